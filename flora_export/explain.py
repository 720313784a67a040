"""What became of each branch, as a table: fused forward, fused backward, neurons, or not fused and why; and what an engine is made of."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from flora_export.artifact import BlockRecord, LedgerEntry
from flora_export.ledger import LedgerReport

COUNTED = {"GEMMs": ("MatMul", "Gemm"), "Split": ("Split",), "Concat": ("Concat",)}


@dataclass(frozen=True)
class Explanation:
    """An artifact, checked; or the plan for a checkpoint, which has no report."""

    blocks: list[BlockRecord]
    operators: dict[str, dict[str, int]]
    entries: list[LedgerEntry]
    report: LedgerReport | None = None
    align: int = 1
    engine: dict[str, Any] = field(default_factory=dict)  # of a compiled artifact, as its manifest has it
    gemms: list[dict[str, Any]] = field(default_factory=list)  # of that engine

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
            "engine": self.engine,
            "gemms": self.gemms,
        }

    def to_text(self) -> str:
        """The same for the eye: a row per block, then the operators, the engine, and the verdict."""
        lines = [*_table(self.blocks), ""]
        for label, names in COUNTED.items():
            before, after = (sum(self.operators[when].get(name, 0) for name in names) for when in ("before", "after"))
            lines.append(f"{label:<7} {before} in the base model, {after} with the adapter")
        if self.engine:
            lines += ["", *_engine(self.engine, self.gemms)]
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


def _engine(engine: dict[str, Any], gemms: list[dict[str, Any]]) -> list[str]:
    """Which GEMM of the engine took which adapter, in decode, and what the adapter adds to the base model's engine."""
    name = "TensorRT-RTX" if engine["flavour"] == "rtx" else "TensorRT"
    lines = [f"engine: {name} {engine['version']}, compute capability {', '.join(engine['compute_capabilities'])}"]
    for profile, bounds in sorted(engine["profiles"].items(), reverse=True):
        sizes = ", ".join(f"{key} {low} to {high} (best {best})" for key, (low, best, high) in bounds.items())
        lines.append(f"  profile {profile}: {sizes}")
    lines.append(f"  {'GEMM of a decode step':<64}  {'[in, out]':>14}  {'layers':>6}  adapters in it")
    alike = Counter(_gemm_row(gemm) for gemm in gemms if gemm["profile"] == "decode" and gemm["adapters"])
    lines += [f"  {title:<64}  {shape:>14}  {count:>6}  {adapters}" for (title, shape, adapters), count in alike.items()]
    layers = engine["layers"]
    for profile in ("prefill", "decode"):
        text = f"  {profile}: {layers['adapted']['kernels'][profile]} kernels, {layers['adapted']['gemms'][profile]} GEMMs"
        if layers["base"] is not None:
            text += f"; the base model's engine has {layers['base']['kernels'][profile]} and {layers['base']['gemms'][profile]}"
        lines.append(text)
    lines += [f"  adapter GEMM that stands alone: {layer}" for layer in layers["adapter_gemms_alone"]]
    return lines


def _gemm_row(gemm: dict[str, Any]) -> tuple[str, str, str]:
    """(block and hosts, shape, adapters) of a GEMM, the same for all layers that are built alike."""
    block = re.sub(r"\.\d+\.", ".*.", gemm["adapters"][0].rpartition(".ffba_")[0].removeprefix("base_model.model."))
    hosts = sorted(short(weight) for weight in gemm["weights"] if ".ffba_" not in weight)
    adapters = sorted(adapter.removesuffix(".weight").rpartition(".")[2] for adapter in gemm["adapters"])
    return f"{block}: {' + '.join(hosts) or 'none'}", f"[{gemm['rows']}, {gemm['columns']}]", ", ".join(adapters)


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


def short(weight: str) -> str:
    """`model.layers.0.mlp.up_proj.weight_t` -> `up_proj`; a packed one -> `q_proj|k_proj|v_proj`."""
    return "|".join(
        name.removesuffix("_t").removesuffix(".weight").rpartition(".")[2] for name in weight.removesuffix("__axis_0__concat_t").split("__")
    )
