"""quantize_base(): a base model as what its quantized artifacts compute with, so that an adapter is trained on exactly that.

Every weight that a build would quantize is quantized and read back. What comes out is a plain Hugging Face checkpoint in fp32: PEFT,
Trainer and any device train on it as on every other, with no kernel for int4. A build for the CPU on such a base, with the same options,
finds the same codes and scales again, since a block's largest number is a whole number of steps of its own scale: what the base loses by
rounding, the adapter has seen in training.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from flora_export.artifact import staged, writing
from flora_export.base_model import BaseModel, load_base
from flora_export.errors import CheckpointError
from flora_export.quantization import Quantization
from flora_export.quantization.packing import Array, read_back
from flora_export.quantization.unpacking import write_beside
from flora_export.shards import DTYPES, Planned, write_shards

Progress = Callable[[str, int, int], None]
NOTE = "quantized_base.json"
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Snapped:
    """What was done: how many tensors, and how far they have moved, ||W' - W|| / ||W|| over all of them."""

    tensors: int
    moved: float


def quantize_base(name: str, output: Path, quantization: Quantization, progress: Progress) -> Snapped:
    """Write a base model with its weights on the steps of a quantization.

    Raises:
        CheckpointError: the base model cannot be read, or is quantized already.
        ArtifactError: `output` exists, or cannot be written.
    """
    base = load_base(name)
    if base.packed is not None:
        raise CheckpointError(f"{name} is quantized already ({base.packed.method}): train on it as it is, its integers are kept")
    total, moved, done = 0.0, 0.0, 0

    def note(before: Array, after: Array) -> None:
        nonlocal total, moved, done
        total += float(np.sum(before.astype(np.float64) ** 2))
        moved += float(np.sum((after.astype(np.float64) - before) ** 2))
        done += 1
        progress("quantizing", done, len(chosen))

    chosen = {tensor: bits for tensor, shape in base.shapes.items() if (bits := _bits(tensor, shape, quantization))}
    planned = [_plan(base, tensor, chosen.get(tensor, 0), quantization.block_size, note) for tensor in base.tensors]
    with staged(output, force=False) as directory, writing(output):
        write_shards(directory, planned)
        write_beside(base.path, directory, base.config)
        facts = {"base": base.digests, "quantization": dataclasses.asdict(quantization)}
        (directory / NOTE).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return Snapped(done, float(np.sqrt(moved / total)) if total else 0.0)


def _bits(tensor: str, shape: tuple[int, ...], quantization: Quantization) -> int:
    if len(shape) != 2 or not tensor.endswith(".weight"):
        return 0
    return quantization.bits_of(tensor)


def _plan(base: BaseModel, tensor: str, bits: int, block: int, note: Callable[[Array, Array], None]) -> Planned:
    with safe_open(base.tensors[tensor], framework="numpy") as file:
        kind = file.get_slice(tensor).get_dtype()
    if kind not in DTYPES:
        raise CheckpointError(f"{base.tensors[tensor]}: {tensor} is {kind}, but known are {', '.join(DTYPES)}. Take the original model.")
    dtype = np.dtype(np.float32 if kind in FLOATS else DTYPES[kind])

    def read() -> Array:
        before = base.read(tensor).astype(dtype)
        if not bits:
            return before
        after = read_back(before, bits, block)
        note(before, after)
        return after

    return Planned(tensor, dtype, base.shapes[tensor], read)
