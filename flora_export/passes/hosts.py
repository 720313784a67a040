"""Find the host projections of a branch by dataflow.

Inside a module prefix such as `model.layers.3.mlp.` the MatMuls that read the block's input x are the forward hosts, and the one that
no other MatMul of the prefix reads is the backward host. No table of architectures.

    x ─┬─ gate ── act ──┐
       └─ up ───────────⊙── h ── down ── y        reads = (gate, up), writes = (down,)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from flora_export.branch import Branch
from flora_export.errors import FusionError
from flora_export.weights import Part, dims_of, parts_of

# Operators that act on each element alone, so that more columns in are more columns out and nothing else changes.
# fmt: off
ELEMENTWISE = frozenset((
    "Add", "Cast", "Div", "Elu", "Erf", "FastGelu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Mul", "Neg", "Pow",
    "QuickGelu", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Swish", "Tanh",
))
# fmt: on


@dataclass(frozen=True)
class Projection:
    """A first projection of a block, up to where its own operators end: MatMul, then a bias, then a Split into halves.

    `value` is what the rest of the block reads, `offset` and `size` the columns of the weight that make it.
    """

    weight: ir.Value  # [d, columns]
    bias: ir.Value | None
    split: ir.Node | None
    value: ir.Value
    offset: int
    size: int


@dataclass(frozen=True)
class Neurons:
    """How an MLP makes its neurons h: act(up) or act(gate) ⊙ up. `chain` is the activation, in order, from `source` to `result`."""

    source: Projection
    chain: tuple[ir.Node, ...]
    result: ir.Value
    up: Projection | None  # of a gated MLP
    product: ir.Node | None


def find_hosts(model: ir.Model, branches: Sequence[Branch], width: int | None) -> tuple[Branch, ...]:
    """Name the hosts of each branch. `width` None: they may be widened already.

    Raises:
        FusionError: a block has no such hosts in this graph, or more than one candidate; the message names the block.
    """
    matmuls = [node for node in model.graph if node.op_type in ("MatMul", "MatMulNBits") and _weight(node) is not None]
    return tuple(_find_one(branch, matmuls, width) for branch in branches)


def _find_one(branch: Branch, matmuls: Sequence[ir.Node], width: int | None) -> Branch:
    inside = [node for node in matmuls if _name(_weight(node)).startswith(branch.block + ".")]
    if not inside:
        raise FusionError(f"{branch.block}: the captured graph has no projection of that name; is it another layout of layers?")
    x = inside[0].inputs[0]
    readers = [node for node in inside if node.inputs[0] is x]
    writers = [node for node in inside if node.inputs[0] is not x]
    if len(writers) != 1:
        names = ", ".join(_name(_weight(node)) for node in writers) or "none"
        raise FusionError(
            f"{branch.block}: expected first projections that read the block's input and one last projection, "
            f"but the last ones are: {names}. "
            "Blocks with experts or several outputs are not supported."
        )
    for node, axis in ((readers[0], 0), (writers[0], 1)):
        if width is not None and (shape := _shape(node))[axis] != width:
            raise FusionError(f"{_name(_weight(node))} is {shape} in the graph, but axis {axis} should be the model's width {width}")
    return replace(branch, reads=tuple(_name(_weight(node)) for node in readers), writes=(_name(_weight(writers[0])),))


def host_node(model: ir.Model, weight_name: str) -> ir.Node:
    """The MatMul that owns a weight.

    Raises:
        FusionError: other nodes use the weight too, so that widening it would change them.
    """
    weight = model.graph.initializers.get(weight_name)
    if weight is None:
        raise FusionError(f"{weight_name}: no such initializer in the graph")
    users = [node for node, _ in weight.uses()]
    if len(users) != 1:
        others = ", ".join(f"{node.op_type} {node.name}" for node in users)
        raise FusionError(f"{weight_name} is shared by {len(users)} nodes ({others}), so it cannot be widened for one of them")
    return users[0]


def own_parts(adapter: ir.Node) -> tuple[Part, ...]:
    """The parts of an adapter projection's weight: its matrix, and the zeros that pad it."""
    weight = _weight(adapter)
    assert weight is not None
    return parts_of(weight)[1]


def projections(model: ir.Model, branch: Branch) -> list[Projection]:
    """The forward hosts, each followed through its bias and its split into halves."""
    found = []
    for name in branch.reads:
        weight, node = model.graph.initializers[name], host_node(model, name)
        value, bias, columns = node.outputs[0], None, _columns(weight)
        after = _only_user(value)
        if after is not None and after.op_type == "Add":
            bias = next((v for v in after.inputs if v is not None and v.is_initializer() and _columns(v) == columns), None)
            if bias is not None:
                value = after.outputs[0]
                after = _only_user(value)
        if after is not None and after.op_type == "Split" and len(after.outputs) == 2:
            half = columns // 2
            found += [Projection(weight, bias, after, out, index * half, half) for index, out in enumerate(after.outputs)]
        else:
            found.append(Projection(weight, bias, None, value, 0, columns))
    return found


def neurons(model: ir.Model, branch: Branch) -> Neurons:
    """Prove how a block computes the input h of its last projection, element by element.

    Raises:
        FusionError: it is neither act(up) nor act(gate) ⊙ up.
    """
    h = host_node(model, branch.writes[0]).inputs[0]
    assert h is not None
    sources = projections(model, branch)
    last = h.producer()
    if last is not None and last.op_type == "Mul":
        sides = [(value, *_trace(value, sources)) for value in last.inputs if value is not None]
        linear = [side for side in sides if not side[1] and len(side[2]) == 1]
        curved = [side for side in sides if side[1] and len(side[2]) == 1]
        if len(sides) == 2 and len(linear) == len(curved) == 1 and linear[0][2] != curved[0][2]:
            return Neurons(curved[0][2][0], tuple(curved[0][1]), curved[0][0], linear[0][2][0], last)
    chain, found = _trace(h, sources)
    if len(found) == 1 and chain:
        return Neurons(found[0], tuple(chain), h, None, None)
    raise FusionError(
        f"{branch.block}: cannot prove that the input of {branch.writes[0]} is act(up) or act(gate) times up, element by element"
    )


def _trace(value: ir.Value, sources: Sequence[Projection]) -> tuple[list[ir.Node], list[Projection]]:
    """Walk up from a value to the projections it is made of.

    Returns (nodes between, in order; projections), or ([], []) where a node on the way is not elementwise.
    """
    nodes: list[ir.Node] = []
    found: list[Projection] = []

    def walk(v: ir.Value) -> bool:
        source = next((p for p in sources if p.value is v), None)
        if source is not None:
            if source not in found:
                found.append(source)
            return True
        node = v.producer()
        if node is None:
            return v.is_initializer() and v.const_value is not None and v.const_value.size == 1
        if node in nodes:
            return True
        if node.op_type == "Constant":
            return v.const_value is not None and v.const_value.size == 1
        if node.op_type not in ELEMENTWISE or not all(walk(i) for i in node.inputs if i is not None):
            return False
        nodes.append(node)
        return True

    return (nodes, found) if walk(value) else ([], [])


def same_function(chain: Sequence[ir.Node], source: ir.Value, other: Sequence[ir.Node], other_source: ir.Value) -> bool:
    """Whether two chains of elementwise nodes compute the same function of their sources."""
    if len(chain) != len(other):
        return False
    match: dict[ir.Value | None, ir.Value | None] = {None: None, source: other_source}
    for a, b in zip(chain, other, strict=True):
        same_operator = (a.op_type, a.domain, len(a.inputs)) == (b.op_type, b.domain, len(b.inputs))
        same_attributes = {k: v.value for k, v in a.attributes.items()} == {k: v.value for k, v in b.attributes.items()}
        same_inputs = all(match.get(i, i) is j for i, j in zip(a.inputs, b.inputs, strict=False))
        if not (same_operator and same_attributes and same_inputs):
            return False
        match.update(zip(a.outputs, b.outputs, strict=True))
    return True


def clone_chain(chain: Sequence[ir.Node], source: ir.Value, new_source: ir.Value, prefix: str) -> Iterator[ir.Node]:
    """The same elementwise function of another value. Nodes and values are named under `prefix`."""
    match: dict[ir.Value | None, ir.Value | None] = {source: new_source}
    for index, node in enumerate(chain):
        name = f"{prefix}.{node.op_type}_{index}"
        copy = ir.node(
            node.op_type, [match.get(v, v) for v in node.inputs], attributes=dict(node.attributes), domain=node.domain, name=name
        )
        copy.outputs[0].name = name
        match[node.outputs[0]] = copy.outputs[0]
        yield copy


def projections_of(weight: ir.Value) -> list[ir.Node]:
    """The nodes that multiply by a weight, which may be read through a DequantizeLinear."""
    users = [node for node, index in weight.uses() if index == 1 or node.op_type == "DequantizeLinear"]
    return [
        user
        for node in users
        for user in ([each for each, _ in node.outputs[0].uses()] if node.op_type == "DequantizeLinear" else [node])
        if user.op_type in ("MatMul", "MatMulNBits")
    ]


def _weight(node: ir.Node) -> ir.Value | None:
    """The weight [in, out] of a MatMul, or None where both inputs are computed."""
    weight = node.inputs[1]
    source = weight.producer() if weight is not None else None
    if source is not None and source.op_type == "DequantizeLinear":
        weight = source.inputs[0]
    return weight if weight is not None and weight.is_initializer() else None


def _shape(node: ir.Node) -> list[int]:
    """[in, out] of a MatMul's weight, quantized or not."""
    weight = _weight(node)
    assert weight is not None
    return [node.attributes[name].as_int() for name in ("K", "N")] if node.op_type == "MatMulNBits" else dims_of(weight)


def _name(value: ir.Value | None) -> str:
    assert value is not None and value.name is not None
    return value.name


def _columns(value: ir.Value) -> int:
    assert value.shape is not None
    columns = value.shape[-1] if len(value.shape) else 1
    assert isinstance(columns, int)
    return columns


def _only_user(value: ir.Value) -> ir.Node | None:
    users = [node for node, _ in value.uses()]
    return users[0] if len(users) == 1 else None
