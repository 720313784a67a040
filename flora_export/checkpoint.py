"""Checkpoint: an adapter that was read and checked (methods/), as what it does to a base model, whatever its method."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # teaches numpy the dtype bfloat16
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from flora_export.bank import Bank
from flora_export.base_model import file_sha256
from flora_export.branch import Branch, Detour
from flora_export.change import Doubles, WeightChange
from flora_export.errors import CheckpointError

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
    detours: tuple[Detour, ...] = ()  # beside projections: changes that were not merged
    parts: tuple[tuple[Path, float], ...] = ()  # of one that is made of several: their directories and weights
    bank: Bank | None = None  # of several that stay apart, each chosen by itself

    @property
    def digest(self) -> str:
        """One SHA-256 over the files of the adapter."""
        return digest_of_files(self.digests)

    def check_unchanged(self) -> None:
        """Raises CheckpointError where a file is no longer the one that was checked: what was read of it since is of nobody knows which."""
        for name, digest in self.digests.items():
            index, _, file = name.rpartition("/")
            if file in (CONFIG, WEIGHTS):
                path = (self.parts[int(index)][0] if index else self.path) / file
                if not path.is_file() or file_sha256(path) != digest:
                    raise CheckpointError(f"{path} has changed while it was built from. Build from a copy that nobody writes to.")

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all its tensors, each once for every branch and weight that it goes into: mostly one."""
        branches = [branch.tensor(matrix) for branch in self.branches for matrix in branch.matrices]
        beside = [name for detour in self.detours for name in (detour.a, detour.b)]
        return (*branches, *beside, *(source for change in self.changes for source in change.sources))

    def matrix(self, branch: Branch, matrix: str) -> npt.NDArray[np.float32]:
        """A, B or G of a branch in torch's layout, [r, d] or [d, r], as fp32 and unscaled."""
        return self.tensor(branch.tensor(matrix))

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """One of its tensors by name, as fp32, in torch's layout."""
        path = self.path
        if self.parts:
            index, _, name = name.partition(":")
            path = self.parts[int(index)][0]
        with safe_open(path / WEIGHTS, framework="numpy") as file:
            values: npt.NDArray[np.float32] = file.get_tensor(name).astype(np.float32)
        return values

    def unmerged(self) -> Checkpoint:
        """The same adapter, low-rank changes beside their projections. What has no rank (biases, saved weights) is still a change.

        Raises:
            CheckpointError: a change is more than A and B beside a projection; the message names it.
        """
        for change in self.changes:
            if change.rank and change.factors is None:
                raise CheckpointError(
                    f"{self.path}: {change.tensor} is changed by {change.what} of rank {change.rank}, but only an A and a B beside a "
                    "linear projection can stay apart (no DoRA, no embeddings, no head that brings its base weight). Build with --merge."
                )
        kept = [Detour(c.tensor, c.what, c.rank, c.scale, *c.factors) for c in self.changes if c.factors is not None]
        return dataclasses.replace(self, changes=tuple(c for c in self.changes if c.factors is None), detours=tuple(kept))

    def changed(self, change: WeightChange, weight: npt.NDArray[Any]) -> Doubles:
        """W' of a change in fp64, from W as the base model's file has it."""
        return change.derive(weight.astype(np.float64), [self.tensor(name).astype(np.float64) for name in change.sources])


def digest_of_files(digests: Mapping[str, str]) -> str:
    """One SHA-256 over files, of the SHA-256 of each by its name."""
    return hashlib.sha256("".join(f"{name} {sha}\n" for name, sha in sorted(digests.items())).encode()).hexdigest()
