"""rebuild(): another engine for an artifact, on the machine that serves it. The graph, its proof and its golden vectors stay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from flora_export.artifact import ENGINE, LAYERS, MANIFEST, Artifact, changed_files, open_artifact, seal, staged, writing
from flora_export.backends import load_backend
from flora_export.backends.tensorrt.plan import EngineOptions
from flora_export.errors import ArtifactError, VerificationError
from flora_export.verify.golden import replay

Progress = Callable[[str, int, int], None]  # (what, done, of)


def rebuild(path: Path, options: EngineOptions, progress: Progress) -> tuple[Artifact, str]:
    """Make the engine anew beside the artifact's other files, replay the golden vectors, then trade places with the old artifact.

    Returns the artifact, and what the golden vectors were replayed in.

    Raises:
        ArtifactError: it has no engine, or a file of it is damaged.
        BackendError: TensorRT is missing, or refuses.
        VerificationError: the golden vectors differ. The artifact stays as it was.
    """
    old = open_artifact(path)
    if old.manifest.backend != "tensorrt":
        raise ArtifactError(f"{path} is for {old.manifest.backend}, which has no engine to rebuild")
    progress("checking the files", 0, 1)
    faults = [fault for fault in changed_files(old) if not fault.startswith((ENGINE, LAYERS))]
    if faults:
        raise ArtifactError(f"{path} is damaged: {'; '.join(faults)}. Build it again from its checkpoint.")
    backend = load_backend("tensorrt")
    with staged(path, force=True) as directory:
        with writing(path):
            _share(path, directory)
        progress("building the engine", 0, 1)
        with writing(path):
            manifest = backend.rebuild(old, directory, options)
            artifact = seal(directory, manifest)
        progress("replaying golden vectors", 0, 1)
        decoder = backend.Decoder(artifact)
        wrong = replay(artifact, decoder)
        if wrong:
            raise VerificationError("\n".join(["FAILED: the new engine is not what was verified; OUT is as it was", *wrong]))
    return Artifact(path, artifact.manifest), decoder.runtime


def _share(source: Path, directory: Path) -> None:
    """The files that stay, as hard links where the file system has them."""
    for file in source.iterdir():
        if file.is_file() and file.name not in (ENGINE, LAYERS, MANIFEST):
            try:
                os.link(file, directory / file.name)
            except OSError:
                shutil.copyfile(file, directory / file.name)
