"""What all methods read and check alike: kinds of values in a configuration, patterns of strangers, the header of the weights, numbers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from flora_export.base_model import BaseModel
from flora_export.branch import Branch
from flora_export.change import WeightChange
from flora_export.checkpoint import WEIGHTS
from flora_export.errors import CheckpointError

PICKLE = "adapter_model.bin"
DTYPES = ("F32", "F16", "BF16")
MAX_PATTERN = 500
MAX_REPETITIONS = 4
MAX_WEIGHT_BYTES = 8 * 2**30

PREFIX = "base_model.model."  # before the base model's own names, in PEFT's
Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name in the checkpoint -> (what it is, shape)
Header = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor -> (dtype, shape)


@dataclass(frozen=True)
class Promise:
    """What an adapter does to a base model, and the tensors that its file must hold for it: name -> (what it is, shape)."""

    branches: tuple[Branch, ...]
    changes: tuple[WeightChange, ...]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


def number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30  # NaN is not below either


def whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def refuser(file: Path, config: Mapping[str, Any]) -> Callable[[str, str], NoReturn]:
    """`refuse(key, expected)` for a configuration: it says what the key is and what was expected."""

    def refuse(key: str, expected: str) -> NoReturn:
        raise CheckpointError(f"{file}: {key} is {config.get(key)!r}, but {expected}")

    return refuse


def check_ranks(file: Path, config: dict[str, Any], key: str) -> None:
    """A pattern of module names -> ranks; nothing at all is an empty one."""
    config[key] = pattern = config.get(key) or {}
    if not isinstance(pattern, dict) or not all(whole(rank) and rank >= 1 for rank in pattern.values()):
        refuser(file, config)(key, "must map block names to ranks of at least 1")
    for name in pattern:
        check_pattern(file, key, rf"(.*\.)?({name})$", name)


def check_selection(file: Path, config: dict[str, Any], names: str) -> None:
    """`target_modules`, `exclude_modules` and `layers_to_transform` are of the kinds that PEFT knows. `names` says what is selected."""
    refuse = refuser(file, config)
    targets = config.get("target_modules")
    if not isinstance(targets, str) and not (isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)):
        refuse("target_modules", f"must be a list of {names} names or a regular expression")
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            check_pattern(file, key, config[key], config[key])
    layers = config.get("layers_to_transform")
    if layers is not None and not whole(layers) and not (isinstance(layers, list) and all(whole(layer) for layer in layers)):
        refuse("layers_to_transform", "must be layer indices or null")
    for key in ("modules_to_save", "exclude_modules"):
        value = config.get(key)
        if value is not None and not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            refuse(key, "must be a list of module names or null")


def check_pattern(file: Path, key: str, pattern: str, written: str) -> None:
    """Refuse what is no regular expression, or one that a stranger could make run for ever: repeated groups, or many repetitions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python may read otherwise
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file}: {key} has {written!r}, which is no regular expression ({error})") from error
    if len(written) > MAX_PATTERN or re.search(r"\)[*+{?]", written) or len(re.findall(r"[*+{]", written)) > MAX_REPETITIONS:
        raise CheckpointError(
            f"{file}: {key} has {written[:80]!r}, but a pattern may repeat no group, have at most {MAX_REPETITIONS} of * + {{, "
            f"and {MAX_PATTERN} characters. List the block names instead."
        )


def matches(patterns: str | list[str] | None, module: str) -> bool:
    """Whether PEFT would choose a module: a regular expression for the whole name, or a list of name endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module == pattern or module.endswith(f".{pattern}") for pattern in patterns or ())


def in_layers(config: Mapping[str, Any], layer: int | None) -> bool:
    """Whether PEFT would choose a module of a layer, by `layers_to_transform`; a module outside of all layers has None."""
    layers = config.get("layers_to_transform")
    if layers in (None, []) or isinstance(config["target_modules"], str):
        return True
    return layer in (layers if isinstance(layers, list) else [layers])


def weights_file(path: Path) -> Path:
    """The adapter's weights. Raises CheckpointError where they are missing, a pickle, or larger than any adapter."""
    file = path / WEIGHTS
    if not file.is_file():
        if (path / PICKLE).exists():
            raise CheckpointError(
                f"{path / PICKLE} is a pickle, which can run code when read. Convert it, running none: flora-export convert {path} OUT."
            )
        raise CheckpointError(f"{path}: {WEIGHTS} is missing")
    if file.stat().st_size > MAX_WEIGHT_BYTES:
        raise CheckpointError(f"{file}: more than {MAX_WEIGHT_BYTES} bytes; no adapter is that large")
    return file


def check_header(file: Path, expected: Mapping[str, tuple[str, tuple[int, ...]]], base: BaseModel, found: Header) -> None:
    """Exactly the promised tensors, each of the promised shape."""
    for key, (where, shape) in expected.items():
        if key not in found:
            raise CheckpointError(
                f"{file}: {where} is missing ({key}; {len(expected.keys() - found.keys())} in all). Is the base model the right one?"
            )
        dtype, got = found[key]
        if got != shape:
            raise CheckpointError(f"{file}: {where} is {got}, but the base model and its rank need {shape}. Trained on another base model?")
        if dtype not in DTYPES:
            raise CheckpointError(f"{file}: {where} is {dtype}, but must be one of {', '.join(DTYPES)}")
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise CheckpointError(
            f"{file}: {len(extra)} tensors that the configuration and a base model of {base.layers} layers do not promise, "
            f"first {extra[0]}. Is the base model the right one?"
        )


def check_finite(file: Path, key: str, values: npt.NDArray[Any]) -> None:
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        raise CheckpointError(f"{file}: {key} holds {bad} NaN or infinite numbers. Training has diverged; take an earlier checkpoint.")
