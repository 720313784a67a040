"""Packing: a weight as integers of a few bits in blocks along its input dimension, with a scale for each block.

    W[k, n] ≈ s[n, k // block] · q        q: int4 in [-8, 7] or int8 in [-128, 127], symmetric, rounded to nearest

The numbers come from ONNX Runtime's own quantizer for its operator MatMulNBits: the format's owner keeps it, its blocks are independent of
each other, so that it can be asked for one weight at a time, and it is one pass of plain C++ with no calibration data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flora_export.errors import BackendError
from flora_export.quantization import BLOCK_SIZES

Array = npt.NDArray[Any]
Content = Literal["codes", "scales"]
CHUNK = 4096  # columns that are quantized at a time


@dataclass(frozen=True)
class Form:
    """How a tensor's numbers stand in an initializer of a quantized artifact.

    codes    [out, blocks, bytes] of a weight [in, out]; [rows, bytes] of a table [rows, d] that is looked up by row
    scales   [out, blocks]; [rows, blocks]
    """

    bits: int
    block_size: int
    content: Content
    by_row: bool = False

    def __str__(self) -> str:
        return f"int{self.bits} {'row ' if self.by_row else ''}{self.content}, blocks of {self.block_size}"

    def of(self, values: Array) -> Array:
        """The numbers of a weight [in, out], or of a table [rows, d], in this form."""
        codes, scales = quantize(values.T if self.by_row else values, self.bits, self.block_size)
        if self.content == "scales":
            return scales
        return codes.reshape(len(codes), -1) if self.by_row else codes


_FORM = re.compile(r"int(?P<bits>[48]) (?P<row>row )?(?P<content>codes|scales), blocks of (?P<block>\d{1,4})")


def read_form(text: str) -> Form:
    """The form that a ledger names. Raises ValueError: there is no such."""
    match = _FORM.fullmatch(text)
    if match is None or int(match["block"]) not in BLOCK_SIZES:
        raise ValueError(f"{text!r} is no form of a quantized weight")
    content: Content = "codes" if match["content"] == "codes" else "scales"
    return Form(int(match["bits"]), int(match["block"]), content, match["row"] is not None)


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
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), codes.shape[1], -1)
    values = (codes.astype(np.int16) - (1 << (bits - 1))).astype(scales.dtype) * scales[..., None]
    return np.ascontiguousarray(values.reshape(len(codes), -1)[:, :rows].T)


def read_back(weight: Array, bits: int, block_size: int) -> Array:
    """A weight [out, in] as it is when it has been quantized along its inputs; `bits` 0 leaves it as it is."""
    if not bits:
        return weight
    codes, scales = quantize(weight.T, bits, block_size)
    return np.ascontiguousarray(dequantize(codes, scales, bits, weight.shape[1]).T)


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
