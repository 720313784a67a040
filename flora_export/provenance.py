"""Which rows of which tensor of the base model fill which slice of which initializer.

The capture keeps names: `model.layers.0.mlp.up_proj.weight_t` is that tensor, transposed; `q__k__v__axis_0__concat_t` is three of them,
one below the other, then transposed. Where it renames a tensor, or cuts one into pieces (Starcoder 2's c_fc, Phi-3's qkv_proj, a tied
head), the numbers tell: the initializer's are found among the tensor's rows, bit for bit and in one place only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from flora_export.base_model import BaseModel
from flora_export.errors import FusionError
from flora_export.weights import Array, dims_of

_CAPTURED = re.compile(r"(?P<stem>.+?)(?P<transposed>_t)?(\[(?P<start>\d{0,12}):(?P<stop>\d{0,12})\])?", re.DOTALL)


@dataclass(frozen=True)
class Captured:
    """What the name of an initializer, or of a part of one, says: tensors stacked along their rows, perhaps transposed, perhaps cut."""

    tensors: tuple[str, ...]
    transposed: bool
    start: int | None
    stop: int | None

    def take(self, values: Array, axis: int) -> Array:
        """The part, of the stacked tensors' values."""
        values = values.T if self.transposed else values
        if axis >= values.ndim:
            return values[:0]  # of a damaged ledger
        return values[(slice(None),) * axis + (slice(self.start, self.stop),)]


def read_name(name: str) -> Captured:
    """What a name says; one that says nothing stands for itself."""
    match = _CAPTURED.fullmatch(name)
    if match is None:
        return Captured((name,), False, None, None)
    start, stop = (int(match[key]) if match[key] else None for key in ("start", "stop"))
    return Captured(tuple(match["stem"].removesuffix("__axis_0__concat").split("__")), bool(match["transposed"]), start, stop)


@dataclass(frozen=True)
class Place:
    """Rows [first, first + rows) of a tensor fill [offset, offset + rows) of an initializer, along its axis `axis`."""

    tensor: str
    initializer: str
    axis: int  # 1 where the initializer holds the tensor transposed, [in, out]
    offset: int
    first: int
    rows: int

    def label(self, total: int) -> str:
        """Its name in the ledger; `total` is the tensor's number of rows."""
        cut = "" if self.rows == total else f"[{self.first}:{self.first + self.rows}]"
        return self.tensor + ("_t" if self.axis else "") + cut


def find_places(model: ir.Model, base: BaseModel, wanted: set[str]) -> dict[str, list[Place]]:
    """Where each of the wanted tensors is in a captured graph that no pass has widened.

    Raises:
        FusionError: a tensor is in more than one place of an initializer, so that it cannot be told which.
    """
    places: dict[str, list[Place]] = {tensor: [] for tensor in wanted}
    nameless: dict[str, ir.Value] = {}
    for name, value in model.graph.initializers.items():
        captured = read_name(name)
        if all(tensor in base.shapes for tensor in captured.tensors):
            offset, axis = 0, int(captured.transposed)
            for tensor in captured.tensors:
                rows = base.shapes[tensor][0] if base.shapes[tensor] else 1
                if tensor in wanted:
                    places[tensor].append(Place(tensor, name, axis, offset, 0, rows))
                offset += rows
        elif value.dtype is not None and value.dtype.is_floating_point() and dims_of(value):
            nameless[name] = value
    for tensor in places:
        places[tensor] += _by_content(tensor, base, {name: value for name, value in nameless.items() if _may_hold(name, tensor, base)})
    return places


def _may_hold(name: str, tensor: str, base: BaseModel) -> bool:
    """Whether a renamed initializer may come from a tensor: both belong to one module, or it is a head that may be tied to a table."""
    if ".layers." not in name and ".layers." not in tensor:
        return base.tied
    return _parent(read_name(name).tensors[0]) == _parent(tensor)


def _parent(tensor: str) -> str:
    """`model.layers.0.mlp.c_fc.weight` -> `model.layers.0.mlp`."""
    return tensor.rsplit(".", 2)[0]


def _by_content(tensor: str, base: BaseModel, candidates: Mapping[str, ir.Value]) -> Iterator[Place]:
    """The places of a tensor among initializers that have other names."""
    if not candidates:
        return
    source = base.read(tensor)
    for name, value in candidates.items():
        assert value.const_value is not None and value.dtype is not None
        dims, transposed = dims_of(value), name.endswith("_t")
        if len(dims) != source.ndim or (source.ndim == 2 and dims[1 - int(transposed)] != source.shape[1]):
            continue
        values = value.const_value.numpy()
        firsts = _find_rows(values.T if transposed else values, source.astype(value.dtype.numpy(), copy=False))
        if len(firsts) > 1:
            raise FusionError(
                f"{name}: its numbers stand in {tensor} of the base model at rows {', '.join(map(str, firsts[:3]))}, so it cannot be told "
                "which of them an adapter would change"
            )
        for first in firsts:
            yield Place(tensor, name, int(transposed), 0, first, dims[1] if transposed else dims[0])


def _find_rows(block: Array, source: Array) -> list[int]:
    """The rows of a source at which all of a block stands, bit for bit."""
    last = len(source) - len(block)
    if last < 0:
        return []
    bits = np.ascontiguousarray(source).view(np.uint8).reshape(len(source), -1)
    wanted: np.ndarray[Any, Any] = np.ascontiguousarray(block).view(np.uint8).reshape(len(block), -1)
    starts = np.flatnonzero((bits[: last + 1] == wanted[0]).all(axis=1))
    return [int(start) for start in starts if np.array_equal(bits[start : start + len(wanted)], wanted)]
