"""What TensorRT drops or gets wrong without a word, and what its parser refuses: found by name before anything is built."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

STANDARD = ("", "ai.onnx")
OPSETS = (23, 24)


def lint(model: ir.Model) -> list[str]:
    """What is wrong with a graph for TensorRT, a line each: node, operator, and why. Empty where it can be built."""
    opset = model.opset_imports.get("", 0)
    found = [] if opset in OPSETS else [f"the graph has opset {opset}, but TensorRT 11 takes Attention of opset 23 or 24"]
    for node in model.graph.all_nodes():
        for rule in _RULES:
            reason = rule(node)
            if reason:
                found.append(f"{node.name} ({node.op_type}): {reason}")
    return found


def _custom(node: ir.Node) -> str:
    if node.domain in STANDARD:
        return ""
    return f"no operator of the ONNX standard ({node.domain}), so the parser refuses it: build with --backend tensorrt, which has none"


def _cache_inside(node: ir.Node) -> str:
    if node.op_type == "Attention" and len(node.outputs) > 1:
        return "it returns the KV cache, which the parser refuses: the cache must be concatenated outside"
    return ""


def _causal(node: ir.Node) -> str:
    if node.op_type == "Attention" and "is_causal" in node.attributes and node.attributes["is_causal"].as_int():
        return "is_causal is aligned with the first key instead of the last, so cached steps are silently wrong: give an explicit mask"
    return ""


def _lengths(node: ir.Node) -> str:
    if node.op_type == "Attention" and len(node.inputs) > 6 and node.inputs[6] is not None:
        return "nonpad_kv_seqlen is dropped silently, so padding would be attended to: give an explicit mask"
    return ""


def _softcap(node: ir.Node) -> str:
    if node.op_type == "Attention" and "softcap" in node.attributes and node.attributes["softcap"].as_float():
        return "softcap is not supported in Attention: spell it out"
    return ""


def _single(node: ir.Node) -> str:
    known = [value.dtype for value in (*node.inputs[:3], *node.outputs) if value is not None]
    if node.op_type == "Attention" and ir.DataType.FLOAT in known:
        return "there is no kernel for Attention in fp32: spell it out"
    return ""


def _cache_places(node: ir.Node) -> str:
    if node.op_type != "TensorScatter":
        return ""
    cache = node.inputs[0]
    places = cache.shape[2] if cache is not None and cache.shape is not None and len(cache.shape) == 4 else None
    return "" if isinstance(places, int) else "its cache has no static length, which an in-place update needs"


def _split_sizes(node: ir.Node) -> str:
    sizes = node.inputs[1] if node.op_type == "Split" and len(node.inputs) > 1 else None
    return "" if sizes is None or sizes.const_value is not None else "its sizes are computed, but must be an initializer"


_RULES: tuple[Callable[[ir.Node], str], ...] = (
    _custom,
    _cache_inside,
    _causal,
    _lengths,
    _softcap,
    _single,
    _cache_places,
    _split_sizes,
)
