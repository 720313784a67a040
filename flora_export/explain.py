"""What became of each branch, as a table: fused forward, fused backward, neurons, or not fused and why."""

from __future__ import annotations

import dataclasses
from typing import Any

from flora_export.artifact import BlockRecord, LedgerEntry
from flora_export.ledger import LedgerReport

COUNTED = {"GEMMs": ("MatMul", "Gemm"), "Split": ("Split",), "Concat": ("Concat",)}


def ledger_dict(
    blocks: list[BlockRecord], operators: dict[str, dict[str, int]], entries: list[LedgerEntry], report: LedgerReport | None
) -> dict[str, Any]:
    """The ledger as one JSON object: `tensors` are the adapter's, `base` the base model's."""
    return {
        "ok": report is None or not report.faults,
        "faults": [] if report is None else report.faults,
        "slices_checked": 0 if report is None else report.checked,
        "blocks": [dataclasses.asdict(block) for block in blocks],
        "operators": operators,
        "tensors": [dataclasses.asdict(entry) for entry in entries if entry.origin == "adapter"],
        "base": [dataclasses.asdict(entry) for entry in entries if entry.origin != "adapter"],
    }


def ledger_text(blocks: list[BlockRecord], operators: dict[str, dict[str, int]], report: LedgerReport | None) -> str:
    """The same for the eye: a row per block, then the operators, then the verdict."""
    width = max(len(block.block) for block in blocks)
    lines = [f"{'block':<{width}}  {'rank':>4}  {'scale':>7}  {'activation':<10}  {'fusion':<16}  hosts"]
    for block in blocks:
        hosts = f"{' + '.join(map(short, block.reads))} -> {' + '.join(map(short, block.writes))}"
        why = f"  ({block.reason})" if block.reason else ""
        lines.append(
            f"{block.block:<{width}}  {block.rank:>4}  {block.scale:>7g}  {block.activation:<10}  {block.fusion:<16}  {hosts}{why}"
        )
    lines.append("")
    for label, names in COUNTED.items():
        before, after = (sum(operators[when].get(name, 0) for name in names) for when in ("before", "after"))
        lines.append(f"{label:<7} {before} in the base model, {after} with the adapter")
    if report is not None:
        lines.append("")
        lines += [f"FAULT {fault}" for fault in report.faults]
        verdict = f"{len(report.faults)} faults" if report.faults else "every one is in its place"
        lines.append(f"{report.checked} slices checked bit for bit, {report.adapter_tensors} adapter tensors: {verdict}")
    return "\n".join(lines)


def short(weight: str) -> str:
    """`model.layers.0.mlp.up_proj.weight_t` -> `up_proj`; a packed one -> `q_proj|k_proj|v_proj`."""
    return "|".join(
        name.removesuffix("_t").removesuffix(".weight").rpartition(".")[2] for name in weight.removesuffix("__axis_0__concat_t").split("__")
    )
