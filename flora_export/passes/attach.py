"""Attach: put every branch beside its block, unfused, as the method defines it.

    before   x ── block ── y
    after    x ─┬─ block ─────────────── y ── Add ── y'
                └─ A ── φ ── z ── sB ─────────┘

A gated branch has z = act(G x) ⊙ (A x), with the host MLP's own activation copied node for node. In a bank that is a stack, A, G and B are
those that a row's index gathers: A is stack[index], [batch, d, r].
The scale s is folded into B in fp32, before the cast to the graph's precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from flora_export.bank import BASE, slot_of
from flora_export.branch import GATED, Branch
from flora_export.checkpoint import Checkpoint
from flora_export.errors import FusionError
from flora_export.passes.bank import index_of
from flora_export.passes.hosts import clone_chain, host_node, neurons
from flora_export.weights import Array, Part, Stacked, add_weight, parts_of, zeros


class Attach(ir.passes.InPlacePass):
    """Adds the nodes `{block}.ffba_A`, `_G`, `_B`, `_add` and the activation between them."""

    def __init__(self, branches: Sequence[Branch], checkpoint: Checkpoint) -> None:
        self.branches, self.checkpoint = branches, checkpoint

    def requires(self, model: ir.Model) -> None:
        for branch in self.branches:
            for name in (*branch.reads, *branch.writes):
                host_node(model, name)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        waiting = [branch for branch in self.branches if not _holds(model, branch, "B")]
        for branch in waiting:
            self._attach_one(model, branch)
        return ir.passes.PassResult(model, modified=bool(waiting))

    def ensures(self, model: ir.Model) -> None:
        for branch in self.branches:
            for matrix in branch.matrices:
                if not _holds(model, branch, matrix):
                    raise FusionError(f"{branch.block}: {matrix} was not attached")

    def _attach_one(self, model: ir.Model, branch: Branch) -> None:
        reader, writer = host_node(model, branch.reads[0]), host_node(model, branch.writes[0])
        x, y = reader.inputs[0], writer.outputs[0]
        assert x is not None
        before: list[ir.Node] = []
        a = self._project(model, branch, "A", x, before)
        if branch.activation == GATED:
            host = neurons(model, branch)
            if host.up is None:
                raise FusionError(f"{branch.block} is not a gated MLP in the graph, so activation 'gated' has no gate to copy")
            g = self._project(model, branch, "G", x, before)
            before += clone_chain(host.chain, host.source.value, g, f"{branch.block}.ffba_act")
            before.append(_node("Mul", [before[-1].outputs[0], a], f"{branch.block}.ffba_z"))
        else:
            for index, (operator, inputs) in enumerate(_ACTIVATIONS[branch.activation]):
                values = [a if i == -1 else before[i].outputs[0] for i in inputs]
                before.append(_node(operator, values, f"{branch.block}.ffba_act.{operator}_{index}"))
        z = before[-1].outputs[0]
        after: list[ir.Node] = []
        b = self._project(model, branch, "B", z, after)
        total = _node("Add", [y, b], f"{branch.block}.ffba_add")
        after.append(total)
        y.replace_all_uses_with(total.outputs[0])
        total.replace_input_with(0, y)  # the line above has redirected this use of y as well
        model.graph.insert_before(writer, before)
        model.graph.insert_after(writer, after)

    def _project(self, model: ir.Model, branch: Branch, matrix: str, source: ir.Value, nodes: list[ir.Node]) -> ir.Value:
        """source [..., in] @ weight [in, out]; adds the node and its weight, returns the product."""
        dtype = model.graph.initializers[branch.writes[0]].dtype
        assert dtype is not None
        width = next(iter(model.graph.initializers[branch.reads[0]].shape or ()))
        assert isinstance(width, int)
        weight = add_weight(model, (self._stack if branch.slots else self._side_by_side)(branch, matrix, width, dtype))
        if branch.slots:
            nodes.append(_node("Gather", [weight, index_of(model)], f"{branch.block}.ffba_{matrix}_own"))
            weight = nodes[-1].outputs[0]
        node = _node("MatMul", [source, weight], f"{branch.block}.ffba_{matrix}")
        nodes.append(node)
        return node.outputs[0]

    def _side_by_side(self, branch: Branch, matrix: str, width: int, dtype: ir.DataType) -> Stacked:
        """A as [d, r] or B as [r, d], the adapters of a bank along the axis of size r."""
        axis = 0 if matrix == "B" else 1
        # φ(0) meets rows of zeros: nothing is added
        lead, padding = (
            [zeros([size, width] if axis == 0 else [width, size], axis, dtype)] if size else [] for size in (branch.lead, branch.padding)
        )
        parts = [*lead, *(_part(self.checkpoint, own, matrix, dtype) for own in branch.own), *padding]
        return Stacked(weight_name(branch, matrix), parts, axis, dtype, [width])

    def _stack(self, branch: Branch, matrix: str, width: int, dtype: ir.DataType) -> Stacked:
        """A as [1 + slots, d, r] or B as [1 + slots, r, d]: zeros for the base model, then the adapters by slot."""
        room = branch.columns
        dims = [room, width] if matrix == "B" else [width, room]
        taken = {slot_of(own.tensor(matrix)): _part(self.checkpoint, own, matrix, dtype, room) for own in branch.members}
        parts = [taken.get(slot) or zeros([1, *dims], 0, dtype) for slot in range(BASE, branch.slots)]
        return Stacked(weight_name(branch, matrix), parts, 0, dtype, dims)


# φ as operators; an input of -1 is A x, others count the branch's nodes from the A projection (0).
_ACTIVATIONS: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {
    "identity": (),
    "relu": (("Relu", (-1,)),),
    "silu": (("Sigmoid", (-1,)), ("Mul", (-1, 1))),
    "gelu": (("Gelu", (-1,)),),
}


def _holds(model: ir.Model, branch: Branch, matrix: str) -> bool:
    """Whether a matrix is in the graph: on its own, or within a host that a pass has widened."""
    initializers = model.graph.initializers
    hosts = [initializers[name] for name in (*branch.reads, *branch.writes, weight_name(branch, matrix)) if name in initializers]
    held = {part.tensor for host in hosts for part in parts_of(host)[1]}
    return all(own.tensor(matrix) in held for own in branch.own)


def weight_name(branch: Branch, matrix: str) -> str:
    """Name of a matrix's own initializer, while it has one."""
    return f"{branch.block}.ffba_{matrix}.weight_t"


def _node(operator: str, inputs: Sequence[ir.Value], name: str) -> ir.Node:
    node = ir.node(operator, inputs, name=name)
    node.outputs[0].name = f"{name}.out"
    return node


def _part(checkpoint: Checkpoint, branch: Branch, matrix: str, dtype: ir.DataType, room: int = 0) -> Part:
    """A matrix as it stands in the graph: [in, out], B times s, in the graph's precision; in a stack one layer of it."""
    scale = branch.scale if matrix == "B" else 1.0
    reader = adapter_reader(checkpoint, branch, matrix, dtype, room)
    return Part(branch.tensor(matrix), "adapter", 1 if room else branch.rank, scale, reader)


def adapter_reader(checkpoint: Checkpoint, branch: Branch, matrix: str, dtype: ir.DataType, room: int = 0) -> Callable[[], Array]:
    """Reads a matrix of the checkpoint as the graph holds it; with `room`, in a stack for ranks up to that, zeros beside its own.

    Raises FusionError where a number overflows the precision.
    """

    def read() -> Array:
        values = checkpoint.matrix(branch, matrix)
        if matrix == "B":
            values = values * np.float32(branch.scale)
        values = values.T
        if room:
            beside = (0, room - branch.rank)
            values = np.pad(values, (beside, (0, 0)) if matrix == "B" else ((0, 0), beside))[None]
        return cast_scaled(values, dtype, f"{branch.block} {matrix}")

    return read


def cast_scaled(values: Array, dtype: ir.DataType, what: str) -> Array:
    """An adapter's matrix in the graph's precision. Raises FusionError where a number overflows it."""
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(values).astype(dtype.numpy())
    if not np.isfinite(cast).all():
        raise FusionError(f"{what}, scaled, overflows {dtype.name}: build with --precision fp32 or bf16")
    return cast
