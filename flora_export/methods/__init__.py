"""Adapter methods, one file each: what an adapter on disk does to a base model, as branches and changes of weights.

Checkpoints come from strangers. The configuration is checked first, then every tensor's name, dtype and shape from the header alone,
against what the method promises for the configuration and the base model; only then are numbers read, and these must be finite.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from safetensors import SafetensorError, safe_open

from flora_export.base_model import BaseModel, check_safetensors, directory_of, file_sha256, load_base, read_json
from flora_export.checkpoint import CONFIG, WEIGHTS, Checkpoint
from flora_export.errors import CheckpointError
from flora_export.methods.bank import gathered
from flora_export.methods.reading import Header, Promise, check_finite, check_header, weights_file
from flora_export.methods.weighted import combined

# peft_type -> the module that reads it, imported when such an adapter is. A new method is one file and one line here.
METHODS: dict[str, str] = {
    "FFBA": "flora_export.methods.ffba",
    "LORA": "flora_export.methods.lora",
    "DELORA": "flora_export.methods.delora",
    "DORA": "flora_export.methods.dora_fork",
    "LORA2": "flora_export.methods.lora2",
    "MELORA": "flora_export.methods.melora",
    "RESLORA": "flora_export.methods.reslora",
}
MERGED_BY_PEFT = "flora_export.methods.merged_by_peft"  # every other peft_type, which it refuses by name or leaves to PEFT's own merge


class Method(Protocol):
    """What a module of METHODS has. Nothing above this folder knows which one it was."""

    def check_config(self, file: Path, config: dict[str, Any]) -> None:
        """Check a configuration, and fill in what it leaves unsaid. Raises CheckpointError."""

    def promise(self, path: Path, config: dict[str, Any], base: BaseModel, found: Header) -> Promise:
        """What a checked configuration says of a base model. `found` is the weights' header, which the caller compares with it.

        Raises:
            CheckpointError: the adapter does not fit the base model, or does what cannot be exported; with the remedy.
        """


def load_sources(
    ckpt: Path, base_name: str | None, *, merge: bool = True, weighted: Sequence[tuple[Path, float]] = ()
) -> tuple[BaseModel, Checkpoint]:
    """The adapter and its base model, both checked. Without `base_name` it is the one that the adapter names.

    `merge` and errors are those of `load_checkpoint`.
    """
    base = load_base_of(ckpt, base_name)
    if not weighted:
        return base, load_checkpoint(ckpt, base, merge=merge)
    checkpoint = combined([(load_checkpoint(path, base), weight) for path, weight in weighted])
    return base, checkpoint if merge else checkpoint.unmerged()


def load_base_of(ckpt: Path, base_name: str | None) -> BaseModel:
    """The base model by its name, or without one the base model that an adapter names. Raises CheckpointError."""
    name = base_name or named_base(read_config(ckpt))
    if name is None:
        raise CheckpointError(f"{ckpt}: the adapter names no base model. Pass --base DIR.")
    return load_base(name)


def named_base(config: Mapping[str, Any]) -> str | None:
    """The base model that an adapter's configuration names; from the hub at the revision that it was trained on, if it says one."""
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        return None
    return f"{name}@{revision}" if revision and not directory_of(name) else name


def load_bank(
    members: Mapping[int, tuple[str, Path]], base_name: str | None, layout: Callable[[Sequence[Checkpoint]], str], slots: int
) -> tuple[BaseModel, Checkpoint]:
    """The adapters of a bank, by slot, as one checkpoint, and their base model: without `base_name`, the one that the first names.

    `layout` chooses the bank's, when they have been read.

    Raises:
        CheckpointError: as `load_checkpoint`, or an adapter that no bank can hold.
    """
    base = load_base_of(next(iter(members.values()))[1], base_name)
    loaded = {slot: (name, load_checkpoint(path, base, merge=False)) for slot, (name, path) in members.items()}
    return base, gathered(loaded, layout([checkpoint for _, checkpoint in loaded.values()]), slots)


def load_checkpoint(path: Path, base: BaseModel, *, merge: bool = True) -> Checkpoint:
    """Read and check an adapter for a base model. Without `merge`, low-rank changes stay beside their projections.

    Raises:
        CheckpointError: anything about it is missing, unknown, of the wrong shape or not finite, or cannot stay
            beside; the message says what and where.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such adapter directory")
    digests = {
        name: file_sha256(path / name) for name in (CONFIG, WEIGHTS) if (path / name).is_file()
    }  # before they are read: they may change
    config, method = _read(path)
    found, weights = read_header(path), path / WEIGHTS
    promise = method.promise(path, config, base, found)
    check_header(weights, promise.tensors, base, found)
    try:
        with safe_open(weights, framework="numpy") as file:
            for key in found:
                check_finite(weights, key, file.get_tensor(key))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights}: cannot be read ({error}). Copy or save it again.") from error
    checkpoint = Checkpoint(path, config, promise.branches, digests, promise.changes)
    return checkpoint if merge else checkpoint.unmerged()


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each of an adapter's tensors, by name. Raises CheckpointError."""
    weights = weights_file(path)
    check_safetensors(weights)
    try:
        with safe_open(weights, framework="numpy") as file:
            header = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # not a dict
            return {key: (entry.get_dtype(), tuple(entry.get_shape())) for key, entry in header.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights}: not a whole safetensors file ({error}). Copy or save it again.") from error


def read_config(path: Path) -> dict[str, Any]:
    """Read and check `adapter_config.json` alone. Raises CheckpointError."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Any], Method]:
    """The configuration, checked, and its method."""
    file = path / CONFIG
    config = read_json(file, "adapter configuration")
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{file}: peft_type is {kind!r}, but must name a method, such as {', '.join(METHODS)}")
    method = cast("Method", importlib.import_module(METHODS.get(kind, MERGED_BY_PEFT)))
    method.check_config(file, config)
    return config, method
