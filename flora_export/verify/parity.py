"""An artifact's numbers against PyTorch: the truth is computed, the noise floor measured, the artifact run, and all of it compared."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flora_export.artifact import Artifact, writing
from flora_export.backends import Golden, Progress, Runner, backend_of
from flora_export.base_model import BaseModel
from flora_export.checkpoint import Checkpoint
from flora_export.proof import LedgerReport
from flora_export.scratch import Scratch
from flora_export.verify.coverage import LIMIT_STEPS, STEPS, Run, ask_eager, compare, expect, expect_near_limit, measure_floors
from flora_export.verify.golden import PROMPT_COUNT, record, replay, write_golden
from flora_export.verify.localise import block_errors, localise, observed
from flora_export.verify.numerics import Expected, Numerics
from flora_export.verify.price import measure_price
from flora_export.verify.prompts import encode_prompts, tokenizer_faults
from flora_export.verify.report import Report


@dataclass(frozen=True)
class VerifyOptions:
    allow_vacuous: bool = False
    prompts: Path | None = None  # a file of prompts, one a line, instead of those that ship
    golden: bool = False  # record golden vectors
    max_quantization_loss: float | None = None  # nats per token
    weighted: tuple[tuple[Path, float], ...] = ()  # several adapters as one, the checkpoint the first of them
    others: tuple[Path, ...] = ()  # of a bank: the adapters after the checkpoint, by slot
    quick: bool = False  # run the prompts together alone
    localise: bool = False  # name the first block that diverges even where all is right


def verify_numerics(
    artifact: Artifact,
    base: BaseModel,
    checkpoint: Checkpoint,
    options: VerifyOptions,
    progress: Progress,
) -> Report:
    """A report whose ledger is still to be filled in. With `options.golden`, the truth is recorded as golden vectors.

    Raises:
        FloraExportError: the sources or the artifact cannot be loaded or run.
    """
    report, expected = compared(artifact, base, checkpoint, options, progress)
    if options.golden:
        with writing(artifact.path):
            write_golden([record(item) for item in expected[:PROMPT_COUNT]], artifact.path)
    return report


def compared(
    artifact: Artifact, base: BaseModel, checkpoint: Checkpoint, options: VerifyOptions, progress: Progress
) -> tuple[Report, list[Expected]]:
    """The report, and the truth that the artifact was compared with."""
    from flora_export.reference import Reference  # imports torch: only where eager PyTorch is needed
    from flora_export.verify.quantized_reference import QuantizedReference, with_rounding

    manifest, precision = artifact.manifest, artifact.manifest.compute
    progress("loading eager PyTorch", 0, 1)
    eager = (
        Reference(base, checkpoint.path, checkpoint.parts)
        if manifest.quantization is None
        else QuantizedReference(base, checkpoint, manifest.quantization)
    )
    runners = open_runner(artifact, exact=True), base_runner(artifact, base, exact=True)
    limits, context = runners[0].limits, min(base.context, runners[0].limits.total)
    longest = min(longest_prompt(base, limits.total), limits.prompt)
    prompts, source = encode_prompts(artifact.path, base.vocabulary, longest, options.prompts)
    expected = expect(eager, prompts, lambda done, of: progress("asking PyTorch in fp64", done, of))
    budget = sum(file.stat().st_size for file in base.weights) // 4
    near_limit = expect_near_limit(eager, runners[0].cache_shapes(), context, (prompts[0] * 3)[:LIMIT_STEPS], budget)
    progress("measuring the noise floor", 0, 1)
    runs = [*((item, None) for item in expected), near_limit]
    ask_eager(eager, runs)
    branches = observed(artifact, checkpoint)
    names = [branch.block for branch in branches]
    blocks = block_errors(artifact, branches, eager.block_outputs(prompts[0], names, adapter=True), prompts[0])
    price, rounded = None, []
    if isinstance(eager, QuantizedReference):
        progress("asking what quantization costs", 0, 1)
        price = measure_price(expected, eager, Reference(base, checkpoint.path, checkpoint.parts))
        rounded = with_rounding(eager, runs) if eager.quantization.accuracy_level else []
    measure_floors(eager.to_precision(precision), runs, precision)
    del eager
    numerics = compare(
        expected,
        near_limit,
        *runners,
        precision=precision,
        source=source,
        allow_vacuous=options.allow_vacuous,
        quick=options.quick,
        progress=lambda done, of: progress("comparing with PyTorch", done, of),
    )
    numerics.causes += tokenizer_faults(artifact, base)
    report = Report(LedgerReport(), numerics, blocks=blocks, environment=environment(*runners))
    if price is not None:
        report.price, report.max_quantization_loss = price, options.max_quantization_loss
    if rounded:
        report.kernels = _as_it_runs(artifact, base, rounded, source, options.quick, progress)
    return report, expected


def _as_it_runs(artifact: Artifact, base: BaseModel, rounded: Sequence[Run], source: str, quick: bool, progress: Progress) -> Numerics:
    """A quantized artifact as it is served, its runtime free to round activations: held to what such rounding does to eager PyTorch."""
    *expected, (near_limit, cache) = rounded
    assert cache is not None
    return compare(
        [item for item, _ in expected],
        (near_limit, cache),
        open_runner(artifact),
        base_runner(artifact, base),
        precision=artifact.manifest.precision,
        source=source,
        allow_vacuous=True,  # the exact run has judged that
        quick=quick,
        progress=lambda done, of: progress("comparing as it runs", done, of),
    )


def replayed(artifact: Artifact, ledger: LedgerReport, progress: Progress) -> Report:
    """The report of an artifact without its sources: the golden vectors, replayed where the ledger found no fault."""
    report = Report(ledger, environment=environment())
    if not ledger.faults:
        progress("replaying golden vectors", 0, 1)
        runner = open_runner(artifact)
        report.replay_faults = replay(artifact, runner)
        report.environment = environment(runner)
    return report


def golden_prompts(base: BaseModel) -> Golden:
    """What an artifact of a base model will have to replay: the prompts, by the places of its cache, and the steps after each."""

    def ask(cache_tokens: int) -> tuple[list[list[int]], int]:
        prompts, _ = encode_prompts(base.path, base.vocabulary, longest_prompt(base, cache_tokens))
        return prompts[:PROMPT_COUNT], STEPS

    return ask


def first_divergence(artifact: Artifact, base: BaseModel, checkpoint: Checkpoint, progress: Progress) -> str:
    """Where the build goes wrong, in words."""
    from flora_export.reference import Reference

    prompts, _ = encode_prompts(artifact.path, base.vocabulary, longest_prompt(base, artifact.manifest.cache_tokens))
    quantized = None
    if artifact.manifest.quantization is not None:
        from flora_export.verify.quantized_reference import QuantizedReference

        quantized = QuantizedReference(base, checkpoint, artifact.manifest.quantization)
    return localise(artifact, base, checkpoint, Reference(base, checkpoint.path, checkpoint.parts), prompts[0], progress, quantized)


def longest_prompt(base: BaseModel, room: int) -> int:
    """The longest prompt that leaves room for the steps after it; `room` is a cache's or an engine's, or 0."""
    return max(1, min(base.context, room or base.context) - STEPS - 1)


def open_runner(artifact: Artifact, *, adapter: bool = True, exact: bool = False) -> Runner:
    """The artifact in its runtime, with its adapter or with that silenced; `exact` as `Backend.decode` has it."""
    return backend_of(artifact).decode(artifact, adapter=adapter, exact=exact)


def base_runner(artifact: Artifact, base: BaseModel, *, exact: bool = False) -> Runner:
    """The artifact's base model: the artifact with its branches silenced, or the base built anew where its weights are changed."""
    if not artifact.manifest.changes:
        return open_runner(artifact, adapter=False, exact=exact)
    with Scratch("flora-export-base-") as name:  # the runner keeps what it needs of it
        return backend_of(artifact).decode_base(artifact, base, Path(name), exact=exact)


def environment(*runners: Runner) -> dict[str, str]:
    """The machine, and what the artifact was run in; without its adapter as well, where that is something else."""
    names = list(dict.fromkeys(runner.runtime for runner in runners))
    ran = {"runtime": "; without its adapter in ".join(names)} if names else {}
    return ran | {"machine": platform.machine(), "system": platform.system(), "python": platform.python_version()}
