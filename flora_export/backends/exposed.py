"""A written graph with what its blocks return as outputs of its own: to see where it goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from flora_export.backends.edited import multiply_in_full
from flora_export.branch import Branch
from flora_export.passes.hosts import projections_of


def expose(model: Path, branches: Sequence[Branch]) -> tuple[bytes, dict[str, str]]:
    """The graph with every block's output as an output, and the names of these by block."""
    loaded = ir.load(model)
    graph, names = loaded.graph, {}
    for branch in branches:
        weight = graph.initializers.get(branch.writes[0])
        nodes = projections_of(weight) if weight is not None else []
        if weight is None or len(nodes) != 1:
            continue  # a damaged file: the ledger says so
        value = _block_output(nodes[0].outputs[0])
        if value.type is None or value.dtype is None:
            value.type = nodes[0].outputs[0].type or ir.TensorType(weight.dtype or ir.DataType.FLOAT)
        graph.outputs.append(value)
        names[branch.block] = value.name or ""
    multiply_in_full(loaded)
    proto: bytes = ir.to_proto(loaded).SerializeToString()
    return proto, names


def _block_output(value: ir.Value) -> ir.Value:
    """What the block returns: its last projection's product, after its bias and what an unfused adapter adds."""
    while True:
        users = [node for node, _ in value.uses()]
        if len(users) == 1 and (users[0].name or "").endswith(".detour_split"):
            value = users[0].outputs[0]
            continue
        if len(users) != 1 or users[0].op_type != "Add":
            return value
        (other,) = [v for v in users[0].inputs if v is not value] or [value]
        adapter = (users[0].name or "").endswith((".ffba_add", ".detour_add"))
        if not adapter and not (other is not None and other.is_initializer()):
            return value  # the residual: no longer the block
        value = users[0].outputs[0]
