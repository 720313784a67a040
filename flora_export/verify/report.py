"""The verification report: one verdict, its causes, and the figures behind it, as JSON and as text."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from flora_export.proof import LedgerReport
from flora_export.verify.localise import BlockError
from flora_export.verify.numerics import Numerics
from flora_export.verify.price import Price


@dataclass
class Report:
    """What `flora-export verify` found. `numerics` is None where only the golden vectors were replayed."""

    ledger: LedgerReport
    numerics: Numerics | None = None
    replay_faults: list[str] | None = None
    kernels: Numerics | None = None  # of a quantized artifact, as it runs: `numerics` is then of its graph, activations not rounded
    price: Price | None = None  # what quantization costs
    max_quantization_loss: float | None = None
    blocks: list[BlockError] = field(default_factory=list)  # of the written file, for the first prompt
    first_divergence: str | None = None  # where the build goes wrong: stage, layer, block, tensor
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def causes(self) -> list[str]:
        """Why it fails: what the numbers say first, since one such cause can stand for many tensors, then the bytes."""
        causes = list(self.numerics.causes) if self.numerics is not None else []
        causes += [f"as it runs: {cause}" for cause in (self.kernels.causes if self.kernels is not None else [])]
        causes += self.price.causes(self.max_quantization_loss) if self.price is not None else []
        return causes + list(self.ledger.faults) + list(self.replay_faults or [])

    @property
    def verified(self) -> bool:
        """Bytes and numbers are right. The ledger alone proves nothing of the numbers."""
        return not self.causes and (self.numerics is not None or self.replay_faults is not None)

    @property
    def verdict(self) -> str:
        return "VERIFIED" if self.verified else "FAILED" if self.causes else "NOT VERIFIED: the ledger alone was checked (--no-verify)"

    def to_dict(self) -> dict[str, Any]:
        return {"verified": self.verified, "causes": self.causes, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def to_text(self) -> str:
        ledger = self.ledger
        lines = [self.verdict]
        lines += [f"  cause: {cause}" for cause in self.causes[:20]]
        if len(self.causes) > 20:
            lines.append(f"  and {len(self.causes) - 20} more causes (--json lists all)")
        if self.first_divergence is not None:
            lines.append(f"  first divergence: {self.first_divergence}")
        lines.append(f"  ledger: {ledger.checked} slices checked bit for bit, {ledger.adapter_tensors} adapter tensors")
        if ledger.base_tensors_equal:
            lines.append(
                f"          {ledger.base_tensors_equal} slices equal the base model's own files, "
                f"{len(ledger.base_tensors_derived)} were derived by the capture"
            )
        if ledger.changed_tensors_equal:
            lines.append(f"          {ledger.changed_tensors_equal} changed weights were derived anew from base and adapter, and are equal")
        if ledger.changed_tensors_near:
            lines.append(
                f"          {ledger.changed_tensors_near} changed weights were merged by a library, were merged again, and are near"
            )
        if self.replay_faults is not None:
            lines.append("  golden vectors: replayed")
        if self.numerics is not None:
            lines += _table(self.numerics)
        lines += [f"  {heading}: {fact}" for heading, fact in quantized_facts(self).items()]
        if "runtime" in self.environment:
            lines.append(f"  run in {self.environment['runtime']}")
        return "\n".join(lines)


def _table(numerics: Numerics) -> list[str]:
    tolerance = numerics.tolerance
    lines = [
        f"  numerics: {numerics.precision} against PyTorch in fp64, prefill and {numerics.steps} cached steps; {numerics.prompts}",
        *(["    quick: the prompts as one batch; not each by itself"] if numerics.quick else []),
        f"    allowed: {tolerance.multiple:g} noise floors, which are what eager PyTorch in {numerics.precision} is off by; at most "
        f"{tolerance.logits:g} of the largest logit, {tolerance.effect:.1%} of the effect",
        f"    {'case':<24}{'past':>11}{'base error':>12}{'logit error':>13}{'floor':>10}{'floors':>8}{'from eager fp32':>17}"
        f"{'max effect':>12}{'effect error':>14}{'floors':>8}  greedy tokens",
    ]
    for case in numerics.cases:
        tie = case.margin <= numerics.tie(case)
        greedy = "equal" if case.other_token is None else f"{'tie' if tie else 'differ'} at {case.other_token}"
        lines.append(
            f"    {case.name:<24}{f'{case.past[0]}-{case.past[1]}':>11}{case.base_error:>12.2e}{case.logits_error:>13.2e}"
            f"{_figure(case.floor_logits):>10}{_multiple(case.logits_error, case.floor_logits):>8}{_figure(case.from_eager):>17}"
            f"{case.largest_effect:>12.2f}{case.effect_error:>14.4%}"
            f"{_multiple(case.effect_error, case.floor_effect):>8}  {greedy}"
        )
    return lines


def quantized_facts(report: Report) -> dict[str, str]:
    """What there is to say of a quantized artifact beyond its graph, a sentence to each heading; nothing of another."""
    kernels, price, facts = report.kernels, report.price, {}
    if price is None or report.numerics is None:
        return {}
    if kernels is not None:
        worst = max(kernels.cases, key=lambda case: case.effect_error / kernels.allowed_effect(case))
        facts["as it runs"] = (
            f"activations rounded to int8: effect off by {worst.effect_error:.1%} in {worst.name}, where such rounding in eager PyTorch is "
            f"off by {worst.floor_effect or 0.0:.1%} (allowed {kernels.tolerance.multiple:g} times that)"
        )
    own = "" if price.adapter_loss is None else f"; rounding A, B and G alone moves it by {price.adapter_loss:.2%}"
    facts["price of quantization"] = f"the adapter's effect moves by {price.effect_error:.1%}{own}"
    facts["answers"] = (
        f"{price.kl_mean:.3g} nats per token from the model as it was trained, the same next token at {price.top1_agreement:.1%} of "
        f"places; the base model alone {price.base_kl_mean:.3g} and {price.base_top1_agreement:.1%}"
    )
    return facts | ({"advice": price.advice} if price.advice else {})


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _multiple(error: float, floor: float | None) -> str:
    return f"{error / floor:.1f}" if floor else "-"
