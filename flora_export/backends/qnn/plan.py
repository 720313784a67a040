"""What contexts are built for: shapes, a chip, and what proves them. Plain facts, no QNN."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flora_export.artifact import Artifact
from flora_export.backends.tensorrt.plan import MIN_PLACES, parse_cache
from flora_export.errors import ArtifactError, FloraExportError

PROMPT_TOKENS, PLACES = 128, 512  # of prefill, and of the cache; fewer where the model's context is shorter
SOC_MODEL, HTP_ARCH = 69, 79  # Snapdragon 8 Elite, Hexagon v79
HTP_ARCHS = (68, 69, 73, 75, 79, 81)  # QNN ignores another without a word that is seen
SHOWN = 12  # tokens of the prompt that is run in the simulator, where a step takes seconds
SIMULATED = ("positions", "agreeing", "error_at_most", "effect_at_least")  # what the manifest says of a run in the simulator


@dataclass(frozen=True)
class ContextOptions:
    """What the user may say of contexts. `None` where the user was silent."""

    prompt_tokens: int | None = None
    cache_tokens: int | None = None
    soc_model: int | None = None
    htp_arch: int | None = None
    share_weights: bool | None = None
    simulate: bool = True


@dataclass(frozen=True)
class ContextPlan:
    """How an artifact's contexts are built."""

    prompt_tokens: int  # N: what `prefill` takes
    cache_tokens: int  # C: places of the cache
    soc_model: int
    htp_arch: int | None  # None: the chip's own
    share_weights: bool  # one binary for both graphs
    prompt: tuple[int, ...]  # what is run in the simulator

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"prompt": list(self.prompt)}


def _cache(text: str) -> int:
    places = parse_cache(text)
    if not places:
        raise FloraExportError("--kv-cache growing: a context has fixed shapes, so its cache cannot grow. Pass --kv-cache static:N")
    return places


def _as_it_is(value: Any) -> Any:
    return value


def _arch(value: int) -> int:
    if value not in HTP_ARCHS:
        raise FloraExportError(f"--htp-arch {value}: QNN knows {', '.join(map(str, HTP_ARCHS))}. Leave it out for the chip's own")
    return value


# How the command line names an option, what it is in ContextOptions, and how it is read.
_GIVEN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "prompt_tokens": ("prompt_tokens", _as_it_is),
    "kv_cache": ("cache_tokens", _cache),
    "soc_model": ("soc_model", _as_it_is),
    "htp_arch": ("htp_arch", _arch),
    "share_weights": ("share_weights", _as_it_is),
    "simulate": ("simulate", _as_it_is),
}


def read_options(given: Mapping[str, Any]) -> ContextOptions:
    """The options of contexts, from what a user gave by name. Raises FloraExportError where one is unknown or cannot be."""
    for name in given.keys() - _GIVEN.keys():
        raise FloraExportError(f"--{name.replace('_', '-')} is no option of --backend qnn")
    return ContextOptions(**{_GIVEN[name][0]: _GIVEN[name][1](value) for name, value in given.items()})


def choose_shapes(options: ContextOptions, context: int) -> tuple[int, int]:
    """(N, C) for a model that takes `context` tokens. Raises FloraExportError where they cannot be."""
    places = options.cache_tokens or min(PLACES, context)
    if not min(MIN_PLACES, context) <= places <= context:
        raise FloraExportError(f"--kv-cache static:{places}: expected {MIN_PLACES} places to {context}, the model's context")
    tokens = options.prompt_tokens or min(PROMPT_TOKENS, places)
    if not 2 <= tokens <= places:
        raise FloraExportError(f"--prompt-tokens {tokens}: expected 2 to {places}, the places of the cache; `decode` takes one")
    return tokens, places


def choose_chip(options: ContextOptions, soc_model: int = SOC_MODEL, htp_arch: int | None = HTP_ARCH) -> tuple[int, int | None]:
    """(soc model, HTP architecture) to build for; those given as arguments where the options name neither."""
    if options.soc_model is None and options.htp_arch is None:
        return soc_model, htp_arch
    return options.soc_model or soc_model, options.htp_arch


def context_plan(artifact: Artifact) -> ContextPlan:
    """What a manifest says of its contexts. Raises ArtifactError where it does not."""
    engine = artifact.manifest.engine
    try:
        tokens, places, soc_model, arch = (engine[name] for name in ("prompt_tokens", "cache_tokens", "soc_model", "htp_arch"))
        prompt = tuple(engine["prompt"])
        counts = [count for name in ("prefill", "decode") for count in engine["operators"][name].values()]
        numbers = (tokens, places, soc_model, *prompt, *counts, *engine["bytes"].values(), arch or 0)
        if not all(type(number) is int and 0 <= number < 2**31 for number in numbers) or not prompt:
            raise ValueError("numbers that are none")
        if not (2 <= tokens <= places == artifact.manifest.cache_tokens and len(prompt) <= tokens and soc_model > 0):
            raise ValueError(f"{tokens} tokens of a prompt, {places} places")
        vocabulary = artifact.manifest.outputs[0].shape[-1]
        if isinstance(vocabulary, int) and max(prompt) >= vocabulary:
            raise ValueError(f"a token {max(prompt)} of {vocabulary}")
        files = artifact.manifest.files
        sizes = {name: files[name]["bytes"] for name in engine["bytes"] if name in files}
        if files and (sizes != engine["bytes"] or not {"prefill.onnx", "decode.onnx"} <= sizes.keys()):
            raise ValueError("contexts that are not among its files")
        versions, found = engine["versions"], engine["simulated"]
        if not isinstance(versions["onnxruntime-qnn"], str) or not isinstance(versions["QNN"], str):
            raise ValueError("versions that are none")
        if found is not None and not all(isinstance(number, int | float) for number in (found[name] for name in SIMULATED)):
            raise ValueError("a simulation that is none")
        return ContextPlan(tokens, places, soc_model, arch, bool(engine["share_weights"]), prompt)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{artifact.path}: its manifest does not say how its contexts were built ({error}). Build it again.") from error
