"""Packing: a weight as integers of a few bits in blocks along its input dimension, with a scale for each block.

    W[k, n] ≈ s[n, k // block] · q        q: int4 in [-8, 7] or int8 in [-128, 127], symmetric, rounded to nearest

The numbers come from ONNX Runtime's own quantizer for its operator MatMulNBits: the format's owner keeps it, its blocks are independent of
each other, so that it can be asked for one weight at a time, and it is one pass of plain C++ with no calibration data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt

from flora_export.errors import BackendError
from flora_export.quantization import BLOCK_SIZES

Array = npt.NDArray[Any]
Content = Literal["codes", "scales"]
Layout = Literal["blocks", "row", "standard"]
DTYPES = {"fp32": np.float32, "fp16": np.float16}
CHUNK = 4096  # columns that are quantized at a time


@dataclass(frozen=True)
class Form:
    """How a tensor's numbers stand in an initializer of a quantized artifact, by what reads it.

    layout      codes                   scales              of
    blocks      [out, blocks, bytes]    [out, blocks]       a weight [in, out]: MatMulNBits
    row         [rows, bytes]           [rows, blocks]      a table [rows, d], looked up by row: GatherBlockQuantized
    standard    int4 [in, out]          [blocks, out]       a weight [in, out]: DequantizeLinear
    """

    bits: int
    block_size: int
    content: Content
    layout: Layout = "blocks"

    def __str__(self) -> str:
        return f"int{self.bits} {self.layout} {self.content}, {self.block_size}"

    def of(self, values: Array) -> Array:
        """The numbers of a weight [in, out], or of a table [rows, d], in this form. Its last block is filled up with zeros."""
        return self.laid_out(*quantize(values.T if self.layout == "row" else values, self.bits, self.block_size))

    def laid_out(self, codes: Array, scales: Array) -> Array:
        """Codes or scales, from [out, blocks, bytes] and [out, blocks]."""
        if self.content == "scales":
            return np.ascontiguousarray(scales.T) if self.layout == "standard" else scales
        if self.layout == "row":
            return codes.reshape(len(codes), -1)
        if self.layout == "standard":
            return np.ascontiguousarray(_numbers(codes, self.bits).reshape(len(codes), -1).T).astype(ml_dtypes.int4)
        return codes

    def axis(self, axis: int) -> int:
        """The axis along which a part of a weight stands that is a part of it along `axis`; its own inverse."""
        return 1 - axis if self.layout == "blocks" else axis

    def extent(self, inputs: int) -> int:
        """How much of its axis a number of inputs takes."""
        blocks = -(-inputs // self.block_size)
        if self.content == "scales" or self.layout == "blocks":
            return blocks
        return blocks * (self.block_size if self.layout == "standard" else self.block_size * self.bits // 8)

    def shape(self, inputs: int, outputs: int) -> list[int]:
        """Of a whole initializer."""
        sizes = [outputs, self.extent(inputs)] if self.layout != "standard" else [self.extent(inputs), outputs]
        return [*sizes, self.block_size * self.bits // 8] if (self.layout, self.content) == ("blocks", "codes") else sizes


_FORM = re.compile(r"int(?P<bits>[48]) (?P<layout>blocks|row|standard) (?P<content>codes|scales), (?P<block>\d{1,4})")


def read_form(text: str) -> Form:
    """The form that a ledger names. Raises ValueError: there is no such."""
    match = _FORM.fullmatch(text)
    if match is None or int(match["block"]) not in BLOCK_SIZES:
        raise ValueError(f"{text!r} is no form of a quantized weight")
    return Form(int(match["bits"]), int(match["block"]), cast("Content", match["content"]), cast("Layout", match["layout"]))


def quantize(weight: Array, bits: int, block_size: int) -> tuple[Array, Array]:
    """Codes [out, blocks, bytes] and scales [out, blocks] of a weight [in, out]; its last block is filled up with zeros."""
    quantizer = _quantizer(bits, block_size)
    rows, columns = weight.shape
    padded = np.zeros((rows + -rows % block_size, min(columns, CHUNK)), weight.dtype)
    codes: list[Array] = []
    scales: list[Array] = []
    for start in range(0, columns, CHUNK):
        some = weight[:, start : start + CHUNK]
        padded[:rows, : some.shape[1]] = some
        packed, scale, _ = quantizer.qbits_block_quant(np.ascontiguousarray(padded[:, : some.shape[1]]))
        codes.append(packed)
        scales.append(scale + 0)  # of a block of zeros it may be -0.0
    return np.concatenate(codes), np.concatenate(scales)


def dequantize(codes: Array, scales: Array, bits: int, rows: int) -> Array:
    """The weight [in, out] that codes and scales stand for, `rows` of its input dimension. Inverse of `quantize` but for the rounding."""
    values = _numbers(codes, bits).astype(scales.dtype) * scales[..., None]
    return np.ascontiguousarray(values.reshape(len(codes), -1)[:, :rows].T)


def _numbers(codes: Array, bits: int) -> Array:
    """Codes [out, blocks, bytes] as whole numbers around zero, [out, blocks, inputs of a block]."""
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), codes.shape[1], -1)
    numbers: Array = codes.astype(np.int8) if bits == 4 else codes.astype(np.int16)
    return numbers - (1 << (bits - 1))


def read_back(weight: Array, bits: int, block_size: int, compute: str = "fp32") -> Array:
    """A weight [out, in] in fp32, as it is when it has been quantized along its inputs, its scales in the precision that is computed in.

    `bits` 0 leaves it as it is.
    """
    if not bits:
        return weight
    codes, scales = quantize(weight.T.astype(DTYPES[compute]), bits, block_size)
    return np.ascontiguousarray(dequantize(codes, scales.astype(np.float32), bits, weight.shape[1]).T)


def quantizer_version() -> str:
    """The version of the package that the quantizer is in. Raises BackendError where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime, whose quantizer is used, cannot be imported ({error}): pip install 'flora-export[cpu]'"
        ) from error
    version: str = onnxruntime.__version__
    return version


@cache
def _quantizer(bits: int, block_size: int) -> Any:
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer
    except ImportError as error:
        raise BackendError(f"the quantizer of ONNX Runtime cannot be imported ({error}): pip install 'flora-export[cpu]'") from error
    return DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=True, bits=bits))
