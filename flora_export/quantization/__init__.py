"""Quantization: which weights of an artifact are int4 or int8, and how, as plain facts. No numpy: packing.py has the numbers."""

from __future__ import annotations

from dataclasses import dataclass

BITS = {"int4": 4, "int8": 8}
BLOCK_SIZES = (16, 32, 64, 128, 256)
COMPUTE = ("fp32", "fp16")
CONTRIB, STANDARD = "MatMulNBits", "DequantizeLinear"  # ONNX Runtime's own, or those of the ONNX standard
LAYERS = ".layers."  # in the name of a weight; what is outside of them are the embeddings and the head
QUANTIZER = "onnxruntime.quantization.matmul_nbits_quantizer.DefaultWeightOnlyQuantizer"


@dataclass(frozen=True)
class Quantization:
    """What is quantized, and how: as a manifest records it."""

    bits: int  # of the linear layers
    block_size: int
    head_bits: int  # of the embeddings and the head; 0: they keep their precision
    adapter_bits: int  # of A, B and G; 0: they keep their precision. Other bits than the hosts' stand beside them, unfused
    compute: str  # precision of what is not quantized: activations, scales, norms
    accuracy_level: int = 4  # MatMulNBits: 4 quantizes activations to int8 as well, for speed; 0: no such thing
    operators: str = CONTRIB  # that read the codes
    quantizer: str = QUANTIZER
    version: str = ""  # of the package that the quantizer is in

    def __post_init__(self) -> None:
        """Raises ValueError: a manifest says what cannot be."""
        known = {"bits": (4, 8), "head_bits": (0, 4, 8), "adapter_bits": (0, 4, 8), "block_size": BLOCK_SIZES, "compute": COMPUTE}
        known["operators"] = (CONTRIB, STANDARD)
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"quantization.{name} is {getattr(self, name)!r}")

    @property
    def precision(self) -> str:
        return f"int{self.bits}"

    def bits_of(self, weight: str) -> int:
        """The bits of one of the base model's matrices, by its name; 0: it keeps its precision."""
        return self.bits if LAYERS in weight else self.head_bits

    @property
    def fusable(self) -> bool:
        """Whether adapter and hosts can be one weight."""
        return self.adapter_bits == self.bits
