"""A bank in the graph: the input that chooses each row's adapter, and the mask that keeps the others' activations from B.

    adapter_ids ── index             index = id + 1: 0 is the base model
    columns   z ── Where(mask, z, 0) ── B        mask = table[index]: a row's own columns
    stack     x ── A[index] ── z ── B[index]     (attach.py)

Where, not Mul: what overflows in another adapter's columns becomes 0 too, where 0 times infinity would be NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from flora_export.bank import ADAPTER_IDS, BASE, STACK, Bank, slot_of
from flora_export.branch import Branch
from flora_export.errors import FusionError
from flora_export.passes.builder import Builder
from flora_export.passes.hosts import projections_of
from flora_export.weights import add_weight, parts_of

INDEX = f"{ADAPTER_IDS}.index"
EMPTY = BASE - 1  # owns the zeros that pad a width


def beside_each_other(branches: Sequence[Branch], bank: Bank) -> tuple[Branch, ...]:
    """One branch for each block, which stands for those of all adapters: of their ranks together, or in a stack of the largest.

    Raises:
        FusionError: two adapters have another activation beside one block.
    """
    blocks: dict[str, list[Branch]] = {}
    for branch in branches:
        blocks.setdefault(branch.block, []).append(branch)
    joined = []
    for block, members in blocks.items():
        kinds = sorted({branch.activation for branch in members})
        if len(kinds) > 1:
            raise FusionError(f"{block}: its adapters have the activations {' and '.join(kinds)}; in one bank they must have the same")
        ranks = [branch.rank for branch in members]
        rank, slots = (max(ranks), bank.slots) if bank.layout == STACK else (sum(ranks), 0)
        joined.append(dataclasses.replace(members[0], rank=rank, scale=1.0, members=tuple(members), slots=slots))
    return tuple(joined)


class ReadAdapterIds(ir.passes.InPlacePass):
    """Adds the graph's input `adapter_ids`, int64 [batch], and the index that is made of it.

    Ids of another number than rows are an error of Reshape. An id that there is not is an error of the Gather that reads the index, where
    the runtime checks indices, and zeros where it answers with these; it is the base model where it does neither.
    """

    def __init__(self, bank: Bank, form: str) -> None:
        self.bank, self.form = bank, form

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        if any(value.name == ADAPTER_IDS for value in graph.inputs):
            return ir.passes.PassResult(model, modified=False)
        rows = next(value for value in graph.inputs if value.name == "input_ids")
        assert rows.shape is not None
        ids = ir.Value(name=ADAPTER_IDS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([rows.shape[0]]))
        graph.inputs.append(ids)
        build = Builder(model, graph[0], ADAPTER_IDS)

        def number(value: int) -> ir.Value:
            return build.constant(f"{ADAPTER_IDS}.{value}", value)

        batch = build("Shape", [rows], "rows", start=0, end=1)
        one_each = build("Reshape", [ids, batch], "one_each")
        wrong = build("Less", [one_each, number(BASE)], "below")
        instead = self.bank.slots + 1  # no row of a table
        if self.form == "tensorrt":  # it clamps an index that is none
            wrong = build("Or", [wrong, build("Greater", [one_each, number(self.bank.slots - 1)], "above")], "wrong")
            instead = 0
        build("Where", [wrong, number(instead), build("Add", [one_each, number(1)], "shifted")], "index")
        return ir.passes.PassResult(model, modified=True)


def index_of(model: ir.Model) -> ir.Value:
    """The index that `ReadAdapterIds` has made: int64 [batch]."""
    return next(node for node in model.graph if node.name == INDEX).outputs[0]


class SelectAdapters(ir.passes.InPlacePass):
    """Masks what is fed to every B, so that a row keeps the columns of its own adapter."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [(weight, node) for weight in list(model.graph.initializers.values()) for node in _readers(weight)]
        waiting = [(weight, node) for weight, node in found if not _is_masked(node)]
        for weight, node in waiting:
            self._select_one(model, weight, node)
        return ir.passes.PassResult(model, modified=bool(waiting))

    def ensures(self, model: ir.Model) -> None:
        for weight in model.graph.initializers.values():
            for node in _readers(weight):
                if not _is_masked(node):
                    raise FusionError(f"{weight.name}: every row would be given every adapter")

    def _select_one(self, model: ir.Model, weight: ir.Value, node: ir.Node) -> None:
        build = Builder(model, node, f"{weight.name}.selected")
        owners = _owners(weight)
        source = node.inputs[0]
        assert source is not None
        last = source.producer()
        if last is not None and last.op_type == "Concat" and (last.name or "").endswith(".ffba_concat"):
            build.before = last  # the block's own h needs no mask
            z = last.inputs[1]
            assert z is not None
            last.replace_input_with(1, self._masked(build, z, [owner for owner in owners if owner != BASE], weight))
        else:
            node.replace_input_with(0, self._masked(build, source, owners, weight))

    def _masked(self, build: Builder, z: ir.Value, owners: list[int], weight: ir.Value) -> ir.Value:
        """z [batch, tokens, columns] where the row's adapter owns the column, and 0 elsewhere."""
        dtype = weight.dtype
        assert dtype is not None
        zero = build.constant(f"{ADAPTER_IDS}.zero.{dtype.name}", 0.0, dtype)
        return build("Where", [self._mask(build, owners), z, zero], "where")

    def _mask(self, build: Builder, owners: list[int]) -> ir.Value:
        """bool [batch, 1, columns]; those of equal owners are one."""
        stops = [at + 1 for at, owner in enumerate(owners) if owners[at + 1 : at + 2] != [owner]]
        name = f"{ADAPTER_IDS}.mask.{'_'.join(f'{owners[stop - 1]}x{stop}' for stop in stops)}"
        graph = build.model.graph
        known = next((node for node in graph if node.name == f"{name}.unsqueeze"), None)
        if known is not None:
            return known.outputs[0]
        table = np.array([[owner in (BASE, slot) for owner in owners] for slot in range(BASE, self.bank.slots)])
        rows = add_weight(build.model, ir.Tensor(table, name=f"{name}.table"))  # its first row is the base model's
        index = index_of(build.model)
        user = index.producer()
        assert user is not None
        early = Builder(build.model, _after(graph, user), name)
        own = early("Gather", [rows, index], "own", axis=0)
        return early("Unsqueeze", [own, early.constant(f"{ADAPTER_IDS}.axis", [1])], "unsqueeze")


def _after(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """The node that follows another."""
    nodes = iter(graph)
    for each in nodes:
        if each is node:
            return next(nodes)
    raise ValueError(f"{node.name} is the graph's last node")


def _readers(weight: ir.Value) -> list[ir.Node]:
    """The nodes that multiply by a weight whose rows are adapters'."""
    if weight.const_value is None or len(weight.const_value.shape) != 2:
        return []
    axis, parts = parts_of(weight)
    return projections_of(weight) if axis == 0 and any(part.origin == "adapter" for part in parts) else []


def _owners(weight: ir.Value) -> list[int]:
    """By row of a weight: the slot that it is of, BASE for the base model's own rows, EMPTY for padding."""
    owners: list[int] = []
    for part in parts_of(weight)[1]:
        owner = slot_of(part.tensor) if part.origin == "adapter" else EMPTY if part.origin == "zeros" else BASE
        owners += [owner] * part.size
    return owners


def _is_masked(node: ir.Node) -> bool:
    source = node.inputs[0]
    last = source.producer() if source is not None else None
    if last is not None and last.op_type == "Concat":
        last = last.inputs[1].producer() if last.inputs[1] is not None else None
    return last is not None and (last.name or "").endswith(".selected.where")
