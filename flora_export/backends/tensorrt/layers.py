"""Read an engine's list of layers: which GEMM took which host and which adapter, and how many kernels the adapter adds.

The builder lists one layer a line: name, kind, shapes, and the ONNX nodes that are in it. Nodes are traced to their weights, and weights
to adapter tensors by the ledger; nothing is guessed from shapes.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from flora_export.errors import BackendError
from flora_export.manifest import LedgerEntry
from flora_export.weights import dims_of

_NOT_KERNELS = ("ShapeHostToDevice", "shape_call", "Constant")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_GROUP = re.compile(r"_myl(\d+)_\d+$")


@dataclass(frozen=True)
class Layer:
    """One kernel of an engine. `profile` is the number of its optimization profile, `nodes` the ONNX nodes in it."""

    name: str
    kind: str
    profile: int
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Gemm:
    """A kernel that multiplies by weights: their names, how many columns they have together, and the adapter tensors in them."""

    profile: int | str
    layer: str
    weights: tuple[str, ...]
    rows: int
    columns: int
    adapters: tuple[str, ...]
    alone: bool  # nothing but adapter is in it


@dataclass(frozen=True)
class LayerReport:
    """What an engine is made of, by profile."""

    kernels: tuple[int, ...]
    gemms: tuple[Gemm, ...]

    def gemm_count(self, profile: int) -> int:
        return sum(gemm.profile == profile for gemm in self.gemms)


def parse_layers(text: str) -> list[Layer]:
    """The layers in the builder's message that begins with `Layers:`.

    Raises:
        BackendError: the message has no layers, as when the profiling verbosity was not detailed.
    """
    lines = [line for line in text.split("\n") if line.startswith("Name: ") and "LayerType: " in line]
    if not lines:
        raise BackendError("TensorRT's build log lists no layers of the engine, so it cannot be told what became of the adapter")
    found = []
    for line in lines:
        name, _, rest = line.removeprefix("Name: ").partition(", LayerType: ")
        kind = rest.partition(",")[0]
        nodes = tuple(re.findall(r"\[ONNX Layer: ([^\]]+)\]", line.rpartition("Metadata:")[2]))
        found.append((name, kind, nodes))
    # Layers of one profile share a number in their names, and those of the second and later ones that are named after ONNX nodes say so.
    groups = [match.group(1) if (match := _GROUP.search(name)) else None for name, _, _ in found]
    profiles: dict[str | None, int] = dict.fromkeys(groups, 0)
    for (name, _, _), group in zip(found, groups, strict=True):
        if match := _PROFILE.search(name):
            profiles[group] = int(match.group(1))
    if None in groups and any(kind not in _NOT_KERNELS and group is None for (_, kind, _), group in zip(found, groups, strict=True)):
        raise BackendError("TensorRT's build log names layers in a way that does not tell their profile; is it a version that is newer?")
    return [Layer(name, kind, profiles[group], nodes) for (name, kind, nodes), group in zip(found, groups, strict=True)]


def report_layers(text: str, model: ir.Model, ledger: Sequence[LedgerEntry]) -> LayerReport:
    """Trace the layers of an engine to the graph that it was built from, and its weights by the ledger to adapter tensors."""
    parts = defaultdict(list)
    for entry in ledger:
        parts[entry.initializer].append(entry)
    layers = [layer for layer in parse_layers(text) if layer.kind not in _NOT_KERNELS]
    weights = {node.name: value for node in model.graph if (value := _weight(node)) is not None}
    kernels = Counter(layer.profile for layer in layers)
    gemms = []
    for layer in layers:
        held = [weights[node] for node in layer.nodes if node in weights]
        if held:
            gemms.append(_gemm(layer, held, parts))
    return LayerReport(tuple(kernels[profile] for profile in sorted(kernels)), tuple(gemms))


def _weight(node: ir.Node) -> ir.Value | None:
    """The weight of a GEMM, or None where the node is none."""
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    inputs = [_dequantized(v) or v for v in node.inputs if v is not None]
    return next((v for v in inputs if v.is_initializer() or _transposed(v) is not None), None)


def _transposed(value: ir.Value) -> ir.Value | None:
    """The initializer that a value is the transpose of: a tied head reads the embedding."""
    return _made_by("Transpose", value)


def _dequantized(value: ir.Value) -> ir.Value | None:
    """The codes that a value is read from."""
    return _made_by("DequantizeLinear", value)


def _made_by(operator: str, value: ir.Value) -> ir.Value | None:
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == operator else None
    return source if source is not None and source.is_initializer() else None


def _gemm(layer: Layer, held: Sequence[ir.Value], ledger: Mapping[str, Sequence[LedgerEntry]]) -> Gemm:
    sources = [_transposed(value) or value for value in held]
    parts = [entry for value in sources for entry in ledger.get(value.name or "", ())]
    rows, columns = [], []
    for value, source in zip(held, sources, strict=True):
        dims = dims_of(source)
        rows.append(dims[0] if value is source else dims[1])
        columns.append(dims[1] if value is source else dims[0])
    return Gemm(
        layer.profile,
        layer.name,
        tuple(value.name or "" for value in sources),
        max(rows),
        sum(columns),
        tuple(part.tensor for part in parts if part.origin == "adapter"),
        bool(parts) and all(part.origin in ("adapter", "zeros") for part in parts),
    )


def compare_layers(adapted: LayerReport, base: LayerReport | None, names: Sequence[str]) -> dict[str, Any]:
    """Counts by profile, for the manifest: kernels and GEMMs of the engine and of the base model's, and adapter GEMMs that stand alone."""

    def counts(report: LayerReport) -> dict[str, Any]:
        return {
            "kernels": dict(zip(names, report.kernels, strict=False)),
            "gemms": {name: report.gemm_count(index) for index, name in enumerate(names)},
        }

    return {
        "adapted": counts(adapted),
        "base": counts(base) if base is not None else None,
        "adapter_gemms_alone": [gemm.layer for gemm in adapted.gemms if gemm.alone],
    }
