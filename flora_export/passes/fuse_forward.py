"""FuseForward: A (and G) become more output columns of a projection that reads the same x.

before   x ─┬─ W ── q            after   x ── [W, G, A] ── Split ─┬─ q
            ├─ G ── g                                             ├─ g
            └─ A ── a                                             └─ a

x [W G A] = [x W, x G, x A]
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from flora_export.branch import Branch
from flora_export.errors import FusionError
from flora_export.passes.attach import weight_name
from flora_export.passes.hosts import host_node, own_parts
from flora_export.weights import add_constant, dims_of, widen


class FuseForward(ir.passes.InPlacePass):
    """Widens, per branch, the host with the fewest columns: Split copies what it cuts off, so the smallest costs least."""

    def __init__(self, branches: Sequence[Branch]) -> None:
        self.branches = branches

    def requires(self, model: ir.Model) -> None:
        for branch in self._waiting(model):
            for name in branch.reads:
                host_node(model, name)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        waiting = self._waiting(model)
        for branch in waiting:
            _fuse_one(model, branch)
        return ir.passes.PassResult(model, modified=bool(waiting))

    def ensures(self, model: ir.Model) -> None:
        for branch in self._waiting(model):
            raise FusionError(f"{branch.block}: its forward adapter is still apart from {', '.join(branch.reads)}")

    def _waiting(self, model: ir.Model) -> list[Branch]:
        return [branch for branch in self.branches if weight_name(branch, "A") in model.graph.initializers]


def _fuse_one(model: ir.Model, branch: Branch) -> None:
    graph = model.graph
    weight = min((graph.initializers[name] for name in branch.reads), key=lambda value: dims_of(value)[1])
    host = host_node(model, weight.name or "")
    adapters = [host_node(model, weight_name(branch, matrix)) for matrix in branch.forward_matrices]
    product = host.outputs[0]
    if product.is_graph_output():
        raise FusionError(f"{branch.block}: {weight.name} makes the graph's output {product.name}, which cannot be widened")
    columns = dims_of(weight)[1]
    widen(weight, 1, [(columns, part) for node in adapters for part in own_parts(node)])

    sizes = add_constant(model, f"{branch.block}.ffba_split.sizes", [columns, *[branch.columns] * len(adapters)])
    split = ir.node("Split", [product, sizes], attributes={"axis": -1}, num_outputs=1 + len(adapters), name=f"{branch.block}.ffba_split")
    # [batch, tokens, columns + n r] -> [batch, tokens, columns], n times [batch, tokens, r]
    for output, old in zip(split.outputs, [product, *(node.outputs[0] for node in adapters)], strict=True):
        output.name = f"{old.name}.ffba_split"
        old.replace_all_uses_with(output)
    split.replace_input_with(0, product)  # the loop has redirected this use of the product as well
    product.shape = None  # it was the host's alone
    graph.insert_after(host, split)
    for node in adapters:
        graph.remove(node, safe=True)
    for matrix in branch.forward_matrices:
        del graph.initializers[weight_name(branch, matrix)]
