"""OpenVINO's IR on disk, read without OpenVINO: which constants it has, and their numbers.

openvino_model.xml   the graph: a layer of type Const says the element type, shape, offset and size of its numbers
openvino_model.bin   those numbers, one after the other, C order; of 4 bits, the first of two is the low half of a byte
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import ml_dtypes  # noqa: F401  # teaches numpy the dtype bfloat16
import onnx_ir as ir

from flora_export.artifact import IR, IR_DATA
from flora_export.errors import ArtifactError

MOST_XML_BYTES = 256 * 2**20

# OpenVINO's element types. Of 4 bits two are in a byte, as in the codes of a quantized graph: they are read as those bytes.
_TYPES = {
    "f32": ir.DataType.FLOAT, "f16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16, "i64": ir.DataType.INT64,
    "i32": ir.DataType.INT32, "u8": ir.DataType.UINT8, "i8": ir.DataType.INT8, "boolean": ir.DataType.BOOL, "u4": ir.DataType.UINT8,
}  # fmt: skip
HALVES = "u4"
CONSTANT = "Const"


def read_constants(directory: Path) -> dict[str, ir.ExternalTensor]:
    """The constants of an IR that its outputs or its state depend on, by name; their numbers are read when they are asked for.

    A `u4` [..., n] is read as uint8 [..., n / 2].

    Raises:
        ArtifactError: the graph is damaged, two constants have one name, or one is not where and what it says it is.
    """
    file, data = directory / IR, directory / IR_DATA
    try:
        if file.stat().st_size > MOST_XML_BYTES:
            raise ValueError(f"{file.stat().st_size} bytes of XML")
        text = file.read_bytes().decode("utf-8")
        if "<!" in text or "\0" in text:  # entities that name each other grow without bound, and OpenVINO writes none
            raise ValueError("a declaration, which OpenVINO writes none of")
        root = ElementTree.fromstring(text)
        (layers,), (edges,) = root.findall("layers"), root.findall("edges")
        end, used = data.stat().st_size, _used(layers, edges)
        found: dict[str, ir.ExternalTensor] = {}
        for layer in layers:
            kind = layer.get("type", "")
            if (kind.lower() in ("const", "constant") and kind != CONSTANT) or layer.find("body") is not None:
                raise ValueError(f"{layer.get('name')}: a {kind} as OpenVINO writes none")
            if kind == CONSTANT:
                tensor = _constant(layer, end, directory)
                if tensor.name in found:
                    raise ValueError(f"two constants are named {tensor.name}")
                if layer.get("id") in used:
                    found[str(tensor.name)] = tensor
    except (OSError, ValueError, KeyError, TypeError, ElementTree.ParseError, RecursionError) as error:
        raise ArtifactError(f"{file} cannot be read ({type(error).__name__}: {error}). Build the artifact again.") from error
    return found


def _used(layers: ElementTree.Element, edges: ElementTree.Element) -> set[str]:
    """The layers, by their ids, on which an output or a state depends."""
    sources: dict[str, list[str]] = defaultdict(list)
    for edge in edges:
        sources[edge.attrib["to-layer"]].append(edge.attrib["from-layer"])
    waiting = [layer.attrib["id"] for layer in layers if layer.get("type") in ("Result", "Assign")]
    reached = set(waiting)
    while waiting:
        new = set(sources[waiting.pop()]) - reached
        reached |= new
        waiting += new
    return reached


def _constant(layer: ElementTree.Element, end: int, directory: Path) -> ir.ExternalTensor:
    facts, name = layer.find("data"), str(layer.get("name"))
    if facts is None:
        raise ValueError(f"{name} says nothing of its numbers")
    kind, offset, size = facts.attrib["element_type"], int(facts.attrib["offset"]), int(facts.attrib["size"])
    shape = [int(dim) for dim in facts.attrib["shape"].split(",") if dim.strip()]
    if kind == HALVES:
        shape = [*shape[:-1], shape[-1] // 2] if shape and shape[-1] % 2 == 0 else [-(-math.prod(shape) // 2)]
    if min(offset, size, *shape) < 0 or offset + size > end or math.prod(shape) * _TYPES[kind].itemsize != size:
        raise ValueError(f"{name}: {kind} {shape} at {offset}, {size} bytes, of {end} in {IR_DATA}")
    return ir.ExternalTensor(IR_DATA, offset, size, _TYPES[kind], shape=ir.Shape(shape), name=name, base_dir=directory)
