"""reproduce(): an artifact built again from what its provenance says, and compared with it byte for byte."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_export.artifact import MANIFEST, UNLISTED, Artifact, files_in, open_artifact
from flora_export.backends import Progress, load_backend
from flora_export.backends.manifest import installed
from flora_export.backends.quantizing import QuantizationOptions
from flora_export.backends.quantizing import read_options as read_quantization
from flora_export.base_model import file_sha256
from flora_export.branch import FUSE_LEVELS
from flora_export.errors import ArtifactError, FloraExportError
from flora_export.manifest import fits
from flora_export.methods import load_base_of
from flora_export.methods.bank import BankOptions
from flora_export.pipeline import BuildOptions, build
from flora_export.scratch import Scratch
from flora_export.trust.statement import check_adapters, check_base, read_parameters


@dataclass(frozen=True)
class Reproduction:
    """How a second build compares with the first: files that are the same, and those that differ, each with the reason."""

    same: tuple[str, ...]
    differ: tuple[str, ...]
    versions: tuple[str, ...]  # of packages that are others here than the first build had

    def to_text(self) -> str:
        if not self.differ:
            return f"REPRODUCED: {len(self.same)} files, each byte the same"
        lines = [f"NOT REPRODUCED: {len(self.differ)} files differ, {len(self.same)} are the same", *(f"  {each}" for each in self.differ)]
        return "\n".join(lines + [f"  it was built with {each}" for each in self.versions])


def reproduce(path: Path, ckpts: Sequence[Path], base_name: str | None, progress: Progress) -> Reproduction:
    """Build an artifact again in a temporary directory, with the options of its provenance, and compare all files but what no build
    of the same makes alike or at all: `report.json`, the BOM and the signature.

    Raises:
        ArtifactError: it has no provenance, or base or adapters are not those that it was built from.
        FloraExportError: as `build`.
    """
    artifact = open_artifact(path)
    options = read_options(artifact, ckpts)
    progress("comparing the inputs", 0, 1)
    check_base(artifact, load_base_of(ckpts[0], base_name))
    check_adapters(artifact, ckpts)
    with Scratch("flora-export-reproduce-") as scratch:
        again, _ = build(ckpts[0], base_name, Path(scratch) / "out", options, progress)
        new = {name: known["sha256"] for name, known in again.manifest.files.items()}
        new[MANIFEST] = file_sha256(Path(scratch) / "out" / MANIFEST)
    same, differ = [], []
    there = files_in(path) - UNLISTED
    for name in sorted(new.keys() | artifact.manifest.files.keys() | there):
        if name not in new:
            differ.append(f"{name}: the second build has none")
        elif not (path / name).is_file():
            differ.append(f"{name}: it is missing in {path}")
        elif (old := file_sha256(path / name)) != new[name]:
            differ.append(f"{name}: SHA-256 {old}, of the second build {new[name]}")
        else:
            same.append(name)
    known = artifact.manifest.versions
    versions = [f"{name} {known[name]}, here is {here}" for name, here in installed(known).items() if here != known[name]]
    return Reproduction(tuple(same), tuple(differ), tuple(versions))


def read_options(artifact: Artifact, ckpts: Sequence[Path]) -> BuildOptions:
    """The options of an artifact's provenance, with adapters from somewhere else. Raises ArtifactError where they are none."""
    said = read_parameters(artifact)
    try:
        weights, bank, names, settings = (said.pop(name) for name in ("weights", "bank", "names", "settings"))
        if not fits(weights, list[float]) or not fits(names, list[str]) or not isinstance(settings, dict):
            raise ValueError("weights, names or settings")
        if len(ckpts) != (len(weights) or len(names) or 1):
            raise ArtifactError(f"{artifact.path} was built from {len(weights) or len(names) or 1} adapters, but {len(ckpts)} were given")
        weighted = tuple(zip(ckpts, weights, strict=True)) if weights else ()
        members = None if bank is None else BankOptions(tuple(zip(names, ckpts, strict=True)), bank["layout"], bank["slots"])
        if said["backend"] != artifact.manifest.backend:
            raise ValueError(f"backend {said['backend']!r}, but it was built for {artifact.manifest.backend}")
        own = restored(load_backend(said["backend"]).options({}), settings)
        check_settings(own)
        options = BuildOptions(**said, weighted=weighted, bank=members, settings=own)
        hints = typing.get_type_hints(BuildOptions)
        wrong = [name for name in said if not fits(getattr(options, name), hints[name])]
        if wrong or options.fuse not in FUSE_LEVELS or options.parameters != read_parameters(artifact):
            raise ValueError(f"no build has these: {', '.join(wrong) or 'its options'}")
        return options
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{artifact.path}: its provenance has options that are none ({error!s:.300}). Build it again.") from error


def check_settings(settings: Any) -> None:
    """Raises ValueError where a field of a backend's options is not one that the command line would have taken."""
    if settings is None:
        return
    if isinstance(settings, QuantizationOptions):
        try:
            read_quantization(dataclasses.asdict(settings))
        except FloraExportError as error:
            raise ValueError(str(error)) from error
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            check_settings(value)
        elif isinstance(hints[field.name], type | types.UnionType) and not fits(value, hints[field.name]):
            raise ValueError(f"{field.name} is {value!r:.100}")


def restored(silent: Any, said: dict[str, Any]) -> Any:
    """A backend's options from JSON, on its defaults."""
    changed = {}
    for name, value in said.items():
        default = getattr(silent, name)
        if dataclasses.is_dataclass(default):
            changed[name] = restored(default, value)
        elif isinstance(value, dict):
            changed[name] = {key: tuple(each) for key, each in value.items()}
        else:
            changed[name] = tuple(value) if isinstance(value, list) else value
    return silent if silent is None else dataclasses.replace(silent, **changed)
