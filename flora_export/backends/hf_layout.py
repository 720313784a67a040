"""From the fused graph to the tensors of a plain checkpoint: r more neurons in every layer's MLP, and nothing else.

    graph, [in, out]                                  checkpoint, [out, in]
    gate    [Wg G]        axis 1                      gate_proj       [Wg; G; 0]          rows
    up      [Wu A]        axis 1                      up_proj         [Wu; A; 0]          rows
    packed  [Wg G Wu A]   axis 1                      gate_up_proj    [Wg; G; 0; Wu; A; 0]
    down    [Wd; sB]      axis 0                      down_proj       [Wd, sB, 0]         columns

`intermediate_size` is one number for all layers: where a layer's rank is below the largest, or it has no adapter, zeros fill the rest.
A neuron of zeros adds exactly zero, since its column of down_proj is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from safetensors import safe_open

from flora_export.base_model import BaseModel
from flora_export.branch import Branch
from flora_export.change import WeightChange
from flora_export.errors import FusionError
from flora_export.ledger import block_records
from flora_export.passes import Fused
from flora_export.passes.change_weights import changed_values
from flora_export.shards import DTYPES, Planned
from flora_export.weights import Array, Part, parts_of

REMEDY = 'Train with target_modules=["mlp"] and mlp_activation="gated", or build with --backend onnxruntime.'
_FLOATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_CASTABLE = ("F64", "F32", "F16", "BF16")

Recipe = tuple[int, tuple[Part, ...]]  # axis, parts along it; values are read as they stand in the file
Note = Callable[[str, int, Part, Array], None]  # (tensor, axis, part, its values)


def check_neurons(fused: Fused) -> int:
    """The base model's `intermediate_size`, if the adapter can be written as more of its neurons.

    Raises:
        FusionError: it cannot; the message says which block, and why.
    """
    if fused.fuse != "both":
        raise FusionError(
            f"--fuse {fused.fuse}: a plain Hugging Face checkpoint has no place for an adapter but its neurons; use --fuse both"
        )
    others = [record for record in block_records(fused) if record.fusion != "neurons"]
    if others:
        first = others[0]
        kinds = {branch.block: branch.kind for branch in fused.branches}
        what = "an attention branch" if kinds[first.block] == "attention" else f"an MLP branch with activation {first.activation!r}"
        raise FusionError(
            f"{first.block}: {what} is not r more neurons of a gated MLP, so no plain Hugging Face checkpoint can hold it "
            f"({len(others)} of {len(kinds)} branches are such). {REMEDY}"
        )
    config, where = fused.base.config, f"{fused.base.path}/config.json"
    size = config.get("intermediate_size")
    if not isinstance(size, int):
        raise FusionError(f"{where}: intermediate_size is {size!r}, but one whole number for all layers is needed. {REMEDY}")
    return size


def widened(fused: Fused, neurons: int) -> tuple[int, dict[str, Recipe]]:
    """(how many neurons are added, the recipe of each tensor of the base's files that becomes larger).

    Raises:
        FusionError: the base's files do not hold the MLP of each layer under the names and in the shapes that the graph promises.
    """
    files = fused.base.tensors
    more = max(branch.rank for branch in fused.branches)
    template = fused.branches[0]
    by_block = {branch.block: branch for branch in fused.branches}
    recipes: dict[str, Recipe] = {}
    for layer in range(fused.base.layers):
        block = _in_layer(template.block, layer)
        branch = by_block.pop(block, None)
        for host, axis in [(name, 0) for name in template.reads] + [(name, 1) for name in template.writes]:
            name = block + host.removeprefix(template.block)
            tensor = file_name(name)
            bases, adapters = _split(fused.model.graph.initializers[host])
            own = _split(fused.model.graph.initializers[name])[1] if branch is not None else []
            _check(fused.base, files, tensor, axis, neurons, len(bases))
            recipes[tensor] = axis, _parts(fused, files, tensor, axis, neurons, own or [None] * len(adapters), more)
            bias = tensor.removesuffix(".weight") + ".bias"
            if axis == 0 and bias in files:
                recipes[bias] = 0, _parts(fused, files, bias, 0, neurons, [None] * len(adapters), more)
    if by_block:
        raise FusionError(f"{next(iter(by_block))}: not one of the {fused.base.layers} layers that {template.block} is in")
    return more, recipes


def _in_layer(block: str, layer: int) -> str:
    """`model.layers.3.mlp` -> the same of another layer."""
    return ".".join(str(layer) if part.isdigit() else part for part in block.split("."))


def file_name(initializer: str) -> str:
    """The graph's name of a weight -> the file's."""
    return initializer.removesuffix("_t")


def _split(value: ir.Value) -> tuple[list[Part], list[Part]]:
    """(base parts, adapter parts) of a widened weight, in order: one base part, one adapter part, and again for the second half."""
    parts = parts_of(value)[1]
    bases, adapters = ([part for part in parts if part.origin == origin] for origin in ("base", "adapter"))
    if [part.origin for part in parts] != ["base", "adapter"] * len(bases):
        raise FusionError(f"{value.name} is not halves of a base weight with an adapter's matrix behind each: {[p.tensor for p in parts]}")
    return bases, adapters


def _check(base: BaseModel, files: dict[str, Path], tensor: str, axis: int, neurons: int, halves: int) -> None:
    if tensor not in files:
        raise FusionError(f"base model {base.name}: its files have no {tensor}, which would have to become larger. {REMEDY}")
    with safe_open(files[tensor], framework="numpy") as file:
        shape = file.get_slice(tensor).get_shape()
    if shape[axis] != halves * neurons:
        raise FusionError(
            f"base model {base.name}: {tensor} is {shape}, but intermediate_size {neurons} makes axis {axis} {halves * neurons}"
        )


def _parts(
    fused: Fused, files: dict[str, Path], tensor: str, axis: int, neurons: int, adapters: Sequence[Part | None], more: int
) -> tuple[Part, ...]:
    """[half; adapter; zeros] for each half of a tensor, so that each becomes `more` larger."""
    dtype = np.dtype(_FLOATS[fused.capture.precision])
    with safe_open(files[tensor], framework="numpy") as file:
        shape = file.get_slice(tensor).get_shape()
    parts = []
    for half, adapter in enumerate(adapters):
        start, stop = half * neurons, (half + 1) * neurons
        label = tensor if len(adapters) == 1 else f"{tensor}[{start}:{stop}]"
        parts.append(Part(label, "base", neurons, 1.0, _base_reader(files[tensor], tensor, dtype, axis, start, stop)))
        if adapter is not None:
            parts.append(Part(adapter.tensor, "adapter", adapter.size, adapter.scale, _transposed(adapter)))
        rest = more - (adapter.size if adapter is not None else 0)
        if rest:
            parts.append(Part("zeros", "zeros", rest, 1.0, _zeros((*shape[:axis], rest, *shape[axis + 1 :]), dtype)))
    return tuple(parts)


def _transposed(part: Part) -> Callable[[], Array]:
    return lambda: part.read().T


def _zeros(shape: Sequence[int], dtype: np.dtype) -> Callable[[], Array]:
    return lambda: np.zeros(shape, dtype)


def _base_reader(file: Path, tensor: str, dtype: np.dtype, axis: int = 0, start: int = 0, stop: int | None = None) -> Callable[[], Array]:
    """Reads [start, stop) along an axis of a tensor of the base's file, cast to a dtype."""

    def read() -> Array:
        with safe_open(file, framework="numpy") as opened:
            values: Array = opened.get_slice(tensor)[(slice(None),) * axis + (slice(start, stop),)] if stop else opened.get_tensor(tensor)
        with np.errstate(over="ignore"):
            cast = values.astype(dtype, copy=False)
        if cast.dtype != values.dtype and not np.isfinite(cast).all():
            raise FusionError(f"{tensor} of the base model overflows {dtype.name}: build with --precision fp32 or bf16")
        return cast

    return read


def changed(fused: Fused) -> dict[str, Recipe]:
    """The recipe of each tensor of the base's files that the adapter changes: the tensor as it becomes."""
    base, dtype = fused.base, _FLOATS[fused.capture.precision]

    def reader(change: WeightChange) -> Callable[[], Array]:
        return lambda: changed_values(fused.checkpoint, change, base, dtype)

    return {c.tensor: (0, (Part(c.tensor, "changed", base.shapes[c.tensor][0], c.scale, reader(c)),)) for c in fused.checkpoint.changes}


def plan(base: BaseModel, precision: str, recipes: dict[str, Recipe], note: Note) -> list[Planned]:
    """Every tensor of the new checkpoint. `note` is given each part as it is read."""
    return [_planned(precision, name, file, recipes.get(name), note) for name, file in base.tensors.items()]


def _planned(precision: str, name: str, file: Path, recipe: Recipe | None, note: Note) -> Planned:
    with safe_open(file, framework="numpy") as opened:
        header = opened.get_slice(name)
        shape, kind = tuple(header.get_shape()), header.get_dtype()
    if kind not in DTYPES:
        raise FusionError(f"{file}: {name} is {kind}, but a plain checkpoint is written of {', '.join(DTYPES)}. Take the original model.")
    dtype = np.dtype(_FLOATS[precision] if kind in _CASTABLE else DTYPES[kind])
    axis, parts = recipe or (0, (Part(name, "base", shape[0] if shape else 1, 1.0, _base_reader(file, name, dtype)),))

    def read() -> Array:
        arrays = [part.read() for part in parts]
        for part, array in zip(parts, arrays, strict=True):
            note(name, axis, part, array)
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=axis)

    if recipe:
        shape = (*shape[:axis], sum(part.size for part in parts), *shape[axis + 1 :])
    return Planned(name, dtype, shape, read)


def branches_in_file(branches: Sequence[Branch]) -> dict[str, tuple[list[str], list[str]]]:
    """The host tensors of each block, (reads, writes), as the file names them."""
    return {b.block: ([file_name(name) for name in b.reads], [file_name(name) for name in b.writes]) for b in branches}
