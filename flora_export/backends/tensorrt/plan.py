"""What an engine is built for: profiles of shapes, compute capabilities, and the builder's settings. Plain facts, no TensorRT.

A profile bounds three numbers, each as minimum, optimum, maximum: rows of the batch, tokens of one call, and tokens already in the
cache. There are two: `prefill` (any tokens, an empty cache) and `decode` (one token, any cache).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flora_export.artifact import Artifact
from flora_export.backends import Limits
from flora_export.backends.quantizing import QUANTIZING, QuantizationOptions
from flora_export.backends.quantizing import read_options as read_quantization
from flora_export.bank import ADAPTER_IDS
from flora_export.errors import ArtifactError, FloraExportError
from flora_export.manifest import Tensor

DEFAULT_PROMPT = 2048  # tokens, or the model's context where that is shorter
DEFAULT_TOTAL = 4096  # tokens of prompt and answer, likewise
DEFAULT_BATCH = (1, 1, 8)
MIN_PLACES = 32  # of a static cache: a prompt and the steps of verification
FLAVOURS = ("auto", "tensorrt", "rtx")

Range = tuple[int, int, int]  # minimum, optimum, maximum


@dataclass(frozen=True)
class EngineOptions:
    """What the user may say of an engine."""

    flavour: str = "auto"
    compute_capabilities: tuple[str, ...] = ()  # "8.9"; none: the GPU of this machine
    ranges: Mapping[str, Range] = dataclasses.field(default_factory=dict)  # prompt, batch, past
    workspace_mib: int | None = None
    timing_cache: str | None = None
    version_compatible: bool = False
    refittable: bool = False
    compare_base: bool = True  # build the base model's engine too, to count what the adapter adds
    cache: bool = True  # keep engines between builds
    cache_tokens: int = 0  # places of a static KV cache; 0: the cache grows
    quantization: QuantizationOptions = dataclasses.field(default_factory=QuantizationOptions)


@dataclass(frozen=True)
class Profile:
    """Bounds of one optimization profile."""

    name: str
    batch: Range
    tokens: Range
    past: Range

    def shape(self, tensor: Tensor, which: int) -> list[int]:
        """The minimum (0), optimum (1) or maximum (2) shape of a graph input."""
        batch, tokens, past = self.batch[which], self.tokens[which], self.past[which]
        if tensor.name in ("input_ids", "position_ids"):
            return [batch, tokens]
        if tensor.name == "attention_mask":
            return [batch, past + tokens]
        if tensor.name == ADAPTER_IDS:
            return [batch]
        if all(isinstance(size, int) for size in tensor.shape):  # a bank's stack
            return [int(size) for size in tensor.shape]
        _, heads, places, size = tensor.shape
        return [batch, int(heads), places if isinstance(places, int) else past, int(size)]


@dataclass(frozen=True)
class EnginePlan:
    """How an artifact's engine was built."""

    flavour: str
    version: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    workspace_mib: int | None
    version_compatible: bool
    refittable: bool

    @property
    def limits(self) -> Limits:
        prefill, decode = self.profiles
        return Limits(prefill.tokens[2], decode.past[2] + 1, prefill.batch[2])


def read_options(given: Mapping[str, Any]) -> EngineOptions:
    """The options of an engine, from what a user gave by name. Raises FloraExportError where one is unknown or cannot be."""
    known = {name: read(given[name]) for name, (_, read) in _GIVEN.items() if name in given}
    for name in given.keys() - _GIVEN.keys() - set(QUANTIZING):
        raise FloraExportError(f"--{name.replace('_', '-')} is no option of --backend tensorrt")
    quantization = read_quantization({name: given[name] for name in QUANTIZING if name in given})
    return EngineOptions(**{_GIVEN[name][0]: value for name, value in known.items()}, quantization=quantization)


def parse_ranges(texts: Sequence[str]) -> dict[str, Range]:
    """`prompt=1:128:2048 batch=1:1:8` -> ranges by name; a single number stands for all three.

    Raises:
        FloraExportError: an unknown name, or numbers that are no range.
    """
    ranges: dict[str, Range] = {}
    for word in " ".join(texts).split():
        match = re.fullmatch(r"(prompt|batch|past)=(\d{1,9})(?::(\d{1,9}):(\d{1,9}))?", word)
        if match is None:
            raise FloraExportError(f"--profile {word}: expected prompt, batch or past = MIN:OPT:MAX, as in prompt=1:128:2048")
        name, low, best, high = match.groups()
        found = (int(low), int(best or low), int(high or low))
        if name in ranges:
            raise FloraExportError(f"--profile {word}: {name} is given twice")
        if not (0 if name == "past" else 1) <= found[0] <= found[1] <= found[2]:
            raise FloraExportError(f"--profile {word}: expected MIN <= OPT <= MAX, and at least 1")
        ranges[name] = found
    return ranges


def parse_cache(text: str) -> int:
    """`growing` -> 0, `static:N` -> N places. Raises FloraExportError for anything else."""
    match = re.fullmatch(r"growing|static:(\d{2,7})", text)
    if match is None:
        raise FloraExportError(f"--kv-cache {text!r}: expected growing, or static:N with N the number of tokens that the cache holds")
    return int(match.group(1) or 0)


def parse_capabilities(text: str | None) -> tuple[str, ...]:
    """`8.6,8.9` -> ("8.6", "8.9"); none where there is no text. Raises FloraExportError where one is no number of that form."""
    words = tuple(word.strip() for word in text.split(",")) if text else ()
    for word in words:
        if not re.fullmatch(r"\d{1,2}\.\d", word):
            raise FloraExportError(f"--compute-capability {word!r}: expected a number such as 8.9")
    return tuple(dict.fromkeys(words))


def _as_it_is(value: Any) -> Any:
    return value


# How the command line names an option, what it is in EngineOptions, and how it is read.
_GIVEN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "trt_flavor": ("flavour", _as_it_is),
    "compute_capability": ("compute_capabilities", parse_capabilities),
    "profile": ("ranges", parse_ranges),
    "kv_cache": ("cache_tokens", parse_cache),
    "workspace": ("workspace_mib", _as_it_is),
    "timing_cache": ("timing_cache", _as_it_is),
    "version_compatible": ("version_compatible", _as_it_is),
    "refittable": ("refittable", _as_it_is),
    "compare_base": ("compare_base", _as_it_is),
    "engine_cache": ("cache", _as_it_is),
}


def profiles_for(ranges: Mapping[str, Range], context: int, cache_tokens: int) -> tuple[Profile, Profile]:
    """The profiles of prefill and of decode.

    Args:
        context: tokens that the model takes.
        cache_tokens: places of a static cache; 0 where it grows.

    Raises:
        FloraExportError: a range is beyond the context or the cache, or too narrow to decode what it can prefill.
    """
    if cache_tokens and not MIN_PLACES <= cache_tokens <= context:
        raise FloraExportError(f"--kv-cache static:{cache_tokens}: expected {MIN_PLACES} places to {context}, the model's context")
    room = cache_tokens or context
    longest = ranges["prompt"][2] if "prompt" in ranges else min(DEFAULT_PROMPT, room)
    prompt = ranges.get("prompt", (1, min(128, longest), longest))
    most = min(room, cache_tokens or max(DEFAULT_TOTAL, 2 * longest)) - 1
    past = ranges.get("past", (1, min(max(256, prompt[1]), most), most))
    batch = ranges.get("batch", DEFAULT_BATCH)
    for name, bounds, limit in (("prompt", prompt, room), ("past", past, room - 1), ("batch", batch, batch[2])):
        if bounds[2] > limit:
            what = f"a static cache of {cache_tokens} places" if cache_tokens else f"a context of {context} tokens"
            raise FloraExportError(f"--profile {name} goes up to {bounds[2]}, but {what} has room for {limit}")
        if bounds[0] > 1:
            raise FloraExportError(
                f"--profile {name} begins at {bounds[0]}, but every artifact must take a single token in a single row: begin at 1"
            )
    if past[2] < min(prompt[2], room - 1):
        raise FloraExportError(f"--profile past goes up to {past[2]}, so a prompt of {prompt[2]} tokens has no next token: raise it")
    return Profile("prefill", batch, prompt, (0, 0, 0)), Profile("decode", batch, (1, 1, 1), past)


def check_prompts(profiles: Sequence[Profile], prompts: Sequence[Sequence[int]], steps: int) -> None:
    """Raise FloraExportError where an engine with these profiles could not replay prompts, with cached steps after each."""
    prefill, decode = profiles
    longest = max(map(len, prompts))
    for name, most, needed in (("prompt", prefill.tokens[2], longest), ("past", decode.past[2], longest + steps - 1)):
        if needed > most:
            raise FloraExportError(
                f"--profile {name} goes up to {most}, but the golden prompts, which every artifact must replay, have up to {longest} "
                f"tokens and {steps} steps, and need {needed}"
            )


def to_json(profiles: Sequence[Profile]) -> dict[str, Any]:
    return {p.name: {"batch": list(p.batch), "tokens": list(p.tokens), "past": list(p.past)} for p in profiles}


def engine_plan(artifact: Artifact) -> EnginePlan:
    """What a manifest says of its engine. Raises ArtifactError where it does not."""

    def bounds(values: Any) -> Range:
        low, best, high = values
        if not all(isinstance(value, int) for value in values):
            raise ValueError(f"a profile of {values}")
        return low, best, high

    engine = artifact.manifest.engine
    try:
        known = sorted(engine["profiles"].items(), reverse=True)  # JSON has no order of its own: prefill, decode
        profiles = tuple(Profile(name, *(bounds(v[key]) for key in ("batch", "tokens", "past"))) for name, v in known)
        if [profile.name for profile in profiles] != ["prefill", "decode"] or engine["flavour"] not in FLAVOURS[1:]:
            raise ValueError(f"{engine['flavour']}: {', '.join(profile.name for profile in profiles)}")
        layers = engine["layers"]
        for counts in (layers["adapted"], layers["base"] or layers["adapted"]):
            if not all(isinstance(counts[key][profile], int) for key in ("kernels", "gemms") for profile in ("prefill", "decode")):
                raise ValueError("counts of layers that are no numbers")
        if not isinstance(engine["version"], str) or not all(isinstance(name, str) for name in layers["adapter_gemms_alone"]):
            raise ValueError("a version or layer that is no text")
        workspace = engine["workspace_mib"]
        return EnginePlan(
            engine["flavour"],
            engine["version"],
            tuple(str(capability) for capability in engine["compute_capabilities"]),
            profiles,
            None if workspace is None else int(workspace),
            bool(engine["version_compatible"]),
            bool(engine["refittable"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{artifact.path}: its manifest does not say how its engine was built ({error}). Build it again.") from error
