"""ONNX -> OpenVINO's own graph, its constants under the names and with the bytes of the initializers that they come from.

OpenVINO reads ONNX itself; three operators are stated here in the words that its plugins know best:

    Attention(q, k, v, mask)                  ScaledDotProductAttention, each key and value spread over the queries of its group
    MatMulNBits(x, codes, scales)             x · w'     w = (codes - 2^(bits - 1)) · scales, the codes u4 or u8 [out, blocks, block]
    GatherBlockQuantized(codes, ids, scales)  rows of such a w

The KV cache becomes state, as OpenVINO GenAI and optimum-intel want it: `past_key_values.*` and `present.*` are variables that a request
holds, empty at first, reordered by one more input `beam_idx` int32 [batch].
"""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino._offline_transformations import apply_make_stateful_transformation
from openvino.frontend import FrontEndManager
from openvino.frontend.onnx import ConversionExtension

from flora_export.artifact import DATA, IR, MODEL
from flora_export.errors import BackendError

BEAM = "beam_idx"
_WINDOW = re.compile(r"ffba_mask(\.(?P<window>\d+))?\.seen")  # LowerAttention's name of a mask
_AUTOMATIC = re.compile(r"[A-Za-z]+_\d+")  # a name that OpenVINO gave, with a number that counts what the process has made before


# What a device would choose for speed, and every program that opens the files would get: a cache in 8 bits, activations rounded to int8.
DEFAULTS = {"KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def write_ir(directory: Path) -> ov.Model:
    """Replace a directory's `model.onnx` and its data by an IR. Returns it. Raises BackendError where OpenVINO refuses the graph."""
    model = read_onnx(directory / MODEL)
    hold_state(model)
    name_nodes(model)
    for name, value in DEFAULTS.items():
        model.set_rt_info(value, ["runtime_options", name])
    ov.save_model(model, directory / IR, compress_to_fp16=False)
    for name in (MODEL, DATA):
        (directory / name).unlink()
    return model


def read_onnx(file: Path) -> ov.Model:
    """An ONNX graph of ours as OpenVINO's. Raises BackendError where OpenVINO refuses it."""
    tables: dict[str, Any] = {}  # a weight that is read twice (a head tied to its embeddings) is stated once
    frontend = FrontEndManager().load_by_framework("onnx")
    for operator, domain, convert in (
        ("Attention", "", _attention),
        ("MatMulNBits", "com.microsoft", partial(_product, tables)),
        ("GatherBlockQuantized", "com.microsoft", partial(_rows, tables)),
    ):
        frontend.add_extension(ConversionExtension(operator, domain, convert))
    try:
        return frontend.convert(frontend.load(str(file)))
    except Exception as error:  # OpenVINO raises RuntimeError and types of its own, none public
        raise BackendError(f"OpenVINO {ov.__version__.partition('-')[0]} refuses {file.name}: {error}") from error


def _attention(node: Any) -> list[Any]:
    """q [batch, heads, T, size] over k, v [batch, KV heads, S, size]; mask bool [batch, 1, T, S]."""
    query, key, value, mask = (node.get_input(index) for index in range(4))
    heads, shared = (x.get_partial_shape()[1].get_length() for x in (query, key))
    dtype = query.get_element_type().to_dtype()
    zero, hidden = op.constant(np.array(0, dtype)), op.constant(np.array(np.finfo(dtype).min, dtype))
    named = _WINDOW.fullmatch(mask.get_node().get_friendly_name())
    window = int((named and named["window"]) or 0)
    added = _within(mask, window, zero, hidden) if window else op.select(mask, zero, hidden)
    scale = op.constant(np.array(node.get_attribute("scale"), dtype))
    spread = [_spread(x, heads, shared) for x in (key, value)]
    return list(op.scaled_dot_product_attention(query, *spread, added, scale, causal=False).outputs())


def _within(mask: Any, window: int, zero: Any, hidden: Any) -> Any:
    """The mask of a sliding window, in the words by which OpenVINO knows one: paged attention, GenAI's default, drops any other mask.

    LowerAttention makes   seen = (real & (j <= i & j > i - window)) | j = i
    """
    seen_real, itself = (value.get_node() for value in mask.get_node().input_values())
    real, seen = seen_real.input_values()
    causal, recent = seen.get_node().input_values()
    key, oldest = recent.get_node().input_values()
    query = oldest.get_node().input_value(0)
    recent = op.greater(key, op.add(query, op.constant(np.array(-window, np.int64))))
    true = op.constant(np.array(True))
    seen = op.bitwise_and(real, op.bitwise_and(op.bitwise_and(true, recent), causal))
    seen = op.broadcast(op.bitwise_and(seen, true), op.constant(np.ones(4, np.int64)), broadcast_spec="BIDIRECTIONAL")
    added = op.select(seen, zero, op.select(itself.output(0), zero, hidden))
    start, stop, step, axis = (op.constant(np.array([number], np.int64)) for number in (0, np.iinfo(np.int64).max, 1, 3))
    return op.slice(added, start, stop, step, axis)


def _spread(x: Any, heads: int, shared: int) -> Any:
    """[batch, KV heads, S, size] -> [batch, heads, S, size], each repeated for the queries that share it."""
    if heads == shared:
        return x
    size = x.get_partial_shape()[3].get_length()
    repeat = op.constant(np.array([1, 1, heads // shared, 1, 1], np.int64))
    repeated = op.broadcast(op.unsqueeze(x, op.constant(np.array(2, np.int64))), repeat, broadcast_spec="BIDIRECTIONAL")
    return op.reshape(repeated, op.constant(np.array([0, heads, -1, size], np.int64)), special_zero=True)


def _product(tables: dict[str, Any], node: Any) -> list[Any]:
    x, codes, scales = (node.get_input(index) for index in range(3))
    return list(op.matmul(x, _weight(tables, node, codes, scales), False, True).outputs())


def _rows(tables: dict[str, Any], node: Any) -> list[Any]:
    codes, ids, scales = (node.get_input(index) for index in range(3))
    return list(op.gather(_weight(tables, node, codes, scales), ids, op.constant(np.array(0, np.int64))).outputs())


def _weight(tables: dict[str, Any], node: Any, codes: Any, scales: Any) -> Any:
    """w [out, in], of integers that stay as they are, byte for byte; both constants keep their names."""
    held, steps = _constant(codes), _constant(scales)
    if held.get_friendly_name() not in tables:
        bits, block = node.get_attribute("bits"), node.get_attribute("block_size")
        kind = ov.Type.u4 if bits == 4 else ov.Type.u8
        rows, blocks = (int(size) for size in list(steps.shape)[:2])
        whole = np.ascontiguousarray(held.data).reshape(-1)
        integers = op.constant(ov.Tensor(whole, ov.Shape([rows, blocks, block]), kind), shared_memory=False)
        middle = np.array([0x88 if bits == 4 else 0x80], np.uint8)
        zero = op.constant(ov.Tensor(middle, ov.Shape([1, 1, 1]), kind), shared_memory=False)
        by_block = op.constant(np.ascontiguousarray(steps.data).reshape(rows, blocks, 1))
        integers.set_friendly_name(held.get_friendly_name())
        by_block.set_friendly_name(steps.get_friendly_name())
        dtype = by_block.get_element_type()
        centred = op.subtract(op.convert(integers, dtype), op.convert(zero, dtype))
        shape = op.constant(np.array([rows, blocks * block], np.int64))
        tables[held.get_friendly_name()] = op.reshape(op.multiply(centred, by_block), shape, special_zero=False)
    return tables[held.get_friendly_name()]


def _constant(value: Any) -> Any:
    """The constant that a value is, perhaps reshaped."""
    node = value.get_node()
    while node.get_type_name() != "Constant":
        node = node.input_value(0).get_node()
    return node


def hold_state(model: ov.Model) -> None:
    """Make the KV cache state, in place."""
    if not any(node.get_type_name() == "ScaledDotProductAttention" for node in model.get_ops()):
        _keep_in_fp32(model)
    beam = op.parameter([-1], np.int32, name=BEAM)
    beam.output(0).get_tensor().set_names({BEAM})
    axis = op.constant(np.array(0, np.int64))
    pairs = {}
    for value in model.inputs:
        name = value.any_name
        if name.startswith("past_key_values."):
            readers = list(value.get_target_inputs())
            chosen = op.gather(value, beam, axis)
            for reader in readers:
                reader.replace_source_output(chosen.output(0))
            pairs[name] = name.replace("past_key_values.", "present.")
    model.add_parameters([beam])
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, pairs)
    ids = next(value for value in model.inputs if "input_ids" in value.names)
    batch = op.gather(op.shape_of(ids, output_type="i64"), op.constant(np.array([0], np.int64)), axis)
    none = op.subtract(batch, batch)  # 0, but not as a constant: a plugin would take the cache for one that never grows
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":  # before the first call: of the batch's rows, and no token
            _, heads, _, size = node.get_output_partial_shape(0)
            shape = op.concat([batch, np.array([heads.get_length()], np.int64), none, np.array([size.get_length()], np.int64)], axis=0)
            zero = op.constant(np.array(0, node.get_output_element_type(0).to_dtype()))
            node.set_arguments([op.broadcast(zero, shape).output(0)])
    model.validate_nodes_and_infer_types()


def _keep_in_fp32(model: ov.Model) -> None:
    """A cache in fp32, whatever reads it. Without that operator (soft caps), OpenVINO 2026.4 does not empty one in fp16 on CPUs."""
    for parameter, value in zip(model.get_parameters(), model.inputs, strict=True):
        if value.any_name.startswith("past_key_values.") and value.get_element_type() == ov.Type.f16:
            readers = list(value.get_target_inputs())
            parameter.set_element_type(ov.Type.f32)
            for reader in readers:
                reader.replace_source_output(op.convert(parameter, "f16").output(0))
    for result, value in zip(model.get_results(), model.outputs, strict=True):
        name, source = value.any_name, result.input_value(0)
        if name.startswith("present.") and source.get_element_type() == ov.Type.f16:
            wide = op.convert(source, "f32")
            source.get_tensor().set_names(set())
            wide.output(0).get_tensor().set_names({name})
            result.input(0).replace_source_output(wide.output(0))
    model.validate_nodes_and_infer_types()


def name_nodes(model: ov.Model) -> None:
    """Names that depend on nothing but the graph: a build repeated gives the same bytes."""
    seen: Counter[str] = Counter()
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if _AUTOMATIC.fullmatch(node.get_friendly_name()):
            node.set_friendly_name(f"{kind}.{seen[kind]}")
            seen[kind] += 1
    model.set_friendly_name("model")
