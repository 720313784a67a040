"""The layout of OUT/: its files, its manifest, and how it comes to be there whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from flora_export import base_model
from flora_export.bank import BASE, Bank
from flora_export.base_model import INDEX, file_sha256, is_file_name, read_json
from flora_export.errors import ArtifactError, BackendError, CheckpointError
from flora_export.manifest import RECORDS, SCHEMA_VERSION, Manifest, checked
from flora_export.quantization import BITS, Quantization
from flora_export.scratch import Scratch

MANIFEST = "manifest.json"
MODEL = "model.onnx"
DATA = "model.onnx.data"
ENGINE = "model.engine"  # of a compiled backend
LAYERS = "engine.json"  # what that engine is made of
GOLDEN = "golden.safetensors"
IR, IR_DATA = "openvino_model.xml", "openvino_model.bin"
PROVENANCE = "provenance.json"  # what it was built from, and how (trust/statement.py)
REPORT = "report.json"  # of the build's verification; the manifest holds no hash of it, so that builds stay byte-identical
BOM, SIGNATURE = "bom.cdx.json", "model.sig"  # made of a whole artifact, after its manifest
UNLISTED = frozenset({MANIFEST, REPORT, BOM, SIGNATURE})  # files that the manifest has no hash of

OTHER_WEIGHTS = {"hf": frozenset({INDEX}), "openvino": frozenset({IR, IR_DATA})}  # of a backend whose weights are not in an ONNX graph


def weight_files(backend: str) -> frozenset[str]:
    """The files that hold a backend's weights: those that its runtime loads, and so those that the ledger is checked on."""
    return OTHER_WEIGHTS.get(backend, frozenset({MODEL, DATA}))


@dataclass(frozen=True)
class Artifact:
    """An output directory that has been opened: its manifest is sound, its files may still be damaged."""

    path: Path
    manifest: Manifest
    slot: int = BASE  # of a bank: the adapter that answers where no other is chosen

    @property
    def model(self) -> Path:
        return self.path / MODEL

    @property
    def is_large(self) -> bool:
        """Whether its weights, all of them in fp32, would take more than a verification loads."""
        files = [self.path / name for name in weight_files(self.manifest.backend)]
        sizes = sum(file.stat().st_size for file in files if file.is_file())
        return sizes * (1 if self.manifest.compute == "fp32" else 2) > base_model.LARGE

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a plain Hugging Face checkpoint, with weights [out, in], instead of a graph, with weights [in, out]."""
        return weight_files(self.manifest.backend) == {INDEX}

    @property
    def is_ir(self) -> bool:
        """Whether its graph is OpenVINO's, not ONNX."""
        return IR in weight_files(self.manifest.backend)


def open_artifact(path: Path) -> Artifact:
    """Read an output directory's manifest.

    Raises:
        ArtifactError: there is no artifact, or its manifest is broken or of another schema version.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise ArtifactError(f"{path} is no artifact: it has no {MANIFEST}. Make one with `flora-export build`.")
    try:
        content = read_json(file, "manifest")
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ArtifactError(f"{file}: schema version {version!r}, but this reads {SCHEMA_VERSION}. Build the artifact again.")
        content.setdefault("changes", [])
        for key, cls in RECORDS.items():
            content[key] = [checked(cls(**item)) for item in content[key]]
        if content.get("quantization") is not None:
            content["quantization"] = checked(Quantization(**content["quantization"]))
        if content.get("bank") is not None:
            content["bank"] = checked(Bank(**content["bank"]))
        manifest: Manifest = checked(Manifest(**content))
        quantized = manifest.quantization.bits if manifest.quantization is not None else None
        if BITS.get(manifest.precision) != quantized:
            raise ValueError(f"precision is {manifest.precision}, but it is quantized to {quantized} bits")
        needed = weight_files(manifest.backend)
        others = ({MODEL, DATA}.union(*OTHER_WEIGHTS.values()) - needed) & manifest.files.keys()
        if others:
            raise ValueError(f"backend {manifest.backend!r} does not load {', '.join(sorted(others))}")
        missing = {*needed, "config.json"} - manifest.files.keys() | {"before", "after"} - manifest.operators.keys()
        if missing or not (
            (manifest.blocks or manifest.changes)
            and manifest.ledger
            and manifest.outputs
            and manifest.checkpoint["tensors"]
            and manifest.base["files"]
        ):
            raise ValueError(f"it is incomplete: {', '.join(sorted(missing)) or 'something that every artifact has is empty'}")
    except (ValueError, TypeError, KeyError, CheckpointError) as error:
        raise ArtifactError(f"{file}: not a manifest ({type(error).__name__}: {error!s:.1000}). Build the artifact again.") from error
    for name in manifest.files:
        if not is_file_name(name):
            raise ArtifactError(f"{file}: names {name!r}, which leaves the artifact's directory")
    return Artifact(path, manifest)


def seal(path: Path, manifest: Manifest, provenance: Callable[[Manifest], str] | None = None) -> Artifact:
    """Add the hash and size of every file to the manifest and write it: the last step of a build.

    `provenance` makes the text of provenance.json from a manifest that has all other files; it is written, and hashed, after these.
    """
    names = sorted(file.name for file in path.iterdir() if file.is_file() and file.name not in UNLISTED)
    sealed = dataclasses.replace(manifest, files={name: _facts(path / name) for name in names})
    if provenance is not None:
        (path / PROVENANCE).write_text(provenance(sealed), encoding="utf-8")
        sealed = dataclasses.replace(sealed, files=sealed.files | {PROVENANCE: _facts(path / PROVENANCE)})
    (path / MANIFEST).write_text(sealed.to_json(), encoding="utf-8")
    return Artifact(path, sealed)


def files_in(path: Path) -> set[str]:
    """Whatever lies in a directory and below, but directories, by its relative path."""
    return {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}


def _facts(file: Path) -> dict[str, str | int]:
    return {"sha256": file_sha256(file), "bytes": file.stat().st_size}


def changed_files(artifact: Artifact) -> list[str]:
    """What is wrong with the files, a line each: missing, of another size, or of another hash than the manifest's."""
    faults = []
    for name, known in artifact.manifest.files.items():
        file = artifact.path / name
        if not file.is_file():
            faults.append(f"{name} is missing")
        elif file.stat().st_size != known["bytes"]:
            faults.append(f"{name} has {file.stat().st_size} bytes, but the manifest says {known['bytes']}")
        elif file_sha256(file) != known["sha256"]:
            faults.append(f"{name} is not the file that was built: its SHA-256 differs from the manifest's")
    return faults


def link_or_copy(source: Path, target: Path) -> None:
    """Another name for a file's bytes, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextlib.contextmanager
def staged(output: Path, *, force: bool) -> Iterator[Path]:
    """A directory beside `output` to build in; it becomes `output` when the block ends well, and vanishes when it does not.

    A killed build leaves its directory behind, and the next build of the same output removes it.

    Raises:
        ArtifactError: `output` exists and `force` is not given, or it is no artifact, or its parent cannot be written.
        BackendError: the disk is full.
    """
    output = output.absolute()
    check_free(output, force)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Scratch(f".{output.name}.building-", output.parent)
        directory = Path(scratch.name)
        directory.chmod(0o755)
    except OSError as error:
        raise ArtifactError(f"{output}: cannot be written there ({error.strerror})") from error
    with scratch:
        yield directory
        with writing(output):
            check_free(output, force)  # it may have come to be there meanwhile
            _publish(directory, output)


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Around what writes into a staged directory: a full disk becomes a BackendError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BackendError(f"{output}: could not be written ({reason}). What was there is as it was; make room and build again.") from error


def check_free(output: Path, force: bool) -> None:
    """Raise ArtifactError where a build may not put its output there."""
    if output.is_symlink():
        raise ArtifactError(f"{output} is a symbolic link. Choose another --output, or give the directory that it points to.")
    if not output.exists():
        return
    if not force:
        raise ArtifactError(f"{output} exists already. Pass --force to replace it.")
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST).is_file()):
        raise ArtifactError(f"{output} exists and is not an artifact, so --force will not replace it. Choose another --output.")


def _publish(directory: Path, output: Path) -> None:
    """Rename into place. A former artifact trades places with the new one, at once where the system can, and goes with the directory."""
    if not output.exists():
        directory.rename(output)
    elif not _exchange(directory, output):
        former = directory.with_name(f"{directory.name}-former")
        output.rename(former)
        directory.rename(output)
        shutil.rmtree(former, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step (Linux's renameat2 with RENAME_EXCHANGE). False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    return renameat2 is not None and renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0
