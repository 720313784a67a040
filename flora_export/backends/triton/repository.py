"""A Triton model repository on disk: a version is written beside it, moved into it whole, and made live by one replaced file per model.

    REPO/decoder/config.pbtxt           names the live version
    REPO/decoder/3/                     the artifact itself: model.onnx, its weights, manifest.json, golden.safetensors, ...
    REPO/decoder/3/config.pbtxt         what decoder/config.pbtxt is while version 3 is live
    REPO/decoder/warmup/3.input_ids     the first request that the server sends itself
    REPO/generate/3/                    the same files (hard links), and the program that runs them: model.py, generation.py, scheduler.py

Weights are copied once, so that nothing done to OUT later can reach a live version. (The onnx package refuses to read weights that have
several hard links; ONNX Runtime reads them. `flora-export verify` is for OUT, and `check` proves that these are OUT's bytes.)
A server that polls never sees half a version: a directory that no config.pbtxt names is not loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flora_export.artifact import MANIFEST, Artifact, changed_files, open_artifact
from flora_export.backends.triton.check import config_faults
from flora_export.backends.triton.config import (
    CONFIG,
    DECODER,
    FORMER,
    GENERATE,
    HASH,
    MAIN,
    Serving,
    parse,
)
from flora_export.backends.triton.steps import MODELS, go_live, move_in, moving, scratch_of, version_of
from flora_export.backends.triton.version import write_version
from flora_export.base_model import file_sha256
from flora_export.errors import ArtifactError, BackendError

GENERATES = ("genai_config.json", "tokenizer.json", "tokenizer_config.json")  # what `generate` needs of an artifact


@dataclass(frozen=True)
class Staged:
    """A version that is written and not in the repository yet. `models` are those that it is for."""

    artifact: Artifact
    version: int
    models: tuple[str, ...]
    former: int | None  # the live version


@contextlib.contextmanager
def staged_version(artifact: Artifact, repo: Path, serving: Serving) -> Iterator[Staged]:
    """Write the artifact as the next version beside the repository; it goes live when the block ends well, and vanishes when it does not.

    Raises:
        ArtifactError: the repository cannot be used, or the artifact cannot be served by it.
        BackendError: it cannot be written, or its config.pbtxt would be wrong.
    """
    repo = repo.resolve()
    if repo.exists() and not repo.is_dir():
        raise ArtifactError(f"{repo} is no directory, so it cannot be a model repository")
    try:
        with scratch_of(repo) as scratch:
            models = _models(artifact, repo)
            former = live(repo)[DECODER] if (repo / DECODER / CONFIG).exists() else None
            version = max(versions(repo, DECODER) + versions(repo, GENERATE), default=0) + 1
            yield Staged(write_version(artifact, scratch, version, models, serving, former), version, models, former)
            with moving(repo, version, scratch):
                for model in models:
                    move_in(scratch / model, repo / model, version)
                go_live(repo, models, version, scratch)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BackendError(
            f"{repo}: the version could not be published ({reason}); what was live still is. A version is written beside the repository "
            "and moved in, so the repository must not be a mount point itself."
        ) from error


def versions(repo: Path, model: str) -> list[int]:
    """The versions of a model that the repository holds, oldest first."""
    directory = repo / model
    found = [int(path.name) for path in directory.iterdir() if path.name.isdecimal()] if directory.is_dir() else []
    return sorted(found)


def live(repo: Path) -> dict[str, int]:
    """The live version of each model in a repository. Raises ArtifactError where it is none of ours, or a configuration is broken."""
    found = {}
    for model in MODELS:
        file = repo / model / CONFIG
        if file.is_file():
            try:
                found[model] = version_of(file)
            except (ValueError, OSError) as error:
                raise ArtifactError(f"{file} names no live version ({error}). Make a version live with --to N.") from error
    if DECODER not in found:
        raise ArtifactError(
            f"{repo} is no model repository of ours: it has no {DECODER}/{CONFIG}. Make one with `flora-export triton OUT REPO`."
        )
    return found


def make_live(repo: Path, version: int | None) -> tuple[int, int | None]:
    """Make a version live that the repository holds, after its files were found to be what they should be.

    Args:
        version: None for the one that was live when the live one was published.

    Returns the version, and the one that was live; None where `version` was given.

    Raises:
        ArtifactError: there is no such version, a model that is served lacks it, or it is damaged.
        BackendError: the repository cannot be written.
    """
    repo = repo.resolve()
    former = None
    if not versions(repo, DECODER):
        raise ArtifactError(f"{repo} has no versions of {DECODER}: it is no model repository of ours")
    try:
        with scratch_of(repo) as scratch:
            if version is None:
                former, version = _before(repo)
            models = [model for model in MODELS if model == DECODER or versions(repo, model)]
            for model in models:
                held = versions(repo, model)
                if version not in held:
                    raise ArtifactError(f"{repo}: {model} has no version {version}; it has {', '.join(map(str, held)) or 'none'}")
            faults = version_faults(repo, version)
            if faults:
                raise ArtifactError(f"{repo}: version {version} cannot go live: {'; '.join(faults)}")
            go_live(repo, models, version, scratch)
    except OSError as error:
        raise BackendError(f"{repo}: version {version} could not be made live ({error.strerror or error})") from error
    return version, former


def _before(repo: Path) -> tuple[int, int]:
    """The live version, and the one that was live when it was published. Raises ArtifactError.

    Where a killed publisher has left two live versions, the one published last counts.
    """
    version = max(live(repo).values())
    file = repo / DECODER / str(version) / CONFIG
    try:
        parameters = parse(file.read_text(encoding="utf-8")).parameters
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{file} does not say what was live before ({error}): roll back with --to N") from error
    former = parameters[FORMER].string_value if FORMER in parameters else ""
    if not former.isdecimal():
        raise ArtifactError(f"{repo}: version {version} is live, and there is none before it")
    return version, int(former)


def half_live(repo: Path) -> list[str]:
    """What is wrong where a kill fell between the renames that make a version live, one of each model; a line, or none."""
    serving = live(repo)
    known = {model: serving.get(model, "none") for model in MODELS if model in serving or versions(repo, model)}
    if len(set(known.values())) == 1:
        return []
    return [f"the models' live versions differ ({', '.join(f'{m} {v}' for m, v in known.items())}): publish or roll back again"]


def check(repo: Path) -> list[str]:
    """What is wrong with a repository, a line each: configurations, live versions that differ, damaged files."""
    serving = live(repo)
    faults = half_live(repo)
    for model, version in serving.items():
        if version not in versions(repo, model):
            faults.append(f"{model}/{CONFIG} names version {version}, which is not there")
        else:
            try:
                faults += config_faults(repo / model, open_artifact(repo / model / str(version)).manifest)
            except ArtifactError as error:
                faults.append(str(error))
    for version in sorted(set(serving.values()) & set(versions(repo, DECODER))):
        faults += version_faults(repo, version)
    return list(dict.fromkeys(faults))


def version_faults(repo: Path, version: int) -> list[str]:
    """What is wrong with the files of a version, a line each."""
    faults: list[str] = []
    for model in MODELS:
        directory = repo / model / str(version)
        if directory.is_dir():
            text = (directory / CONFIG).read_text(encoding="utf-8") if (directory / CONFIG).is_file() else ""
            try:
                artifact = open_artifact(directory)
            except ArtifactError as error:
                faults.append(str(error))
                continue
            faults += config_faults(repo / model, artifact.manifest, text)
            faults += [f"{model}/{version}/{fault}" for fault in changed_files(artifact)]
            if model == GENERATE:
                faults += [f"{model}/{version}/{fault}" for fault in _changed_program(directory, text)]
    return faults


def _changed_program(directory: Path, text: str) -> list[str]:
    """Files of `generate`'s program that are not those whose hashes its configuration has, a line each."""
    try:
        parameters = parse(text).parameters
    except ValueError:
        return []  # said already
    known = {key.removeprefix(HASH): value.string_value for key, value in parameters.items() if key.startswith(HASH)}
    faults = []
    for name in sorted({MAIN, *known}):  # an earlier version has other files beside it
        if not (directory / name).is_file():
            faults.append(f"{name} is missing")
        elif file_sha256(directory / name) != known.get(name):
            faults.append(f"{name} is not the file that was published: its SHA-256 differs from {CONFIG}'s")
    return faults


def _models(artifact: Artifact, repo: Path) -> tuple[str, ...]:
    """The models that an artifact can be served as. Raises ArtifactError where the repository has others."""
    can = MODELS if artifact.manifest.files.keys() >= set(GENERATES) else (DECODER,)
    for model in MODELS:
        held = versions(repo, model)
        if (repo / model).exists() and not (held and (repo / model / str(held[-1]) / MANIFEST).is_file()):
            raise ArtifactError(f"{repo / model} is there already and was not published by flora-export. Choose another repository.")
        if held and model not in can:
            raise ArtifactError(f"{repo} serves {model}, but the artifact has no {' or no '.join(GENERATES)}. Choose another repository.")
    return can
