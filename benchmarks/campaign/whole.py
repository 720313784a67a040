"""What is there, compared with what should be: a directory byte for byte, a repository by what its live versions hold."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from flora_export.artifact import MANIFEST, REPORT, changed_files, open_artifact
from flora_export.backends.triton.config import CONFIG
from flora_export.backends.triton.repository import MODELS, check, live, versions
from flora_export.errors import FloraExportError

ABSENT, OLD, NEW = "absent", "old", "new"
BETWEEN = "one model old, one new"  # each whole; `triton --check` says so, and the next publish or rollback ends it

Digests = dict[str, str]  # path in the directory -> SHA-256
State = Callable[[Path], str]  # one of the words above, or what is wrong


def digests(directory: Path) -> Digests:
    """SHA-256 of each file but reports, which hold times. What is no file is named as such."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            found[name] = "no plain file"
        elif path.is_file() and path.name != REPORT:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def directory_state(old: Digests | None, new: Digests, compiled: Sequence[str] = ()) -> State:
    """Tells an OUT: absent, old or new, each file the same; and, where it has a manifest, sound by that.

    Args:
        compiled: ends of the names of files of which a compiler makes other bytes each time. That a new one is whole, its manifest says.
    """

    def stable(found: Digests) -> Digests:
        ends = (*compiled, MANIFEST) if compiled else ()
        return {name: "" if name.endswith(tuple(ends)) else sha for name, sha in found.items()}

    def state(path: Path) -> str:
        if not path.exists():
            return ABSENT if old is None else "it was there, and is not"
        there = digests(path)
        if there != old and stable(there) != stable(new):
            return f"it is neither old nor new: {differing(there, new)}"
        if (path / MANIFEST).is_file():
            with contextlib.suppress(FloraExportError):
                faults = changed_files(open_artifact(path))
                return f"its manifest says: {faults[0]}" if faults else (OLD if there == old else NEW)
            return "its manifest cannot be read"
        return OLD if there == old else NEW

    return state


def differing(there: Digests, expected: Digests) -> str:
    """The first files that differ."""
    names = sorted(name for name in there.keys() | expected.keys() if there.get(name) != expected.get(name))
    return ", ".join(f"{name} {'differs' if name in there and name in expected else 'is missing' if name in expected else 'is new'}"
                     for name in names[:4])  # fmt: skip


def live_content(repo: Path) -> dict[str, Digests]:
    """Of each model: the files of its live version. The configuration is left out: it has the version's number."""
    return {model: _version(repo / model / str(version)) for model, version in live(repo).items()}


def _version(directory: Path) -> Digests:
    return {name: sha for name, sha in digests(directory).items() if name != CONFIG}


def repository_state(old: dict[str, Digests] | None, new: dict[str, Digests]) -> State:
    """Tells a repository by what its models serve: old or new, whole, with the configuration that the version holds itself."""

    def state(repo: Path) -> str:
        if not any((repo / model / CONFIG).exists() for model in MODELS):
            return ABSENT if old is None else "nothing is live any more"
        try:
            faults = [fault for fault in check(repo) if "live versions differ" not in fault]
            serving = live(repo)
            if old is None and MODELS[0] not in serving:
                faults.append(f"{MODELS[0]} is not live")
            words = {model: _which(repo, model, version, old, new) for model, version in serving.items()}
        except FloraExportError as error:
            return f"it cannot be read: {error}"
        faults += [word for word in words.values() if word not in (OLD, NEW)]
        if faults:
            return "; ".join(faults[:3])
        found = set(words.values()) | ({ABSENT} if words.keys() < new.keys() else set())
        return found.pop() if len(found) == 1 else BETWEEN

    return state


def _which(repo: Path, model: str, version: int, old: dict[str, Digests] | None, new: dict[str, Digests]) -> str:
    directory = repo / model / str(version)
    if not (directory / CONFIG).is_file():
        return f"{model}/{version} has no {CONFIG}"
    if (repo / model / CONFIG).read_bytes() != (directory / CONFIG).read_bytes():
        return f"{model}/{CONFIG} is not that of version {version}"
    there = _version(directory)
    if there == new.get(model):
        return NEW
    return OLD if old is not None and there == old.get(model) else f"{model}/{version}: {differing(there, new.get(model, {}))}"


def strays_of_repository(repo: Path, count: int) -> list[str]:
    """What lies in a repository beyond `count` versions of each model and their warm-ups."""
    strays = [f"{path.name} in the repository" for path in repo.iterdir() if path.name not in MODELS]
    for model in MODELS:
        if not (repo / model).is_dir():
            continue
        held = versions(repo, model)
        if len(held) != count:
            strays.append(f"{len(held)} versions of {model}, not {count}")
        known = {CONFIG, "warmup", *map(str, held)}
        strays += [f"{model}/{path.name}" for path in (repo / model).iterdir() if path.name not in known]
        strays += [
            f"{model}/warmup/{path.name}"
            for path in (repo / model / "warmup").iterdir()
            if not any(path.name.startswith(f"{version}.") for version in held)
        ]
    return strays


def cache_faults(cache: Path) -> list[str]:
    """What is wrong with a cache of engines: an entry whose hash is not the one that stands beside it, or what is no entry."""
    faults = []
    for entry in sorted(cache.iterdir()) if cache.is_dir() else []:
        if entry.name.startswith("."):
            continue  # a part: what killed builds leave is counted after the next one
        try:
            known = json.loads((entry / "layers.json").read_text())["sha256"]
            whole = hashlib.sha256((entry / "model.engine").read_bytes()).hexdigest() == known
        except (OSError, ValueError, KeyError):
            whole = False
        if not whole:
            faults.append(f"{entry.name[:12]} in the cache is not whole")
    return faults
