"""How A and G start: as the directions of x that the block's own first projections listen to most. B starts at zero.

With W the first projections of the block, one above the other ([Wq; Wk; Wv], or [Wgate; Wup]), and W = U S V^T, the rows of A are the
leading rows of V^T, and those of G the ones that follow. Measured against Kaiming's uniform numbers in docs/method.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from flora_export.branch import Kind

TRAINABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FIRST_PROJECTIONS: dict[Kind, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "mlp": ("gate_proj", "up_proj", "gate_up_proj", "c_fc"),
}


@torch.no_grad()
def start_at_leading_directions(block: nn.Module, kind: Kind, name: str, matrices: Sequence[nn.Module]) -> None:
    """Fill the weights of A: [r, d], then of G: [r, d] of a gated branch.

    They stay as they are, with a warning, where the block has no such projections, or quantized ones that PEFT cannot read.
    """
    modules = {key: module for key, module in block.named_children() if key in FIRST_PROJECTIONS[kind]}
    try:
        if not modules:
            raise TypeError(f"it has none of the projections {', '.join(FIRST_PROJECTIONS[kind])}")
        hosts = torch.cat([_weight(key, module) for key, module in modules.items()])  # [outputs, d]
    except TypeError as error:
        warnings.warn(
            f"{name} ({type(block).__name__}): {error}; its forward adapter starts from random numbers (init_ffba_weights='kaiming')",
            stacklevel=2,
        )
        return
    weights = [parameter for matrix in matrices for parameter in matrix.parameters()]
    rows = leading_directions(hosts, sum(len(weight) for weight in weights))
    for weight in weights:
        weight.copy_(rows[: len(weight)])
        rows = rows[len(weight) :]


def _weight(name: str, module: nn.Module) -> Tensor:
    """A projection's weight [outputs, d] in fp32. Raises TypeError: it is quantized in a way that PEFT does not undo."""
    weight: Tensor | None = dequantize_module_weight(module) if hasattr(module, "weight") else None
    if weight is None or weight.dtype not in TRAINABLE:  # 8-bit floats have scales that lie elsewhere
        raise TypeError(f"{name} ({type(module).__name__}) has no weight that could be read as plain numbers")
    return weight.to(torch.float32)


def leading_directions(weights: Tensor, count: int) -> Tensor:
    """The `count` leading right singular vectors of W: [outputs, d], as unit rows [count, d], signed so that the largest entry is positive.

    Exact, as eigenvectors of W^T W, since singular values of weights lie close together. Beyond the d that there are, they start over.
    """
    rows: Tensor = torch.linalg.eigh(weights.T @ weights).eigenvectors.T.flip(0)  # eigenvalues come in ascending order
    rows = rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    repeated: Tensor = rows[torch.arange(count, device=rows.device) % len(rows)]
    return repeated


def kaiming(linear: nn.Linear) -> None:
    """As LoRA draws its A: uniform, a = sqrt 5."""
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
