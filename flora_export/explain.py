"""What became of each branch and of each changed weight, as a table: fused forward, fused backward, neurons, or not fused and why."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from flora_export.bank import Bank
from flora_export.manifest import BlockRecord, ChangeRecord, LedgerEntry
from flora_export.proof import LedgerReport
from flora_export.provenance import read_name
from flora_export.weights import short

COUNTED = {"GEMMs": ("MatMul", "Gemm", "MatMulNBits"), "Split": ("Split",), "Concat": ("Concat",)}


@dataclass(frozen=True)
class Explanation:
    """An artifact, checked; or the plan for a checkpoint, which has no report."""

    blocks: list[BlockRecord]
    changes: list[ChangeRecord]
    operators: dict[str, dict[str, int]]
    entries: list[LedgerEntry]
    report: LedgerReport | None = None
    align: int = 1
    bank: Bank | None = None
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
            "adapters": self.bank.taken if self.bank is not None else {},
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
            "operators": self.operators,
            "tensors": [dataclasses.asdict(entry) for entry in self.entries if entry.origin == "adapter"],
            "changes": [dataclasses.asdict(change) for change in self.changes],
            "changed": [dataclasses.asdict(entry) for entry in self.entries if entry.origin == "changed"],
            "base": [dataclasses.asdict(entry) for entry in self.entries if entry.origin not in ("adapter", "changed")],
            **({"engine": {}, "gemms": []} | self.details),  # empty where nothing is compiled
        }

    def to_text(self) -> str:
        """The same for the eye: a row per block, then the operators, what the backend adds, and the verdict."""
        lines = [*_table(self.blocks), *_changes(self.changes, self.entries), ""]
        if self.bank is not None:
            taken = ", ".join(f"{slot} {name}" for name, slot in self.bank.taken.items())
            lines.append(f"adapters ({self.bank.layout}, {self.bank.slots} slots): {taken}")
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


def _changes(changes: list[ChangeRecord], entries: list[LedgerEntry]) -> list[str]:
    """A row for each changed weight: how, and in which initializers it is."""
    if not changes:
        return []
    places: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        if entry.origin == "changed":
            places[read_name(entry.tensor).tensors[0]].append(f"{short(entry.initializer)}[{entry.start}:{entry.stop}]")
    width = max(len(change.tensor) for change in changes)
    lines = [f"{'weight':<{width}}  {'change':<12}  {'rank':>4}  {'scale':>7}  in"]
    for change in changes:
        rank = change.rank or "-"
        lines.append(f"{change.tensor:<{width}}  {change.what:<12}  {rank:>4}  {change.scale:>7g}  {', '.join(places[change.tensor])}")
    return lines


def _table(blocks: list[BlockRecord]) -> list[str]:
    if not blocks:
        return []
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
        lines.append(f"rank {rank} is padded with zeros to {free}, a multiple of {align}: rank {free} would be free")
    return lines
