"""The steps of a repository's publisher: its place beside the repository, a version moved in, made live, or taken out again.

A step that a SIGKILL stops is undone, or seen to be done, by the next publisher.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from flora_export.backends.triton.config import CONFIG, DECODER, GENERATE, parse
from flora_export.errors import BackendError
from flora_export.scratch import Scratch

MODELS = (DECODER, GENERATE)
MOVING = "moving"  # in the scratch directory: the version that is moved in, and that nothing may name yet


def version_of(file: Path) -> int:
    """The version that a configuration makes live. Raises ValueError or OSError: it names none, or more."""
    (version,) = parse(file.read_text(encoding="utf-8")).version_policy.specific.versions
    return int(version)


@contextlib.contextmanager
def moving(repo: Path, version: int, scratch: Path) -> Iterator[None]:
    """Around what moves a version in and makes it live: where that fails, or is killed, the version does not stay for ever."""
    (scratch / MOVING).write_text(str(version), encoding="utf-8")
    try:
        yield
    except BaseException:
        _take_out(repo, scratch)
        raise


def _take_out(repo: Path, scratch: Path) -> None:
    """Remove the version that was being moved in, unless it went live."""
    note = scratch / MOVING
    if not note.is_file():
        return
    version = note.read_text(encoding="utf-8")
    with contextlib.suppress(ValueError, OSError):
        if int(version) in [version_of(repo / model / CONFIG) for model in MODELS if (repo / model / CONFIG).is_file()]:
            return
        for directory in (repo / model for model in MODELS):
            shutil.rmtree(directory / version, ignore_errors=True)
            for file in directory.glob(f"warmup/{version}.*"):
                file.unlink()
            for empty in (directory / "warmup", directory):
                with contextlib.suppress(OSError):
                    empty.rmdir()


def move_in(source: Path, target: Path, version: int) -> None:
    """A version of a model and its warm-up; nothing names them yet."""
    if not target.exists():
        source.rename(target)
        return
    if (source / "warmup").is_dir():
        (target / "warmup").mkdir(exist_ok=True)
        for file in (source / "warmup").iterdir():
            file.rename(target / "warmup" / file.name)
    (source / str(version)).rename(target / str(version))


def go_live(repo: Path, models: Sequence[str], version: int, scratch: Path) -> None:
    """Replace the models' configurations by those of a version: of all models, or of none."""
    for model in models:
        shutil.copyfile(repo / model / str(version) / CONFIG, scratch / f"{model}.new")
        _flush(scratch / f"{model}.new")
        if (repo / model / CONFIG).is_file():
            shutil.copyfile(repo / model / CONFIG, scratch / f"{model}.old")
    try:
        for model in models:  # one rename after the other, with nothing between them: a SIGKILL may fall there
            _replace(scratch / f"{model}.new", repo / model / CONFIG)
    except BaseException as error:
        done = [model for model in models if not (scratch / f"{model}.new").exists()]
        try:
            for model in done:
                if (scratch / f"{model}.old").exists():
                    _replace(scratch / f"{model}.old", repo / model / CONFIG)
                else:
                    (repo / model / CONFIG).unlink()
        except OSError as second:
            raise BackendError(
                f"{repo}: version {version} went live for {', '.join(done)} alone ({error}), which could not be undone ({second}): "
                "publish or roll back again"
            ) from error
        raise


def _replace(source: Path, target: Path) -> None:
    source.replace(target)


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def scratch_of(repo: Path) -> Iterator[Path]:
    """A directory beside the repository, for one publisher at a time; what killed ones have left goes."""
    prefix = f".{repo.name}.publishing-"
    lock = _lock(repo)
    try:
        for left in repo.parent.glob(f"{glob.escape(prefix)}*"):
            _take_out(repo, left)
            shutil.rmtree(left, ignore_errors=True)
        with Scratch(prefix, repo.parent) as directory:
            yield Path(directory)
    finally:
        with contextlib.suppress(OSError):
            repo.rmdir()  # only where it is empty: the first version did not come to be
        os.close(lock)


def _lock(repo: Path) -> int:
    """The repository's directory, made where it is missing, open and locked. Whoever had the lock before may have removed it: once more."""
    while True:
        repo.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(repo, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(lock), os.stat(repo)):
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)
