"""The ledger: a proof, not a log, that every adapter tensor is in the artifact.

`write_model` hashes each source tensor as it goes into the file; `check_ledger` (proof.py) looks for exactly those bytes in exactly those
slices of the written file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from flora_export.artifact import DATA, MODEL, Artifact
from flora_export.checkpoint import Checkpoint
from flora_export.errors import ArtifactError
from flora_export.manifest import BlockRecord, ChangeRecord, LedgerEntry
from flora_export.passes import MERGES_SIBLINGS, Fused
from flora_export.passes.attach import weight_name
from flora_export.passes.attach_detours import detour_weight
from flora_export.weights import Array, dims_of, parts_of

MOST_GRAPH_BYTES = 2**31  # protobuf has no larger messages
Progress = Callable[[int, int], None]  # (done, of)


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
            entries.append(LedgerEntry(part.tensor, part.origin, name, axis, start, start + part.size, part.scale, "", part.form))
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
        if fused.quantization is not None and not fused.quantization.fusable:
            reason = "--adapter-precision: other bits than its hosts'"
        if backward and not forward and fused.fuse == "both":
            reason = MERGES_SIBLINGS[fused.capture.form]
        rank = b.columns if b.slots else b.rank  # of a stack, the room
        records.append(BlockRecord(b.block, b.activation, rank, b.scale, fusion, reason, list(b.reads), list(b.writes)))
    for d in fused.detours:
        forward = detour_weight(d.host, "A") not in model.graph.initializers
        reason = "B: it needs A's result"
        if not forward:
            reason = MERGES_SIBLINGS[fused.capture.form] if fused.fuse == "both" else f"--fuse {fused.fuse}"
        records.append(BlockRecord(d.module, "identity", d.rank, d.scale, "forward" if forward else "none", reason, [d.host], [d.host]))
    return records


def load_graph(artifact: Artifact) -> ir.Model:
    """The graph of an artifact, its weights still in their file. Raises ArtifactError where it cannot be read."""
    if artifact.is_ir or artifact.is_checkpoint:
        raise ArtifactError(f"{artifact.path} is for {artifact.manifest.backend}: it holds no ONNX graph")
    for file in (artifact.model, artifact.path / DATA):  # a pipe, or a device, would never end
        if not file.is_file() or (file == artifact.model and file.stat().st_size > MOST_GRAPH_BYTES):
            raise ArtifactError(f"{file} is missing, or no file that a build has written. Build the artifact again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it leaves out: the ledger finds what is missing
            return ir.load(artifact.model)
    except Exception as error:  # a damaged protobuf can raise nearly anything
        raise ArtifactError(f"{artifact.model} cannot be read ({type(error).__name__}: {error}). Build the artifact again.") from error


def change_records(checkpoint: Checkpoint) -> list[ChangeRecord]:
    """What the adapter does to weights of the base."""
    return [ChangeRecord(c.tensor, c.what, list(c.sources), c.rank, c.scale) for c in checkpoint.changes]
