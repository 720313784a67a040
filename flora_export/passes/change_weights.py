"""ChangeWeights: a weight of the base model becomes what an adapter makes of it. No node is added or moved.

before   x ── W ── y
after    x ── W' ── y          W' = W + s B A, say: computed in fp64 when it is written, and rounded once

A weight that packs several of the base's is restated as the parts that it is made of, the changed ones among them.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from flora_export.base_model import BaseModel
from flora_export.change import WeightChange
from flora_export.checkpoint import Checkpoint
from flora_export.errors import FusionError
from flora_export.provenance import Place, find_places, read_name
from flora_export.rotary import round_once
from flora_export.weights import Array, Part, Stacked, dims_of, parts_of


class ChangeWeights(ir.passes.InPlacePass):
    """Runs before what widens weights."""

    def __init__(self, checkpoint: Checkpoint, base: BaseModel) -> None:
        self.checkpoint, self.base = checkpoint, base

    def requires(self, model: ir.Model) -> None:
        for tensor in (change.tensor for change in self._waiting(model)):
            if tensor not in self.base.shapes:
                raise FusionError(f"{tensor}: the base model {self.base.name} has no such weight")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        waiting = {change.tensor: change for change in self._waiting(model)}
        places: dict[str, list[Place]] = defaultdict(list)
        for tensor, found in find_places(model, self.base, set(waiting)).items():
            if _missing_rows(found, self.base.shapes[tensor][0]):
                raise FusionError(
                    f"{tensor}: the adapter changes it, but the captured graph does not hold it as it is in the base model's file, nor "
                    "pieces of it, so it cannot be changed there. Merge the adapter in PEFT with merge_and_unload()."
                )
            for place in found:
                places[place.initializer].append(place)
        for name, own in places.items():
            self._change_one(model.graph.initializers[name], sorted(own, key=lambda place: place.offset), waiting)
        return ir.passes.PassResult(model, modified=bool(waiting))

    def ensures(self, model: ir.Model) -> None:
        for change in self._waiting(model):
            raise FusionError(f"{change.tensor}: was not changed")

    def _waiting(self, model: ir.Model) -> list[WeightChange]:
        done = {tensor for v in model.graph.initializers.values() for part in _changed(v) for tensor in read_name(part.tensor).tensors}
        return [change for change in self.checkpoint.changes if change.tensor not in done]

    def _change_one(self, value: ir.Value, places: Sequence[Place], changes: dict[str, WeightChange]) -> None:
        """Restate an initializer as its parts, those of `places` changed."""
        tensor = value.const_value
        assert tensor is not None and value.name is not None
        dims, axis = dims_of(value), places[0].axis
        if isinstance(tensor, Stacked) or any(place.axis != axis for place in places):
            raise FusionError(f"{value.name}: weights are changed before they are widened, and along one axis")
        parts: list[Part] = []
        stop = 0
        for place in places:
            parts += self._kept(value, axis, stop, place.offset)
            change, label = changes[place.tensor], place.label(self.base.shapes[place.tensor][0])
            parts.append(Part(label, "changed", place.rows, change.scale, self._reader(change, place, tensor.dtype)))
            stop = place.offset + place.rows
        parts += self._kept(value, axis, stop, dims[axis])
        value.const_value = Stacked(value.name, parts, axis, tensor.dtype, dims[:axis] + dims[axis + 1 :])

    def _reader(self, change: WeightChange, place: Place, dtype: ir.DataType) -> Callable[[], Array]:
        def read() -> Array:
            values = changed_values(self.checkpoint, change, self.base, dtype.numpy())[place.first : place.first + place.rows]
            return np.ascontiguousarray(values.T) if place.axis else values

        return read

    def _kept(self, value: ir.Value, axis: int, start: int, stop: int) -> list[Part]:
        """The parts in [start, stop) of an initializer that stay as they are, one for each tensor that it packs."""
        assert value.name is not None and value.const_value is not None
        cuts = {start, stop}
        named = {}
        for tensor, (first, last) in _packed(value.name, self.base).items():
            if start <= first and last <= stop:
                cuts |= {first, last}
                named[first] = tensor + ("_t" if axis else "")
        edges = sorted(cuts)
        return [
            Part(named.get(a, f"{value.name}[{a}:{b}]"), "base", b - a, 1.0, _slice_reader(value.const_value, axis, a, b))
            for a, b in itertools.pairwise(edges)
        ]


def changed_values(checkpoint: Checkpoint, change: WeightChange, base: BaseModel, dtype: npt.DTypeLike) -> Array:
    """A changed weight in the layout of the base model's file, rounded once from fp64. Raises FusionError where a number overflows."""
    kind = np.dtype(dtype)
    with np.errstate(over="ignore"):
        values = round_once(checkpoint.changed(change, base.read(change.tensor)), kind)
    if not np.isfinite(values).all():
        raise FusionError(f"{change.tensor}, changed, overflows {kind.name}: build with --precision fp32 or bf16")
    return values


def _missing_rows(places: Sequence[Place], rows: int) -> bool:
    """Whether a tensor has rows that are in no place."""
    held = np.zeros(rows, bool)
    for place in places:
        held[place.first : place.first + place.rows] = True
    return not held.all()


def _packed(name: str, base: BaseModel) -> dict[str, tuple[int, int]]:
    """Where each tensor is that an initializer packs by its name."""
    tensors = read_name(name).tensors
    if len(tensors) < 2 or not all(tensor in base.shapes for tensor in tensors):
        return {}
    stops = np.cumsum([base.shapes[tensor][0] for tensor in tensors]).tolist()
    return {tensor: (stop - base.shapes[tensor][0], stop) for tensor, stop in zip(tensors, stops, strict=True)}


def _slice_reader(tensor: ir.TensorProtocol, axis: int, start: int, stop: int) -> Callable[[], Array]:
    return lambda: tensor.numpy()[(slice(None),) * axis + (slice(start, stop),)]


def _changed(value: ir.Value) -> list[Part]:
    return [part for part in parts_of(value)[1] if part.origin == "changed"]
