"""Quantize: projections become integers of a few bits with a scale for each block of their inputs, adapter slices and all.

before   x ── W ── y                        after   x ── MatMulNBits(codes, scales) ── y
before   ids ── table ── Gather ── x        after   ids ── GatherBlockQuantized(codes, scales) ── x

For runtimes of the ONNX standard, W is DequantizeLinear(codes, scales). A head that is tied to the embeddings reads the same codes.

A block never holds numbers of two tensors: more columns are more rows of codes, and more rows of W begin a block of their own, so that
widened or not each of the base's weights has the same codes.

Runs last: what the other passes do to floating-point weights holds for the codes as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from flora_export.errors import FusionError
from flora_export.passes.builder import Builder
from flora_export.provenance import read_name
from flora_export.quantization import LAYERS, STANDARD, Quantization
from flora_export.quantization.packing import Form
from flora_export.quantization.unpacking import Packed
from flora_export.weights import Array, Part, Stacked, add_weight, dims_of, parts_of, zeros

DOMAIN = "com.microsoft"
IDS = "input_ids"


class Quantize(ir.passes.InPlacePass):
    """Initializers keep their names and hold the codes; beside each stands `{name}.scales`."""

    def __init__(self, quantization: Quantization, packed: Packed | None = None) -> None:
        """`packed` are the integers of a base model that is quantized already: they are taken as they are."""
        self.quantization, self.packed = quantization, packed

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [(weight, uses) for weight in list(model.graph.initializers.values()) if (uses := _uses(weight))]
        done = [weight for weight, uses in found if self._quantize_one(model, weight, uses)]
        return ir.passes.PassResult(model, modified=bool(done))

    def ensures(self, model: ir.Model) -> None:
        for weight in model.graph.initializers.values():
            if _uses(weight) and self._bits(weight):
                raise FusionError(f"{weight.name}: was not quantized")

    def _bits(self, weight: ir.Value) -> int:
        """The bits of a weight, by what it is: 0 where it keeps its precision."""
        if all(part.origin in ("adapter", "zeros") for part in parts_of(weight)[1]):
            return self.quantization.adapter_bits
        return self.quantization.bits_of(weight.name or "")

    def _quantize_one(self, model: ir.Model, weight: ir.Value, uses: Sequence[ir.Node]) -> bool:
        bits = self._bits(weight)
        if not bits:
            return False
        by_row = any(node.op_type in ("Gather", "Transpose") for node in uses)
        inputs, outputs = reversed(dims_of(weight)) if by_row else dims_of(weight)
        block, standard = self.quantization.block_size, self.quantization.operators == STANDARD
        if (by_row or standard) and inputs % block:
            raise FusionError(
                f"{weight.name}: its {inputs} inputs are no whole number of blocks of {block}. Choose a --block-size that divides it"
                + (", or --head-precision keep." if by_row else ".")
            )
        if by_row and standard:
            raise FusionError(
                f"{weight.name}: a table that is looked up by row is not quantized for {STANDARD}. Pass --head-precision keep."
            )
        form = Form(bits, block, "codes", "row" if by_row else "standard" if standard else "blocks")
        restated = _restated(weight, replace(form, content="scales"), f"{weight.name}.scales", self.packed)
        scales = add_weight(model, restated)
        dtype, codes = weight.dtype, _restated(weight, form, weight.name or "", self.packed)
        weight.const_value, weight.shape, weight.type = codes, codes.shape, ir.TensorType(codes.dtype)
        if standard:
            _dequantize(model, weight, scales, uses, block, dtype)
            return True
        product = {"K": inputs, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": self.quantization.accuracy_level}
        for node in uses:
            if node.op_type == "Gather":
                attributes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
                _replace(model, node, "GatherBlockQuantized", [weight, node.inputs[1], scales], attributes)
            elif node.op_type == "MatMul":
                _replace(model, node, "MatMulNBits", [node.inputs[0], weight, scales], product)
            else:
                (matmul,) = [user for user, _ in node.outputs[0].uses()]
                source = _by_blocks(model, weight, matmul, [outputs, inputs // block, block * bits // 8])
                _replace(model, matmul, "MatMulNBits", [matmul.inputs[0], source, scales], product)
                model.graph.remove(node, safe=True)
        model.graph.opset_imports.setdefault(DOMAIN, 1)
        return True


def _uses(weight: ir.Value) -> list[ir.Node]:
    """The nodes that read a floating-point matrix as weight or table; none where any reads it as something else."""
    if weight.dtype is None or not weight.dtype.is_floating_point() or len(dims_of(weight)) != 2:
        return []
    uses = list(weight.uses())
    return [node for node, _ in uses] if uses and all(_reads(node, index) for node, index in uses) else []


def _reads(node: ir.Node, index: int) -> bool:
    if node.op_type == "Transpose":
        users = list(node.outputs[0].uses())
        return len(users) == 1 and users[0][0].op_type == "MatMul" and users[0][1] == 1
    if node.op_type == "Gather":  # not a table of rotary angles, which is looked up by position
        ids = node.inputs[1]
        return index == 0 and ids is not None and ids.name == IDS
    return (node.domain, node.op_type, index) == ("", "MatMul", 1)


def _restated(weight: ir.Value, form: Form, name: str, packed: Packed | None) -> Stacked:
    """A weight in a form: a part for each of its parts."""
    axis, parts = parts_of(weight)
    by_inputs = axis == (1 if form.layout == "row" else 0)
    inputs, outputs = reversed(dims_of(weight)) if form.layout == "row" else dims_of(weight)
    filled = _by_block(weight, parts, form.block_size) if by_inputs else ((part, 0) for part in parts)
    made = [
        Part(
            part.tensor,
            part.origin,
            form.extent(part.size + added) if by_inputs else part.size,
            part.scale,
            _reader(part, form, packed),
            str(form),
        )
        for part, added in filled
    ]
    assert weight.dtype is not None
    codes = ir.DataType.INT4 if form.layout == "standard" else ir.DataType.UINT8
    shape, placed = form.shape(inputs, outputs), form.axis(axis)
    return Stacked(name, made, placed, weight.dtype if form.content == "scales" else codes, shape[:placed] + shape[placed + 1 :])


def _by_block(weight: ir.Value, parts: Sequence[Part], block: int) -> Iterator[tuple[Part, int]]:
    """Parts along the input dimension, each with how many zeros after it fill up its last block.

    Raises:
        FusionError: a part would begin within another's block.
    """
    assert weight.dtype is not None
    last, added = parts[0], 0
    for part in parts[1:]:
        room = min(-(last.size + added) % block, part.size)
        if room and part.origin != "zeros":
            raise FusionError(
                f"{weight.name}: {part.tensor} would share a block of {block} with {last.tensor}. Choose a smaller --block-size."
            )
        added += room
        if part.size > room:
            yield last, added
            last, added = zeros([part.size - room, dims_of(weight)[1]], 0, weight.dtype) if room else part, 0
    yield last, added


def _reader(part: Part, form: Form, packed: Packed | None) -> Callable[[], Array]:
    """A part in a form. The zeros that fill up its last block are those that `quantize` puts there."""

    def read() -> Array:
        own = packed_values(part.tensor, form, packed) if part.origin == "base" else None
        return form.of(part.read()) if own is None else own

    return read


def packed_values(name: str, form: Form, packed: Packed | None) -> Array | None:
    """The own integers, or scales, of what a name says; None where the base model has none for it.

    Raises:
        FusionError: the base's integers are of other bits or blocks, or are cut along their blocks.
    """
    captured = read_name(name)
    if packed is None or not all(tensor in packed.modules for tensor in captured.tensors):
        return None
    if (packed.bits, packed.block_size) != (form.bits, form.block_size) or not captured.transposed:
        option = "precision" if LAYERS in name else "head-precision"
        raise FusionError(
            f"{name}: the base model has int{packed.bits} in blocks of {packed.block_size} ({packed.method}), and is not requantized to "
            f"int{form.bits} in blocks of {form.block_size}. Build with --{option} int{packed.bits} --block-size {packed.block_size}."
        )
    own = [packed.read(tensor) for tensor in captured.tensors]
    codes, scales = (np.concatenate([each[index] for each in own])[captured.start : captured.stop] for index in (0, 1))
    return form.laid_out(codes, scales)


def _dequantize(model: ir.Model, codes: ir.Value, scales: ir.Value, uses: Sequence[ir.Node], block: int, dtype: ir.DataType | None) -> None:
    """The standard's own way: x ── DequantizeLinear(codes, scales) ── MatMul."""
    node = ir.node("DequantizeLinear", [codes, scales], attributes={"axis": 0, "block_size": block}, name=f"{codes.name}.dequantized")
    value = node.outputs[0]
    value.name, value.type = f"{codes.name}.dequantized.out", ir.TensorType(dtype) if dtype is not None else None
    model.graph.insert_before(uses[0], node)
    for user in uses:
        user.replace_input_with(1, value)


def _by_blocks(model: ir.Model, codes: ir.Value, before: ir.Node, shape: list[int]) -> ir.Value:
    """The codes of a table as MatMulNBits wants them: [rows, bytes] -> [rows, blocks, bytes of a block]."""
    build = Builder(model, before, codes.name or "")
    return build("Reshape", [codes, build.constant(f"{codes.name}.blocks", shape)], "by_block")


def _replace(model: ir.Model, node: ir.Node, operator: str, inputs: Sequence[ir.Value | None], attributes: dict[str, int]) -> None:
    """Another operator in a node's place: its output keeps its name, type and shape."""
    new = ir.node(operator, inputs, attributes=attributes, domain=DOMAIN, name=node.name)
    old, made = node.outputs[0], new.outputs[0]
    made.type, made.shape = old.type, old.shape
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    model.graph.insert_before(node, new)
    name = old.name
    model.graph.remove(node, safe=True)
    made.name = name
