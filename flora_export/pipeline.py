"""build() and verify(): the story on one screen. Data walks one way, from checkpoint to artifact."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_export.artifact import REPORT, Artifact, open_artifact, seal, staged, writing
from flora_export.backends import capture_form, default_align, load_backend
from flora_export.base_model import BaseModel, load_base
from flora_export.capture import capture
from flora_export.checkpoint import CONFIG, Checkpoint, load_checkpoint, read_config
from flora_export.errors import ArtifactError, BackendError, CheckpointError, VerificationError
from flora_export.explain import Explanation
from flora_export.ledger import block_records, check_ledger, load_graph, planned_entries
from flora_export.passes import fuse_adapter, operator_counts
from flora_export.verify.coverage import STEPS
from flora_export.verify.golden import PROMPT_COUNT, replay
from flora_export.verify.parity import environment, first_divergence, longest_prompt, open_runner, verify_numerics
from flora_export.verify.prompts import encode_prompts
from flora_export.verify.report import Report

Progress = Callable[[str, int, int], None]  # (what, done, of)


@dataclass(frozen=True)
class BuildOptions:
    backend: str = "onnxruntime"
    target: str | None = None  # None: the backend's own first
    precision: str = "fp32"
    fuse: str = "both"
    verify: bool = True
    allow_vacuous: bool = False
    force: bool = False
    align: int | None = None  # None: the backend's own
    cache_tokens: int = 0  # places of a static KV cache; 0: the cache grows
    engine: Any = None  # options of a backend that compiles; None: its own


@dataclass(frozen=True)
class VerifyOptions:
    allow_vacuous: bool = False
    prompts: Path | None = None  # a file of prompts, one a line, instead of those that ship
    golden: bool = False  # record golden vectors
    localise: bool = False  # name the first block that diverges even where all is right


def load_sources(ckpt: Path, base_name: str | None) -> tuple[BaseModel, Checkpoint]:
    """The adapter and its base model, both checked. Without `base_name` it is the one that the adapter names."""
    name = base_name or read_config(ckpt).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{ckpt}: the adapter names no base model. Pass --base DIR.")
    base = load_base(name)
    return base, load_checkpoint(ckpt, base)


def build(ckpt: Path, base_name: str | None, output: Path, options: BuildOptions, progress: Progress) -> tuple[Artifact, Report]:
    """Checkpoint and base model -> artifact. The output appears whole and verified, or stays as it was.

    Without `options.verify` the report holds the ledger's check alone, and the manifest says that nothing else was verified.

    Raises:
        FloraExportError: its subclasses say what failed; `VerificationError` carries the causes.
    """
    with staged(output, force=options.force) as directory:
        progress("reading the checkpoint", 0, 1)
        base, checkpoint = load_sources(ckpt, base_name)
        backend = load_backend(options.backend)
        target, form = capture_form(options.backend, options.target)
        more: dict[str, Any] = {}
        if hasattr(backend, "prepare"):  # it compiles
            prompts, _ = encode_prompts(base.path, base.vocabulary, longest_prompt(base, options.cache_tokens))
            plan = backend.prepare(options.engine, base, options.cache_tokens, prompts[:PROMPT_COUNT], STEPS)
            more = {"plan": plan, "stage": lambda what: progress(what, 0, 1)}
        progress("capturing the base model", 0, 1)
        captured = capture(base, form, options.precision)
        progress("fusing", 0, 1)
        align = default_align(options.backend, options.precision) if options.align is None else options.align
        fused = fuse_adapter(captured, base, checkpoint, options.fuse, align=align, cache_tokens=options.cache_tokens)
        with writing(output):
            manifest = backend.write(fused, directory, target, lambda done, of: progress("writing", done, of), **more)
        del captured, fused  # the weights: what comes next needs the room
        gc.collect()  # mobius's package refers to itself
        artifact = Artifact(directory, dataclasses.replace(manifest, verified=options.verify))
        report: Report | None = None
        if options.verify:
            report = verify_numerics(
                artifact, base, checkpoint, prompt_file=None, allow_vacuous=options.allow_vacuous, golden=True, progress=progress
            )
        with writing(output):
            artifact = seal(directory, artifact.manifest)
        progress("checking the ledger", 0, 1)
        ledger = check_ledger(artifact, checkpoint, base)
        report = dataclasses.replace(report, ledger=ledger) if report is not None else Report(ledger)
        if report.numerics is not None and report.numerics.causes:
            report.first_divergence = first_divergence(artifact, base, checkpoint, progress)
        if report.causes:
            raise VerificationError(report.to_text(), report.to_dict())
        with writing(output):
            (directory / REPORT).write_text(report.to_json(), encoding="utf-8")
    return Artifact(output, artifact.manifest), report


def verify(path: Path, ckpt: Path | None, base_name: str | None, options: VerifyOptions, progress: Progress) -> Report:
    """Check an artifact: its files and ledger always; its numbers against eager PyTorch with `ckpt`, else against its golden vectors.

    Raises:
        FloraExportError: something cannot be read or run. A failed check is no error: the report tells.
    """
    artifact = open_artifact(path)
    if ckpt is None:
        progress("checking the ledger", 0, 1)
        report = Report(check_ledger(artifact), environment=environment())
        if not report.ledger.faults:
            progress("replaying golden vectors", 0, 1)
            runner = open_runner(artifact)
            report.replay_faults = replay(artifact, runner)
            report.environment = environment(runner)
    else:
        base, checkpoint = load_sources(ckpt, base_name)
        progress("checking the ledger", 0, 1)
        ledger = check_ledger(artifact, checkpoint, base)
        try:
            report = verify_numerics(
                artifact,
                base,
                checkpoint,
                prompt_file=options.prompts,
                allow_vacuous=options.allow_vacuous,
                golden=options.golden,
                progress=progress,
            )
        except (ArtifactError, BackendError) as error:
            if not ledger.faults:
                raise
            ledger.faults.append(f"it does not run: {error}")  # damaged as the faults before it say
            report = Report(ledger, environment=environment())
        report.ledger = ledger
        if options.localise or (report.numerics is not None and report.numerics.causes):
            report.first_divergence = first_divergence(artifact, base, checkpoint, progress)
    return report


def explain(path: Path, base_name: str | None, fuse: str, progress: Progress) -> Explanation:
    """The ledger of an artifact, checked; or, for a checkpoint, the plan: what a build for the CPU would do with each branch.

    Raises:
        FloraExportError: it is neither, or it cannot be read.
    """
    if not (path / CONFIG).is_file():
        artifact = open_artifact(path)
        progress("checking the ledger", 0, 1)
        manifest, report = artifact.manifest, check_ledger(artifact)
        gemms = []
        if manifest.backend == "tensorrt":
            from flora_export.backends.tensorrt import read_gemms
            from flora_export.backends.tensorrt.plan import engine_plan

            engine_plan(artifact)  # it is sound
            gemms = read_gemms(artifact)
        return Explanation(manifest.blocks, manifest.operators, manifest.ledger, report, manifest.align, manifest.engine, gemms)
    base, checkpoint = load_sources(path, base_name)
    progress("capturing the base model", 0, 1)
    fused = fuse_adapter(capture(base, "cpu", "fp32"), base, checkpoint, fuse)
    operators = {"before": fused.operators_before, "after": operator_counts(fused.model)}
    return Explanation(block_records(fused), operators, planned_entries(fused.model))


def lint_for_tensorrt(path: Path, base_name: str | None, fuse: str, progress: Progress) -> list[str]:
    """What TensorRT would refuse, drop or get wrong in an artifact's graph, or in the one that it would be given of a checkpoint.

    Raises:
        FloraExportError: it is neither, or it cannot be read.
    """
    from flora_export.backends.tensorrt.lint import lint

    if not (path / CONFIG).is_file():
        return lint(load_graph(open_artifact(path)))
    base, checkpoint = load_sources(path, base_name)
    progress("capturing the base model", 0, 1)
    graphs = [fuse_adapter(capture(base, "tensorrt", precision), base, checkpoint, fuse).model for precision in ("fp16", "fp32")]
    return list(dict.fromkeys(fault for graph in graphs for fault in lint(graph)))
