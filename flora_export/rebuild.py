"""rebuild(): another engine for an artifact, on the machine that serves it. The graph, its proof and its golden vectors stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flora_export.artifact import (
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
from flora_export.errors import ArtifactError, VerificationError
from flora_export.verify.golden import replay


def rebuild(path: Path, given: Mapping[str, Any], progress: Progress) -> tuple[Artifact, str]:
    """Make the engine anew beside the artifact's other files, replay the golden vectors, then trade places with the old artifact.

    Args:
        given: options of the backend, by name.

    Returns the artifact, and what the golden vectors were replayed in.

    Raises:
        ArtifactError: it has no engine, or a file of it is damaged.
        BackendError: its compiler is missing, or refuses.
        VerificationError: the golden vectors differ. The artifact stays as it was.
    """
    old = open_artifact(path)
    backend = backend_of(old)
    options = backend.options(given)
    progress("checking the files", 0, 1)
    faults = [fault for fault in changed_files(old) if not fault.startswith(backend.compiled)]
    if faults:
        raise ArtifactError(f"{path} is damaged: {'; '.join(faults)}. Build it again from its checkpoint.")
    if GOLDEN not in old.manifest.files:
        raise ArtifactError(f"{path} has no {GOLDEN}: it was built with --no-verify, so no engine of it can be checked. Build it again.")
    with staged(path, force=True) as directory:
        with writing(path):
            _share(path, directory, backend.compiled)
        progress("building the engine", 0, 1)
        with writing(path):
            manifest = backend.rebuild(old, directory, options)
        progress("replaying golden vectors", 0, 1)
        unsealed = Artifact(directory, dataclasses.replace(manifest, files={}))  # the engine may be meant for another machine
        decoder = backend.decode(unsealed)
        wrong = replay(unsealed, decoder)
        if wrong:
            raise VerificationError("\n".join(["FAILED: the new engine is not what was verified; OUT is as it was", *wrong]))
        with writing(path):
            artifact = seal(directory, manifest)
    return Artifact(path, artifact.manifest), decoder.runtime


def _share(source: Path, directory: Path, compiled: Sequence[str]) -> None:
    """The files that stay, as hard links where the file system has them. What vouches for the old engine does not."""
    for file in source.iterdir():
        if file.is_file() and file.name not in {*compiled, PROVENANCE, *UNLISTED} - {REPORT}:
            link_or_copy(file, directory / file.name)
