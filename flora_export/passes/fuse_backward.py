"""FuseBackward: sB becomes more input rows of the block's last projection.

before   h ── W ── y ── Add ── y'            after   h ─┬─ Concat ── [W; sB] ── y'
         z ── sB ───────┘                            z ─┘

h W + z sB = [h z] [W; sB]
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from flora_export.branch import Branch
from flora_export.errors import FusionError
from flora_export.passes.attach import weight_name
from flora_export.passes.hosts import host_node, own_parts
from flora_export.weights import dims_of, widen


class FuseBackward(ir.passes.InPlacePass):
    """Widens the backward host of each branch whose B still stands apart."""

    def __init__(self, branches: Sequence[Branch]) -> None:
        self.branches = branches

    def requires(self, model: ir.Model) -> None:
        for branch in self._waiting(model):
            for name in branch.writes:
                host_node(model, name)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        waiting = self._waiting(model)
        for branch in waiting:
            _fuse_one(model, branch)
        return ir.passes.PassResult(model, modified=bool(waiting))

    def ensures(self, model: ir.Model) -> None:
        for branch in self._waiting(model):
            raise FusionError(f"{branch.block}: its backward adapter is still apart from {', '.join(branch.writes)}")

    def _waiting(self, model: ir.Model) -> list[Branch]:
        return [branch for branch in self.branches if weight_name(branch, "B") in model.graph.initializers]


def _fuse_one(model: ir.Model, branch: Branch) -> None:
    graph = model.graph
    host = host_node(model, branch.writes[0])
    adapter = host_node(model, weight_name(branch, "B"))
    h, weight = host.inputs
    z = adapter.inputs[0]
    assert h is not None and z is not None and weight is not None
    (total,) = [node for node, _ in adapter.outputs[0].uses()]  # the Add that Attach has made
    widen(weight, 0, [(dims_of(weight)[0], part) for part in own_parts(adapter)])

    concat = ir.node("Concat", [h, z], attributes={"axis": -1}, name=f"{branch.block}.ffba_concat")
    concat.outputs[0].name = f"{branch.block}.ffba_concat.out"  # [batch, tokens, columns of h + r]
    graph.insert_before(host, concat)
    host.replace_input_with(0, concat.outputs[0])
    total.outputs[0].replace_all_uses_with(host.outputs[0])
    graph.remove([total, adapter], safe=True)
    del graph.initializers[weight_name(branch, "B")]
