"""LowerAttention: state what the standard's Attention leaves to its runtime, so that TensorRT's parser takes it and means the same.

    before   q, k, v, mask, past ── Attention (causal, keeps the cache) ── y, present
    after    past, k ── Concat ── present.key ──┐
             past, v ── Concat ── present.value ┼── Attention (an explicit mask) ── y
                                       q, mask ─┘

TensorRT's parser refuses an Attention that returns the cache, and aligns `is_causal` with the first key instead of the last. The mask is
therefore boolean and made once, for all layers with the same window W. The query at place i, the past included, sees the key at j where

    (attention_mask[j]  and  i - W < j <= i)  or  j = i

The last term changes nothing for a real token; a padded one sees itself, or its softmax would be over nothing, and not a number.

With a static cache of C places, Concat becomes TensorScatter, which writes the new keys into the cache at `position_ids`: a step copies
no cache, and its shapes never change. The query at position i sees i - W < j <= i; rows are padded on the right, and what padding has
written into the cache is overwritten before it is seen.

TensorRT has no softcap in Attention, and no Attention in fp32; QNN has no Attention at all. There it is spelled out:

    softmax(mask(cap tanh(q k' / cap))) v

OpenVINO has an operator of its own for fp32 as well, and is given the Attention (backends/openvino/convert.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from flora_export.capture import WINDOW
from flora_export.errors import FusionError
from flora_export.passes.builder import Builder

_PAST = slice(4, 6)  # inputs of an Attention that keeps a cache


@dataclass(frozen=True)
class _Heads:
    queries: int
    keys: int
    size: int
    scale: float
    softcap: float
    dtype: ir.DataType


class LowerAttention(ir.passes.InPlacePass):
    """Replaces each Attention that keeps a cache, and drops the masks that were made for them."""

    def __init__(self, cache_tokens: int = 0, *, spelled_out: Collection[ir.DataType] = (ir.DataType.FLOAT,)) -> None:
        """`cache_tokens` is the number of places of a static cache; 0 lets the cache grow. `spelled_out`: where no Attention is left."""
        self.cache_tokens, self.spelled_out = cache_tokens, spelled_out

    def requires(self, model: ir.Model) -> None:
        needed = {"input_ids", "position_ids" if self.cache_tokens else "attention_mask"}
        missing = needed - {value.name for value in model.graph.inputs}
        if missing:
            raise FusionError(f"the captured graph has no input {', '.join(sorted(missing))}, so no attention mask can be made from it")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        waiting = _waiting(model)
        windows = [int(node.metadata_props.get(WINDOW, 0)) for node in waiting]
        masks = {}
        for window in dict.fromkeys(windows):
            make = Builder(model, waiting[0], f"ffba_mask.{window}" if window else "ffba_mask")
            masks[window] = _static_mask(make, self.cache_tokens, window) if self.cache_tokens else _mask(make, window)
        for node, window in zip(waiting, windows, strict=True):
            self._lower_one(model, node, masks[window])
        if waiting:
            _drop_unused(model, self.cache_tokens)
        return ir.passes.PassResult(model, modified=bool(waiting))

    def ensures(self, model: ir.Model) -> None:
        for node in _waiting(model):
            raise FusionError(f"{node.name}: this Attention still keeps the cache itself")

    def _lower_one(self, model: ir.Model, node: ir.Node, mask: ir.Value) -> None:
        make = Builder(model, node, node.name or "")
        query, key, value = (v for v in node.inputs[:3] if v is not None)
        pasts = [v for v in node.inputs[_PAST] if v is not None]
        heads = _heads(node, pasts[0])
        present = []
        for past, new, old in zip(pasts, (key, value), node.outputs[1:], strict=True):
            kind = "key" if new is key else "value"
            split = _by_head(make, new, heads.keys, kind)
            if self.cache_tokens:
                place = make("Gather", [_input(model, "position_ids"), make.constant("ffba.zero", 0)], f"{kind}_place", axis=1)
                kept = make("TensorScatter", [past, split, place], f"{kind}_cache", axis=-2, mode="linear")
                past.shape = _with_places(past.shape, self.cache_tokens)
            else:
                kept = make("Concat", [past, split], f"{kind}_cache", axis=2)
            _take_place(old, kept, past.shape if self.cache_tokens else old.shape)
            present.append(kept)
        attend = _spell_out if heads.softcap or heads.dtype in self.spelled_out else _attend
        attended = attend(make, _by_head(make, query, heads.queries, "query"), present[0], present[1], mask, heads)
        by_token = make("Transpose", [attended], "by_token", perm=[0, 2, 1, 3])
        y = make("Reshape", [by_token, make.constant("ffba.merge_heads", [0, 0, heads.queries * heads.size])], "merged")
        node.outputs[0].replace_all_uses_with(y)
        model.graph.remove(node, safe=True)


def _waiting(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Attention" and len(node.outputs) > 1]


def _heads(node: ir.Node, past: ir.Value) -> _Heads:
    """Facts of an Attention. Raises FusionError where its cache has no fixed head size."""
    size = past.shape[3] if past.shape is not None else None
    if not isinstance(size, int) or past.dtype is None:
        raise FusionError(f"{node.name}: its cache {past.name} is {past.shape}, but its last dimension should be the head size")
    number = {key: node.attributes[key].as_int() for key in ("q_num_heads", "kv_num_heads")}
    scale = node.attributes["scale"].as_float() if "scale" in node.attributes else size**-0.5
    softcap = node.attributes["softcap"].as_float() if "softcap" in node.attributes else 0.0
    return _Heads(number["q_num_heads"], number["kv_num_heads"], size, scale, softcap, past.dtype)


def _mask(make: Builder, window: int) -> ir.Value:
    """For a cache that grows: [batch, 1, tokens, past + tokens]."""
    ids, padding = _input(make.model, "input_ids"), _input(make.model, "attention_mask")
    zero, one = make.constant("ffba.zero", 0), make.constant("ffba.one", 1)
    tokens = make("Gather", [make("Shape", [ids], "ids_shape"), one], "tokens")
    total = make("Gather", [make("Shape", [padding], "mask_shape"), one], "total")
    key = make("Unsqueeze", [make("Range", [zero, total, one], "keys"), make.constant("ffba.axis_0", [0])], "key")  # [1, S]
    places = make("Range", [make("Sub", [total, tokens], "past"), total, one], "places")
    query = make("Unsqueeze", [places, make.constant("ffba.axis_1", [1])], "query")  # [T, 1]
    seen = _causal(make, key, query, window)  # [T, S]
    real = make("Cast", [padding], "real", to=int(ir.DataType.BOOL))
    real = make("Unsqueeze", [real, make.constant("ffba.axes_1_2", [1, 2])], "real_keys")  # [batch, 1, 1, S]
    seen = make("And", [real, seen], "real_seen")  # [batch, 1, T, S]
    return make("Or", [seen, make("Equal", [key, query], "itself")], "seen")


def _static_mask(make: Builder, places: int, window: int) -> ir.Value:
    """For a static cache of C places: [batch, 1, tokens, C]."""
    key = make.constant("ffba.places", list(range(places)))  # [C]
    query = make("Unsqueeze", [_input(make.model, "position_ids"), make.constant("ffba.axes_1_3", [1, 3])], "query")  # [batch, 1, T, 1]
    return _causal(make, key, query, window)


def _causal(make: Builder, key: ir.Value, query: ir.Value, window: int) -> ir.Value:
    seen = make("LessOrEqual", [key, query], "causal")
    if not window:
        return seen
    oldest = make("Sub", [query, make.constant(f"ffba.window_{window}", window)], "oldest")
    return make("And", [seen, make("Greater", [key, oldest], "recent")], "within")


def _by_head(make: Builder, x: ir.Value, heads: int, name: str) -> ir.Value:
    """[batch, T, heads * size] -> [batch, heads, T, size]"""
    split = make("Reshape", [x, make.constant(f"ffba.split_{heads}", [0, 0, heads, -1])], f"{name}_heads")
    return make("Transpose", [split], f"{name}_by_head", perm=[0, 2, 1, 3])


def _attend(make: Builder, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value, heads: _Heads) -> ir.Value:
    """Queries [batch, heads, T, size] over keys and values [batch, kv heads, S, size] -> [batch, heads, T, size]."""
    return make("Attention", [query, key, value, mask], "attend", scale=heads.scale)


def _spell_out(make: Builder, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value, heads: _Heads) -> ir.Value:
    """The same, without the operator."""
    group = make.constant(f"ffba.groups_{heads.keys}", [0, heads.keys, heads.queries // heads.keys, -1, heads.size])
    axis = make.constant("ffba.axis_2", [2])

    def scalar(name: str, number: float) -> ir.Value:
        return make.constant(f"ffba.{name}", number, heads.dtype)

    scaled = make("Mul", [query, scalar("scale", heads.scale)], "scaled")
    grouped = make("Reshape", [scaled, group], "grouped")  # [batch, kv heads, group, T, size]
    keys = make("Transpose", [make("Unsqueeze", [key, axis], "keys")], "keys_by_size", perm=[0, 1, 2, 4, 3])
    scores = make("MatMul", [grouped, keys], "scores")  # [batch, kv heads, group, T, S]
    if heads.softcap:
        cap = scalar("softcap", heads.softcap)
        scores = make("Mul", [make("Tanh", [make("Div", [scores, cap], "uncapped")], "tanh"), cap], "capped")
    lowest = scalar("lowest", float(np.finfo(np.float16).min) if heads.dtype == ir.DataType.FLOAT16 else -3e38)
    masked = make("Where", [make("Unsqueeze", [mask, axis], "mask"), scores, lowest], "masked")
    weights = make("Softmax", [masked], "weights", axis=-1)
    summed = make("MatMul", [weights, make("Unsqueeze", [value, axis], "values")], "attended")  # [batch, kv heads, group, T, size]
    return make("Reshape", [summed, make.constant(f"ffba.heads_{heads.queries}", [0, heads.queries, -1, heads.size])], "heads")


def _input(model: ir.Model, name: str) -> ir.Value:
    return next(value for value in model.graph.inputs if value.name == name)


def _with_places(shape: ir.Shape | None, places: int) -> ir.Shape:
    assert shape is not None
    return ir.Shape([places if axis == 2 else dim for axis, dim in enumerate(shape)])


def _take_place(old: ir.Value, new: ir.Value, shape: ir.Shape | None) -> None:
    """`new` becomes the graph output that `old` was, by name and type."""
    new.type, new.shape = old.type, shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{old.name}.replaced", old.name


def _drop_unused(model: ir.Model, cache_tokens: int) -> None:
    """The captured graph's own masks, which nobody reads any more; and, with a static cache, the input that they were made of."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
    if cache_tokens:
        padding = _input(model, "attention_mask")
        if padding.uses():
            users: Sequence[str] = [node.name or node.op_type for node, _ in padding.uses()]
            raise FusionError(f"attention_mask is read by {', '.join(users)}, which a static cache has no mask for")
        model.graph.inputs.remove(padding)
