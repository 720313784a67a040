"""Several LoRAs as one change: W' = W + Σ w s B A, adapter by adapter in the order that they are given, rounded once.

The same holds for an ordered list of boosters (XGBLoRA, arXiv 2410.19694), each of weight 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from flora_export.bank import slot_tensor
from flora_export.change import WeightChange
from flora_export.checkpoint import Checkpoint
from flora_export.errors import CheckpointError
from flora_export.methods.arithmetic import low_ranks


def combined(parts: Sequence[tuple[Checkpoint, float]]) -> Checkpoint:
    """Adapters and their weights as one adapter, whose tensors are named `0:...`, `1:...` after the adapter that they are in.

    Raises:
        CheckpointError: one of them does more than to add a low-rank product to weights of linear layers.
    """
    steps: dict[str, list[tuple[int, WeightChange, float]]] = {}
    for index, (checkpoint, weight) in enumerate(parts):
        for change in checkpoint.changes:
            if change.factors is None:
                raise CheckpointError(f"{checkpoint.path}: {change.tensor}: {change.what}, and only plain LoRAs can be weighted and added.")
            steps.setdefault(change.tensor, []).append((index, change, weight))
        if checkpoint.branches:
            raise CheckpointError(
                f"{checkpoint.path}: its branches run beside blocks, and only plain LoRAs can be weighted and added. Build it by itself."
            )
    changes = []
    for tensor, own in steps.items():
        sources = tuple(slot_tensor(index, name) for index, change, _ in own for name in change.factors or ())
        scales = tuple(change.scale * weight for _, change, weight in own)
        what = " + ".join(f"{weight:g} {change.what}" for _, change, weight in own)
        changes.append(WeightChange(tensor, what, sources, partial(low_ranks, scales), sum(change.rank for _, change, _ in own)))
    digests = {f"{index}/{name}": sha for index, (each, _) in enumerate(parts) for name, sha in each.digests.items()}
    digests["weights"] = hashlib.sha256(" ".join(f"{weight!r}" for _, weight in parts).encode()).hexdigest()
    first = parts[0][0]
    weighted = tuple((each.path, weight) for each, weight in parts)
    return dataclasses.replace(first, digests=digests, changes=tuple(changes), parts=weighted)


def read_weighted(text: str) -> tuple[Path, float]:
    """`DIR` or `DIR=0.7` -> the adapter and its weight. Raises CheckpointError: the weight is no finite number."""
    path, mark, weight = text.rpartition("=")
    if not mark or Path(text).is_dir():
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError as error:
        raise CheckpointError(f"{text}: {weight!r} is no weight of an adapter; expected DIR or DIR=NUMBER") from error
    if not abs(value) < 1e6:  # NaN is not below either
        raise CheckpointError(f"{text}: an adapter's weight must be a finite number, below a million")
    return Path(path), value
