"""A base model and its adapters with fewer layers: what a calibration builds, and what costs a known part of the whole.

Layers stand in the names of tensors as their first number, `model.layers.3.mlp.experts.0.up_proj.weight`, for adapters as for their bases.
Those that are kept get the numbers from 0 on, in their order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flora_export.artifact import link_or_copy
from flora_export.base_model import BESIDE, INDEX, BaseModel, read_json
from flora_export.checkpoint import CONFIG, WEIGHTS
from flora_export.methods import read_header
from flora_export.shards import DTYPES, Planned, write_shards

CHOSEN = "layers_to_transform"  # PEFT's setting whose numbers are layers; those of others are tokens


def layers_to_keep(ckpts: Sequence[Path], layers: int) -> tuple[list[int], int]:
    """All layers of a base model in the order in which a calibration wants them, and how many of these it needs at least.

    First one of each adapter, or it would do nothing; then the others that have one, so that few layers stand for what most are.
    """
    own = [{number for name in read_header(ckpt) if (number := _layer(name)) is not None and number < layers} for ckpt in ckpts]
    first: dict[int, None] = {}
    for each in own:
        if each and each.isdisjoint(first):
            first[min(each)] = None
    order = dict.fromkeys([*first, *sorted(set().union(*own)), *range(layers)])
    return list(order), max(1, len(first))


def shorten_base(base: BaseModel, kept: Sequence[int], directory: Path) -> None:
    """Write some layers of a base model, and all that is not of a layer, as a base model of its own."""
    directory.mkdir()
    for file in base.path.iterdir():
        if file.suffix in BESIDE and file.is_file() and file.name not in ("config.json", INDEX):
            link_or_copy(file.resolve(), directory / file.name)
    places = _places(kept)
    config = {
        key: [value[layer] for layer in places] if isinstance(value, list) and len(value) == base.layers else value
        for key, value in base.config.items()
    }
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(places)}, indent=1), encoding="utf-8")
    write_shards(directory, [_planned(base, name, new) for name in base.tensors if (new := _renamed(name, places)) is not None])


def _planned(base: BaseModel, name: str, new: str) -> Planned:
    with safe_open(base.tensors[name], framework="numpy") as file:
        dtype = np.dtype(DTYPES[file.get_slice(name).get_dtype()])
    return Planned(new, dtype, base.shapes[name], lambda: base.read(name))


def shorten_adapter(ckpt: Path, kept: Sequence[int], directory: Path) -> None:
    """Write what an adapter does to some layers, and to what is not of a layer, as an adapter of its own."""
    directory.mkdir()
    places = _places(kept)
    config = {key: _within(value, places) for key, value in read_json(ckpt / CONFIG, "adapter configuration").items()}
    if isinstance(chosen := config.get(CHOSEN), int):
        config[CHOSEN] = places.get(chosen, chosen)
    if isinstance(chosen, list):
        config[CHOSEN] = [places[layer] for layer in chosen if layer in places]
    (directory / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    tensors = {new: tensor for name, tensor in load_file(ckpt / WEIGHTS).items() if (new := _renamed(name, places)) is not None}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def _places(kept: Sequence[int]) -> dict[int, int]:
    """Each layer that is kept, in their order, with its new number."""
    return {layer: place for place, layer in enumerate(sorted(kept))}


def _within(value: Any, places: Mapping[int, int]) -> Any:
    """A setting. Names of modules in it, in a list or as keys of a pattern, are as they are now; those of layers that are gone are gone."""
    if isinstance(value, Mapping):
        return {new: each for key, each in value.items() if (new := _renamed(key, places)) is not None}
    if isinstance(value, list):
        renamed = [_renamed(each, places) if isinstance(each, str) else each for each in value]
        return [new for each, new in zip(value, renamed, strict=True) if new is not None or each is None]
    return value


def _layer(name: str) -> int | None:
    """The number of the layer that a tensor or a module is of."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _renamed(name: str, places: Mapping[int, int]) -> str | None:
    """A name with its layer's new number; None where the layer is gone."""
    layer, parts = _layer(name), name.split(".")
    if layer is None:
        return name
    if layer not in places:
        return None
    at = next(place for place, part in enumerate(parts) if part.isdecimal())
    return ".".join([*parts[:at], str(places[layer]), *parts[at + 1 :]])
