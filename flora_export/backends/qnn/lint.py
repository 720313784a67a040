"""What QNN's HTP does not take of the graphs that we make: found by name before anything is compiled."""

from __future__ import annotations

import onnx_ir as ir

STANDARD = ("", "ai.onnx")


def lint(model: ir.Model) -> list[str]:
    """What is wrong with a graph for QNN, a line each: node, operator, and why. Empty where it can be compiled."""
    return [f"{node.name} ({node.op_type}): {reason}" for node in model.graph.all_nodes() if (reason := _reason(node))]


def _reason(node: ir.Node) -> str:
    if node.domain not in STANDARD:
        return f"no operator of the ONNX standard ({node.domain}), so it would be left to the CPU: build with --backend qnn, which has none"
    if node.op_type == "Attention":
        return "QNN has no Attention, so it would be left to the CPU: --backend qnn spells it out"
    if node.op_type == "TensorScatter":
        cache = node.inputs[0]
        places = cache.shape[2] if cache is not None and cache.shape is not None and len(cache.shape) == 4 else None
        return "" if isinstance(places, int) else "its cache has no static length, but QNN takes fixed shapes alone: --kv-cache static:N"
    return ""
