"""Read an FFBA checkpoint, the directory that PEFT's `save_pretrained` writes. Safetensors and JSON only.

Checkpoints come from strangers. The configuration is checked first, then every tensor's name, dtype and shape from the header
alone, against the configuration and the base model's; only then are numbers read, and these must be finite.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # teaches numpy the dtype bfloat16
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from flora_export.base_model import BaseModel, file_sha256, read_json
from flora_export.branch import ACTIVATIONS, BLOCK_KINDS, FORMAT_KEY, GATED, Branch, adapter_scale, format_defaults, rank_of
from flora_export.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
DTYPES = ("F32", "F16", "BF16")
MAX_PATTERN = 500
MAX_REPETITIONS = 4
MAX_WEIGHT_BYTES = 8 * 2**30
_KEY = re.compile(
    r"base_model\.model\.(?P<block>(?P<layers>(?:\w+\.)*layers)\.(?P<layer>\d+)\.(?P<name>\w+))\.ffba_(?P<matrix>[ABG])\.weight"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checked adapter: its branches, ordered by layer, and its matrices on demand."""

    path: Path
    config: dict[str, Any]
    branches: tuple[Branch, ...]
    digests: dict[str, str]  # SHA-256 by file name

    @property
    def digest(self) -> str:
        """One SHA-256 over the files of the adapter."""
        return hashlib.sha256("".join(f"{name} {sha}\n" for name, sha in sorted(self.digests.items())).encode()).hexdigest()

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(tensor_name(branch, matrix) for branch in self.branches for matrix in branch.matrices)

    def matrix(self, branch: Branch, matrix: str) -> npt.NDArray[np.float32]:
        """A, B or G of a branch in torch's layout, [r, d] or [d, r], as fp32 and unscaled."""
        with safe_open(self.path / WEIGHTS, framework="numpy") as file:
            values: npt.NDArray[np.float32] = file.get_tensor(tensor_name(branch, matrix)).astype(np.float32)
        return values


def tensor_name(branch: Branch, matrix: str) -> str:
    """Name of a matrix in the checkpoint, as PEFT writes it."""
    return f"base_model.model.{branch.block}.ffba_{matrix}.weight"


def load_checkpoint(path: Path, base: BaseModel) -> Checkpoint:
    """Read and check an adapter for a base model.

    Raises:
        CheckpointError: anything about it is missing, unknown, of the wrong shape or not finite; the message says what and where.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such adapter directory")
    config = read_config(path)
    if not (path / WEIGHTS).is_file():
        if (path / PICKLE).exists():
            raise CheckpointError(
                f"{path / PICKLE} is a pickle, which can run code when read. Save the adapter with safe_serialization=True."
            )
        raise CheckpointError(f"{path}: {WEIGHTS} is missing")
    if (path / WEIGHTS).stat().st_size > MAX_WEIGHT_BYTES:
        raise CheckpointError(f"{path / WEIGHTS}: more than {MAX_WEIGHT_BYTES} bytes; no FFBA adapter is that large")
    try:
        with safe_open(path / WEIGHTS, framework="numpy") as file:
            header = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # not a dict
            found = {key: (entry.get_dtype(), tuple(entry.get_shape())) for key, entry in header.items()}
            branches = _plan(path, config, base, found)
            _check_header(path, branches, base, found)
            for key in found:
                _check_finite(path, key, file.get_tensor(key))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / WEIGHTS}: not a whole safetensors file ({error}). Copy or save it again.") from error
    return Checkpoint(path, config, branches, {name: file_sha256(path / name) for name in (CONFIG, WEIGHTS)})


def read_config(path: Path) -> dict[str, Any]:
    """Read and check `adapter_config.json` alone. Raises CheckpointError."""
    file = path / CONFIG
    config = read_json(file, "adapter configuration")

    def refuse(key: str, expected: str) -> None:
        raise CheckpointError(f"{file}: {key} is {config.get(key)!r}, but {expected}")

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30  # NaN is not below either

    def whole(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    if config.get("peft_type") != "FFBA":
        refuse("peft_type", "only FFBA adapters can be fused on both sides. A LoRA adapter can be merged with PEFT's merge_and_unload().")
    try:
        defaults = format_defaults(config.setdefault(FORMAT_KEY, 0))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if not whole(config.get("r")) or config["r"] < 1:
        refuse("r", "a rank is a whole number of at least 1")
    if not number(config.get("alpha")):
        refuse("alpha", "must be a finite number")
    if not number(config.setdefault("gated_gain", defaults.gated_gain)):
        refuse("gated_gain", "must be a finite number")
    if not number(config.setdefault("dropout", 0.0)) or not 0 <= config["dropout"] < 1:
        refuse("dropout", "must be at least 0 and below 1")
    if not isinstance(config.setdefault("use_rslora", False), bool):
        refuse("use_rslora", "must be true or false")
    for key, kind in (("attn_activation", "attention"), ("mlp_activation", "mlp")):
        allowed = ACTIVATIONS[kind]  # type: ignore[index]
        if config.setdefault(key, allowed[0] if kind == "attention" else GATED) not in allowed:
            refuse(key, f"must be one of {', '.join(allowed)}")
    config["rank_pattern"] = pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict) or not all(whole(rank) and rank >= 1 for rank in pattern.values()):
        refuse("rank_pattern", "must map block names to ranks of at least 1")
    for key in pattern:
        _check_pattern(file, "rank_pattern", rf"(.*\.)?({key})$", key)
    targets = config.setdefault("target_modules", list(BLOCK_KINDS))
    if not isinstance(targets, str) and not (isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)):
        refuse("target_modules", "must be a list of block names or a regular expression")
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            _check_pattern(file, key, config[key], config[key])
    layers = config.get("layers_to_transform")
    if layers is not None and not whole(layers) and not (isinstance(layers, list) and all(whole(layer) for layer in layers)):
        refuse("layers_to_transform", "must be layer indices or null")
    for key in ("modules_to_save", "exclude_modules"):
        value = config.get(key)
        if value is not None and not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            refuse(key, "must be a list of module names or null")
    if config.get("modules_to_save"):
        refuse("modules_to_save", "only FFBA branches are exported: train without it, or merge those modules into the base model")
    return config


def _check_pattern(file: Path, key: str, pattern: str, written: str) -> None:
    """Refuse what is no regular expression, or one that a stranger could make run for ever: repeated groups, or many repetitions."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file}: {key} has {written!r}, which is no regular expression ({error})") from error
    if len(written) > MAX_PATTERN or re.search(r"\)[*+{?]", written) or len(re.findall(r"[*+{]", written)) > MAX_REPETITIONS:
        raise CheckpointError(
            f"{file}: {key} has {written[:80]!r}, but a pattern may repeat no group, have at most {MAX_REPETITIONS} of * + {{, "
            f"and {MAX_PATTERN} characters. List the block names instead."
        )


def _plan(path: Path, config: dict[str, Any], base: BaseModel, keys: Iterable[str]) -> tuple[Branch, ...]:
    """The branches that the configuration promises for this base model, whatever the file holds."""
    prefixes = {match["layers"] for match in map(_KEY.fullmatch, keys) if match}
    if len(prefixes) > 1:
        raise CheckpointError(f"{path / WEIGHTS}: branches in more than one list of layers: {', '.join(sorted(prefixes))}")
    prefix = prefixes.pop() if prefixes else "model.layers"
    branches = []
    for layer in range(base.layers):
        for name, kind in BLOCK_KINDS.items():
            block = f"{prefix}.{layer}.{name}"
            if not _targeted(config, block, layer):
                continue
            rank = rank_of(block, config["r"], config["rank_pattern"])
            if rank > base.width:
                raise CheckpointError(f"{path / CONFIG}: rank {rank} of {block} is above the base model's width {base.width}")
            activation = config["attn_activation"] if kind == "attention" else config["mlp_activation"]
            gain = config["gated_gain"] if activation == GATED else 1.0
            branches.append(Branch(block, kind, activation, rank, adapter_scale(config["alpha"], rank, config["use_rslora"], gain)))
    if not branches:
        raise CheckpointError(
            f"{path / CONFIG}: target_modules {config['target_modules']!r} selects no block; expected {', '.join(BLOCK_KINDS)}"
        )
    return tuple(branches)


def _targeted(config: dict[str, Any], block: str, layer: int) -> bool:
    """Whether PEFT would put a branch there: a regular expression for the whole name, or a list of name endings."""

    def matches(patterns: str | list[str] | None) -> bool:
        if isinstance(patterns, str):
            return re.fullmatch(patterns, block) is not None
        return any(block == pattern or block.endswith(f".{pattern}") for pattern in patterns or ())

    layers = config.get("layers_to_transform")
    if layers in (None, []) or isinstance(config["target_modules"], str):
        chosen = True
    else:
        chosen = layer in (layers if isinstance(layers, list) else [layers])
    return chosen and matches(config["target_modules"]) and not matches(config.get("exclude_modules"))


def _check_header(path: Path, branches: tuple[Branch, ...], base: BaseModel, found: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Exactly the promised tensors, each of the promised shape."""
    expected = {tensor_name(b, m): (f"{b.block} {m}", b.shape(m, base.width)) for b in branches for m in b.matrices}
    for key, (where, shape) in expected.items():
        if key not in found:
            raise CheckpointError(
                f"{path / WEIGHTS}: {where} is missing ({key}; {len(expected.keys() - found.keys())} in all). "
                "Is the base model the right one?"
            )
        dtype, got = found[key]
        if got != shape:
            raise CheckpointError(
                f"{path / WEIGHTS}: {where} is {got}, but the base model and its rank need {shape}. Trained on another base model?"
            )
        if dtype not in DTYPES:
            raise CheckpointError(f"{path / WEIGHTS}: {where} is {dtype}, but must be one of {', '.join(DTYPES)}")
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise CheckpointError(
            f"{path / WEIGHTS}: {len(extra)} tensors that the configuration and a base model of {base.layers} layers do not promise, "
            f"first {extra[0]}. Is the base model the right one?"
        )


def _check_finite(path: Path, key: str, values: npt.NDArray[Any]) -> None:
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        raise CheckpointError(
            f"{path / WEIGHTS}: {key} holds {bad} NaN or infinite numbers. Training has diverged; take an earlier checkpoint."
        )
