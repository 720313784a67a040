"""Safetensors shards and their index, as Hugging Face lays out a checkpoint: written a tensor at a time, read a tensor at a time.

    model-00001-of-0000N.safetensors ...   8 bytes: the header's length; the header, JSON; the tensors' bytes, C order
    model.safetensors.index.json           which tensor is in which shard

The index stands there for one shard too. Loaders that take every *.safetensors file of a directory (vLLM) are told by it which are weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  # teaches numpy the dtype bfloat16
import numpy as np
import onnx_ir as ir
from safetensors import SafetensorError, safe_open

from flora_export.base_model import INDEX, read_json
from flora_export.errors import ArtifactError, CheckpointError
from flora_export.weights import Array

SHARD = "model-{:05d}-of-{:05d}.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# Safetensors' names of dtypes, and numpy's.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written; `read` is called once, when it is its turn."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_shards(directory: Path, tensors: Sequence[Planned]) -> None:
    """Write tensors and their index into a directory. No more than one tensor is in memory at a time."""
    shards = _split(tensors)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SHARD.format(number, len(shards))
        _write_one(directory / file, shard)
        weight_map |= {tensor.name: file for tensor in shard}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: Sequence[Planned]) -> list[list[Planned]]:
    """Shards of at most MAX_SHARD_BYTES, or of one tensor."""
    shards: list[list[Planned]] = [[]]
    room = MAX_SHARD_BYTES
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def _write_one(file: Path, tensors: Sequence[Planned]) -> None:
    tensors = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))  # widest first: each is aligned to its own size
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + tensor.nbytes
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = tensor.read()
            assert (values.dtype, values.shape) == (tensor.dtype, tensor.shape), tensor.name
            stream.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def read_shards(directory: Path, files: Sequence[str]) -> dict[str, ir.TensorProtocol]:
    """The tensors of a written checkpoint by name, read when they are asked for.

    Args:
        files: the artifact's files; its shards are those named as such.

    Raises:
        ArtifactError: a shard or the index is damaged, or they disagree.
    """
    found: dict[str, ir.TensorProtocol] = {}
    places: dict[str, str] = {}
    for name, tensor, file in _tensors(directory, sorted(filter(_SHARD_NAME.fullmatch, files))):
        if name in found:
            raise ArtifactError(f"{directory}: {name} is in both {places[name]} and {file}. Build the artifact again.")
        found[name], places[name] = tensor, file
    try:
        indexed = read_json(directory / INDEX, "weight index").get("weight_map")
    except CheckpointError as error:
        raise ArtifactError(f"{error}. Build the artifact again.") from error
    if indexed != places:
        raise ArtifactError(f"{directory / INDEX} does not say which tensors are in which shards. Build the artifact again.")
    return found


def _tensors(directory: Path, files: Sequence[str]) -> Iterator[tuple[str, ir.TensorProtocol, str]]:
    for file in files:
        try:
            with safe_open(directory / file, framework="numpy") as shard:
                for name in shard.keys():  # noqa: SIM118  # not a dict
                    header = shard.get_slice(name)
                    shape, dtype = ir.Shape(header.get_shape()), ir.DataType.from_numpy(np.dtype(DTYPES[header.get_dtype()]))
                    yield name, ir.LazyTensor(_reader(directory / file, name), dtype=dtype, shape=shape, name=name), file
        except (SafetensorError, OSError, KeyError) as error:
            raise ArtifactError(
                f"{directory / file} cannot be read ({type(error).__name__}: {error}). Build the artifact again."
            ) from error


def _reader(file: Path, name: str) -> Callable[[], ir.TensorProtocol]:
    def read() -> ir.TensorProtocol:
        with safe_open(file, framework="numpy") as shard:
            return ir.Tensor(shard.get_tensor(name), name=name)

    return read
