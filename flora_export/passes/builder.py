"""Make nodes before a given one, each named after the place it stands for. What a pass that writes operators is written in."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from flora_export.weights import add_constant


class Builder:
    """Called with an operator, its inputs and a suffix of its name, it inserts a node and returns the node's output."""

    def __init__(self, model: ir.Model, before: ir.Node, prefix: str) -> None:
        self.model, self.before, self.prefix = model, before, prefix

    def __call__(self, operator: str, inputs: Sequence[ir.Value], suffix: str, **attributes: int | float | str | list[int]) -> ir.Value:
        node = ir.node(operator, inputs, attributes=attributes, name=f"{self.prefix}.{suffix}")
        node.outputs[0].name = f"{self.prefix}.{suffix}.out"
        self.model.graph.insert_before(self.before, node)
        return node.outputs[0]

    def constant(self, name: str, values: int | float | list[int], dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """An initializer by that name, made once for the graph."""
        initializers = self.model.graph.initializers
        return initializers[name] if name in initializers else add_constant(self.model, name, values, dtype)
