"""Derivation: what a slice of an artifact must hold, made anew from base and adapter, as its entry in the ledger says."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from flora_export.artifact import MANIFEST, Artifact
from flora_export.base_model import BaseModel
from flora_export.errors import ArtifactError
from flora_export.ledger import sha256_of
from flora_export.manifest import LedgerEntry
from flora_export.provenance import read_name
from flora_export.quantization.packing import Form, read_form
from flora_export.weights import Array

# Of a precision, the dtype of what is not quantized.
_COMPUTED = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

# How far a weight that a library merges may be from the same merge done again, in multiples of its largest number, beside one rounding to
# the artifact's precision. fp32 products of another processor or another number of threads differ by some 1e-6 of it.
BOUND = 2.0**-16
_MANTISSA = {ir.DataType.FLOAT16: 10, ir.DataType.BFLOAT16: 7}  # bits; fp32 has 23


def base_values(entry: LedgerEntry, base: BaseModel, dtype: ir.DataType) -> Array | None:
    """The values of a captured weight, from the base model's files, by its name; None where they have no such tensor."""
    captured = read_name(entry.tensor)
    if not all(name in base.tensors for name in captured.tensors):
        return None
    arrays = [base.read(name).astype(dtype.numpy(), copy=False) for name in captured.tensors]
    return captured.take(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=0), axis_of(entry))


def is_scales(entry: LedgerEntry) -> bool:
    return entry.form != "" and form_of(entry).content == "scales"


def is_codes(entry: LedgerEntry) -> bool:
    return entry.form != "" and form_of(entry).content == "codes"


def dtype_of(artifact: Artifact, entry: LedgerEntry, initializers: dict[str, ir.TensorProtocol]) -> ir.DataType:
    """The dtype that a tensor had in the graph before it was quantized, or has."""
    return _COMPUTED[artifact.manifest.compute] if entry.form else initializers[entry.initializer].dtype


def axis_of(entry: LedgerEntry) -> int:
    """The axis of the floating-point weight along which an entry is a slice: codes stand by output, weights by input."""
    return form_of(entry).axis(entry.axis) if entry.form else entry.axis


def digest_of(values: Array, entry: LedgerEntry) -> str:
    """The digest of a tensor's numbers as they stand in an artifact: quantized anew where the entry says so."""
    return sha256_of(form_of(entry).of(values) if entry.form else values)


def form_of(entry: LedgerEntry) -> Form:
    try:
        return read_form(entry.form)
    except ValueError as error:
        raise ArtifactError(f"{MANIFEST}: {entry.tensor}: {error}. Was it built by a newer flora-export? Build it again.") from error


def near(expected: Array, got: Array, dtype: ir.DataType) -> bool:
    """Whether a slice of a weight that a library merged is within BOUND of the same merge, done again."""
    if expected.shape != got.shape:
        return False
    one, other = expected.astype(np.float64), got.astype(np.float64)
    allowed = float(np.abs(one).max(initial=0.0)) * max(BOUND, 2.0 ** -_MANTISSA.get(dtype, 23))
    return bool((np.abs(one - other) <= allowed).all())
