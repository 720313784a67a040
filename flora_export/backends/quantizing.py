"""What a user may say of quantization, and what it comes to for a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flora_export.errors import FloraExportError
from flora_export.quantization import BITS, BLOCK_SIZES, STANDARD, Quantization
from flora_export.quantization.packing import quantizer_version
from flora_export.quantization.unpacking import Packed

SAME, KEEP = "same", "keep"
COMPUTE = {"cpu": "fp32", "cuda": "fp16"}  # what the provider's MatMulNBits computes fastest in


@dataclass(frozen=True)
class QuantizationOptions:
    """`None` where the user was silent."""

    block_size: int | None = None
    adapter_precision: str | None = None  # "same" as its hosts, so that it is fused into them; "int8" or "keep": beside them
    head_precision: str | None = None  # embeddings and head; a tied pair is one table


QUANTIZING = ("block_size", "adapter_precision", "head_precision")


def read_options(given: Mapping[str, Any]) -> QuantizationOptions:
    """Options by name. Raises FloraExportError: a value that there is not."""
    options = QuantizationOptions(**given)
    if options.block_size is not None and options.block_size not in BLOCK_SIZES:
        raise FloraExportError(f"--block-size {options.block_size}: there are {', '.join(map(str, BLOCK_SIZES))}")
    for name in ("adapter_precision", "head_precision"):
        if (value := getattr(options, name)) not in (None, SAME, KEEP, *BITS):
            raise FloraExportError(f"--{name.replace('_', '-')} {value}: there are {SAME}, {KEEP}, {', '.join(BITS)}")
    return options


def block_of(options: QuantizationOptions, packed: Packed | None) -> int:
    """Inputs that share a scale: as the user says, as the base model has them, or 32."""
    return options.block_size or (packed.block_size if packed is not None else 32)


def choose_for_engines(precision: str, options: QuantizationOptions, align: int, packed: Packed | None = None) -> Quantization | None:
    """How a build for TensorRT quantizes: int4 alone, in operators of the ONNX standard; embeddings and head keep fp16.

    TensorRT-RTX 1.7 parses int8 and fp8 in blocks too, but folds them into fp16 weights while it builds: the engine is no smaller. With one
    scale for a column it keeps them, but the base and the adapter would share it.

    Raises:
        FloraExportError: another precision, or a choice that an engine has no place for.
    """
    if precision == "int8":
        raise FloraExportError(
            "--backend tensorrt takes no --precision int8: its builder folds int8 weights in blocks into fp16, so the engine would be no "
            "smaller. Use int4, or --backend onnxruntime"
        )
    for name, taken in (("head_precision", (None, KEEP)), ("adapter_precision", (None, SAME, KEEP))):
        if precision in BITS and getattr(options, name) not in taken:
            raise FloraExportError(
                f"--{name.replace('_', '-')} {getattr(options, name)} is not for engines; they take {', '.join(map(str, taken[1:]))}"
            )
    chosen = choose_quantization(precision, "cuda", options, packed)
    if chosen is None:
        return None
    if align % chosen.block_size:
        raise FloraExportError(f"--align {align}: a quantized engine wants ranks in whole blocks of {chosen.block_size}")
    return replace(chosen, head_bits=0, accuracy_level=0, operators=STANDARD)


def choose_quantization(precision: str, target: str, options: QuantizationOptions, packed: Packed | None = None) -> Quantization | None:
    """How a build quantizes; None where it does not.

    Adapter slices have their hosts' bits by default, so that they are fused: at blocks of 32, int4 moves the example adapter's effect by
    less than 3 %. Embeddings and head are int8 unless told otherwise.

    Args:
        packed: the integers of a base model that is quantized already, which decide bits and blocks.

    Raises:
        FloraExportError: an option of quantization with a precision that is none, or other bits or blocks than the base's own.
    """
    if precision not in BITS:
        given = [name for name in QUANTIZING if getattr(options, name) is not None]
        if given:
            raise FloraExportError(f"--{given[0].replace('_', '-')} is for --precision {' or '.join(BITS)}, not {precision}")
        return None
    bits, block = BITS[precision], block_of(options, packed)
    if packed is not None and (packed.bits, packed.block_size) != (bits, block):
        raise FloraExportError(
            f"the base model has int{packed.bits} in blocks of {packed.block_size} ({packed.method}), which are kept as they are: "
            f"build with --precision int{packed.bits} and without --block-size, or with fp32 or fp16 on the weights that they stand for"
        )
    chosen = {SAME: bits, KEEP: 0} | BITS
    return Quantization(
        bits=bits,
        block_size=block,
        head_bits=chosen[options.head_precision or "int8"],
        adapter_bits=chosen[options.adapter_precision or SAME],
        compute=COMPUTE[target],
        version=quantizer_version(),
    )
