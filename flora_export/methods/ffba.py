"""FFBA: branches beside the blocks of a decoder layer (branch.py), written by PEFT with `flora_export.ffba`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from flora_export.base_model import BaseModel
from flora_export.branch import ACTIVATIONS, BLOCK_KINDS, FORMAT_KEY, GATED, Branch, adapter_scale, by_pattern, format_defaults
from flora_export.checkpoint import CONFIG, WEIGHTS
from flora_export.errors import CheckpointError
from flora_export.methods.reading import Header, Promise, check_ranks, check_selection, in_layers, matches, number, refuser, whole

_KEY = re.compile(
    r"base_model\.model\.(?P<block>(?P<layers>(?:\w+\.)*layers)\.(?P<layer>\d+)\.(?P<name>\w+))\.ffba_(?P<matrix>[ABG])\.weight"
)


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Check an FFBA configuration and fill in what its version leaves unsaid. Raises CheckpointError."""
    refuse = refuser(file, config)
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
    check_ranks(file, config, "rank_pattern")
    config.setdefault("target_modules", list(BLOCK_KINDS))
    check_selection(file, config, "block")
    if config.get("modules_to_save"):
        refuse("modules_to_save", "only FFBA branches are exported: train without it, or merge those modules into the base model")


def promise(path: Path, config: dict[str, Any], base: BaseModel, found: Header) -> Promise:
    """The branches that the configuration promises for this base model, whatever the file holds. Raises CheckpointError."""
    prefixes = {match["layers"] for match in map(_KEY.fullmatch, found) if match}
    if len(prefixes) > 1:
        raise CheckpointError(f"{path / WEIGHTS}: branches in more than one list of layers: {', '.join(sorted(prefixes))}")
    prefix = prefixes.pop() if prefixes else "model.layers"
    branches = []
    for layer in range(base.layers):
        for name, kind in BLOCK_KINDS.items():
            block = f"{prefix}.{layer}.{name}"
            chosen = in_layers(config, layer) and matches(config["target_modules"], block)
            if not chosen or matches(config.get("exclude_modules"), block):
                continue
            rank = by_pattern(block, config["r"], config["rank_pattern"])
            if rank > base.width:
                raise CheckpointError(f"{path / CONFIG}: rank {rank} of {block} is above the base model's width {base.width}")
            activation = config["attn_activation"] if kind == "attention" else config["mlp_activation"]
            gain = config["gated_gain"] if activation == GATED else 1.0
            branches.append(Branch(block, kind, activation, rank, adapter_scale(config["alpha"], rank, config["use_rslora"], gain)))
    if not branches:
        raise CheckpointError(
            f"{path / CONFIG}: target_modules {config['target_modules']!r} selects no block; expected {', '.join(BLOCK_KINDS)}"
        )
    tensors = {b.tensor(m): (f"{b.block} {m}", b.shape(m, base.width)) for b in branches for m in b.matrices}
    return Promise(tuple(branches), (), tensors)
