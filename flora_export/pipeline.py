"""build() and verify(): the story on one screen. Data walks one way, from checkpoint to artifact."""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flora_export.artifact import REPORT, SIGNATURE, Artifact, open_artifact, seal, staged, writing
from flora_export.backends import Backend, Plan, Progress, backend_of, load_backend
from flora_export.base_model import BaseModel
from flora_export.capture import capture
from flora_export.checkpoint import CONFIG, Checkpoint
from flora_export.errors import ArtifactError, BackendError, FloraExportError, VerificationError
from flora_export.explain import Explanation
from flora_export.ledger import block_records, change_records, load_graph, planned_entries
from flora_export.methods import load_bank, load_sources
from flora_export.methods.bank import BankOptions
from flora_export.passes import Fused, fuse_adapter, operator_counts
from flora_export.proof import check_ledger
from flora_export.trust.signature import Key, signing_with, write_signature
from flora_export.trust.statement import statement
from flora_export.verify.bank import verify_bank
from flora_export.verify.parity import VerifyOptions, environment, first_divergence, golden_prompts, replayed, verify_numerics
from flora_export.verify.report import Report


@dataclass(frozen=True)
class BuildOptions:
    backend: str = "onnxruntime"
    target: str | None = None  # None: the backend's own first
    precision: str = "fp32"
    fuse: str = "both"
    verify: bool = True
    allow_vacuous: bool = False
    force: bool = False
    merge: bool = True  # low-rank changes into the base's weights; else they stay beside them
    align: int | None = None  # None: the backend's own
    max_quantization_loss: float | None = None  # nats per token; None: whatever it costs
    weighted: tuple[tuple[Path, float], ...] = ()  # several LoRAs as one, the checkpoint the first of them; empty: it alone
    bank: BankOptions | None = None  # several adapters that stay apart, the checkpoint the first of them
    settings: Any = None  # the backend's own options, as its `options` makes them; None: their defaults
    quick: bool = False  # verify on the prompts together alone
    sign: Key | None = None  # what the output is signed with

    @property
    def parameters(self) -> dict[str, Any]:
        """What the output depends on, as JSON for its provenance; `reproduce` reads it. Adapters are there by their digests."""
        apart = ("force", "weighted", "bank", "settings", "sign")
        said = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in apart}
        bank = None if self.bank is None else {"layout": self.bank.layout, "slots": self.bank.slots}
        names = [] if self.bank is None else [name for name, _ in self.bank.members]
        return said | {"weights": [w for _, w in self.weighted], "bank": bank, "names": names, "settings": _chosen(self.settings)}


def _chosen(settings: Any) -> dict[str, Any]:
    """A backend's options where they are not its defaults. Where a cache is kept changes nothing, and is this machine's own."""
    silent = settings if settings is None else type(settings)()
    chosen = {}
    for name in () if settings is None else [f.name for f in dataclasses.fields(settings) if f.name not in ("timing_cache", "cache")]:
        value = getattr(settings, name)
        if value != getattr(silent, name):
            chosen[name] = _chosen(value) if dataclasses.is_dataclass(value) else value
    return chosen


@dataclass(frozen=True)
class Prepared:
    """A build up to where the weights are read: those of the graph are lazy."""

    base: BaseModel
    checkpoint: Checkpoint
    backend: Backend
    plan: Plan
    fused: Fused


def prepare(ckpt: Path, base_name: str | None, options: BuildOptions, progress: Progress) -> Prepared:
    """Checkpoint and base model -> fused graph. What can be refused without the base's weights is refused here. Raises FloraExportError."""
    progress("reading the checkpoint", 0, 1)
    if options.bank is None:
        base, checkpoint = load_sources(ckpt, base_name, merge=options.merge, weighted=options.weighted)
    else:
        bank, members = options.bank, dict(enumerate(options.bank.members))
        layout = partial(bank.layout_for, precision=options.precision)
        base, checkpoint = load_bank(members, base_name, layout, bank.slots or len(members))
    backend, golden = load_backend(options.backend), golden_prompts(base)
    if checkpoint.bank is not None and not backend.banks:
        raise FloraExportError(f"--backend {options.backend} takes one adapter; a bank is built for onnxruntime, triton and tensorrt")
    plan = backend.prepare(base, options.target, options.precision, options.align, options.settings, golden)
    progress("capturing the base model", 0, 1)
    quantization = plan.quantization
    captured = capture(base, plan.form, options.precision if quantization is None else quantization.compute)
    progress("fusing", 0, 1)
    fused = fuse_adapter(
        captured, base, checkpoint, options.fuse, align=plan.align, cache_tokens=plan.cache_tokens, quantization=quantization
    )
    return Prepared(base, checkpoint, backend, plan, fused)


def build(ckpt: Path, base_name: str | None, output: Path, options: BuildOptions, progress: Progress) -> tuple[Artifact, Report]:
    """Checkpoint and base model -> artifact. The output appears whole and verified, or stays as it was.

    Without `options.verify` the report holds the ledger's check alone, and the manifest says that nothing else was verified.

    Raises:
        FloraExportError: its subclasses say what failed; `VerificationError` carries the causes.
    """
    signing = None if options.sign is None else signing_with(options.sign)  # a key that is none is said before the work
    with staged(output, force=options.force) as directory:
        prepared = prepare(ckpt, base_name, options, progress)
        base, checkpoint = prepared.base, prepared.checkpoint
        with writing(output):
            manifest = prepared.backend.write(prepared.fused, directory, prepared.plan, progress)
        del prepared  # the weights: what comes next needs the room
        gc.collect()  # mobius's package refers to itself
        artifact, report = Artifact(directory, dataclasses.replace(manifest, verified=options.verify)), None
        if options.verify:
            report = (verify_numerics if checkpoint.bank is None else verify_bank)(
                artifact,
                base,
                checkpoint,
                VerifyOptions(options.allow_vacuous, golden=True, max_quantization_loss=options.max_quantization_loss, quick=options.quick),
                progress,
            )
        with writing(output):
            artifact = seal(directory, artifact.manifest, partial(statement, parameters=options.parameters))
        progress("checking the ledger", 0, 1)
        ledger = check_ledger(artifact, checkpoint, base)
        checkpoint.check_unchanged()
        report = dataclasses.replace(report, ledger=ledger) if report is not None else Report(ledger)
        if report.numerics is not None and report.numerics.causes and checkpoint.bank is None:
            report.first_divergence = first_divergence(artifact, base, checkpoint, progress)
        if report.causes:
            raise VerificationError(report.to_text(), report.to_dict())
        with writing(output):
            (directory / REPORT).write_text(report.to_json(), encoding="utf-8")
            if signing is not None:
                write_signature(directory, signing, directory / SIGNATURE)
    return Artifact(output, artifact.manifest), report


def verify(path: Path, ckpt: Path | None, base_name: str | None, options: VerifyOptions, progress: Progress) -> Report:
    """Check an artifact: its files and ledger always; its numbers against eager PyTorch with `ckpt`, else against its golden vectors.

    Raises:
        FloraExportError: something cannot be read or run. A failed check is no error: the report tells.
    """
    artifact = open_artifact(path)
    if ckpt is None:
        progress("checking the ledger", 0, 1)
        return replayed(artifact, check_ledger(artifact), progress)
    base, checkpoint = _sources_of(artifact, ckpt, base_name, options)
    progress("checking the ledger", 0, 1)
    ledger = check_ledger(artifact, checkpoint, base)
    try:
        report = (verify_numerics if checkpoint.bank is None else verify_bank)(artifact, base, checkpoint, options, progress)
    except (ArtifactError, BackendError) as error:
        if not ledger.faults:
            raise
        ledger.faults.append(f"it does not run: {error}")  # damaged as the faults before it say
        report = Report(ledger, environment=environment())
    report.ledger = ledger
    if checkpoint.bank is None and (options.localise or (report.numerics is not None and report.numerics.causes)):
        report.first_divergence = first_divergence(artifact, base, checkpoint, progress)
    return report


def _sources_of(artifact: Artifact, ckpt: Path, base_name: str | None, options: VerifyOptions) -> tuple[BaseModel, Checkpoint]:
    """The base model and the adapter, or adapters, that an artifact is compared with. Raises FloraExportError."""
    bank, paths = artifact.manifest.bank, (ckpt, *options.others)
    if len(paths) != (1 if bank is None else len(bank.taken)):
        raise FloraExportError(
            f"{artifact.path} holds {1 if bank is None else len(bank.taken)} adapters"
            + ("" if bank is None else f" ({', '.join(bank.taken)})")
            + f", but {len(paths)} were given: pass --ckpt once for each, in that order"
        )
    if bank is None:
        return load_sources(ckpt, base_name, merge=artifact.manifest.merge, weighted=options.weighted)
    members = {slot: (name, path) for (name, slot), path in zip(bank.taken.items(), paths, strict=True)}
    return load_bank(members, base_name, lambda _: bank.layout, bank.slots)


def explain(path: Path, base_name: str | None, fuse: str, progress: Progress, *, merge: bool = True) -> Explanation:
    """The ledger of an artifact, checked; or, for a checkpoint, the plan: what a build for the CPU would do with each branch.

    Raises:
        FloraExportError: it is neither, or it cannot be read.
    """
    if not (path / CONFIG).is_file():
        artifact = open_artifact(path)
        progress("checking the ledger", 0, 1)
        manifest, report = artifact.manifest, check_ledger(artifact)
        details, lines = backend_of(artifact).explain(artifact)
        found = (manifest.blocks, manifest.changes, manifest.operators, manifest.ledger, report, manifest.align, manifest.bank)
        return Explanation(*found, details, lines)
    base, checkpoint = load_sources(path, base_name, merge=merge)
    progress("capturing the base model", 0, 1)
    fused = fuse_adapter(capture(base, "cpu", "fp32"), base, checkpoint, fuse)
    operators = {"before": fused.operators_before, "after": operator_counts(fused.model)}
    return Explanation(block_records(fused), change_records(checkpoint), operators, planned_entries(fused.model))


def lint(path: Path, base_name: str | None, fuse: str, backend_name: str, progress: Progress) -> list[str]:
    """What a backend's runtime would refuse, drop or get wrong in an artifact's graph, or in those that it would be given of a checkpoint.

    An artifact that is compiled is judged by its own backend.

    Raises:
        FloraExportError: it is neither, or it cannot be read.
    """
    backend = load_backend(backend_name)
    if not (path / CONFIG).is_file():
        artifact = open_artifact(path)
        return (backend_of(artifact) if backend_of(artifact).compiled else backend).lint(load_graph(artifact))
    base, checkpoint = load_sources(path, base_name)
    progress("capturing the base model", 0, 1)
    form = next(iter(backend.targets.values()))
    graphs = [fuse_adapter(capture(base, form, precision), base, checkpoint, fuse).model for precision in ("fp16", "fp32")]
    return list(dict.fromkeys(fault for graph in graphs for fault in backend.lint(graph)))
