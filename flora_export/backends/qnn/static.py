"""From the portable graph to two whose every dimension is fixed: `prefill`, N tokens after none, and `decode`, one token at a position.

    before   past [batch, h, C, s], new ── TensorScatter at position_ids ── present
    prefill  new [1, h, N, s], zeros [1, h, C - N, s] ── Concat ── present        no past, and positions 0 to N - 1 are constants
    decode   Where(0..C-1 = position, new [1, h, 1, s], past [1, h, C, s]) ── present

Both equal TensorScatter: of a cache of zeros, after which nothing but new keys is left; and of one token, which is broadcast to all places
and taken at its own. QNN has no TensorScatter, and knows no dimension that is not a number.

    before   x [1, T, h, s] ── RMSNormalization ── y
    after    x ── Reshape [1, T h, s] ── RMSNormalization ── Reshape [1, T, h, s] ── y

What works on rows, or element by element, may be done to rows that are counted otherwise. QNN's HTP takes no Tanh of rank 5 (a soft cap's),
and of RMSNormalization of rank 4 (that of queries and keys) it makes something else without a word.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from flora_export.errors import FusionError
from flora_export.passes.builder import Builder

FOLDED = ("RMSNormalization", "Tanh")  # of a higher rank than 3


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
    interface = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    for value in (value for node in graph for value in node.outputs):
        if value not in interface:
            value.shape = None
    ShapeInferencePass()(model)
    for node in [node for node in graph if node.op_type in FOLDED]:
        _fold_rows(model, node)


def _fold_rows(model: ir.Model, node: ir.Node) -> None:
    """Have a node see [1, rows, size] where it saw a higher rank."""
    (x, *_), y = node.inputs, node.outputs[0]
    assert x is not None
    sizes = _sizes(x.shape)
    if sizes is None:
        raise FusionError(f"{node.name}: {x.name} is {x.shape}, and not every dimension of it is known")
    if len(sizes) <= 3:
        return
    make = Builder(model, node, node.name or "")
    folded = [1, math.prod(sizes[:-1]), sizes[-1]]
    rows = make("Reshape", [x, _constant(model, "qnn.shape_" + "_".join(map(str, folded)), np.array(folded, np.int64))], "rows")
    rows.shape, rows.type = ir.Shape(folded), x.type
    node.replace_input_with(0, rows)
    shape = _constant(model, "qnn.shape_" + "_".join(map(str, sizes)), np.array(sizes, np.int64))
    back = ir.node("Reshape", [y, shape], name=f"{node.name}.unfolded")
    back.outputs[0].name = f"{node.name}.unfolded.out"
    model.graph.insert_after(node, back)
    _replace(y, back.outputs[0])
    back.replace_input_with(0, y)  # the line above has redirected this use as well
    y.shape = ir.Shape(folded)


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
        model.graph.initializers.add(ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor))
    return model.graph.initializers[name]


def _replace(old: ir.Value, new: ir.Value) -> None:
    """`new` becomes the graph output that `old` was, by name and type."""
    new.type, new.shape = old.type, old.shape or new.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{old.name}.replaced", old.name


def _fixed(value: ir.Value, tokens: int) -> ir.Shape:
    """Its shape for one row. Raises FusionError where a dimension is another than rows and tokens."""
    known: dict[str, int] = {"batch": 1, "sequence_len": tokens}
    sizes = _sizes(ir.Shape([size if isinstance(size, int) else known.get(str(size.value)) for size in value.shape or ()]))
    if not sizes:
        raise FusionError(f"{value.name} is {value.shape}, and not every dimension of it is known")
    return ir.Shape(sizes)


def _sizes(shape: ir.Shape | None) -> list[int] | None:
    """The dimensions of a shape; None where one is not known."""
    sizes = [size for size in shape or () if isinstance(size, int)]
    return sizes if shape is not None and len(sizes) == len(shape) else None
