"""The ledger: a proof, not a log, that every adapter tensor is in the artifact.

`write_model` hashes each source tensor as it goes into the file. `check_ledger` opens the written file again and looks for exactly those
bytes in exactly those slices; with the checkpoint and the base model at hand it derives the bytes from these anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors import safe_open

from flora_export.artifact import DATA, MANIFEST, MODEL, REPORT, Artifact, BlockRecord, LedgerEntry, changed_files
from flora_export.base_model import BaseModel
from flora_export.checkpoint import Checkpoint
from flora_export.errors import ArtifactError
from flora_export.passes import MERGES_SIBLINGS, Fused
from flora_export.passes.attach import adapter_reader, weight_name
from flora_export.shards import read_shards
from flora_export.weights import Array, dims_of, parts_of

Progress = Callable[[int, int], None]  # (done, of)


@dataclass
class LedgerReport:
    """What the check found. `faults` is empty where every slice holds its tensor."""

    checked: int = 0
    adapter_tensors: int = 0
    base_tensors_equal: int = 0  # to the base model's own files, bit for bit
    base_tensors_derived: list[str] = field(default_factory=list)  # by the capture: no tensor of the base model has its name
    bytes: dict[str, int] = field(default_factory=dict)  # of the slices, by their origin
    faults: list[str] = field(default_factory=list)


def write_model(model: ir.Model, directory: Path, progress: Progress | None = None) -> list[LedgerEntry]:
    """Write `model.onnx` and `model.onnx.data`, an initializer at a time, and return the ledger."""
    digests: dict[str, list[str]] = {}
    plan = planned_entries(model)
    recipes = {value: value.const_value for value in model.graph.initializers.values()}
    for value in recipes:
        value.const_value = _Hashing(value, digests)
    done = 0

    def count(_tensor: object, info: ir.external_data.CallbackInfo) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, info.total)

    try:
        ir.save(model, directory / MODEL, external_data=DATA, callback=count, max_workers=2, max_in_flight_bytes=1 << 27)
    finally:
        for value, recipe in recipes.items():
            value.const_value = recipe
    return [dataclasses.replace(entry, sha256=digests[entry.initializer].pop(0)) for entry in plan]


def planned_entries(model: ir.Model) -> list[LedgerEntry]:
    """The ledger of a graph that is not written yet, without digests: the recipes of its initializers."""
    entries = []
    for name, value in model.graph.initializers.items():
        axis, parts = parts_of(value)
        start = 0
        for part in parts:
            entries.append(LedgerEntry(part.tensor, part.origin, name, axis, start, start + part.size, part.scale, ""))
            start += part.size
    return entries


class _Hashing(ir.LazyTensor):
    """An initializer that notes the digest of each of its parts when it is read."""

    def __init__(self, value: ir.Value, digests: dict[str, list[str]]) -> None:
        self.axis, self.parts = parts_of(value)
        self.dims = dims_of(value)
        self.digests = digests
        tensor = value.const_value
        assert tensor is not None
        super().__init__(self._read, dtype=tensor.dtype, shape=ir.Shape(self.dims), name=value.name)

    def _read(self) -> ir.Tensor[Any]:
        arrays = [np.ascontiguousarray(part.read()) for part in self.parts]
        assert self.name is not None
        self.digests[self.name] = [sha256_of(array) for array in arrays]
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=self.axis)
        return ir.Tensor(whole.reshape(self.dims), dtype=self.dtype, name=self.name)


def sha256_of(array: Array) -> str:
    """The digest of an array's bytes, C order."""
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data if array.ndim else array.tobytes()).hexdigest()


def block_records(fused: Fused) -> list[BlockRecord]:
    """How each branch stands in the graph, read off the graph."""
    model = fused.model
    nodes = {node.name for node in model.graph}
    records = []
    for b in fused.branches:
        forward = weight_name(b, "A") not in model.graph.initializers
        backward = weight_name(b, "B") not in model.graph.initializers
        if forward and backward:
            fusion = "forward+backward" if f"{b.block}.ffba_concat" in nodes else "neurons"
        else:
            fusion = "forward" if forward else "backward" if backward else "none"
        reason = "" if forward and backward else f"--fuse {fused.fuse}"
        if backward and not forward and fused.fuse == "both":
            reason = MERGES_SIBLINGS[fused.capture.form]
        records.append(BlockRecord(b.block, b.activation, b.rank, b.scale, fusion, reason, list(b.reads), list(b.writes)))
    return records


def check_ledger(artifact: Artifact, checkpoint: Checkpoint | None = None, base: BaseModel | None = None) -> LedgerReport:
    """Check the written files against the manifest, and against the sources where these are given.

    Raises:
        ArtifactError: `model.onnx`, or a checkpoint's shard, cannot be read at all.
    """
    report = LedgerReport(faults=changed_files(artifact))
    initializers = _read_checkpoint(artifact, report) if artifact.is_checkpoint else _initializers(artifact)
    slices: dict[str, list[LedgerEntry]] = defaultdict(list)
    for entry in artifact.manifest.ledger:
        slices[entry.initializer].append(entry)
    where = "the checkpoint" if artifact.is_checkpoint else MODEL
    report.faults += [f"initializer {name} is in {where}, but not in the ledger" for name in initializers.keys() - slices.keys()]
    for name, entries in slices.items():
        if name not in initializers:
            report.faults += [f"{entry.tensor}: its initializer {name} is not in {where}" for entry in entries]
            continue
        tensor = initializers[name]
        _check_one(tensor, entries, report)
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()  # unmap the file: else all of it would stand in memory at the end
    _check_coverage(artifact, report)
    if checkpoint is not None:
        _check_checkpoint(artifact, checkpoint, initializers, report)
    if base is not None:
        _check_base(artifact, base, initializers, report)
    return report


def _read_checkpoint(artifact: Artifact, report: LedgerReport) -> dict[str, ir.TensorProtocol]:
    """The tensors of a plain checkpoint. Loaders look for files by name, so one that was not built can come before those that were."""
    known = {*artifact.manifest.files, MANIFEST, REPORT}
    report.faults += [f"{file.name} was not built, and a loader may take it" for file in artifact.path.iterdir() if file.name not in known]
    return read_shards(artifact.path, list(artifact.manifest.files))


def load_graph(artifact: Artifact) -> ir.Model:
    """The graph of an artifact, its weights still in their file. Raises ArtifactError where it cannot be read."""
    try:
        return ir.load(artifact.model)
    except Exception as error:  # a damaged protobuf can raise nearly anything
        raise ArtifactError(f"{artifact.model} cannot be read ({type(error).__name__}: {error}). Build the artifact again.") from error


def _initializers(artifact: Artifact) -> dict[str, ir.TensorProtocol]:
    model = load_graph(artifact)
    found: dict[str, ir.TensorProtocol] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or (isinstance(tensor, ir.ExternalTensor) and str(tensor.location) != DATA):
            raise ArtifactError(f"{artifact.model}: {name} is not in {DATA}. Only files of the artifact itself are read.")
        found[name] = tensor
    return found


def _check_one(tensor: ir.TensorProtocol, entries: list[LedgerEntry], report: LedgerReport) -> None:
    """The slices tile the initializer, and each holds its tensor's bytes."""
    try:
        values = tensor.numpy()
    except Exception as error:  # outside the file, a wrong length, an unknown type
        report.faults += [f"{entry.tensor}: {tensor.name} cannot be read ({error})" for entry in entries]
        return
    values = values.reshape(1) if values.ndim == 0 else values
    expected = 0
    for entry in sorted(entries, key=lambda e: e.start):
        if entry.start != expected or entry.stop <= entry.start or not 0 <= entry.axis < values.ndim or entry.axis != entries[0].axis:
            report.faults.append(
                f"{entry.tensor}: slice [{entry.start}, {entry.stop}) of {tensor.name} does not follow the one before it, "
                f"which ends at {expected}"
            )
        expected = entry.stop
        report.checked += 1
        report.bytes[entry.origin] = report.bytes.get(entry.origin, 0) + _slice(values, entry).nbytes
        if entry.origin == "zeros" and np.any(_slice(values, entry)):
            report.faults.append(f"{tensor.name}: its padding, slice [{entry.start}, {entry.stop}), is not zero")
        if sha256_of(_slice(values, entry)) != entry.sha256:
            report.faults.append(
                f"{entry.tensor}: its bytes are not in {tensor.name}, axis {entry.axis}, slice [{entry.start}, {entry.stop})"
            )
    if expected != values.shape[entries[0].axis]:
        report.faults.append(
            f"{tensor.name}: the ledger explains {expected} of {values.shape[entries[0].axis]} along axis {entries[0].axis}"
        )


def _slice(values: Array, entry: LedgerEntry) -> Array:
    index = (slice(None),) * entry.axis + (slice(entry.start, entry.stop),)
    return np.ascontiguousarray(values[index])


def _check_coverage(artifact: Artifact, report: LedgerReport) -> None:
    """Every adapter tensor has one slice."""
    held = Counter(entry.tensor for entry in artifact.manifest.ledger if entry.origin == "adapter")
    promised = artifact.manifest.checkpoint["tensors"]
    report.adapter_tensors = len(promised)
    for tensor in promised:
        if held[tensor] != 1:
            report.faults.append(f"{tensor}: has {held[tensor]} slices in the artifact, but must have one")
    report.faults += [f"{tensor}: in the ledger, but not in the checkpoint" for tensor in held.keys() - set(promised)]


def _check_checkpoint(artifact: Artifact, checkpoint: Checkpoint, initializers: dict[str, ir.TensorProtocol], report: LedgerReport) -> None:
    """Derive each adapter tensor from the checkpoint and look for it in its slice."""
    if checkpoint.digest != artifact.manifest.checkpoint["digest"]:
        report.faults.append(f"{checkpoint.path} is not the checkpoint that the artifact was built from: its SHA-256 is another")
    entries = {entry.tensor: entry for entry in artifact.manifest.ledger if entry.origin == "adapter"}
    for branch in checkpoint.branches:
        for matrix in branch.matrices:
            entry = entries.get(branch.tensor(matrix))
            if entry is None:
                report.faults.append(f"{branch.tensor(matrix)}: in the checkpoint, but not in the ledger")
                continue
            if entry.initializer not in initializers:
                continue  # reported already
            dtype = initializers[entry.initializer].dtype
            values = adapter_reader(checkpoint, branch, matrix, dtype)()
            if sha256_of(values.T if artifact.is_checkpoint else values) != entry.sha256:
                report.faults.append(
                    f"{entry.tensor}: the checkpoint's {matrix}, times {branch.scale:g}, is not what the artifact holds"
                    if matrix == "B"
                    else f"{entry.tensor}: the checkpoint's {matrix} is not what the artifact holds"
                )


def _check_base(artifact: Artifact, base: BaseModel, initializers: dict[str, ir.TensorProtocol], report: LedgerReport) -> None:
    """Find the base model's own tensors in the artifact. The capture may have derived some (norms, rotary tables): those are listed."""
    if base.digests != artifact.manifest.base["files"]:
        report.faults.append(f"{base.path} is not the base model that the artifact was built from: its SHA-256 is another")
    files = {key: file for file in base.weights for key in safe_open(file, framework="numpy").keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118
    for entry in artifact.manifest.ledger:
        if entry.origin != "base" or entry.initializer not in initializers:
            continue
        values = _base_values(entry, files, initializers[entry.initializer].dtype)
        if values is None:
            report.base_tensors_derived.append(entry.tensor)
        elif sha256_of(values) == entry.sha256:
            report.base_tensors_equal += 1
        else:
            report.faults.append(f"{entry.tensor}: is not the tensor of the base model's own file")


_CAPTURED = re.compile(r"(?P<stem>.+?)(?P<transposed>_t)?(\[(?P<start>\d*):(?P<stop>\d*)\])?")


def _base_values(entry: LedgerEntry, files: dict[str, Path], dtype: ir.DataType) -> Array | None:
    """The values of a captured weight, from the base model's files: its name tells which, packed along axis 0 and then transposed."""
    match = _CAPTURED.fullmatch(entry.tensor)
    assert match is not None
    names = match["stem"].removesuffix("__axis_0__concat").split("__")
    if not all(name in files for name in names):
        return None
    arrays = []
    for name in names:
        with safe_open(files[name], framework="numpy") as file:
            arrays.append(file.get_tensor(name).astype(dtype.numpy(), copy=False))
    values: Array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=0)
    values = values.T if match["transposed"] else values
    start, stop = (int(match[key]) if match[key] else None for key in ("start", "stop"))
    return values[(slice(None),) * entry.axis + (slice(start, stop),)]
