"""A written graph, edited in memory for a comparison; its weights stay where they are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from flora_export.artifact import Artifact
from flora_export.backends import check_can_be_silenced
from flora_export.manifest import LedgerEntry
from flora_export.passes.hosts import projections_of
from flora_export.quantization.packing import read_form
from flora_export.weights import dims_of

IN_FULL = 1  # MatMulNBits' accuracy_level that computes in fp32


def edited_graph(artifact: Artifact, *, adapter: bool = True, exact: bool = False) -> bytes:
    """An artifact's graph, with its adapter or without (a bank is left as it is), as it is or with quantized weights multiplied exactly.

    Raises:
        FloraExportError: the adapter is merged into the base's weights, so that there is no graph without it.
    """
    adapter = adapter or artifact.manifest.bank is not None  # a bank is told by each run
    if adapter and not (exact and artifact.manifest.quantization):
        return artifact.model.read_bytes()
    model = ir.load(artifact.model)
    if not adapter:
        check_can_be_silenced(artifact)
        _silence(model, artifact)
    if exact:
        multiply_in_full(model)
    graph: bytes = ir.to_proto(model).SerializeToString()
    return graph


def multiply_in_full(model: ir.Model) -> None:
    """Have quantized weights multiplied in fp32: no rounding of activations to int8."""
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", IN_FULL)


def _silence(model: ir.Model, artifact: Artifact) -> None:
    """What is fed to B's rows of a weight is multiplied by zero.

    (Replacing the initializers in the session is not enough: a graph that ONNX Runtime casts to another precision keeps the file's.)
    """
    for entry in artifact.manifest.ledger:
        weight = model.graph.initializers.get(entry.initializer)
        if weight is None or entry.origin != "adapter":
            continue
        for node in projections_of(weight):
            rows = _rows_of(entry, node, weight)
            if rows is None:
                continue
            total, (start, stop) = rows
            source = node.inputs[0]
            mask = np.ones(total, _computed(weight).numpy())
            mask[start:stop] = 0
            value = ir.Value(name=f"{entry.tensor}.mask", const_value=ir.tensor(mask, name=f"{entry.tensor}.mask"))
            model.graph.initializers.add(value)
            silenced = ir.node("Mul", [source, value], name=f"{entry.tensor}.silenced")
            silenced.outputs[0].name = f"{entry.tensor}.silenced.out"
            model.graph.insert_before(node, silenced)
            node.replace_input_with(0, silenced.outputs[0])


def _rows_of(entry: LedgerEntry, node: ir.Node, weight: ir.Value) -> tuple[int, tuple[int, int]] | None:
    """(rows of a weight [in, out], those that a B fills); None where the entry is no B: what fills columns is an A."""
    if not entry.form:
        return (dims_of(weight)[0], (entry.start, entry.stop)) if entry.axis == 0 else None
    form = read_form(entry.form)
    if form.axis(entry.axis) != 0 or form.content != "codes":
        return None
    if node.op_type == "MatMul":
        return dims_of(weight)[0], (entry.start, entry.stop)
    return node.attributes["K"].as_int(), (entry.start * form.block_size, entry.stop * form.block_size)


def _computed(weight: ir.Value) -> ir.DataType:
    """The precision that a weight is multiplied in: its own, or its scales'."""
    node = next(node for node, _ in weight.uses())
    scales = node.inputs[2 if node.op_type == "MatMulNBits" else 1]
    assert scales is not None and scales.dtype is not None
    return scales.dtype
