"""bench(): what the adapter costs. An artifact beside its base model, other fuse levels, LoRA and eager PyTorch, in one interleaved run."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from flora_export.artifact import DATA, Artifact, Manifest, open_artifact
from flora_export.backends import load_backend
from flora_export.base_model import BaseModel, load_base
from flora_export.branch import BLOCK_KINDS, Branch
from flora_export.capture import capture
from flora_export.checkpoint import CONFIG, WEIGHTS, Checkpoint, load_checkpoint, tensor_name
from flora_export.errors import ArtifactError, BackendError, FloraExportError
from flora_export.ledger import write_model
from flora_export.passes import fuse_adapter, run_passes
from flora_export.passes.attach_lora import AttachLora, lora_hosts, lora_parameters
from flora_export.verify.arms import Arm, EagerArm, OnnxArm
from flora_export.verify.latency import BASE, Call, environment, interleaved, judge_overhead, summarise

Progress = Callable[[str, int, int], None]  # (what, done, of)

SCHEMA_VERSION = 1
FUSE_LEVELS = {"unfused": "none", "forward": "forward", "backward": "backward"}
ARMS = ("eager", BASE, *FUSE_LEVELS, "fused", "lora", "lora-budget")
DEFAULT_ARMS = ("eager", BASE, "unfused", "fused", "lora")
WARMUP = {"ttft": 2, "tpot": 5, "total": 1}
LEAST_ROUNDS = 3
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
    rounds: int = 60  # of TPOT; TTFT gets a fifth, the total a twelfth
    max_overhead: float | None = None

    def rounds_of(self, metric: str) -> int:
        return self.rounds if metric == "tpot" else max(min(self.rounds, LEAST_ROUNDS), self.rounds // {"ttft": 5, "total": 12}[metric])


@dataclass
class _Bench:
    """What is known while the arms are built and measured."""

    artifact: Artifact
    base: BaseModel
    checkpoint: Checkpoint  # random numbers under the artifact's own configuration
    threads: int
    bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    parameters: dict[str, int] = dataclasses.field(default_factory=dict)
    lora_rank: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def manifest(self) -> Manifest:
        return self.artifact.manifest


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """ "32,128" -> (32, 128). Raises FloraExportError."""
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise FloraExportError(f"{option} {text!r}: expected whole numbers with commas between them, such as 32,128") from error
    if min(numbers) < 1:
        raise FloraExportError(f"{option} {text!r}: must be at least 1")
    return numbers


def share(text: str, option: str) -> float:
    """ "3%" or "0.03" -> 0.03. Raises FloraExportError."""
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
    artifact = open_artifact(out)
    arms = _arms(options)
    base = load_base(base_name or str(artifact.manifest.base["name"]))
    _check(artifact, base, options)
    with tempfile.TemporaryDirectory(prefix="flora-export-bench-") as work, ExitStack() as stack:
        checkpoint = _random_checkpoint(artifact.manifest, base, Path(work) / "adapter")
        run = _Bench(artifact, base, checkpoint, options.threads or os.cpu_count() or 1)
        runners = {}
        for index, arm in enumerate(sorted(arms, key="fused".__ne__)):  # the artifact first: what is wrong with it shows at once
            progress("building arms", index, len(arms))
            runners[arm] = _make_arm(arm, run, Path(work), stack)
        progress("building arms", len(arms), len(arms))
        measurements = list(_measure({arm: runners[arm] for arm in arms}, run, options, progress))
    return _result(arms, run, options, measurements)


def _arms(options: BenchOptions) -> tuple[str, ...]:
    """The arms in the order of ARMS, `base` among them."""
    unknown = [arm for arm in options.arms if arm not in ARMS]
    if unknown:
        raise FloraExportError(f"--arms: {', '.join(map(repr, unknown))} is unknown; there are {', '.join(ARMS)}")
    if options.max_overhead is not None and "fused" not in options.arms:
        raise FloraExportError("--max-overhead judges the arm fused: add it to --arms")
    return tuple(arm for arm in ARMS if arm in options.arms or arm == BASE)


def _check(artifact: Artifact, base: BaseModel, options: BenchOptions) -> None:
    """Refuse what cannot be measured, before anything is built."""
    if artifact.manifest.backend != "onnxruntime":
        raise BackendError(f"{artifact.path} is for {artifact.manifest.backend}, but only onnxruntime artifacts can be measured yet")
    if base.digests != artifact.manifest.base["files"]:
        raise ArtifactError(
            f"{base.path} is not the base model that {artifact.path} was built from: its SHA-256 is another. "
            "Pass that one with --base DIR, or build the artifact again."
        )
    context = base.config.get("max_position_embeddings")
    longest = max(*options.prompt_tokens, options.prompt_tokens[0] + options.new_tokens - 1, max(options.past_tokens) + 1)
    if isinstance(context, int) and longest > context:
        raise FloraExportError(
            f"{longest} tokens are asked for, but the base model's context has {context}: "
            "lower --prompt-tokens, --past-tokens or --new-tokens"
        )


def _random_checkpoint(manifest: Manifest, base: BaseModel, directory: Path) -> Checkpoint:
    """An adapter with the artifact's configuration and random numbers, read as any other: latency does not depend on the numbers."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    tensors = {}
    for block in manifest.blocks:
        branch = Branch(block.block, BLOCK_KINDS[block.block.rpartition(".")[2]], block.activation, block.rank, block.scale)
        for matrix in branch.matrices:
            numbers = rng.standard_normal(branch.shape(matrix, base.width), np.float32)
            tensors[tensor_name(branch, matrix)] = numbers * np.float32(0.02)
    save_file(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(manifest.checkpoint["config"]), encoding="utf-8")
    return load_checkpoint(directory, base)


def _make_arm(arm: str, run: _Bench, work: Path, stack: ExitStack) -> Arm:
    """Build an arm and load it. Its files are removed once they are loaded."""
    manifest, checkpoint = run.manifest, run.checkpoint
    adapter = sum(int(np.prod(b.shape(m, run.base.width))) for b in checkpoint.branches for m in b.matrices)
    run.parameters[arm] = 0 if arm == BASE else adapter
    if arm == "eager":
        eager = EagerArm(run.base, checkpoint, manifest.target, manifest.precision, run.threads)
        stack.callback(eager.close)
        return eager
    if arm == "fused":
        return _load(arm, run.artifact, run)
    captured = capture(run.base, manifest.target, manifest.precision)
    if arm in FUSE_LEVELS:
        fuse_adapter(captured, run.base, checkpoint, FUSE_LEVELS[arm])
    elif arm != BASE:
        hosts = lora_hosts(captured.model, run.base, checkpoint.branches[0].block.rsplit(".", 2)[0])
        same = statistics.mode(branch.rank for branch in checkpoint.branches)
        rank = same if arm == "lora" else max(1, round(adapter / lora_parameters(hosts, 1)))
        run_passes(captured.model, [AttachLora(hosts, rank)])
        run.lora_rank[arm], run.parameters[arm] = rank, lora_parameters(hosts, rank)
    with tempfile.TemporaryDirectory(dir=work) as directory:
        write_model(captured.model, Path(directory))
        return _load(arm, Artifact(Path(directory), dataclasses.replace(manifest, blocks=[], ledger=[])), run)


def _load(arm: str, artifact: Artifact, run: _Bench) -> Arm:
    backend = load_backend(artifact.manifest.backend)
    run.bytes[arm] = (artifact.path / DATA).stat().st_size
    return OnnxArm(backend.Bound(backend.Decoder(artifact, threads=run.threads)))


def _measure(arms: dict[str, Arm], run: _Bench, options: BenchOptions, progress: Progress) -> Iterator[dict[str, Any]]:
    """The rows of the result: every metric at every length and batch."""
    vocabulary = int(run.base.config["vocab_size"])
    rng = np.random.default_rng(0)
    for batch in options.batch:
        series = [("ttft", n) for n in options.prompt_tokens] + [("tpot", n) for n in options.past_tokens]
        for metric, tokens in [*series, ("total", options.prompt_tokens[0])]:
            prompt, new = (rng.integers(min(3, vocabulary - 1), vocabulary, (batch, n)) for n in (tokens, options.new_tokens))
            rounds = options.rounds_of(metric)
            calls = {arm: _call(metric, runner, prompt, new) for arm, runner in arms.items()}
            if "eager" in calls:
                every = max(1, min(EAGER_EVERY, (rounds - 1) // (LEAST_ROUNDS - 1)))  # at least three of them
                calls["eager"] = dataclasses.replace(calls["eager"], every=every, settle=EAGER_SETTLE)
            label = f"measuring {metric}, {tokens} tokens, batch {batch}"
            samples = interleaved(calls, rounds, WARMUP[metric], lambda done, of, label=label: progress(label, done, of))  # type: ignore[misc]
            for arm, summary in summarise(samples).items():
                interval = list(summary.ratio_interval) if summary.ratio_interval else None
                row = {"metric": metric, "tokens": tokens, "batch": batch, "arm": arm, **dataclasses.asdict(summary)}
                yield row | {"ratio_interval": interval}


def _call(metric: str, arm: Arm, prompt: Any, new: Any) -> Call:
    if metric == "ttft":
        return arm.prefill(prompt)
    return arm.step(prompt, new[:, :1]) if metric == "tpot" else arm.generation(prompt, new)


def _result(arms: tuple[str, ...], run: _Bench, options: BenchOptions, measurements: list[dict[str, Any]]) -> dict[str, Any]:
    manifest = run.manifest
    ranks = sorted({block.rank for block in manifest.blocks})
    where = "inputs and outputs stay on the device, and each run is waited for: ONNX Runtime's Python API has no device events"
    return {
        "schema_version": SCHEMA_VERSION,
        "what": (
            f"{run.base.name}, FFBA rank {', '.join(map(str, ranks))}, {manifest.precision}, {manifest.target}, {run.threads} threads; "
            "arms interleaved in one process, so sessions do not spin; the model alone is timed, on given tokens"
            + (f"; {where}" if manifest.target != "cpu" else "")
        ),
        "artifact": {key: getattr(manifest, key) for key in ("fuse", "precision", "target")} | {"rank": ranks, "padding": manifest.padding},
        "arms": list(arms),
        "settings": {
            "prompt_tokens": list(options.prompt_tokens),
            "past_tokens": list(options.past_tokens),
            "new_tokens": options.new_tokens,
            "batch": list(options.batch),
            "rounds": {metric: options.rounds_of(metric) for metric in WARMUP},
            "threads": run.threads,
            "spinning": False,
        },
        "measurements": measurements,
        "bytes_ratio_to_base": {arm: run.bytes[arm] / run.bytes[BASE] for arm in arms if arm in run.bytes},
        "adapter_parameters": {arm: run.parameters[arm] for arm in arms},
        "lora_rank": {arm: run.lora_rank[arm] for arm in arms if arm in run.lora_rank},
        "budget": _budget(options, measurements),
        "environment": environment(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _budget(options: BenchOptions, measurements: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The verdict on TPOT of `fused`, at the first past length and batch."""
    if options.max_overhead is None:
        return None
    row = next(m for m in measurements if (m["metric"], m["arm"]) == ("tpot", "fused"))
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
