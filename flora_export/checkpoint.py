"""Checkpoint: an adapter that was read and checked (methods/), as what it does to a base model, whatever its method."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # teaches numpy the dtype bfloat16
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from flora_export.branch import Branch
from flora_export.change import Doubles, WeightChange

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checked adapter: branches that run beside blocks, ordered by layer, changes of the base's weights, and its numbers on demand."""

    path: Path
    config: dict[str, Any]
    branches: tuple[Branch, ...]
    digests: dict[str, str]  # SHA-256 by file name
    changes: tuple[WeightChange, ...] = ()

    @property
    def digest(self) -> str:
        """One SHA-256 over the files of the adapter."""
        return hashlib.sha256("".join(f"{name} {sha}\n" for name, sha in sorted(self.digests.items())).encode()).hexdigest()

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all its tensors, each once for every branch and weight that it goes into: mostly one."""
        branches = [branch.tensor(matrix) for branch in self.branches for matrix in branch.matrices]
        return (*branches, *(source for change in self.changes for source in change.sources))

    def matrix(self, branch: Branch, matrix: str) -> npt.NDArray[np.float32]:
        """A, B or G of a branch in torch's layout, [r, d] or [d, r], as fp32 and unscaled."""
        with safe_open(self.path / WEIGHTS, framework="numpy") as file:
            values: npt.NDArray[np.float32] = file.get_tensor(branch.tensor(matrix)).astype(np.float32)
        return values

    def changed(self, change: WeightChange, weight: npt.NDArray[Any]) -> Doubles:
        """W' of a change in fp64, from W as the base model's file has it."""
        with safe_open(self.path / WEIGHTS, framework="numpy") as file:
            sources = [file.get_tensor(name).astype(np.float64) for name in change.sources]
        return change.derive(weight.astype(np.float64), sources)
