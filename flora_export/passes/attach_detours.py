"""AttachDetours: A and B stay beside the projection that they change, instead of being merged into it.

    before   x ── W ── y
    after    x ─┬─ W ─────────── y ── Add ── y'
                └─ A ── sB ───────────┘

Projections that are packed in one weight share one GEMM for all their A, and one for all their B:

    [x A1 B1, x A2 B2, x A3 B3] = x [A1 A2 A3] [B1 0 0; 0 B2 0; 0 0 B3]

FuseForward then makes the A's more columns of the host, as x [W A] = [x W, x A]. B needs A's result, so it stays apart at every level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import onnx_ir as ir

from flora_export.base_model import BaseModel
from flora_export.branch import Detour
from flora_export.checkpoint import Checkpoint
from flora_export.errors import FusionError
from flora_export.passes.attach import cast_scaled
from flora_export.passes.hosts import host_node
from flora_export.provenance import find_places
from flora_export.weights import Array, Part, Stacked, add_weight, dims_of, parts_of, zeros


def place_detours(model: ir.Model, checkpoint: Checkpoint, base: BaseModel) -> tuple[Detour, ...]:
    """The adapter's detours with their hosts in a captured graph that no pass has widened, host by host, in the order of its columns.

    Raises:
        FusionError: a projection is not whole in one weight of the graph; the message names it.
    """
    found = find_places(model, base, {detour.tensor for detour in checkpoint.detours})
    placed = []
    for detour in checkpoint.detours:
        places = found[detour.tensor]
        if len(places) != 1 or places[0].rows != base.shapes[detour.tensor][0] or places[0].axis != 1:
            where = ", ".join(place.initializer for place in places) or "nowhere"
            raise FusionError(
                f"{detour.tensor}: its A and B need it whole in one weight [in, out] of the graph, but it is in: {where}. "
                "Build with --merge."
            )
        if host_node(model, places[0].initializer).outputs[0].is_graph_output():
            raise FusionError(f"{detour.tensor} makes an output of the graph, and nothing can be added beside it. Build with --merge.")
        placed.append(replace(detour, host=places[0].initializer, offset=places[0].offset, columns=places[0].rows))
    return tuple(sorted(placed, key=lambda detour: (detour.host, detour.offset)))


class AttachDetours(ir.passes.InPlacePass):
    """Adds, per host, the nodes `{host}.detour_A`, `.detour_B` and `.detour_add`."""

    def __init__(self, detours: Sequence[Detour], checkpoint: Checkpoint, align: int = 1) -> None:
        """`detours` as `place_detours` returns them; the ranks of a host are padded together to a multiple of `align`."""
        self.hosts = {host: tuple(group) for host, group in groupby(detours, key=lambda detour: detour.host)}
        self.checkpoint, self.align = checkpoint, align

    def requires(self, model: ir.Model) -> None:
        for host in self.hosts:
            host_node(model, host)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        waiting = [host for host in self.hosts if detour_weight(host, "B") not in model.graph.initializers]
        for host in waiting:
            self._attach_one(model, host)
        return ir.passes.PassResult(model, modified=bool(waiting))

    def ensures(self, model: ir.Model) -> None:
        initializers = model.graph.initializers
        for host, detours in self.hosts.items():
            names = [name for name in (host, detour_weight(host, "A"), detour_weight(host, "B")) if name in initializers]
            held = {part.tensor for name in names for part in parts_of(initializers[name])[1]}
            for detour in detours:
                if not {detour.a, detour.b} <= held:
                    raise FusionError(f"{detour.tensor}: {detour.a} or {detour.b} was not attached")

    def _attach_one(self, model: ir.Model, host: str) -> None:
        node, weight = host_node(model, host), model.graph.initializers[host]
        x, y, dtype = node.inputs[0], node.outputs[0], weight.dtype
        assert x is not None and dtype is not None
        inputs, outputs = dims_of(weight)
        detours = self.hosts[host]
        down = [Part(d.a, "adapter", d.rank, 1.0, detour_reader(self.checkpoint, d, "A", dtype)) for d in detours]
        up = [Part(d.b, "adapter", d.rank, d.scale, detour_reader(self.checkpoint, d, "B", dtype, outputs)) for d in detours]
        if padding := -sum(d.rank for d in detours) % self.align:
            down.append(zeros([inputs, padding], 1, dtype))
            up.append(zeros([padding, outputs], 0, dtype))
        a = _matmul(model, x, Stacked(detour_weight(host, "A"), down, 1, dtype, [inputs]), f"{host}.detour_A")  # [in, ranks]
        b = _matmul(model, a.outputs[0], Stacked(detour_weight(host, "B"), up, 0, dtype, [outputs]), f"{host}.detour_B")  # [ranks, out]
        total = ir.node("Add", [y, b.outputs[0]], name=f"{host}.detour_add")
        total.outputs[0].name = f"{host}.detour_add.out"
        y.replace_all_uses_with(total.outputs[0])
        total.replace_input_with(0, y)  # the line above has redirected this use of y as well
        model.graph.insert_after(node, [a, b, total])


def detour_weight(host: str, matrix: str) -> str:
    """Name of a host's A's or B's. It does not begin as the host's module does, whose own projections are found by their names."""
    return f"detour_{matrix}.{host}"


def detour_reader(checkpoint: Checkpoint, detour: Detour, matrix: str, dtype: ir.DataType, outputs: int = 0) -> Callable[[], Array]:
    """Reads A as [in, r], or s B as [r, outputs] with zeros beside its own columns. Raises FusionError where a number overflows."""

    def read() -> Array:
        values = checkpoint.tensor(detour.a if matrix == "A" else detour.b).T
        if matrix == "B":
            values = np.pad(values * np.float32(detour.scale), ((0, 0), (detour.offset, outputs - detour.offset - detour.columns)))
        return cast_scaled(values, dtype, f"{detour.tensor} {matrix}")

    return read


def _matmul(model: ir.Model, source: ir.Value, tensor: Stacked, name: str) -> ir.Node:
    node = ir.node("MatMul", [source, add_weight(model, tensor)], name=name)
    node.outputs[0].name = f"{name}.out"
    return node
