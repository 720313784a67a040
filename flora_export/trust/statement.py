"""provenance.json: what an artifact was made of, and how, as an in-toto Statement with SLSA's provenance as its predicate.

It holds no time, no random number and no path, so that a build repeated elsewhere writes the same bytes. It is one of the files whose
hashes the manifest has; so its subjects are all of these but itself, and not the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flora_export import __version__
from flora_export.artifact import GOLDEN, PROVENANCE, Artifact
from flora_export.base_model import BaseModel, file_sha256, is_file_name, read_json
from flora_export.checkpoint import CONFIG, WEIGHTS
from flora_export.errors import ArtifactError, CheckpointError
from flora_export.manifest import Manifest

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD = "urn:flora-export:build:v1"


def statement(manifest: Manifest, parameters: dict[str, Any]) -> str:
    """The text of a provenance.json. `manifest` has the hashes of all other files, `parameters` are the build's options as JSON."""
    content = {
        "_type": STATEMENT,
        "subject": [_described(name, known["sha256"]) for name, known in sorted(manifest.files.items())],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD,
                "externalParameters": parameters,
                "internalParameters": {"versions": manifest.versions},
                "resolvedDependencies": [
                    *(_described(f"base/{name}", sha) for name, sha in sorted(manifest.base["files"].items())),
                    *(_described(f"adapter/{name}", sha) for name, sha in sorted(adapter_files(manifest).items())),
                ],
            },
            "runDetails": {
                "builder": {"id": f"pkg:generic/flora-export@{__version__}"},
                "byproducts": [
                    {
                        "name": "verification",
                        "annotations": {
                            "verified": manifest.verified,
                            "ledgerEntries": len(manifest.ledger),
                            "goldenVectors": GOLDEN in manifest.files,
                        },
                    }
                ],
            },
        },
    }
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _described(name: str, sha256: str) -> dict[str, Any]:
    """A ResourceDescriptor."""
    return {"name": name, "digest": {"sha256": sha256}}


def adapter_files(manifest: Manifest) -> dict[str, str]:
    """SHA-256 of the adapter's files by name; of several adapters, by `0/name`, `1/name`."""
    files: dict[str, str] = manifest.checkpoint["files"]
    return {name: sha for name, sha in files.items() if name != "weights"}  # numbers that several LoRAs are weighted with, no file


def read_parameters(artifact: Artifact) -> dict[str, Any]:
    """The options that an artifact was built with. Raises ArtifactError: it has no provenance, or its provenance is of another kind."""
    if PROVENANCE not in artifact.manifest.files:
        raise ArtifactError(
            f"{artifact.path} has no {PROVENANCE}: it was built before there was one, or changed after its build (set-adapter, rebuild). "
            "Build it again."
        )
    file = artifact.path / PROVENANCE
    try:
        content = read_json(file, "provenance")
        definition = content["predicate"]["buildDefinition"]
        if content["predicateType"] != PREDICATE or definition["buildType"] != BUILD:
            raise ValueError(f"a {content['predicateType']!r:.100} of {definition['buildType']!r:.100}, not of {BUILD}")
        return dict(definition["externalParameters"])
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{file}: not a provenance that this reads ({type(error).__name__}: {error!s:.300}). Build it again."
        ) from error


def check_base(artifact: Artifact, base: BaseModel) -> None:
    """Raises ArtifactError where an artifact was built from another base model."""
    _check(f"base model {base.path}", base.digests, artifact.manifest.base["files"], artifact)


def check_adapters(artifact: Artifact, paths: Sequence[Path]) -> None:
    """Raises ArtifactError where an artifact was built from other adapters, or from the same in another order."""
    known = adapter_files(artifact.manifest)
    many = any("/" in name for name in known)
    found = {}
    for slot, path in enumerate(paths):
        for name in (CONFIG, WEIGHTS):
            if not (path / name).is_file():
                raise ArtifactError(f"{path}: no such adapter: {name} is missing")
            found[f"{slot}/{name}" if many or len(paths) > 1 else name] = file_sha256(path / name)
    _check(f"adapter {', '.join(map(str, paths))}", found, known, artifact)


def _check(what: str, found: dict[str, str], known: dict[str, str], artifact: Artifact) -> None:
    for name in sorted(found.keys() | known.keys()):
        if found.get(name) != known.get(name):
            shown = name if all(map(is_file_name, name.split("/"))) else repr(name)
            raise ArtifactError(
                f"{what}: {shown} has SHA-256 {found.get(name, 'none')}, but {artifact.path} was built from {known.get(name, 'none')}. "
                "Give what it was built from, several adapters in their order."
            )
