"""A base model and its adapters with fewer layers: what a calibration builds, and what costs a known part of the whole.

Layers stand in the names of tensors as their first number, `model.layers.3.mlp.experts.0.up_proj.weight`, for adapters as for their bases.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flora_export.artifact import link_or_copy
from flora_export.base_model import BESIDE, INDEX, BaseModel, read_json
from flora_export.checkpoint import CONFIG, WEIGHTS
from flora_export.shards import DTYPES, Planned, write_shards

CHOSEN = "layers_to_transform"  # PEFT's setting whose numbers are layers; those of others are tokens


def shorten_base(base: BaseModel, layers: int, directory: Path) -> None:
    """Write the first layers of a base model, and all that is not of a layer, as a base model of its own."""
    directory.mkdir()
    for file in base.path.iterdir():
        if file.suffix in BESIDE and file.is_file() and file.name not in ("config.json", INDEX):
            link_or_copy(file.resolve(), directory / file.name)
    config = {key: value[:layers] if isinstance(value, list) and len(value) == base.layers else value for key, value in base.config.items()}
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}, indent=1), encoding="utf-8")
    write_shards(directory, [_planned(base, name) for name in base.tensors if _is_there(name, layers)])


def _planned(base: BaseModel, name: str) -> Planned:
    with safe_open(base.tensors[name], framework="numpy") as file:
        dtype = np.dtype(DTYPES[file.get_slice(name).get_dtype()])
    return Planned(name, dtype, base.shapes[name], lambda: base.read(name))


def shorten_adapter(ckpt: Path, layers: int, directory: Path) -> None:
    """Write what an adapter does to the first layers, and to what is not of a layer, as an adapter of its own."""
    shutil.copytree(ckpt, directory, ignore=lambda _, names: [name for name in names if name not in (CONFIG, WEIGHTS)])
    config = read_json(ckpt / CONFIG, "adapter configuration")
    config = {key: _without(value, layers) for key, value in config.items()}
    if isinstance(chosen := config.get(CHOSEN), list):
        config[CHOSEN] = [layer for layer in chosen if layer < layers]
    (directory / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    tensors = {name: tensor for name, tensor in load_file(ckpt / WEIGHTS).items() if _is_there(name, layers)}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def _without(value: Any, layers: int) -> Any:
    """A setting, without the names of modules in layers that are gone, in a list or as the keys of a pattern."""
    if isinstance(value, Mapping):
        return {key: each for key, each in value.items() if _is_there(key, layers)}
    if isinstance(value, list):
        return [each for each in value if not isinstance(each, str) or _is_there(each, layers)]
    return value


def _is_there(name: str, layers: int) -> bool:
    number = next((int(part) for part in name.split(".") if part.isdecimal()), None)
    return number is None or number < layers
