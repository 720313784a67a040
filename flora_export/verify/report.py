"""The verification report: one verdict, its causes, and the figures behind it, as JSON and as text."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from flora_export.ledger import LedgerReport
from flora_export.verify.numerics import Numerics


@dataclass
class Report:
    """What `flora-export verify` found. `numerics` is None where only the golden vectors were replayed."""

    ledger: LedgerReport
    numerics: Numerics | None = None
    replay_faults: list[str] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def causes(self) -> list[str]:
        """Why it fails, deepest first: bytes, then numbers."""
        causes = list(self.ledger.faults) + list(self.replay_faults or [])
        return causes + (self.numerics.causes if self.numerics is not None else [])

    @property
    def verified(self) -> bool:
        return not self.causes

    def to_dict(self) -> dict[str, Any]:
        return {"verified": self.verified, "causes": self.causes, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def to_text(self) -> str:
        ledger = self.ledger
        lines = [f"{'VERIFIED' if self.verified else 'FAILED'}"]
        lines += [f"  cause: {cause}" for cause in self.causes[:20]]
        if len(self.causes) > 20:
            lines.append(f"  and {len(self.causes) - 20} more causes (--json lists all)")
        lines.append(f"  ledger: {ledger.checked} slices checked bit for bit, {ledger.adapter_tensors} adapter tensors")
        if ledger.base_tensors_equal:
            lines.append(
                f"          {ledger.base_tensors_equal} slices equal the base model's own files, "
                f"{len(ledger.base_tensors_derived)} were derived by the capture"
            )
        if self.replay_faults is not None:
            lines.append("  golden vectors: replayed")
        if self.numerics is not None:
            lines += _table(self.numerics)
        return "\n".join(lines)


def _table(numerics: Numerics) -> list[str]:
    tolerance = numerics.tolerance
    lines = [
        f"  numerics: {numerics.precision} against eager PyTorch fp32, prefill and {numerics.steps} cached steps; {numerics.prompts}",
        f"    allowed: logits {tolerance.logits:g} of the largest logit (or of 1), effect {tolerance.effect:.1%}",
        f"    {'case':<22}{'tokens':>7}{'base error':>12}{'logit error':>13}{'max logit':>11}{'max effect':>12}{'effect error':>14}"
        "  greedy tokens",
    ]
    for case in numerics.cases:
        greedy = "equal" if case.first_divergent_token is None else f"differ at {case.first_divergent_token}"
        lines.append(
            f"    {case.name:<22}{case.prompt_tokens:>7}{case.base_error:>12.2e}{case.logits_error:>13.2e}{case.largest_logit:>11.2f}"
            f"{case.largest_effect:>12.2f}{case.effect_error:>14.4%}  {greedy}"
        )
    return lines
