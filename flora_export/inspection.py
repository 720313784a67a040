"""inspect(): what an adapter is and what a build would do with it, from headers alone. No weight of the base model is read."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_export.base_model import directory_of, load_base
from flora_export.branch import Branch
from flora_export.change import WeightChange
from flora_export.errors import CheckpointError
from flora_export.methods import load_checkpoint, named_base, read_config, read_header


@dataclass(frozen=True)
class Inspection:
    """An adapter. Without its base model at hand, `unchecked` says why, and what it does to the base is not known."""

    path: str
    method: str
    base: str | None
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    branches: tuple[Branch, ...] = ()
    changes: tuple[WeightChange, ...] = ()
    unchecked: str = ""

    def to_dict(self) -> dict[str, Any]:
        """One JSON object."""
        fields = ("path", "method", "base", "tensors", "parameters", "dtypes", "unchecked")
        return {name: getattr(self, name) for name in fields} | {
            "branches": [dataclasses.asdict(b) for b in self.branches],
            "changes": [
                {"tensor": c.tensor, "what": c.what, "rank": c.rank, "scale": c.scale, "sources": list(c.sources)} for c in self.changes
            ],
        }

    def to_text(self) -> str:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        lines = [
            f"{self.path}: {self.method}, {self.parameters:,} numbers in {self.tensors} tensors ({dtypes}), for {self.base or 'no base'}"
        ]
        if self.unchecked:
            return "\n".join([*lines, f"not compared with its base model: {self.unchecked}"])
        for (name, rank, scale), count in Counter((f"{b.kind}, {b.activation}", b.rank, b.scale) for b in self.branches).items():
            lines.append(
                f"  {count:>4} branches beside blocks  {name:<20}  rank {rank:<4}  scale {scale:g}: fused into the block's projections"
            )
        kinds = Counter((f"{c.what}, {_last(c.tensor)}", c.rank, c.scale) for c in self.changes)
        kept = {f"{c.what}, {_last(c.tensor)}" for c in self.changes if c.factors is not None}
        for (name, rank, scale), count in kinds.items():
            told = f"rank {rank:<4}  scale {scale:g}" if rank else ""
            apart = ", or beside them with --no-merge" if name in kept else ""
            lines.append(f"  {count:>4} weights changed  {name:<24}  {told}: merged, at the base model's own cost{apart}".rstrip())
        return "\n".join(lines)


def inspect(path: Path, base_name: str | None) -> Inspection:
    """Read an adapter's configuration and header, and compare them with the base model's where that is at hand.

    Raises:
        CheckpointError: it cannot be exported; the message says why, and what to do.
    """
    config = read_config(path)
    header = read_header(path)
    name = base_name or named_base(config)
    found = Inspection(
        str(path),
        str(config["peft_type"]),
        name,
        len(header),
        sum(math.prod(shape) for _, shape in header.values()),
        dict(Counter(dtype for dtype, _ in header.values())),
    )
    if found.base is None or (base_name is None and not directory_of(found.base)):
        return dataclasses.replace(found, unchecked=f"{found.base or 'it names none'} is no directory here. Pass --base DIR.")
    try:
        base = load_base(found.base)
    except CheckpointError as error:
        if base_name is not None:
            raise
        return dataclasses.replace(found, unchecked=str(error))
    checkpoint = load_checkpoint(path, base)
    return dataclasses.replace(found, branches=checkpoint.branches, changes=checkpoint.changes)


def _last(tensor: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `up_proj`."""
    return tensor.removesuffix(".weight").rpartition(".")[2]
