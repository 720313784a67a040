"""What a fleet has done, a small file for each job beside the artifacts: OUTPUT/.fleet/ADAPTER/TARGET.json, written once the job is done.

A record says what an artifact was made of. One that is lost, with the process that would have written it, costs a build and no more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_export.artifact import MANIFEST, changed_files, open_artifact
from flora_export.backends.manifest import installed
from flora_export.base_model import BESIDE, file_sha256, load_base, read_json
from flora_export.errors import ArtifactError, FloraExportError
from flora_export.fleet.plan import STATE, Job, Plan
from flora_export.manifest import Manifest
from flora_export.scratch import sweep
from flora_export.trust.statement import adapter_files

PACKAGES = (
    *("flora-export", "mobius-onnx", "onnx", "onnx-ir", "transformers", "peft", "torch", "numpy", "safetensors"),
    *("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "openvino", "onnxruntime-qnn"),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a job. `parity` and `effect`: the largest share that was used of what its verification allows."""

    job: str
    state: str  # built, published (built before), kept (nothing was to be done), failed
    seconds: float = 0.0  # of the worker, the last attempt's
    attempts: int = 0
    exit_code: int = 0
    error: str | None = None
    message: str | None = None
    verified: bool = False
    parity: float | None = None
    effect: float | None = None
    bytes: int = 0
    manifest: str = ""  # SHA-256 of the artifact's manifest; of a job whose publishing has failed as well, so that it alone is done again
    version: int | None = None  # in its Triton repository

    @property
    def failed(self) -> bool:
        return self.exit_code != 0


@contextlib.contextmanager
def holding(output: Path) -> Iterator[None]:
    """Be the one fleet at work on OUTPUT, until the block or the process ends. Raises ArtifactError where another is."""
    state = output / STATE
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ArtifactError(f"{output}: cannot be written there ({error.strerror})") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArtifactError(f"another fleet is at work on {output}: wait for it, or choose another --output") from error
        yield
    finally:
        os.close(lock)


def clear(plan: Plan) -> None:
    """Remove what killed workers were building, and half of a record."""
    for job in plan.jobs:
        sweep(job.output.parent, f".{job.output.name}.building-")
        _record(plan, job).with_suffix(".writing").unlink(missing_ok=True)


@dataclass(frozen=True)
class Inputs:
    """What a job's artifact is made of: SHA-256 of the base's files and of the adapter's, and one over these, its options and versions."""

    base: Mapping[str, str]
    adapter: Mapping[str, str]
    sha256: str

    def made(self, manifest: Manifest) -> bool:
        """Whether an artifact was built of these very files, and not of what had taken their place when its turn came."""
        pairs = (manifest.base["files"], self.base), (adapter_files(manifest), self.adapter)
        return all(known.get(name) == sha for files, known in pairs for name, sha in files.items())


def inputs_of(plan: Plan) -> dict[str, Inputs]:
    """By job's name.

    Raises:
        CheckpointError: there is no such base model. An adapter that is not there, or cannot be read, is found by its own job.
    """
    base = load_base(plan.base)
    path = (base.original or base).path
    shared = {"base": _files(path, (".safetensors", *BESIDE)), "versions": installed(PACKAGES)}
    adapters = {job.checkpoint for job in plan.jobs}
    files: dict[Path, dict[str, str]] = {checkpoint: {} for checkpoint in adapters}
    for checkpoint in adapters:
        with contextlib.suppress(OSError):
            files[checkpoint] = _files(checkpoint, (".safetensors", ".json"))
    found = {}
    for job in plan.jobs:
        facts = {**shared, "adapter": files[job.checkpoint], "options": dict(job.options)}
        whole = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        found[job.name] = Inputs(shared["base"], files[job.checkpoint], whole)
    return found


def _files(directory: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    if not directory.is_dir():
        return {}
    return {file.name: file_sha256(file) for file in sorted(directory.iterdir()) if file.suffix in suffixes and file.is_file()}


def write_record(plan: Plan, job: Job, inputs: Inputs, outcome: Outcome) -> None:
    """Say that a job is done, whole or not at all."""
    file = _record(plan, job)
    file.parent.mkdir(parents=True, exist_ok=True)
    repository = None if job.repository is None else str(job.repository)
    content = {"inputs": inputs.sha256, "repository": repository, "outcome": dataclasses.asdict(outcome)}
    writing = file.with_suffix(".writing")
    writing.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(writing, file)


def kept(plan: Plan, job: Job, inputs: Inputs) -> tuple[Outcome | None, bool]:
    """What became of a job whose artifact is there, whole, verified and made of the same; and whether it is published as well."""
    try:
        record = read_json(_record(plan, job), "record")
        outcome = Outcome(**record["outcome"])
        artifact = open_artifact(job.output)
        same = (
            record["inputs"] == inputs.sha256 and outcome.manifest == file_sha256(job.output / MANIFEST) and inputs.made(artifact.manifest)
        )
        if not same or not artifact.manifest.verified or changed_files(artifact):
            return None, False
        published = job.repository is None or _published(job.repository, record, outcome)
    except (FloraExportError, OSError, KeyError, TypeError):
        return None, False
    return dataclasses.replace(
        outcome, job=job.name, state="kept", attempts=0, seconds=0.0, exit_code=0, error=None, message=None
    ), published


def _published(repo: Path, record: Mapping[str, Any], outcome: Outcome) -> bool:
    """Whether a job's version is in its repository still, and no version is live by half; who has rolled it back since wanted that."""
    from flora_export.backends.triton.config import DECODER
    from flora_export.backends.triton.repository import half_live

    if record["repository"] != str(repo) or outcome.version is None:
        return False
    try:
        return not half_live(repo) and outcome.manifest == file_sha256(repo / DECODER / str(outcome.version) / MANIFEST)
    except (ArtifactError, OSError):
        return False


def _record(plan: Plan, job: Job) -> Path:
    return plan.output / STATE / job.adapter / f"{job.target}.json"
