"""FoldNeurons: an adapter that computes what the host MLP's neurons compute becomes r more of them. No node is added.

    gated    act(x Wg) ⊙ (x Wu) Wd  +  act(x G) ⊙ (x A) sB     =  act(x [Wg G]) ⊙ (x [Wu A])  [Wd; sB]
    plain    act(x Wu) Wd           +  act(x A) sB             =  act(x [Wu A])  [Wd; sB]

A packed gate and up projection is widened half by half, [Wg G Wu A]; a bias by zeros. Branches of another function are left
to FuseForward and FuseBackward.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from flora_export.branch import GATED, Branch
from flora_export.errors import FusionError
from flora_export.passes.attach import weight_name
from flora_export.passes.hosts import Neurons, Projection, host_node, neurons, own_parts, same_function
from flora_export.weights import Part, add_constant, dims_of, widen, zeros


class FoldNeurons(ir.passes.InPlacePass):
    """Widens gate, up and down projections; runs after Attach."""

    def __init__(self, branches: Sequence[Branch]) -> None:
        self.branches = branches

    def requires(self, model: ir.Model) -> None:
        for branch in self.branches:
            if branch.activation == GATED and weight_name(branch, "A") in model.graph.initializers:
                neurons(model, branch)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        folded = [branch for branch in self.branches if _fold_one(model, branch)]
        return ir.passes.PassResult(model, modified=bool(folded))

    def ensures(self, model: ir.Model) -> None:
        for branch in self.branches:
            if branch.activation == GATED and weight_name(branch, "A") in model.graph.initializers:
                raise FusionError(f"{branch.block}: its gated adapter was not folded into the neurons of its host")


def _fold_one(model: ir.Model, branch: Branch) -> bool:
    if branch.kind != "mlp" or weight_name(branch, "A") not in model.graph.initializers:
        return False
    try:
        host = neurons(model, branch)
    except FusionError:
        if branch.activation == GATED:
            raise
        return False
    adapters = {matrix: host_node(model, weight_name(branch, matrix)) for matrix in branch.matrices}
    curved = adapters["G" if branch.activation == GATED else "A"].outputs[0]
    between = _adapter_nodes(model, branch)
    if host.up is not None:
        if branch.activation != GATED:
            return False
        activation = [node for node in between if node.name != f"{branch.block}.ffba_z"]
        additions = [(host.source, adapters["G"]), (host.up, adapters["A"])]
    else:
        activation = between
        additions = [(host.source, adapters["A"])]
    if not same_function(host.chain, host.source.value, activation, curved):
        return False

    down = host_node(model, branch.writes[0])
    (total,) = [node for node, _ in adapters["B"].outputs[0].uses()]
    total.outputs[0].replace_all_uses_with(down.outputs[0])
    _widen_projections(model, branch, [(projection, part) for projection, node in additions for part in own_parts(node)])
    weight = model.graph.initializers[branch.writes[0]]
    widen(weight, 0, [(dims_of(weight)[0], part) for part in own_parts(adapters["B"])])
    _forget_shapes(host)
    model.graph.remove([total, *adapters.values(), *between], safe=True)
    for matrix in branch.matrices:
        del model.graph.initializers[weight_name(branch, matrix)]
    return True


def _adapter_nodes(model: ir.Model, branch: Branch) -> list[ir.Node]:
    """The nodes between the branch's projections, in order: its activation, and the product with A x of a gated one."""
    return [n for n in model.graph if n.name in (f"{branch.block}.ffba_z",) or (n.name or "").startswith(f"{branch.block}.ffba_act.")]


def _widen_projections(model: ir.Model, branch: Branch, additions: Sequence[tuple[Projection, Part]]) -> None:
    """Widen each projection's weight, bias and split at the end of its own columns; a packed weight takes both additions at once."""
    weights = {id(projection.weight): projection for projection, _ in additions}
    for projection in weights.values():
        own = [(p.offset + p.size, part) for p, part in additions if p.weight is projection.weight]
        widen(projection.weight, 1, own)
        if projection.bias is not None:
            dtype = projection.bias.dtype
            assert dtype is not None
            widen(projection.bias, 0, [(offset, zeros([part.size], 0, dtype)) for offset, part in own])
        if projection.split is not None and len(projection.split.inputs) > 1:
            _widen_split(model, projection.split, branch)


def _widen_split(model: ir.Model, split: ir.Node, branch: Branch) -> None:
    """A Split that states its sizes gets r more in each half."""
    old = split.inputs[1]
    if old is None or old.const_value is None:
        raise FusionError(f"{branch.block}: the Split {split.name} of its packed projection has computed sizes")
    sizes = [int(size) + branch.columns for size in old.const_value.numpy()]
    split.replace_input_with(1, add_constant(model, f"{branch.block}.ffba_split.sizes", sizes))


def _forget_shapes(host: Neurons) -> None:
    """Values between the first projections and the last were as wide as the base model's neurons; a stale shape would be refused."""
    stale = [node.outputs[0] for node in host.chain]
    for projection in (host.source, host.up):
        if projection is not None:
            stale.append(projection.value)
            matmul = next(node for node, _ in projection.weight.uses())
            stale.append(matmul.outputs[0])
            stale += [output for node, _ in matmul.outputs[0].uses() for output in node.outputs]
            stale += list(projection.split.outputs) if projection.split else []
    if host.product is not None:
        stale.append(host.product.outputs[0])
    for value in stale:
        value.shape = None
