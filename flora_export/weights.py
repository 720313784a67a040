"""Initializers that know what they are made of.

A widened weight is the base model's weight with columns or rows of an adapter put in. `Stacked` holds that recipe, and the numbers
come into being one initializer at a time, when the model is saved. The ledger is read off these recipes: no one keeps books.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from flora_export.errors import FusionError

Array = npt.NDArray[Any]
# changed: a tensor of the base that an adapter has changed; zeros fill a bias or pad a width, constants are sizes and axes
Origin = Literal["adapter", "base", "changed", "zeros", "constant"]


@dataclass(frozen=True)
class Part:
    """A tensor that fills one slice of an initializer, whole, along the initializer's stacking axis.

    `read` returns its values as they stand in the initializer: transposed, scaled and cast.
    """

    tensor: str
    origin: Origin
    size: int  # extent along the stacking axis
    scale: float
    read: Callable[[], Array]
    form: str = (
        ""  # of a quantized weight, how its numbers stand there (quantization/packing.py); then `size` counts rows, blocks or bytes of it
    )


class Stacked(ir.LazyTensor):
    """Parts laid side by side along one axis."""

    def __init__(self, name: str, parts: Sequence[Part], axis: int, dtype: ir.DataType, other_dims: Sequence[int]) -> None:
        """`other_dims` are the dimensions but for the stacking axis."""
        self.parts = tuple(parts)
        self.axis = axis
        dims = list(other_dims)
        dims.insert(axis, sum(part.size for part in parts))
        super().__init__(self._stack, dtype=dtype, shape=ir.Shape(dims), name=name)

    def _stack(self) -> ir.Tensor[Any]:
        return ir.Tensor(np.concatenate([part.read() for part in self.parts], axis=self.axis), dtype=self.dtype, name=self.name)


def zeros(dims: Sequence[int], axis: int, dtype: ir.DataType) -> Part:
    """A part of nothing but zeros: for an adapter's place in a bias, and for padding."""

    def read() -> Array:
        return np.zeros(dims, dtype=dtype.numpy())

    return Part("zeros", "zeros", dims[axis], 1.0, read)


def dims_of(value: ir.Value) -> list[int]:
    """The dimensions of an initializer."""
    assert value.const_value is not None
    return list(value.const_value.shape.numpy())


def add_constant(model: ir.Model, name: str, values: float | Sequence[int], dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
    """A new initializer: sizes of a Split, an axis, a scalar."""
    return add_weight(model, ir.Tensor(np.array(values, dtype.numpy()), dtype=dtype, name=name))


def add_weight(model: ir.Model, tensor: ir.LazyTensor | ir.Tensor[Any]) -> ir.Value:
    """A tensor as a new initializer of its name."""
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.initializers.add(value)
    return value


def parts_of(value: ir.Value) -> tuple[int, tuple[Part, ...]]:
    """(axis, parts) of an initializer. One that no pass has touched is a single part."""
    tensor = value.const_value
    if isinstance(tensor, Stacked):
        return tensor.axis, tensor.parts
    assert tensor is not None and value.name is not None
    size = next(iter(dims_of(value)), 1)
    origin: Origin = "base" if tensor.dtype.is_floating_point() else "constant"
    return 0, (Part(value.name, origin, size, 1.0, tensor.numpy),)


def widen(value: ir.Value, axis: int, additions: Sequence[tuple[int, Part]]) -> None:
    """Put parts into an initializer, each at an offset along `axis` that counts the weight as it was before.

    x [W1 W2] = [x W1, x W2] widens columns (axis 1 of [in, out]), x W1 + z W2 = [x z] [W1; W2] widens rows (axis 0).

    Raises:
        FusionError: the weight is stacked along the other axis already.
    """
    tensor = value.const_value
    assert tensor is not None and value.name is not None
    old_axis, old_parts = parts_of(value)
    if len(old_parts) > 1 and old_axis != axis:
        raise FusionError(f"{value.name} is widened along axis {old_axis} already and cannot be widened along axis {axis} as well")
    dims = dims_of(value)
    if len(old_parts) == 1:  # the size that a part states is the one along its initializer's axis
        old = old_parts[0]
        old_parts = (Part(old.tensor, old.origin, dims[axis], old.scale, old.read),)
    parts: list[Part] = []
    waiting = sorted(additions, key=lambda addition: addition[0])
    start = 0
    for part in old_parts:
        stop = start + part.size
        rest = part
        for offset, addition in [w for w in waiting if start < w[0] < stop]:
            if offset > start:  # not where two parts go to one place
                head, rest = _cut(rest, axis, offset - start)
                parts.append(head)
                start = offset
            parts.append(addition)
        parts.append(rest)
        parts += [addition for offset, addition in waiting if offset == stop]
        start = stop
    stacked = Stacked(value.name, parts, axis, tensor.dtype, dims[:axis] + dims[axis + 1 :])
    value.const_value = stacked
    value.shape = stacked.shape


def _cut(part: Part, axis: int, size: int) -> tuple[Part, Part]:
    """Cut a part in two along an axis; both halves keep its name, and say which half they are."""

    def read(slice_: slice) -> Callable[[], Array]:
        return lambda: part.read()[(slice(None),) * axis + (slice_,)]

    head = Part(f"{part.tensor}[:{size}]", part.origin, size, part.scale, read(slice(0, size)))
    tail = Part(f"{part.tensor}[{size}:]", part.origin, part.size - size, part.scale, read(slice(size, None)))
    return head, tail


def short(weight: str) -> str:
    """`model.layers.0.mlp.up_proj.weight_t` -> `up_proj`; a packed one -> `q_proj|k_proj|v_proj`."""
    return "|".join(
        name.removesuffix("_t").removesuffix(".weight").rpartition(".")[2] for name in weight.removesuffix("__axis_0__concat_t").split("__")
    )
