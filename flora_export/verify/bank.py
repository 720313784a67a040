"""A bank against eager PyTorch: each adapter as if it were alone in the artifact, then all of them in mixed batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from flora_export.artifact import Artifact, writing
from flora_export.backends import Progress
from flora_export.bank import BASE, Bank
from flora_export.base_model import BaseModel
from flora_export.checkpoint import Checkpoint
from flora_export.methods import load_checkpoint
from flora_export.proof import LedgerReport
from flora_export.verify.coverage import STEPS, run_forced
from flora_export.verify.golden import PROMPT_COUNT, record, write_golden
from flora_export.verify.numerics import TOLERANCES, Expected, Numerics, judge, measure
from flora_export.verify.parity import VerifyOptions, compared, first_divergence, open_runner
from flora_export.verify.report import Report

ROWS = 8  # adapters in one mixed batch; a row of the base model comes to them


def members_of(checkpoint: Checkpoint, base: BaseModel) -> Iterator[tuple[int, str, Checkpoint]]:
    """(slot, name, adapter) of a bank's adapters, each as it is on disk."""
    assert checkpoint.bank is not None
    for name, slot in checkpoint.bank.taken.items():
        yield slot, name, load_checkpoint(checkpoint.parts[slot][0], base, merge=False)


def verify_bank(artifact: Artifact, base: BaseModel, checkpoint: Checkpoint, options: VerifyOptions, progress: Progress) -> Report:
    """As `verify_numerics`: its cases are those of every adapter, by name, and those of mixed batches.

    Raises:
        FloraExportError: the sources or the artifact cannot be loaded or run.
    """
    bank = artifact.manifest.bank
    assert bank is not None
    whole, truths = Report(LedgerReport()), {}
    for slot, name, member in members_of(checkpoint, base):
        alone = dataclasses.replace(artifact, slot=slot)
        label = _labelled(progress, name)
        report, expected = compared(alone, base, member, options, label)
        truths[slot] = expected[:PROMPT_COUNT]
        if report.numerics is not None and report.numerics.causes and whole.first_divergence is None:
            whole.first_divergence = f"{name}: {first_divergence(alone, base, member, label)}"
        join(whole, report, name)
    assert whole.numerics is not None
    progress("comparing mixed batches", 0, 1)
    together = mixed(artifact, bank, truths)
    whole.numerics.cases += together.cases
    whole.numerics.causes += together.causes
    if options.golden:
        with writing(artifact.path):
            write_golden([record(item, slot) for slot, items in truths.items() for item in items], artifact.path)
    return whole


def _labelled(progress: Progress, name: str) -> Progress:
    return lambda what, done, of: progress(f"{name}: {what}", done, of)


def join(whole: Report, report: Report, name: str) -> None:
    """Add what was found of one adapter, under its name."""
    for field in ("numerics", "kernels"):
        found: Numerics | None = getattr(report, field)
        if found is None:
            continue
        found.cases = [dataclasses.replace(case, name=f"{name}: {case.name}") for case in found.cases]
        found.causes = [f"{name}: {cause}" for cause in found.causes]
        if getattr(whole, field) is None:
            setattr(whole, field, found)
        else:
            getattr(whole, field).cases += found.cases
            getattr(whole, field).causes += found.causes
    if report.price is not None and (whole.price is None or report.price.kl_mean > whole.price.kl_mean):
        whole.price, whole.max_quantization_loss = report.price, report.max_quantization_loss
    whole.blocks += report.blocks
    whole.environment |= report.environment


def mixed(artifact: Artifact, bank: Bank, truths: Mapping[int, Sequence[Expected]]) -> Numerics:
    """Every adapter in a batch with others and a row of the base model. A row must be right whatever stands beside it."""
    manifest = artifact.manifest
    result = Numerics(manifest.compute, TOLERANCES[manifest.compute], "mixed batches", STEPS)
    runner = open_runner(artifact, exact=True)
    names = {slot: name for name, slot in bank.taken.items()}
    # each adapter's first or second prompt, so that rows differ in length
    own = [(slot, truths[slot][slot % len(truths[slot])]) for slot in names]
    together = min(ROWS, runner.limits.batch - 1)
    if together < 1:
        result.causes.append(f"no mixed batch can be run: it takes {runner.limits.batch} rows. Build with wider --profile bounds")
        return result
    for start in range(0, len(own), together):
        rows = own[start : start + together]
        rows = [*rows, (BASE, rows[0][1])]
        prompts, forced = [item.prompt for _, item in rows], [item.tokens for _, item in rows]
        runner.choice.choose([slot for slot, _ in rows])
        got = run_forced(runner, prompts, forced)
        runner.choice.choose(BASE)
        got_base = run_forced(runner, prompts, forced)
        for at, (slot, item) in enumerate(rows):
            if slot != BASE:
                result.cases.append(measure(item, got[at], got_base[at], f"mixed batch, {names[slot]}", len(rows)))
            elif (fault := _base_fault(result, item, got[at])) is not None:
                result.causes.append(fault)
    result.causes += judge(result, allow_vacuous=True)  # the adapters have been judged alone
    return result


def _base_fault(result: Numerics, item: Expected, got: np.ndarray) -> str | None:
    """What is wrong with a row of the base model beside adapters, or None."""
    case = measure(item, got, got, "mixed batch, base", 1)
    off = float(np.abs(got - item.base).max())
    allowed = result.allowed_logits(case)
    return None if off <= allowed else f"mixed batch: the row of the base model is off by {off:.3g} (allowed {allowed:.3g})"
