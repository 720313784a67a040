"""From the portable graph to two whose every dimension is fixed: `prefill`, N tokens after none, and `decode`, one token at a position.

    before   past [batch, h, C, s], new ── TensorScatter at position_ids ── present
    prefill  new [1, h, N, s], zeros [1, h, C - N, s] ── Concat ── present        no past, and positions 0 to N - 1 are constants
    decode   Where(0..C-1 = position, new [1, h, 1, s], past [1, h, C, s]) ── present

Both equal TensorScatter: of a cache of zeros, after which nothing but new keys is left; and of one token, which is broadcast to all places
and taken at its own. QNN has no TensorScatter, and knows no dimension that is not a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from flora_export.errors import FusionError
from flora_export.passes.builder import Builder

Ids = Sequence[int]


def fix_shapes(model: ir.Model, tokens: int) -> None:
    """Make, in place, the graph for one row of `tokens` tokens: `prefill`, or `decode` where that is one.

    Raises:
        FusionError: its cache has no static length, or a dimension is left that is not known.
    """
    graph = model.graph
    positions = next(value for value in graph.inputs if value.name == "position_ids")
    if tokens > 1:
        positions.replace_all_uses_with(_constant(model, "qnn.positions", np.arange(tokens, dtype=np.int64)[None]))
        graph.inputs.remove(positions)
    for node in [node for node in graph if node.op_type == "TensorScatter"]:
        past, new, _ = node.inputs
        assert past is not None and new is not None
        make = Builder(model, node, node.name or "")
        kept = _from_nothing(make, past, new, tokens) if tokens > 1 else _at_position(make, past, new, positions)
        _replace(node.outputs[0], kept)
        graph.remove(node, safe=True)
        if tokens > 1:
            graph.inputs.remove(past)
    RemoveUnusedNodesPass()(model)
    for value in (*graph.inputs, *graph.outputs):
        value.shape = _fixed(value, tokens)
    interface = set(graph.outputs)
    for node in graph:
        for value in node.outputs:
            if value not in interface:
                value.shape = None  # ONNX Runtime infers it from the inputs


def _from_nothing(make: Builder, past: ir.Value, new: ir.Value, tokens: int) -> ir.Value:
    """The cache after N tokens from place 0."""
    heads, places, size = _cache_shape(past)
    if places == tokens:
        return make("Identity", [new], "filled")
    assert past.dtype is not None
    rest = np.zeros((1, heads, places - tokens, size), past.dtype.numpy())
    return make("Concat", [new, _constant(make.model, f"qnn.rest_{heads}_{size}", rest)], "filled", axis=2)


def _at_position(make: Builder, past: ir.Value, new: ir.Value, positions: ir.Value) -> ir.Value:
    """The cache with one place written."""
    _, places, _ = _cache_shape(past)
    each = _constant(make.model, "qnn.places", np.arange(places, dtype=np.int64).reshape(1, 1, places, 1))
    here = make("Reshape", [positions, _constant(make.model, "qnn.scalar", np.ones(4, np.int64))], "position")  # [1, 1, 1, 1]
    return make("Where", [make("Equal", [each, here], "here"), new, past], "written")


def _cache_shape(past: ir.Value) -> tuple[int, int, int]:
    """(KV heads, places, head size) of a static cache. Raises FusionError where it is none."""
    shape = list(past.shape) if past.shape is not None else []
    if len(shape) != 4 or not all(isinstance(size, int) for size in shape[1:]):
        raise FusionError(f"{past.name} is {past.shape}, but QNN needs a cache of a fixed number of places: --kv-cache static:N")
    return int(shape[1]), int(shape[2]), int(shape[3])  # type: ignore[arg-type]


def _constant(model: ir.Model, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """An initializer by that name, made once for the graph."""
    if name not in model.graph.initializers:
        tensor = ir.tensor(array, name=name)
        model.graph.initializers.add(ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor))
    return model.graph.initializers[name]


def _replace(old: ir.Value, new: ir.Value) -> None:
    """`new` becomes the graph output that `old` was, by name and type."""
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{old.name}.replaced", old.name


def _fixed(value: ir.Value, tokens: int) -> ir.Shape:
    """Its shape for one row. Raises FusionError where a dimension is another than rows and tokens."""
    known: dict[str, int] = {"batch": 1, "sequence_len": tokens}
    sizes = [size if isinstance(size, int) else known.get(str(size.value)) for size in value.shape or ()]
    if not sizes or None in sizes:
        raise FusionError(f"{value.name} is {value.shape}, and not every dimension of it is known")
    return ir.Shape([size for size in sizes if size is not None])
