"""Other places for a branch, to be tried: they write into the first projections of the block that follows, not beside their own.

    next     z = A x, with x the block's input            gate, up (after attention) or the next layer's q, k, v (after the MLP) += s B z
    carried  z = A h, with h the last projection's input  the same

`carried` is how we read zFLoRA's idea: o_proj and down_proj get r more outputs, which are carried to the next projections as r more
inputs. Neither has an activation of its own. Here they are hooks around a Hugging Face model: to train and score, not to save or export.
A starts at the leading directions of what reads the same tensor, as FFBA's does; B at zero.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from flora_export.ffba import FFBAConfig
from flora_export.ffba.init import leading_directions

QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


class Carrier(nn.Module):
    """One branch: A reads before some projections run, B adds to the outputs of later ones."""

    def __init__(self, readers: list[nn.Linear], writers: list[nn.Linear], rank: int, scale: float) -> None:
        super().__init__()
        self.scale, self.z = scale, torch.zeros(0)
        self.A = nn.Linear(readers[0].in_features, rank, bias=False)
        self.B = nn.ModuleList(nn.Linear(rank, writer.out_features, bias=False) for writer in writers)
        with torch.no_grad():
            self.A.weight.copy_(leading_directions(torch.cat([reader.weight for reader in readers]), rank))
        for matrix in self.B:
            nn.init.zeros_(matrix.weight)  # type: ignore[arg-type]
        readers[0].register_forward_pre_hook(self._read)
        for matrix, writer in zip(self.B, writers, strict=True):
            writer.register_forward_hook(lambda _module, _inputs, output, matrix=matrix: output + self.scale * matrix(self.z))

    def _read(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.z = self.A(inputs[0])


def place(model: Any, placement: str, config: FFBAConfig) -> Any:
    """Freeze a Llama-like model and put branches of a placement between its blocks; s is alpha / r. Returns the model.

    The last MLP has none: no block follows it.
    """
    model.requires_grad_(False)
    blocks = [block for layer in model.model.layers for block in (layer.self_attn, layer.mlp)]
    carriers = []
    for block, following in pairwise(blocks):
        first, last = (QKV, "o_proj") if hasattr(block, "q_proj") else (GATED, "down_proj")
        readers = [getattr(block, name) for name in (first if placement == "next" else (last,))]
        writers = [getattr(following, name) for name in (QKV if hasattr(following, "q_proj") else GATED)]
        carriers.append(Carrier(readers, writers, config.r, config.alpha / config.r))
    model.carriers = nn.ModuleList(carriers)
    return model
