"""WeightChange: a weight of the base model that an adapter turns into another, as plain facts. No torch, no onnx."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class WeightChange:
    """W becomes W'. It is computed in fp64, of W and of the adapter's tensors alone, and rounded once, where it is written.

    `derive(W, sources)` returns W', both in the layout of the base model's file. Its bits depend on its arguments alone: elementwise
    arithmetic in a fixed order, and no matrix product, whose last bits depend on a library, on the processor and on the number of threads.
    What a library merges has no such promise: then `exact` is False, `what` names the library, and the ledger compares within a bound.
    """

    tensor: str  # W's name in the base model's files
    what: str  # how it is changed, in words: "LoRA"
    sources: tuple[str, ...]  # names of the adapter's tensors that it takes
    derive: Callable[[Doubles, Sequence[Doubles]], Doubles]
    rank: int = 0  # 0: it has none
    scale: float = 1.0
    exact: bool = True
    factors: tuple[str, str] | None = None  # A and B among the sources, where W' = W + scale · B A: these can stay beside W
