"""What became of each branch, as a table: fused forward, fused backward, neurons, or not fused and why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from flora_export.artifact import BlockRecord, LedgerEntry
from flora_export.ledger import LedgerReport
from flora_export.weights import short

COUNTED = {"GEMMs": ("MatMul", "Gemm"), "Split": ("Split",), "Concat": ("Concat",)}


@dataclass(frozen=True)
class Explanation:
    """An artifact, checked; or the plan for a checkpoint, which has no report."""

    blocks: list[BlockRecord]
    operators: dict[str, dict[str, int]]
    entries: list[LedgerEntry]
    report: LedgerReport | None = None
    align: int = 1
    details: dict[str, Any] = field(default_factory=dict)  # what the backend adds, for programs
    lines: list[str] = field(default_factory=list)  # and for the eye

    @property
    def faults(self) -> list[str]:
        return [] if self.report is None else self.report.faults

    def to_dict(self) -> dict[str, Any]:
        """One JSON object: `tensors` are the adapter's, `base` the base model's."""
        return {
            "ok": not self.faults,
            "faults": self.faults,
            "slices_checked": 0 if self.report is None else self.report.checked,
            "bytes": {} if self.report is None else self.report.bytes,
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
            "operators": self.operators,
            "tensors": [dataclasses.asdict(entry) for entry in self.entries if entry.origin == "adapter"],
            "base": [dataclasses.asdict(entry) for entry in self.entries if entry.origin != "adapter"],
            **({"engine": {}, "gemms": []} | self.details),  # empty where nothing is compiled
        }

    def to_text(self) -> str:
        """The same for the eye: a row per block, then the operators, what the backend adds, and the verdict."""
        lines = [*_table(self.blocks), ""]
        for label, names in COUNTED.items():
            before, after = (sum(self.operators[when].get(name, 0) for name in names) for when in ("before", "after"))
            lines.append(f"{label:<7} {before} in the base model, {after} with the adapter")
        if self.lines:
            lines += ["", *self.lines]
        if self.report is not None:
            lines += ["", *_cost(self.report, self.blocks, self.align)]
            lines += [f"FAULT {fault}" for fault in self.faults]
            verdict = f"{len(self.faults)} faults" if self.faults else "every one is in its place"
            lines.append(f"{self.report.checked} slices checked bit for bit, {self.report.adapter_tensors} adapter tensors: {verdict}")
        return "\n".join(lines)


def _table(blocks: list[BlockRecord]) -> list[str]:
    width = max(len(block.block) for block in blocks)
    lines = [f"{'block':<{width}}  {'rank':>4}  {'scale':>7}  {'activation':<10}  {'fusion':<16}  hosts"]
    for block in blocks:
        hosts = f"{' + '.join(map(short, block.reads))} -> {' + '.join(map(short, block.writes))}"
        why = f"  ({block.reason})" if block.reason else ""
        lines.append(
            f"{block.block:<{width}}  {block.rank:>4}  {block.scale:>7g}  {block.activation:<10}  {block.fusion:<16}  {hosts}{why}"
        )
    return lines


def _cost(report: LedgerReport, blocks: list[BlockRecord], align: int) -> list[str]:
    """What the ranks cost in bytes, and where a larger one would cost nothing more."""
    sizes = report.bytes
    if not sizes.get("base") or not sizes.get("adapter"):
        return []
    lines = [f"weights: the adapter adds {sizes['adapter'] / sizes['base']:.2%} to the base model's bytes"]
    for rank in sorted({block.rank for block in blocks if block.rank % align}):
        free = rank + -rank % align
        lines.append(f"rank {rank} is padded with zeros to {free}, a multiple of {align} for tensor cores: rank {free} would be free")
    return lines
