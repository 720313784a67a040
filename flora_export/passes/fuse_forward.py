"""FuseForward: A (and G) become more output columns of a projection that reads the same x.

before   x ─┬─ W ── q            after   x ── [W, G, A] ── Split ─┬─ q
            ├─ G ── g                                             ├─ g
            └─ A ── a                                             └─ a

x [W G A] = [x W, x G, x A]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from flora_export.branch import Branch, Detour
from flora_export.errors import FusionError
from flora_export.passes.attach import weight_name
from flora_export.passes.attach_detours import detour_weight
from flora_export.passes.hosts import host_node, own_parts
from flora_export.weights import add_constant, dims_of, widen


class FuseForward(ir.passes.InPlacePass):
    """Widens, per branch, the host with the fewest columns: Split copies what it cuts off, so the smallest costs least.

    A detour has one host, which takes all its A's at once.
    """

    def __init__(self, branches: Sequence[Branch], detours: Sequence[Detour] = ()) -> None:
        hosts = dict.fromkeys(detour.host for detour in detours)
        self.adapters = [
            *(_Forward(b.block, f"{b.block}.ffba", b.reads, tuple(weight_name(b, m) for m in b.forward_matrices)) for b in branches),
            *(_Forward(host, f"{host}.detour", (host,), (detour_weight(host, "A"),)) for host in hosts),
        ]

    def requires(self, model: ir.Model) -> None:
        for adapter in self._waiting(model):
            for name in adapter.reads:
                host_node(model, name)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        waiting = self._waiting(model)
        for adapter in waiting:
            _fuse_one(model, adapter)
        return ir.passes.PassResult(model, modified=bool(waiting))

    def ensures(self, model: ir.Model) -> None:
        for adapter in self._waiting(model):
            raise FusionError(f"{adapter.where}: its forward adapter is still apart from {', '.join(adapter.reads)}")

    def _waiting(self, model: ir.Model) -> list[_Forward]:
        return [adapter for adapter in self.adapters if adapter.weights[-1] in model.graph.initializers]


@dataclass(frozen=True)
class _Forward:
    """A forward adapter: the prefix of its nodes, the hosts that it can go into, and the weights [in, r] of its own."""

    where: str
    prefix: str
    reads: tuple[str, ...]
    weights: tuple[str, ...]


def _fuse_one(model: ir.Model, forward: _Forward) -> None:
    graph = model.graph
    weight = min((graph.initializers[name] for name in forward.reads), key=lambda value: dims_of(value)[1])
    host = host_node(model, weight.name or "")
    adapters = [host_node(model, name) for name in forward.weights]
    product = host.outputs[0]
    if product.is_graph_output():
        raise FusionError(f"{forward.where}: {weight.name} makes the graph's output {product.name}, which cannot be widened")
    columns = dims_of(weight)[1]
    widen(weight, 1, [(columns, part) for node in adapters for part in own_parts(node)])

    sizes = add_constant(
        model, f"{forward.prefix}_split.sizes", [columns, *(dims_of(graph.initializers[name])[1] for name in forward.weights)]
    )
    split = ir.node("Split", [product, sizes], attributes={"axis": -1}, num_outputs=1 + len(adapters), name=f"{forward.prefix}_split")
    # [batch, tokens, columns + n r] -> [batch, tokens, columns], n times [batch, tokens, r]
    for output, old in zip(split.outputs, [product, *(node.outputs[0] for node in adapters)], strict=True):
        output.name = f"{old.name}.{forward.prefix.rpartition('.')[2]}_split"
        old.replace_all_uses_with(output)
    split.replace_input_with(0, product)  # the loop has redirected this use of the product as well
    product.shape = None  # it was the host's alone
    graph.insert_after(host, split)
    for node in adapters:
        graph.remove(node, safe=True)
    for name in forward.weights:
        del graph.initializers[name]
