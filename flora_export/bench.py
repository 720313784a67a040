"""bench(): what the adapter costs. An artifact beside its base model, other fuse levels, LoRA and eager PyTorch, in one interleaved run."""

from __future__ import annotations

import dataclasses
import gc
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flora_export.artifact import Artifact, open_artifact
from flora_export.backends import backend_of
from flora_export.base_model import BaseModel, load_base
from flora_export.errors import ArtifactError, FloraExportError
from flora_export.manifest import Manifest
from flora_export.methods import named_base
from flora_export.scratch import Scratch
from flora_export.verify.arms import Arm, EagerArm, OnnxArm
from flora_export.verify.build_arms import ARMS, BANK, BANK_ARMS, EAGER, FUSED, Built, build_arm, random_checkpoint
from flora_export.verify.latency import BASE, Call, Samples, environment, interleaved, joined, judge_overhead, summarise
from flora_export.verify.pages import gather

Progress = Callable[[str, int, int], None]  # (what, done, of)
Series = tuple[str, int, int]  # metric, tokens, batch

SCHEMA_VERSION = 1
DEFAULT_ARMS = (EAGER, BASE, "unfused", FUSED, "lora")
LOADS = 3  # how often the arms are loaded anew, each time in another order
SHARES = {"ttft": 5, "tpot": 1, "total": 12}  # the rounds of TPOT for one round of each
WARMUP = {"ttft": 2, "tpot": 5, "total": 1}  # of each load
# Eager, the slowest, takes part in every fourth round at most. PyTorch's threads spin for a while after their work: what comes next
# waits for them.
EAGER_EVERY, EAGER_SETTLE = 4, 0.01


@dataclass(frozen=True)
class BenchOptions:
    arms: tuple[str, ...] = DEFAULT_ARMS
    prompt_tokens: tuple[int, ...] = (128,)
    past_tokens: tuple[int, ...] = (128,)
    new_tokens: int = 32
    batch: tuple[int, ...] = (1,)
    threads: int = 0  # 0: all cores
    rounds: int = 60  # of TPOT, over all loads
    max_overhead: float | None = None

    @property
    def loads(self) -> int:
        return min(LOADS, self.rounds)

    def rounds_per_load(self, metric: str) -> int:
        return -(-self.rounds // (SHARES[metric] * self.loads))


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """Read "32,128" as (32, 128). Raises FloraExportError."""
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise FloraExportError(f"{option} {text!r}: expected whole numbers with commas between them, such as 32,128") from error
    if min(numbers) < 1:
        raise FloraExportError(f"{option} {text!r}: must be at least 1")
    return numbers


def share(text: str, option: str) -> float:
    """Read "3%" or "0.03" as 0.03. Raises FloraExportError."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise FloraExportError(f"{option} {text!r}: expected a share such as 3% or 0.03") from error
    if not 0 <= value < 1:
        raise FloraExportError(f"{option} {text!r}: must be at least 0 and below 1 (100 %); write 3% or 0.03")
    return value


def bench(out: Path, base_name: str | None, options: BenchOptions, progress: Progress) -> dict[str, Any]:
    """Measure the artifact `out` and the arms beside it. Returns the result; `_result` lists its keys.

    Arms but for `out` itself are built from the base model into a temporary directory, for the artifact's target and precision.

    Raises:
        FloraExportError: an unknown arm, numbers beyond the model's context, or another base model than the artifact's.
    """
    artifact = _with_adapter(open_artifact(out))
    manifest, arms, threads = artifact.manifest, _arms(options, artifact.manifest), options.threads or os.cpu_count() or 1
    base = load_base(base_name or named_base(manifest.checkpoint["config"]) or str(manifest.base["name"]))
    backend_of(artifact).timed(artifact, threads)  # what is wrong with it shows before anything is built
    _check(artifact, base, options)
    with Scratch("flora-export-bench-") as work, ExitStack() as stack:
        checkpoint = random_checkpoint(manifest, base, Path(work) / "adapter") if manifest.blocks and manifest.merge else None
        built = {}
        for index, arm in enumerate(arms):
            progress("building arms", index, len(arms))
            built[arm] = build_arm(arm, artifact, base, checkpoint, Path(work) / arm)
        progress("building arms", len(arms), len(arms))
        eager = None
        if EAGER in arms and checkpoint is not None:
            eager = EagerArm(base, checkpoint, manifest.target, manifest.compute, threads)
            stack.callback(eager.close)
        measurements = measure(built, eager, options, threads, base.vocabulary, progress)
        sizes = {arm: size for arm in arms if (size := built[arm].bytes) is not None}
    return _result(artifact, base, built, sizes, options, threads, measurements)


def _arms(options: BenchOptions, manifest: Manifest) -> tuple[str, ...]:
    """The arms in the order of ARMS, `base` among them.

    Of an adapter that is merged into the base's weights there are two, of a bank those that stand for what a server could do instead.
    """
    unknown = [arm for arm in options.arms if arm not in ARMS]
    if unknown:
        raise FloraExportError(f"--arms: {', '.join(map(repr, unknown))} is unknown; there are {', '.join(ARMS)}")
    if manifest.bank is not None:
        chosen = BANK_ARMS if options.arms == DEFAULT_ARMS else options.arms
        if others := [arm for arm in chosen if arm not in BANK_ARMS]:
            raise FloraExportError(f"--arms {', '.join(others)}: the artifact is a bank, whose arms are {', '.join(BANK_ARMS)}")
        if not manifest.merge:
            raise FloraExportError("a bank of LoRAs cannot be measured yet: `bench` builds arms of FFBA alone")
        if options.max_overhead is not None and BANK not in chosen:
            raise FloraExportError("--max-overhead judges the arm bank: add it to --arms")
        return tuple(arm for arm in BANK_ARMS if arm in chosen or arm == BASE)
    if options.max_overhead is not None and FUSED not in options.arms:
        raise FloraExportError("--max-overhead judges the arm fused: add it to --arms")
    if manifest.changes or not manifest.merge:
        others = [arm for arm in options.arms if arm not in (BASE, FUSED)]
        if others and options.arms != DEFAULT_ARMS:
            raise FloraExportError(
                f"--arms {', '.join(others)}: the adapter is merged into the base's own weights, or beside them, and other levels are "
                f"built of FFBA alone. Its arms are {BASE}, {FUSED}."
            )
        return BASE, FUSED
    return tuple(arm for arm in ARMS if arm in options.arms or arm == BASE)


def _with_adapter(artifact: Artifact) -> Artifact:
    """Of a bank, with its first adapter for all rows: the work is the same whichever they have."""
    bank = artifact.manifest.bank
    return artifact if bank is None else dataclasses.replace(artifact, slot=min(bank.taken.values()))


def _check(artifact: Artifact, base: BaseModel, options: BenchOptions) -> None:
    """Refuse what cannot be measured, before anything is built."""
    if base.digests != artifact.manifest.base["files"]:
        raise ArtifactError(
            f"{base.path} is not the base model that {artifact.path} was built from: its SHA-256 is another. "
            "Pass that one with --base DIR, or build the artifact again."
        )
    longest = max(*options.prompt_tokens, options.prompt_tokens[0] + options.new_tokens - 1, max(options.past_tokens) + 1)
    if longest > base.context:
        raise FloraExportError(
            f"{longest} tokens are asked for, but the base model's context has {base.context}: "
            "lower --prompt-tokens, --past-tokens or --new-tokens"
        )


def measure(
    built: Mapping[str, Built], eager: EagerArm | None, options: BenchOptions, threads: int, vocabulary: int, progress: Progress
) -> list[dict[str, Any]]:
    """Time all arms, interleaved, over several loads. Returns a row for each metric, length, batch and arm, beside the arm `base`."""
    loads: dict[Series, list[Samples]] = defaultdict(list)
    for load in range(options.loads):
        for series, samples in _measure_load(load, built, eager, options, threads, vocabulary, progress):
            loads[series].append(samples)
        gc.collect()  # its sessions make room for the next
    return [row for series, samples in loads.items() for row in _rows(series, samples)]


def _measure_load(
    load: int, built: Mapping[str, Built], eager: EagerArm | None, options: BenchOptions, threads: int, vocabulary: int, progress: Progress
) -> Iterator[tuple[Series, Samples]]:
    """Load every arm, each time in another order, and time every metric at every length and batch."""
    names = [arm for arm, each in built.items() if each.artifact is not None]
    order = (names, names[::-1], names[len(names) // 2 :] + names[: len(names) // 2])[load % LOADS]
    where = f"load {load + 1} of {options.loads}"
    runners: dict[str, Arm] = {} if eager is None else {EAGER: eager}
    for index, arm in enumerate(order):
        progress(f"{where}: loading arms", index, len(order))
        artifact = built[arm].artifact
        assert artifact is not None
        runners[arm] = OnnxArm(backend_of(artifact).timed(artifact, threads))
    gather()
    progress(f"{where}: loading arms", len(order), len(order))
    rng = np.random.default_rng(0)
    for batch in options.batch:
        lengths = [("ttft", n) for n in options.prompt_tokens] + [("tpot", n) for n in options.past_tokens]
        for metric, tokens in [*lengths, ("total", options.prompt_tokens[0])]:
            prompt, new = (rng.integers(min(3, vocabulary - 1), vocabulary, (batch, n)) for n in (tokens, options.new_tokens))
            rounds = options.rounds_per_load(metric)
            calls = {arm: _call(metric, runners[arm], prompt, new) for arm in built}
            if EAGER in calls:
                calls[EAGER] = dataclasses.replace(calls[EAGER], every=min(EAGER_EVERY, rounds), settle=EAGER_SETTLE)
                if load == 0 and metric != "total":  # it stays loaded, and one warm-up is enough for it
                    calls[EAGER].run(calls[EAGER].prepare())
            label = f"{where}: {metric}, {tokens} tokens, batch {batch}"
            samples = interleaved(calls, rounds, WARMUP[metric], lambda done, of, label=label: progress(label, done, of), load)  # type: ignore[misc]
            yield (metric, tokens, batch), samples


def _call(metric: str, arm: Arm, prompt: Any, new: Any) -> Call:
    if metric == "ttft":
        return arm.prefill(prompt)
    return arm.step(prompt, new[:, :1]) if metric == "tpot" else arm.generation(prompt, new)


def _result(
    artifact: Artifact,
    base: BaseModel,
    built: Mapping[str, Built],
    sizes: Mapping[str, int],
    options: BenchOptions,
    threads: int,
    measurements: list[dict[str, Any]],
) -> dict[str, Any]:
    manifest = artifact.manifest
    ranks = sorted({block.rank for block in manifest.blocks} | {change.rank for change in manifest.changes if change.rank})
    method = manifest.checkpoint["config"].get("peft_type")
    what = (
        f"{base.name}, {method} rank {', '.join(map(str, ranks))}, {manifest.precision}, {manifest.target}, {threads} threads; "
        f"arms interleaved in one process, so sessions do not spin, and loaded {options.loads} times; "
        "the model alone is timed, on given tokens"
    )
    if manifest.target == "cuda":
        what += "; inputs and outputs stay on the device, and each run is waited for: ONNX Runtime's Python API has no device events"
    return {
        "schema_version": SCHEMA_VERSION,
        "what": what,
        "artifact": {key: getattr(manifest, key) for key in ("fuse", "precision", "target")} | {"rank": ranks, "padding": manifest.padding},
        "arms": list(built),
        "settings": {
            "prompt_tokens": list(options.prompt_tokens),
            "past_tokens": list(options.past_tokens),
            "new_tokens": options.new_tokens,
            "batch": list(options.batch),
            "rounds": {metric: options.loads * options.rounds_per_load(metric) for metric in SHARES},
            "threads": threads,
            "spinning": False,
        },
        "measurements": measurements,
        "bytes_ratio_to_base": {arm: size / sizes[BASE] for arm, size in sizes.items()},
        "adapter_parameters": {arm: each.parameters for arm, each in built.items()},
        "lora_rank": {arm: each.lora_rank for arm, each in built.items() if each.lora_rank is not None},
        "budget": _budget(options, measurements),
        "environment": environment(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _rows(series: Series, loads: list[Samples]) -> Iterator[dict[str, Any]]:
    metric, tokens, batch = series
    for arm, summary in summarise(joined(loads), len(loads)).items():
        row = {"metric": metric, "tokens": tokens, "batch": batch, "arm": arm, **dataclasses.asdict(summary)}
        yield row | {"ratio_interval": list(summary.ratio_interval) if summary.ratio_interval else None}


def _budget(options: BenchOptions, measurements: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The verdict on TPOT of `fused`, at the first past length and batch."""
    if options.max_overhead is None:
        return None
    row = next(m for m in measurements if m["metric"] == "tpot" and m["arm"] in (FUSED, BANK))
    judged = judge_overhead(row["ratio_interval"], options.max_overhead)
    return {
        "max_overhead": options.max_overhead,
        "metric": "tpot",
        "tokens": row["tokens"],
        "batch": row["batch"],
        "ratio": row["ratio_to_base"],
        "interval": row["ratio_interval"],
        "verdict": judged.verdict,
        "message": judged.message,
    }
