"""The layout of OUT/: its files, its manifest, and how it comes to be there whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flora_export.base_model import file_sha256
from flora_export.errors import ArtifactError, BackendError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
DATA = "model.onnx.data"
GOLDEN = "golden.safetensors"
_WRITE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    None,
)  # None: numpy's short write
REPORT = "report.json"  # written by every verify, so the manifest holds no hash of it


@dataclass(frozen=True)
class LedgerEntry:
    """One source tensor and the slice [start, stop) along `axis` of the initializer that it fills, times `scale`.

    `sha256` is the digest of the slice's bytes, C order, as they came from the source, not from the written file.
    """

    tensor: str
    origin: str  # "adapter", "base", "zeros" or "constant"
    initializer: str
    axis: int
    start: int
    stop: int
    scale: float
    sha256: str


@dataclass(frozen=True)
class BlockRecord:
    """How one branch is in the graph: `fusion` is neurons, forward+backward, forward, backward or none; `reason` says why not both."""

    block: str
    activation: str
    rank: int
    scale: float
    fusion: str
    reason: str
    reads: list[str]
    writes: list[str]


@dataclass(frozen=True)
class Tensor:
    """A graph input or output. Dimensions are whole numbers or names."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class Manifest:
    """All that is known of an artifact. Nothing in it depends on when or where it was built."""

    backend: str
    target: str
    precision: str
    fuse: str
    passes: list[str]
    padding: str  # side on which ragged prompts are padded: "right" where the graph has GroupQueryAttention, else "left"
    verified: bool
    versions: dict[str, str]
    base: dict[str, Any]  # name, files: SHA-256 by file name
    checkpoint: dict[str, Any]  # digest, files, config, tensors
    inputs: list[Tensor]
    outputs: list[Tensor]
    operators: dict[str, dict[str, int]]  # "before" and "after": how many nodes of each operator
    blocks: list[BlockRecord]
    ledger: list[LedgerEntry]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # sha256, bytes
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Artifact:
    """An output directory that has been opened: its manifest is sound, its files may still be damaged."""

    path: Path
    manifest: Manifest

    @property
    def model(self) -> Path:
        return self.path / MODEL


def open_artifact(path: Path) -> Artifact:
    """Read an output directory's manifest.

    Raises:
        ArtifactError: there is no artifact, or its manifest is broken or of another schema version.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise ArtifactError(f"{path} is no artifact: it has no {MANIFEST}. Make one with `flora-export build`.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{file}: schema version {version!r}, but this flora-export reads {SCHEMA_VERSION}. Build the artifact again."
            )
        for key, cls in (("inputs", Tensor), ("outputs", Tensor), ("blocks", BlockRecord), ("ledger", LedgerEntry)):
            content[key] = [cls(**item) for item in content[key]]
        manifest = Manifest(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{file}: not a manifest ({type(error).__name__}: {error}). Build the artifact again.") from error
    for name in manifest.files:
        if Path(name).name != name:
            raise ArtifactError(f"{file}: names {name!r}, which leaves the artifact's directory")
    return Artifact(path, manifest)


def seal(path: Path, manifest: Manifest) -> Artifact:
    """Add the hash and size of every file to the manifest and write it: the last step of a build."""
    names = sorted(file.name for file in path.iterdir() if file.is_file() and file.name not in (MANIFEST, REPORT))
    files = {name: {"sha256": file_sha256(path / name), "bytes": (path / name).stat().st_size} for name in names}
    sealed = dataclasses.replace(manifest, files=files)
    (path / MANIFEST).write_text(sealed.to_json(), encoding="utf-8")
    return Artifact(path, sealed)


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


@contextlib.contextmanager
def staged(output: Path, *, force: bool) -> Iterator[Path]:
    """A directory beside `output` to build in; it becomes `output` when the block ends well, and vanishes when it does not.

    A killed build leaves its directory behind, and the next build of the same output removes it.

    Raises:
        ArtifactError: `output` exists and `force` is not given, or its parent cannot be written.
        BackendError: the disk is full.
    """
    output = output.absolute()
    if output.exists() and not force:
        raise ArtifactError(f"{output} exists already. Pass --force to replace it.")
    if output.exists() and not (output.is_dir() and ((output / MANIFEST).is_file() or not any(output.iterdir()))):
        raise ArtifactError(f"{output} exists and is not an artifact, so --force will not replace it. Choose another --output.")
    prefix = f".{output.name}.building-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _sweep(output.parent, prefix)
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
        directory.chmod(0o755)
    except OSError as error:
        raise ArtifactError(f"{output}: cannot be written there ({error.strerror})") from error
    lock = os.open(directory, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield directory
        _publish(directory, output, prefix)
    except OSError as error:
        if error.errno not in _WRITE_ERRORS:
            raise
        raise BackendError(
            f"{output}: could not be written ({error.strerror or error}). What was there is as it was; make room and build again."
        ) from error
    finally:
        os.close(lock)
        shutil.rmtree(directory, ignore_errors=True)


def _publish(directory: Path, output: Path, prefix: str) -> None:
    """Rename into place. A former artifact is moved aside first, whole, and removed last."""
    if output.exists():
        former = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent)) / output.name
        output.rename(former)
        try:
            directory.rename(output)
        except OSError:
            former.rename(output)
            raise
        shutil.rmtree(former.parent, ignore_errors=True)
    else:
        directory.rename(output)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove what killed builds have left; a build that still runs holds a lock on its directory."""
    for left in parent.glob(f"{prefix}*"):
        try:
            lock = os.open(left, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
