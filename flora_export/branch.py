"""Branch and Detour: what an adapter puts beside a block, or beside one projection, as plain facts. No torch, no onnx.

An FFBA adapter runs beside a block (the `self_attn` or `mlp` module of a decoder layer) with input x of width d:

    y = block(x) + s · B φ(A x)      A: [r, d]   B: [d, r]   s = alpha / r, or alpha / sqrt(r) with use_rslora

`gated` is φ(x) = act(G x) ⊙ (A x) with G: [r, d] and the host MLP's own activation; its s is `gated_gain` times as large.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

Kind = Literal["attention", "mlp"]
Value = TypeVar("Value")

# The module names that can carry a branch, and what each one is.
BLOCK_KINDS: dict[str, Kind] = {"self_attn": "attention", "mlp": "mlp"}

# How far branches are fused.
FUSE_LEVELS = ("none", "forward", "backward", "both")

GATED = "gated"
ACTIVATIONS: dict[Kind, tuple[str, ...]] = {
    "attention": ("identity", "relu", "silu", "gelu"),
    "mlp": ("identity", "relu", "silu", "gelu", GATED),
}


@dataclass(frozen=True)
class Defaults:
    """What an adapter's configuration means where it is silent."""

    gated_gain: float  # act(G x) ⊙ (A x) is small to the second order in its matrices, and a gated branch would learn late at 1
    init_weights: bool | str  # how training starts; see `ffba/config.py`


# The format of `adapter_config.json` by its `ffba_version`. What a version means never changes: other defaults are another version.
FORMAT_KEY = "ffba_version"
FORMATS: dict[int, Defaults] = {
    0: Defaults(gated_gain=1.0, init_weights="kaiming"),  # files without a version
    1: Defaults(gated_gain=16.0, init_weights=True),
}
FORMAT = max(FORMATS)  # the one that is written


def format_defaults(version: object) -> Defaults:
    """The defaults of a configuration with this `ffba_version`, 0 where it has none. Raises ValueError: none that is known here."""
    if type(version) is not int or version not in FORMATS:  # JSON's true and 1.0 equal 1
        raise ValueError(
            f"{FORMAT_KEY} is {version!r}, but this flora-export reads versions up to {FORMAT}. "
            "If a newer one wrote the adapter: pip install --upgrade flora-export"
        )
    return FORMATS[version]


@dataclass(frozen=True)
class Branch:
    """One adapter branch beside one block.

    `reads` and `writes` name the weights of the host projections on either side. They are empty until a graph is
    known, and nothing here assumes that both sides lie in the same block.
    """

    block: str  # "model.layers.0.self_attn"
    kind: Kind
    activation: str
    rank: int
    scale: float
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    keys: str = "base_model.model.{block}.ffba_{matrix}.weight"  # how its checkpoint names a matrix
    lead: int = 0  # zeros before its rank in the graph, so that B's rows begin a block of their own where weights are quantized
    padding: int = 0  # zeros beside its rank in the graph, so that the widened projections have a width that the target likes
    members: tuple[Branch, ...] = ()  # of a bank: the branches of its adapters, which it stands for in the graph
    slots: int = 0  # of a bank that is stacked: how many adapters have a place; 0: they stand side by side

    @property
    def matrices(self) -> tuple[str, ...]:
        """The letters of its matrices: forward adapters first, in the order of the host's neurons, then B."""
        return ("G", "A", "B") if self.activation == GATED else ("A", "B")

    @property
    def own(self) -> tuple[Branch, ...]:
        """The branches that are in a checkpoint: itself, or those that it stands for."""
        return self.members or (self,)

    @property
    def columns(self) -> int:
        """How many columns of x A, and rows of B, it has in the graph."""
        return self.lead + self.rank + self.padding

    @property
    def forward_matrices(self) -> tuple[str, ...]:
        return self.matrices[:-1]

    def tensor(self, matrix: str) -> str:
        """Name of a matrix in the checkpoint."""
        return self.keys.format(block=self.block, matrix=matrix)

    def shape(self, matrix: str, width: int) -> tuple[int, int]:
        """Shape of a matrix in torch's layout [out, in], for a model of width d."""
        return (width, self.rank) if matrix == "B" else (self.rank, width)


@dataclass(frozen=True)
class Detour:
    """A low-rank branch beside one projection, y = W x + s · B (A x), with A: [r, in] and B: [out, r] in torch's layout."""

    tensor: str  # W's name in the base model's files
    what: str  # the method, in words: "LoRA"
    rank: int
    scale: float
    a: str  # names of the adapter's tensors
    b: str
    host: str = ""  # the weight [in, out] of the graph that holds W; empty until a graph is known
    offset: int = 0  # W's first column in it
    columns: int = 0

    @property
    def module(self) -> str:
        return self.tensor.removesuffix(".weight")


def adapter_scale(alpha: float, rank: int, use_rslora: bool, gain: float) -> float:
    """s = alpha / r (LoRA, arXiv 2106.09685), or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732), times the gain of a gated branch."""
    return gain * (alpha / math.sqrt(rank) if use_rslora else alpha / rank)


def by_pattern(module: str, default: Value, patterns: Mapping[str, Value]) -> Value:
    """The value of the first pattern that matches the end of a module's name, as PEFT matches `rank_pattern`; or the default."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
