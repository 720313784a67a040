"""Ways to break an artifact: its written numbers, its graph, its manifest, each with hashes and ledger forged to agree."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from flora_export.artifact import DATA, MODEL, open_artifact, seal
from flora_export.manifest import LedgerEntry


def edit(out: Path, change: Callable[[LedgerEntry, Any], None], *, forge: bool) -> None:
    """Change the written slices. `forge` makes hashes and ledger agree with the change, as a careful forger would."""
    artifact = open_artifact(out)
    initializers = ir.load(artifact.model).graph.initializers
    entries = []
    for entry in artifact.manifest.ledger:
        tensor = initializers[entry.initializer].const_value
        if not isinstance(tensor, ir.ExternalTensor):  # small ones stand in model.onnx itself
            entries.append(entry)
            continue
        data = np.memmap(out / DATA, dtype=tensor.dtype.numpy(), mode="r+", offset=tensor.offset or 0, shape=tuple(map(int, tensor.shape)))
        view = data[(slice(None),) * entry.axis + (slice(entry.start, entry.stop),)]
        change(entry, view)
        data.flush()
        entries.append(dataclasses.replace(entry, sha256=_digest(view)))
    if forge:
        seal(out, dataclasses.replace(artifact.manifest, ledger=entries))


def _digest(view: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(view).tobytes()).hexdigest()


def scale_b(factor: float) -> Callable[[LedgerEntry, Any], None]:
    def change(entry: LedgerEntry, view: Any) -> None:
        if entry.tensor.endswith("ffba_B.weight"):
            view *= factor

    return change


def edit_slices(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change written slices together, given by the last parts of their tensors' names, and forge the ledger."""
    artifact = open_artifact(out)
    initializers = ir.load(artifact.model).graph.initializers
    views = {}
    for entry in artifact.manifest.ledger:
        tensor = initializers[entry.initializer].const_value
        if isinstance(tensor, ir.ExternalTensor):
            dims = tuple(map(int, tensor.shape))
            data = np.memmap(out / DATA, dtype=tensor.dtype.numpy(), mode="r+", offset=tensor.offset or 0, shape=dims)
            name = entry.tensor.removeprefix("base_model.model.model.").removeprefix("model.")
            views[name] = data[(slice(None),) * entry.axis + (slice(entry.start, entry.stop),)]
    change(views)
    edit(out, lambda *_: None, forge=True)


def edit_graph(out: Path, change: Callable[[ir.Graph], None]) -> None:
    """Change model.onnx and forge its hash."""
    model = ir.load(out / MODEL)
    change(model.graph)
    ir.save(model, out / MODEL)
    seal(out, open_artifact(out).manifest)


def edit_manifest(out: Path, **changes: Any) -> None:
    seal(out, dataclasses.replace(open_artifact(out).manifest, **changes))
