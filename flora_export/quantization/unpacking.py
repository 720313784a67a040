"""Quantized checkpoints that users own: their integers, as MatMulNBits takes them, and the plain checkpoint that they stand for.

    gptq                 qweight int32 [in / n, out], n numbers of an input after the other in each; qzeros; scales [groups, out]
    compressed-tensors   weight_packed int32 [out, in / n]; weight_scale [out, groups]        (pack-quantized)

In both, a number is q with W = s · (q - 2^(bits - 1)): symmetric quantization, the only one that is read. Nothing is requantized: what a
build writes for such a weight are these integers, laid out otherwise.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flora_export.errors import CheckpointError
from flora_export.quantization import BLOCK_SIZES
from flora_export.quantization.packing import Array, dequantize
from flora_export.scratch import Scratch

REMEDY = "Take the original model, and let flora-export quantize it."
COPIED = (".json", ".jinja", ".model", ".txt")
_SUFFIXES = {"gptq": ("qweight", "qzeros", "scales", "g_idx"), "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape")}


@dataclass(frozen=True)
class Packed:
    """The quantized weights of a checkpoint, each by the name of the tensor that it stands for: `model.layers.0.mlp.up_proj.weight`."""

    method: str
    bits: int
    block_size: int
    zero: int  # what a zero point is stored as
    files: Mapping[str, Path]  # of all its tensors
    modules: Mapping[str, tuple[int, int]]  # tensor -> [out, in]

    def read(self, tensor: str) -> tuple[Array, Array]:
        """Codes [out, blocks, bytes] and fp32 scales [out, blocks]."""
        at = tensor.removesuffix("weight")
        outputs, inputs = self.modules[tensor]
        if self.method == "gptq":
            words, scales = self._tensor(f"{at}qweight").T, self._tensor(f"{at}scales").T
        else:
            words, scales = self._tensor(f"{at}weight_packed"), self._tensor(f"{at}weight_scale")
        count = 32 // self.bits
        shifts = np.arange(count, dtype=np.uint32) * np.uint32(self.bits)
        values = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts) & np.uint32((1 << self.bits) - 1)
        codes: Array = values.astype(np.uint8).reshape(outputs, inputs // self.block_size, self.block_size)
        if self.bits == 4:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        return codes, np.ascontiguousarray(scales, np.float32)

    def weight(self, tensor: str) -> Array:
        """The weight [out, in] that they stand for, in fp32."""
        codes, scales = self.read(tensor)
        return np.ascontiguousarray(dequantize(codes, scales, self.bits, self.modules[tensor][1]).T)

    def plain(self, name: str) -> Array | None:
        """A tensor that is not quantized; None for those that are, or say how."""
        return None if self._belongs(name) else self._tensor(name)

    @property
    def tensors(self) -> list[str]:
        """The names of the plain checkpoint's tensors."""
        return sorted([*self.modules, *(name for name in self.files if not self._belongs(name))])

    def _belongs(self, name: str) -> bool:
        module, _, last = name.rpartition(".")
        return last in _SUFFIXES[self.method] and f"{module}.weight" in self.modules

    def _tensor(self, name: str) -> Array:
        with safe_open(self.files[name], framework="numpy") as file:
            values: Array = file.get_tensor(name)
        return values


def read_packed(path: Path, config: Mapping[str, Any], files: Mapping[str, Path]) -> Packed:
    """The quantized weights of a checkpoint, checked: all shapes, and that nothing says more than is read here.

    Args:
        files: which file each tensor is in.

    Raises:
        CheckpointError: a method or a variant of it that is not read; or a damaged checkpoint.
    """
    method, bits, group, zero = _read_config(path / "config.json", config["quantization_config"])
    try:
        shapes = {name: shape for file in sorted(set(files.values())) for name, shape in _shapes(file).items()}
        packed = Packed(method, bits, group, zero, files, _modules(path, method, bits, shapes))
        for tensor, (outputs, inputs) in packed.modules.items():
            _check_module(path, packed, tensor, outputs, inputs, shapes)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Copy it again.") from error
    if not packed.modules:
        raise CheckpointError(
            f"{path}: config.json says that it is quantized ({method}), but no tensor of it is. Is its download complete?"
        )
    return packed


def write_plain(packed: Packed, source: Path, config: Mapping[str, Any]) -> Scratch:
    """The plain checkpoint that a quantized one stands for, in fp32, a tensor at a time. The directory lives as long as its object."""
    directory = Scratch("flora-export-unpacked-")
    path = Path(directory.name)
    names = packed.tensors
    weight_map = {}
    for index, name in enumerate(names, start=1):
        values = packed.plain(name) if name not in packed.modules else packed.weight(name)
        assert values is not None
        weight_map[name] = f"model-{index:05d}-of-{len(names):05d}.safetensors"
        save_file({name: np.ascontiguousarray(values)}, path / weight_map[name], {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    write_beside(source, path, config)
    return directory


def write_beside(source: Path, directory: Path, config: Mapping[str, Any]) -> None:
    """What stands beside a base model's weights, for a plain checkpoint of it in fp32: tokenizer, settings, its configuration."""
    for file in source.iterdir():
        if file.is_file() and file.suffix in COPIED and not file.name.endswith(".index.json"):
            shutil.copyfile(file, directory / file.name)
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")} | {"dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def _read_config(file: Path, quantization: Any) -> tuple[str, int, int, int]:
    """(method, bits, inputs that share a scale, what a zero point is stored as)."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{file}: quantization_config {what}. {REMEDY}")

    if method == "gptq":
        if quantization.get("desc_act") or not quantization.get("sym", True):
            raise refuse("has desc_act or sym = false, but inputs must be in order and quantization symmetric")
        bits, group = quantization.get("bits"), quantization.get("group_size")
    elif method == "compressed-tensors":
        groups = quantization.get("config_groups")
        only = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
        weights = only.get("weights") if isinstance(only, dict) else None
        if quantization.get("format") != "pack-quantized" or not isinstance(weights, dict):
            raise refuse(f"has format {quantization.get('format')!r}, but only pack-quantized weights of one group of layers are read")
        if not weights.get("symmetric") or weights.get("actorder") or weights.get("type", "int") != "int":
            raise refuse("has weights that are not symmetric integers in their own order")
        bits, group = weights.get("num_bits"), weights.get("group_size")
    else:
        raise refuse(f"has quant_method {method!r}, but read are {', '.join(_SUFFIXES)}")
    if bits not in (4, 8) or group not in BLOCK_SIZES:
        raise refuse(f"has {bits!r} bits in groups of {group!r}, but read are 4 and 8 bits in groups of {', '.join(map(str, BLOCK_SIZES))}")
    first = quantization.get("checkpoint_format", "gptq") == "gptq"  # it keeps zero points less one
    return method, bits, group, (1 << (bits - 1)) - (1 if first else 0)


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="numpy") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118  # not a dict


def _modules(path: Path, method: str, bits: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    suffix, count = _SUFFIXES[method][0], 32 // bits
    found = {}
    for name, shape in shapes.items():
        if re.fullmatch(rf"[\w.]+\.{suffix}", name):
            if len(shape) != 2:
                raise CheckpointError(f"{path}: {name} is {shape}, but a matrix was expected. Copy it again.")
            outputs, inputs = (shape[1], shape[0] * count) if method == "gptq" else (shape[0], shape[1] * count)
            found[name.removesuffix(suffix) + "weight"] = (outputs, inputs)
    return found


def _check_module(path: Path, packed: Packed, tensor: str, outputs: int, inputs: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Shapes agree, and what could say otherwise (zero points, an order of inputs) says what is read."""
    at, groups = tensor.removesuffix("weight"), inputs // packed.block_size
    scales = f"{at}scales" if packed.method == "gptq" else f"{at}weight_scale"
    expected = (groups, outputs) if packed.method == "gptq" else (outputs, groups)
    if inputs % packed.block_size or shapes.get(scales) != expected:
        raise CheckpointError(f"{path}: {scales} is {shapes.get(scales)}, but {tensor} [{outputs}, {inputs}] needs {expected}. {REMEDY}")
    if packed.method == "compressed-tensors" and (f"{at}weight_zero_point" in shapes or f"{at}weight_g_idx" in shapes):
        raise CheckpointError(f"{path}: {tensor} has zero points or an order of its inputs, which is not read. {REMEDY}")
    if packed.method == "gptq":
        if f"{at}g_idx" in shapes and not np.array_equal(packed._tensor(f"{at}g_idx"), np.arange(inputs) // packed.block_size):
            raise CheckpointError(f"{path}: {at}g_idx orders its inputs otherwise, which is not read. {REMEDY}")
        stored = packed.zero * 0x11 if packed.bits == 4 else packed.zero  # a byte of them
        if f"{at}qzeros" in shapes and not (packed._tensor(f"{at}qzeros").view(np.uint8) == stored).all():
            raise CheckpointError(f"{path}: {at}qzeros holds zero points that are not the middle, which is not read. {REMEDY}")
