"""refill(): an artifact of a bank with another adapter in one of its slots. Base, graph and the other adapters stay as they are."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np

from flora_export.artifact import (
    DATA,
    GOLDEN,
    PROVENANCE,
    REPORT,
    UNLISTED,
    Artifact,
    changed_files,
    link_or_copy,
    open_artifact,
    seal,
    staged,
    writing,
)
from flora_export.backends import Progress, backend_of
from flora_export.bank import Bank, checked_name, slot_of
from flora_export.checkpoint import Checkpoint, digest_of_files
from flora_export.errors import ArtifactError, FloraExportError, VerificationError
from flora_export.manifest import LedgerEntry, Manifest
from flora_export.methods import load_base_of
from flora_export.methods.bank import gathered
from flora_export.proof import check_ledger
from flora_export.scratch import locked
from flora_export.stacks import entry_of, fitting, layers_of, read_stacks, stacked_bank
from flora_export.verify.golden import PROMPT_COUNT, record, recorded_prompts, replay, write_golden
from flora_export.verify.parity import VerifyOptions, compared
from flora_export.verify.report import Report


def refill(
    path: Path, name: str, ckpt: Path, base_name: str | None, output: Path, options: VerifyOptions, progress: Progress, *, force: bool
) -> tuple[Artifact, Report]:
    """Write the artifact `path` to `output`, which may be the same, with an adapter by that name: in place of the one it has, or a new one.

    The adapter is compared with eager PyTorch, as in a build, and the golden vectors of the others are replayed.

    Raises:
        FloraExportError: its subclasses say what failed; `output` is as it was.
    """
    checked_name(name)
    open_artifact(path)  # it is one
    with locked(path):  # two that set adapters at the same time do it one after the other
        return _refill(path, name, ckpt, base_name, output, options, progress, force=force)


def _refill(
    path: Path, name: str, ckpt: Path, base_name: str | None, output: Path, options: VerifyOptions, progress: Progress, *, force: bool
) -> tuple[Artifact, Report]:
    old = open_artifact(path)
    bank = stacked_bank(old)
    if faults := changed_files(old):
        raise ArtifactError(f"{path} is damaged: {'; '.join(faults)}. Build it again from its checkpoints.")
    base = load_base_of(ckpt, base_name)
    if base.digests != old.manifest.base["files"]:
        raise ArtifactError(f"{base.path} is not the base model that {path} was built from: its SHA-256 is another")
    adapter = fitting(old, ckpt, base)
    if GOLDEN not in old.manifest.files:
        raise ArtifactError(f"{path} was built with --no-verify, so there are no golden vectors to replay. Build it verified.")
    slot = free_slot(bank, name)
    with staged(output, force=force) as directory:
        with writing(output):
            for file in (old.path / each for each in old.manifest.files.keys() - {PROVENANCE, *UNLISTED}):
                (shutil.copyfile if file.name == DATA else link_or_copy)(file, directory / file.name)
            entries = _write(Artifact(directory, old.manifest), adapter, slot)
        artifact = Artifact(directory, _restated(old.manifest, name, slot, adapter, entries), slot)
        report, expected = compared(artifact, base, adapter, options, progress)
        own = [record(item, slot) for item in expected[:PROMPT_COUNT]]
        others = [each for each in recorded_prompts(old) if each.slot != slot]
        progress("replaying the other adapters", 0, 1)
        report.replay_faults = replay(artifact, backend_of(old).decode(artifact), others)
        with writing(output):
            (directory / GOLDEN).unlink()  # it may be a name of the old one's
            write_golden(sorted([*others, *own], key=lambda each: each.slot or 0), directory)
            artifact = seal(directory, artifact.manifest)
        report.ledger = check_ledger(artifact, gathered({slot: (name, adapter)}, bank.layout, bank.slots))
        adapter.check_unchanged()
        if open_artifact(path).manifest != old.manifest:  # by a build, which takes no lock
            raise ArtifactError(f"{path} has changed while {name!r} was put into it, and would lose that: do it again")
        if report.causes:
            raise VerificationError(report.to_text(), report.to_dict())
        with writing(output):
            (directory / REPORT).write_text(report.to_json(), encoding="utf-8")
    return Artifact(output, artifact.manifest), report


def free_slot(bank: Bank, name: str) -> int:
    """The slot of an adapter by that name, or else an empty one. Raises FloraExportError: all are taken."""
    if name in bank.taken:
        return bank.taken[name]
    if "" not in bank.names:
        raise FloraExportError(f"all {bank.slots} slots are taken: replace one of {', '.join(bank.taken)}, or build with more --slots")
    return bank.names.index("")


def _write(artifact: Artifact, adapter: Checkpoint, slot: int) -> dict[str, LedgerEntry]:
    """Write an adapter's layers over those in the file. Returns their entries, by initializer."""
    entries = {}
    file = np.memmap(artifact.path / DATA, np.uint8, "r+")
    for stack, branch, layer in layers_of(read_stacks(artifact), adapter):
        content = layer.tobytes()
        start = (stack.tensor.offset or 0) + (slot + 1) * len(content)
        file[start : start + len(content)] = np.frombuffer(content, np.uint8)
        entries[stack.name] = entry_of(stack, branch, slot, layer)
    file.flush()
    return entries


def _restated(manifest: Manifest, name: str, slot: int, adapter: Checkpoint, entries: dict[str, LedgerEntry]) -> Manifest:
    """The manifest with the adapter in its slot, still without the files' hashes."""
    bank = manifest.bank
    assert bank is not None
    ledger = [entries.get(e.initializer, e) if (e.start, e.axis) == (slot + 1, 0) else e for e in manifest.ledger]
    names, digests = list(bank.names), list(bank.digests)
    names[slot], digests[slot] = name, adapter.digest
    others = {file: sha for file, sha in manifest.checkpoint["files"].items() if not file.startswith(f"{slot}/")}
    files = others | {f"{slot}/{file}": sha for file, sha in adapter.digests.items()}
    kept = [tensor for tensor in manifest.checkpoint["tensors"] if slot_of(tensor) != slot]
    tensors = sorted([*kept, *(entry.tensor for entry in entries.values() if entry.origin == "adapter")], key=slot_of)
    config = adapter.config if slot == min([slot, *bank.taken.values()]) else manifest.checkpoint["config"]
    checkpoint = manifest.checkpoint | {"config": config, "digest": digest_of_files(files), "files": files, "tensors": tensors}
    return dataclasses.replace(
        manifest, ledger=ledger, bank=Bank(bank.layout, tuple(names), tuple(digests)), checkpoint=checkpoint, files={}, verified=True
    )
