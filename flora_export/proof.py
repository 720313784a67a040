"""check_ledger: the written file is opened again, and each slice must hold the bytes of its tensor.

With the checkpoint and the base model at hand the bytes are derived anew from these: what an adapter has changed, from both.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from flora_export.artifact import Artifact, changed_files
from flora_export.base_model import BaseModel
from flora_export.checkpoint import Checkpoint
from flora_export.derivation import axis_of, base_values, digest_of, dtype_of, form_of, is_codes, is_scales, near
from flora_export.ledger import change_records, sha256_of
from flora_export.manifest import LedgerEntry
from flora_export.passes.attach import adapter_reader
from flora_export.passes.attach_detours import detour_reader
from flora_export.passes.change_weights import changed_values
from flora_export.passes.quantize import packed_values
from flora_export.provenance import read_name
from flora_export.quantization.packing import quantizer_version
from flora_export.weights import Array
from flora_export.written import read_written


@dataclass
class LedgerReport:
    """What the check found. `faults` is empty where every slice holds its tensor."""

    checked: int = 0
    adapter_tensors: int = 0
    base_tensors_equal: int = 0  # to the base model's own files, bit for bit
    changed_tensors_equal: int = 0  # weights that the adapter changes, derived anew from base and adapter, bit for bit
    changed_tensors_near: int = 0  # the same, of those that a library merges (not WeightChange.exact): within BOUND
    base_tensors_derived: list[str] = field(default_factory=list)  # by the capture: no tensor of the base model has its name
    bytes: dict[str, int] = field(default_factory=dict)  # of the slices, by their origin
    faults: list[str] = field(default_factory=list)


def check_ledger(artifact: Artifact, checkpoint: Checkpoint | None = None, base: BaseModel | None = None) -> LedgerReport:
    """Check the written files against the manifest, and against the sources where these are given.

    Raises:
        ArtifactError: `model.onnx`, or a checkpoint's shard, cannot be read at all.
    """
    report = LedgerReport(faults=changed_files(artifact))
    initializers, where, strangers = read_written(artifact)
    report.faults += strangers
    slices: dict[str, list[LedgerEntry]] = defaultdict(list)
    for entry in artifact.manifest.ledger:
        slices[entry.initializer].append(entry)
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
    if checkpoint is not None and base is not None:
        _check_detours(artifact, checkpoint, base, initializers, report)
        _check_changes(artifact, checkpoint, base, initializers, report)
    quantization = artifact.manifest.quantization
    if quantization is not None and report.faults and base is not None and quantizer_version() != quantization.version:
        report.faults.append(
            f"its weights were quantized by onnxruntime {quantization.version}, and are compared by {quantizer_version()}: install that one"
        )
    return report


def _check_one(tensor: ir.TensorProtocol, entries: list[LedgerEntry], report: LedgerReport) -> None:
    """The slices tile the initializer, and each holds its tensor's bytes."""
    try:
        values = tensor.numpy()
    except Exception as error:  # outside the file, a wrong length, an unknown type
        report.faults += [f"{entry.tensor}: {tensor.name} cannot be read ({error})" for entry in entries]
        return
    values = values.reshape(1) if values.ndim == 0 else values
    axes = {entry.axis for entry in entries}
    if len(axes) > 1 or not 0 <= entries[0].axis < values.ndim:
        report.faults += [f"{entry.tensor}: is a slice of {tensor.name} along axis {entry.axis}, which cannot be" for entry in entries]
        return
    expected = 0
    for entry in sorted(entries, key=lambda e: e.start):
        if entry.start != expected or entry.stop <= entry.start:
            report.faults.append(
                f"{entry.tensor}: slice [{entry.start}, {entry.stop}) of {tensor.name} does not follow the one before it, "
                f"which ends at {expected}"
            )
        expected = entry.stop
        report.checked += 1
        report.bytes[entry.origin] = report.bytes.get(entry.origin, 0) + _slice(values, entry).nbytes
        if entry.origin == "zeros" and not is_codes(entry) and np.any(_slice(values, entry)):  # at a scale of zero, codes say nothing
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
    """Every adapter tensor has one slice, or goes into the weights that it changes, which are there and nowhere unchanged."""
    manifest = artifact.manifest
    stands = {tensor: {e.initializer for e in entries} for tensor, entries in _by_tensor(artifact, "base").items()}
    changed = _by_tensor(artifact, "changed")
    held = Counter(entry.tensor for entry in manifest.ledger if entry.origin == "adapter" and not is_scales(entry))
    codes, scales = (Counter((e.tensor, e.origin) for e in manifest.ledger if which(e)) for which in (is_codes, is_scales))
    report.faults += [
        f"{tensor} ({origin}): has {codes[tensor, origin]} slices of codes, but {scales[tensor, origin]} of scales"
        for tensor, origin in dict.fromkeys([*codes, *scales])
        if codes[tensor, origin] != scales[tensor, origin] and origin != "zeros"  # which may be less than a block
    ]
    for record in manifest.changes:
        if record.tensor in changed:
            held.update(record.sources)
        else:
            report.faults.append(f"{record.tensor}: the adapter changes it, but the artifact does not hold it changed")
        report.faults += [f"{record.tensor}: stands unchanged in {name}" for name in sorted(stands.get(record.tensor, ()))]
    unknown = changed.keys() - {record.tensor for record in manifest.changes}
    report.faults += [f"{tensor}: is changed, but the manifest does not say by what" for tensor in sorted(unknown)]
    promised = Counter(manifest.checkpoint["tensors"])
    report.adapter_tensors = len(promised)
    for tensor, count in promised.items():
        if held[tensor] != count:
            must = "one" if count == 1 else str(count)
            report.faults.append(f"{tensor}: has {held[tensor]} slices in the artifact, but must have {must}")
    report.faults += [f"{tensor}: in the ledger, but not in the checkpoint" for tensor in held.keys() - set(promised)]


def _by_tensor(artifact: Artifact, origin: str) -> dict[str, list[LedgerEntry]]:
    """The entries of an origin, by each tensor of the base model that they are named for."""
    found: dict[str, list[LedgerEntry]] = defaultdict(list)
    for entry in artifact.manifest.ledger:
        if entry.origin == origin:
            for tensor in read_name(entry.tensor).tensors:
                found[tensor].append(entry)
    return found


def _check_checkpoint(artifact: Artifact, checkpoint: Checkpoint, initializers: dict[str, ir.TensorProtocol], report: LedgerReport) -> None:
    """Derive each adapter tensor from the checkpoint and look for it in its slice."""
    bank, known = checkpoint.bank, artifact.manifest.bank
    if bank is not None and known is not None:  # of some adapters, or of all
        same = all(own in ("", theirs) for own, theirs in zip(bank.digests, known.digests, strict=True))
    else:
        same = checkpoint.digest == artifact.manifest.checkpoint["digest"]
    if not same:
        report.faults.append(f"{checkpoint.path} is not the checkpoint that the artifact was built from: its SHA-256 is another")
    entries: dict[str, list[LedgerEntry]] = defaultdict(list)
    for each in artifact.manifest.ledger:
        if each.origin == "adapter":
            entries[each.tensor].append(each)
    for branch in checkpoint.branches:
        for matrix in branch.matrices:
            if branch.tensor(matrix) not in entries:
                report.faults.append(f"{branch.tensor(matrix)}: in the checkpoint, but not in the ledger")
            for entry in entries[branch.tensor(matrix)]:
                if entry.initializer not in initializers:
                    continue  # reported already
                room = 0 if entry.form else _room(initializers[entry.initializer], matrix)
                values = adapter_reader(checkpoint, branch, matrix, dtype_of(artifact, entry, initializers), room)()
                if digest_of(values.T if artifact.is_checkpoint else values, entry) != entry.sha256:
                    report.faults.append(
                        f"{entry.tensor}: the checkpoint's {matrix}, times {branch.scale:g}, is not what the artifact holds"
                        if matrix == "B"
                        else f"{entry.tensor}: the checkpoint's {matrix} is not what the artifact holds"
                    )


def _room(tensor: ir.TensorProtocol, matrix: str) -> int:
    """The rank that each layer of a stack has a place for; 0 for what is no stack."""
    dims = tensor.shape.numpy()
    return 0 if len(dims) < 3 else dims[1 if matrix == "B" else 2]


def _check_detours(
    artifact: Artifact, checkpoint: Checkpoint, base: BaseModel, initializers: dict[str, ir.TensorProtocol], report: LedgerReport
) -> None:
    """Derive A and B beside each projection anew, B with zeros beside the columns of its own projection, and look for both."""
    entries = {entry.tensor: entry for entry in artifact.manifest.ledger if entry.origin == "adapter"}
    for detour in checkpoint.detours:
        for matrix, name in (("A", detour.a), ("B", detour.b)):
            entry = entries.get(name)
            if entry is None:
                report.faults.append(f"{name}: in the checkpoint, but not in the ledger")
                continue
            if entry.initializer not in initializers:
                continue  # reported already
            tensor = initializers[entry.initializer]
            offset = _first_column(detour.tensor, entry.initializer.partition(".")[2], base) if matrix == "B" else 0
            placed = dataclasses.replace(detour, offset=offset, columns=base.shapes[detour.tensor][0])
            outputs = list(tensor.shape.numpy())[-1]
            if placed.offset + placed.columns > outputs and matrix == "B":
                report.faults.append(f"{name}: stands beside {entry.initializer.partition('.')[2]}, which does not hold {detour.tensor}")
            elif sha256_of(detour_reader(checkpoint, placed, matrix, tensor.dtype, outputs)()) != entry.sha256:
                report.faults.append(f"{name}: the checkpoint's {matrix} is not what the artifact holds")


def _first_column(tensor: str, host: str, base: BaseModel) -> int:
    """Where a tensor of the base begins in a weight that packs several, by its name; 0 in one that has a name of its own."""
    offset = 0
    for packed in read_name(host).tensors:
        if packed == tensor or packed not in base.shapes:
            break
        offset += base.shapes[packed][0]
    return offset


def _check_base(artifact: Artifact, base: BaseModel, initializers: dict[str, ir.TensorProtocol], report: LedgerReport) -> None:
    """Find the base model's own tensors in the artifact. The capture may have derived some (norms, rotary tables): those are listed."""
    if base.digests != artifact.manifest.base["files"]:
        report.faults.append(f"{base.path} is not the base model that the artifact was built from: its SHA-256 is another")
    for entry in artifact.manifest.ledger:
        if entry.origin != "base" or entry.initializer not in initializers:
            continue
        own = packed_values(entry.tensor, form_of(entry), base.packed) if entry.form else None
        if own is not None:
            equal = sha256_of(own) == entry.sha256
            report.base_tensors_equal += equal
            report.faults += [] if equal else [f"{entry.tensor}: is not what the base model's own integers are"]
            continue
        values = base_values(entry, base, dtype_of(artifact, entry, initializers))
        if values is None:
            report.base_tensors_derived.append(entry.tensor)
        elif digest_of(values, entry) == entry.sha256:
            report.base_tensors_equal += 1
        else:
            report.faults.append(f"{entry.tensor}: is not the tensor of the base model's own file")


def _check_changes(
    artifact: Artifact, checkpoint: Checkpoint, base: BaseModel, initializers: dict[str, ir.TensorProtocol], report: LedgerReport
) -> None:
    """Derive each changed weight from the base and the adapter, and look for all of it in its slices."""
    if artifact.manifest.changes != change_records(checkpoint):
        report.faults.append(f"{checkpoint.path}: changes the base model in another way than the manifest says")
    entries = _by_tensor(artifact, "changed")
    for change in checkpoint.changes:
        rows = np.zeros(base.shapes[change.tensor][0], bool)
        derived: dict[ir.DataType, Array] = {}
        wrong = 0
        for entry in entries[change.tensor]:
            if entry.initializer not in initializers:
                continue  # reported already
            dtype, captured = dtype_of(artifact, entry, initializers), read_name(entry.tensor)
            if dtype not in derived:
                derived[dtype] = changed_values(checkpoint, change, base, dtype.numpy())
            rows[captured.start : captured.stop] = True
            values = captured.take(derived[dtype], axis_of(entry))
            if change.exact:
                wrong += digest_of(values, entry) != entry.sha256
            else:
                wrong += not near(values, _slice(initializers[entry.initializer].numpy(), entry), dtype)
        if wrong:
            report.faults.append(f"{change.tensor}: changed by {', '.join(change.sources)}, it is not what the artifact holds")
        elif not rows.all():
            report.faults.append(
                f"{change.tensor}: {int((~rows).sum())} of its {len(rows)} rows are not in the artifact as they are changed"
            )
        elif change.exact:
            report.changed_tensors_equal += 1
        else:
            report.changed_tensors_near += 1
