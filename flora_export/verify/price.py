"""What quantization costs: how far the quantized model, computed exactly, is from the one that was trained.

This is no fault of an artifact, and no tolerance is derived from it. Three things are told apart: what the rounding of A, B and G does on
the same quantized base; what all of it does to the adapter's effect; and what it does to the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flora_export.verify.coverage import Eager
from flora_export.verify.numerics import Expected, Logits, difference, divergence

if TYPE_CHECKING:
    from flora_export.verify.quantized_reference import QuantizedReference  # imports torch

ADAPTER_LOSS = 0.05  # of its effect: what an adapter loses without a word by being quantized itself


@dataclass(frozen=True)
class Price:
    """Over all positions of all prompts, from eager PyTorch in fp32 on the weights as they were trained. KL in nats per token."""

    adapter_loss: float | None  # ||Δ - Δ'|| / ||Δ|| by quantizing A, B and G alone; None: they are not, or stand in the base's weights
    effect_error: float  # ||Δ - Δ'|| / ||Δ|| by quantizing everything
    kl_mean: float  # of next-token distributions, trained from quantized
    kl_max: float
    top1_agreement: float  # share of positions where both prefer the same token
    base_kl_mean: float  # the same of the base model without its adapter
    base_top1_agreement: float

    def causes(self, most: float | None) -> list[str]:
        """Why it is too much; `most` is the largest `kl_mean` that the user takes, None where he takes any."""
        if most is None or self.kl_mean <= most:
            return []
        return [
            f"quantization loss: {self.kl_mean:.3g} nats per token from the model as it was trained (--max-quantization-loss {most:g}). "
            "Build with --precision int8, or train the adapter on the quantized base."
        ]

    @property
    def advice(self) -> str:
        """What would cost less, where it costs much; else nothing."""
        if self.adapter_loss is None or self.adapter_loss <= ADAPTER_LOSS:
            return ""
        return "--adapter-precision int8 would keep more of the adapter, beside its hosts; so would --precision int8, fused"


def measure_price(expected: Sequence[Expected], eager: QuantizedReference, trained: Eager) -> Price:
    """Compare with the model as it was trained. `expected` is the truth of the quantized one."""
    sequences = [item.prompt + item.tokens for item in expected]
    before = list(zip(trained.logits(sequences), trained.logits(sequences, adapter=False), strict=True))
    kl = np.concatenate([divergence(adapted, item.adapted) for (adapted, _), item in zip(before, expected, strict=True)])
    base_kl = np.concatenate([divergence(base, item.base) for (_, base), item in zip(before, expected, strict=True)])
    kept = None
    if eager.quantizes_adapter:
        with eager.exact_adapter():
            kept = _moved([(logits, item.base) for logits, item in zip(eager.logits(sequences), expected, strict=True)], expected)
    return Price(
        adapter_loss=kept,
        effect_error=_moved(before, expected),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1_agreement=_agreement([adapted for adapted, _ in before], [item.adapted for item in expected]),
        base_kl_mean=float(base_kl.mean()),
        base_top1_agreement=_agreement([base for _, base in before], [item.base for item in expected]),
    )


def _moved(before: Sequence[tuple[Logits, Logits]], expected: Sequence[Expected]) -> float:
    """||Δ' - Δ|| / ||Δ|| over all prompts, Δ before quantization: (adapted, base) each."""
    moved = whole = 0.0
    for (adapted, base), item in zip(before, expected, strict=True):
        effect = difference(adapted, base)
        moved += float(np.sum((difference(item.adapted, item.base) - effect) ** 2))
        whole += float(np.sum(effect**2))
    return float(np.sqrt(moved / whole)) if whole else 0.0


def _agreement(one: Sequence[Logits], other: Sequence[Logits]) -> float:
    return float(np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in zip(one, other, strict=True)]).mean())
