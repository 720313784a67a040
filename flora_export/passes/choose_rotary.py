"""ChooseRotary: longrope has a table for contexts up to the original one and another for longer ones; let attention read the right one.

before   tables [original + context, pairs] ── GroupQueryAttention, which reads row p for position p
after    total > original ── Where ── first = original or 0
         tables ── Slice [first : first + total] ── GroupQueryAttention

The frequencies of a call are those of its longest row, as in transformers. The slice copies as many rows as there are tokens.
"""

from __future__ import annotations

import onnx_ir as ir

from flora_export.capture import LONGROPE
from flora_export.errors import FusionError
from flora_export.passes.builder import Builder

_TOTAL, _COS, _SIN = 6, 7, 8  # inputs of a GroupQueryAttention


class ChooseRotary(ir.passes.InPlacePass):
    """Puts one slice of each table before all layers that read it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        chosen: dict[str, ir.Value] = {}
        waiting = _waiting(model)
        for node in waiting:
            total, original = node.inputs[_TOTAL], int(node.metadata_props[LONGROPE])
            for index in (_COS, _SIN):
                table = node.inputs[index]
                if total is None or table is None or table.name is None:
                    raise FusionError(f"{node.name}: has no total length or no rotary tables, so longrope's table cannot be chosen")
                if table.name not in chosen:
                    chosen[table.name] = _slice(Builder(model, node, table.name), table, total, original)
                node.replace_input_with(index, chosen[table.name])
        return ir.passes.PassResult(model, modified=bool(waiting))

    def ensures(self, model: ir.Model) -> None:
        for node in _waiting(model):
            raise FusionError(f"{node.name}: reads longrope's tables from their first row still")


def _waiting(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if LONGROPE in node.metadata_props and (t := node.inputs[_COS]) is not None and t.is_initializer()]


def _slice(make: Builder, table: ir.Value, total: ir.Value, original: int) -> ir.Value:
    zero, first_long = make.constant("longrope.short", [0]), make.constant("longrope.long", [original])
    tokens = make("Reshape", [make("Cast", [total], "tokens", to=int(ir.DataType.INT64)), make.constant("longrope.one", [1])], "total")
    first = make("Where", [make("Greater", [tokens, first_long], "is_long"), first_long, zero], "first")
    return make("Slice", [table, first, make("Add", [first, tokens], "last"), zero], "chosen")
