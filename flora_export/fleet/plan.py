"""plan.yaml: which adapters are built for which targets. Every key is checked, and nothing that it names leaves OUTPUT by its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_export.backends import BACKENDS, PUBLISHED
from flora_export.branch import FUSE_LEVELS
from flora_export.errors import BackendError, FloraExportError

VERSION = 1
MAX_PLAN_BYTES = 2**20
MAX_JOBS = 100_000
STATE = ".fleet"  # in OUTPUT: what is done. No name of an adapter or a target begins with a dot
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


def _among(*choices: str) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices


_FLAG: tuple[str, Callable[[Any], bool]] = ("true or false", lambda value: isinstance(value, bool))
# What a target may say, beside `repository`: options of a build, by the names that `BuildOptions` has.
OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "backend": _among(*BACKENDS),
    "target": _among("cpu", "cuda", "gpu", "npu"),
    "precision": _among("fp32", "fp16", "bf16", "int8", "int4"),
    "fuse": _among(*FUSE_LEVELS),
    "merge": _FLAG,
    "allow_vacuous": _FLAG,
    "align": ("a whole number of at least 1", lambda value: type(value) is int and value >= 1),
    "max_quantization_loss": ("a number of nats, at least 0", lambda value: type(value) in (int, float) and 0 <= value < 1e9),
}


@dataclass(frozen=True)
class Job:
    """One adapter for one target: what is built, and where it goes."""

    adapter: str
    target: str
    checkpoint: Path
    base: str
    output: Path
    options: Mapping[str, Any]  # of `BuildOptions`
    repository: Path | None = None  # of Triton, where the artifact is published

    @property
    def name(self) -> str:
        return f"{self.adapter}/{self.target}"


@dataclass(frozen=True)
class Plan:
    """A plan that was read and checked. Whether its adapters can be built is seen when they are: each fails alone."""

    base: str
    output: Path
    jobs: tuple[Job, ...]


def read_plan(file: Path, output: Path | None = None) -> Plan:
    """Read a plan; `output` takes the place of the one that it names. Relative paths in it are of its directory.

    Raises:
        FloraExportError: it cannot be read, or it says something that cannot be; one line says where, and what was expected.
        BackendError: there is no package that reads YAML.
    """
    try:
        content = _load(file)
        return _plan(content, file.absolute().parent, output)
    except _Wrong as error:
        raise FloraExportError(f"{file}: {error}") from error


class _Wrong(Exception):
    """What is wrong with a plan, its file not named yet."""


def _load(file: Path) -> Any:
    """The YAML as plain values, a key given twice refused: the second would silently take the place of the first."""
    try:
        import yaml
    except ImportError as error:
        raise BackendError(f"a fleet needs a package that is not installed ({error}): pip install 'flora-export[fleet]'") from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # untyped
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [loader.construct_object(key) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = [key for key in keys if isinstance(key, str) and keys.count(key) > 1]
        if twice:
            raise _Wrong(f"{_shown(twice[0])} is given twice")
        values: dict[Any, Any] = loader.construct_mapping(node, deep=True)
        return values

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_PLAN_BYTES + 1)
        if len(text) > MAX_PLAN_BYTES:
            raise _Wrong(f"has more than {MAX_PLAN_BYTES} bytes, which no plan needs; give the adapters as a glob")
        return yaml.load(text, Loader)  # a SafeLoader
    except OSError as error:
        raise _Wrong(f"cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise _Wrong(f"not YAML that can be read ({str(error)[:300] or type(error).__name__})") from error


def _plan(content: Any, home: Path, output: Path | None) -> Plan:
    _keys(content, "the plan", needed=("version", "base", "adapters", "targets"), others=("output",))
    if type(content["version"]) is not int or content["version"] != VERSION:
        raise _Wrong(f"version is {_shown(content['version'])}, but this reads {VERSION}")
    base = _text(content["base"], "base")
    if _path(home, base).is_dir():  # else the name of a hub repository
        base = str(_path(home, base))
    if output is None:
        if "output" not in content:
            raise _Wrong("names no output: add `output: DIR`, or pass --output DIR")
        output = _path(home, _text(content["output"], "output"))
    output = output.resolve()
    adapters, targets = _adapters(content["adapters"], home), content["targets"]
    if not isinstance(targets, dict) or not targets:
        raise _Wrong("targets must be names, each with its options, as `cpu: {backend: onnxruntime}`")
    if len(adapters) * len(targets) > MAX_JOBS:
        raise _Wrong(f"has {len(adapters) * len(targets)} jobs, more than {MAX_JOBS}; make several of it")
    checked = {_name(name, "targets"): _target(f"targets.{name}", options) for name, options in targets.items()}
    jobs = []
    for adapter, checkpoint in adapters.items():
        for target, (options, template) in checked.items():
            filled = template and template.replace("{adapter}", adapter).replace("{target}", target)
            repository = _path(home, filled) if filled else None
            jobs.append(Job(adapter, target, checkpoint, base, output / adapter / target, options, repository))
    _check_apart(jobs)
    return Plan(base, output, tuple(jobs))


def _adapters(found: Any, home: Path) -> dict[str, Path]:
    """Each adapter's directory by its name: as the plan names it, or in a list of paths and globs as the directory is named."""
    if isinstance(found, dict):
        adapters = {_name(name, "adapters"): _path(home, _text(path, f"adapters.{name}")) for name, path in found.items()}
    elif isinstance(found, list):
        adapters = {}
        for pattern in (_text(entry, "adapters") for entry in found):
            paths = sorted(path for path in _glob(home, pattern) if path.is_dir()) if any(c in pattern for c in "*?[") else [Path(pattern)]
            if not paths:
                raise _Wrong(f"adapters: no directory is named as {_shown(pattern)}")
            for path in paths:
                name = _name(path.name, "adapters")
                if name in adapters:
                    raise _Wrong(f"adapters: {adapters[name]} and {path} would both be {name}; name them: `adapters: {{NAME: DIR}}`")
                adapters[name] = _path(home, str(path))
    else:
        raise _Wrong(f"adapters is {_shown(found)}, but must be names with their directories, or a list of directories and globs")
    if not adapters:
        raise _Wrong("adapters is empty")
    return adapters


def _path(home: Path, text: str) -> Path:
    try:
        return (home / Path(text).expanduser()).resolve()
    except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle, a user that is not there
        raise _Wrong(f"{_shown(text)} is no path ({error})") from error


def _glob(home: Path, pattern: str) -> list[Path]:
    try:
        path = Path(pattern).expanduser()
        found = Path(path.anchor).glob(str(path.relative_to(path.anchor))) if path.is_absolute() else home.glob(pattern)
        fixed = next(place for place, part in enumerate(path.parts) if any(c in part for c in "*?["))
        start = fixed if path.is_absolute() else len(home.parts) + fixed
        asked = any(part.startswith(".") for part in path.parts[fixed:])
        return [each for each in found if asked or not any(part.startswith(".") for part in each.parts[start:])]
    except (ValueError, NotImplementedError, RuntimeError) as error:  # the last, a user that is not there
        raise _Wrong(f"adapters: {_shown(pattern)} is no glob ({error})") from error


def _target(where: str, found: Any) -> tuple[dict[str, Any], str | None]:
    """A target's options, and where it is published."""
    if isinstance(found, dict) and found.get("backend") in tuple(PUBLISHED):
        raise _Wrong(f"{where}: backend {found['backend']} is a place; say `backend: onnxruntime, repository: repositories/{{adapter}}`")
    _keys(found, where, needed=("backend",), others=(*OPTIONS, "repository"))
    for key, value in found.items():
        if key in OPTIONS and not OPTIONS[key][1](value):
            raise _Wrong(f"{where}.{key} is {_shown(value)}, but must be {OPTIONS[key][0]}")
    options = {key: value for key, value in found.items() if key in OPTIONS}
    if "repository" not in found:
        return options, None
    return options, _text(found["repository"], f"{where}.repository")


def _check_apart(jobs: list[Job]) -> None:
    """A repository is one job's alone, and is no artifact: two adapters in one would each take the other's place."""
    outputs, owners = {job.output.resolve() for job in jobs}, dict[Path, Job]()
    for job in jobs:
        repo = job.repository
        if repo is None:
            continue
        if repo in owners:
            raise _Wrong(f"{owners[repo].name} and {job.name} are both published in {repo}: put {{adapter}} and {{target}} into the path")
        owners[repo] = job
        if not outputs.isdisjoint({repo, *repo.parents}) or any(repo in output.parents for output in outputs):
            raise _Wrong(f"targets.{job.target}.repository is {repo}, which an artifact lies in, or which lies in one")


def _keys(found: Any, where: str, needed: tuple[str, ...], others: tuple[str, ...]) -> None:
    if not isinstance(found, dict):
        raise _Wrong(f"{where} is {_shown(found)}, but must be a mapping with {', '.join(needed)}")
    unknown = [key for key in found if key not in (*needed, *others)]
    if unknown:
        raise _Wrong(f"{where} has {_shown(unknown[0])}, which is unknown; it takes {', '.join(dict.fromkeys((*needed, *others)))}")
    missing = [key for key in needed if key not in found]
    if missing:
        raise _Wrong(f"{where} has no {missing[0]}")


def _name(found: Any, where: str) -> str:
    if not isinstance(found, str) or not NAME.fullmatch(found):
        raise _Wrong(
            f"{where} has the name {_shown(found)}, but a name becomes a directory: letters, digits, `.`, `_` and `-`, no dot in front, "
            "in quotes where it is a number"
        )
    return found


def _text(found: Any, where: str) -> str:
    if not isinstance(found, str) or not found or "\0" in found or len(found) > 4096:
        raise _Wrong(f"{where} is {_shown(found)}, but must be a text")
    return found


def _shown(value: Any) -> str:
    """A value as an error quotes it: not the whole of a list that refers to itself a thousand times."""
    return f"{value!r:.100}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
