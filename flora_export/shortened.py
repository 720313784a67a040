"""A base model and its adapters with fewer layers: what a calibration builds, and what costs a known part of the whole.

A layer's number stands in the names of tensors behind the name of their list, `model.layers.3.mlp.experts.0.up_proj.weight`, for adapters
as for their bases. The layers that are kept get the numbers from 0 on, in their order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flora_export.artifact import link_or_copy
from flora_export.base_model import INDEX, BaseModel, read_json
from flora_export.checkpoint import CONFIG, WEIGHTS
from flora_export.methods import read_header
from flora_export.shards import DTYPES, Planned, write_shards

CHOSEN = "layers_to_transform"  # PEFT's setting whose numbers are layers; those of others are tokens


def layers_to_keep(ckpts: Sequence[Path], base: BaseModel) -> tuple[list[int], int]:
    """All layers of a base model in the order in which a calibration wants them, and how many of these it needs at least.

    First one of each adapter, or it would do nothing; then the others that have one, so that few layers stand for what most are.
    """
    numbers = _Numbers(base, range(base.layers))
    own = [{layer for name in read_header(ckpt) if (layer := numbers.layer(name)) is not None} for ckpt in ckpts]
    first: dict[int, None] = {}
    for each in own:
        if each and each.isdisjoint(first):
            first[min(each)] = None
    order = dict.fromkeys([*first, *sorted(set().union(*own)), *range(base.layers)])
    return list(order), max(1, len(first))


class _Numbers:
    """What becomes of the numbers of layers, in names and in patterns of names."""

    def __init__(self, base: BaseModel, kept: Sequence[int]) -> None:
        lists = {match[1] for name in base.tensors if (match := re.search(r"(\w+)\.\d+\.", name))}
        self.places = {layer: place for place, layer in enumerate(sorted(kept))}
        self._number = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, lists)) or '$'})\\?\.(\d+)(?!\w)")

    def layer(self, name: str) -> int | None:
        found = self._number.search(name)
        return int(found[1]) if found else None

    def renamed(self, name: str) -> str | None:
        """A name with its layer's new number; None where the layer is gone."""
        found = self._number.search(name)
        if found is None:
            return name
        place = self.places.get(int(found[1]))
        return None if place is None else f"{name[: found.start(1)]}{place}{name[found.end(1) :]}"

    def setting(self, value: Any) -> Any:
        """A setting of an adapter. Names in a list, or as the keys of a mapping, are `renamed`, and left out where their layer is gone."""
        if isinstance(value, str):
            return self.renamed(value) or value
        if isinstance(value, Mapping):
            return {new: each for key, each in value.items() if (new := self.renamed(key)) is not None}
        if isinstance(value, list):
            pairs = [(each, self.renamed(each) if isinstance(each, str) else each) for each in value]
            return [new for each, new in pairs if new is not None or each is None]
        return value


def shorten_base(base: BaseModel, kept: Sequence[int], directory: Path) -> None:
    """Write some layers of a base model, and all that is not of a layer, as a base model of its own."""
    directory.mkdir()
    for file in base.beside:
        if file.name not in ("config.json", INDEX):
            link_or_copy(file.resolve(), directory / file.name)
    numbers = _Numbers(base, kept)
    config = {
        key: [value[layer] for layer in numbers.places] if isinstance(value, list) and len(value) == base.layers else value
        for key, value in base.config.items()
    }
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(kept)}, indent=1), encoding="utf-8")
    write_shards(directory, [_planned(base, name, new) for name in base.tensors if (new := numbers.renamed(name)) is not None])


def _planned(base: BaseModel, name: str, new: str) -> Planned:
    with safe_open(base.tensors[name], framework="numpy") as file:
        dtype = np.dtype(DTYPES[file.get_slice(name).get_dtype()])
    return Planned(new, dtype, base.shapes[name], lambda: base.read(name))


def shorten_adapter(ckpt: Path, base: BaseModel, kept: Sequence[int], directory: Path) -> None:
    """Write what an adapter does to some layers of its base, and to what is not of a layer, as an adapter of its own."""
    directory.mkdir()
    numbers = _Numbers(base, kept)
    config = {key: numbers.setting(value) for key, value in read_json(ckpt / CONFIG, "adapter configuration").items()}
    chosen = config.get(CHOSEN)
    if isinstance(chosen, int):
        config[CHOSEN] = numbers.places.get(chosen, chosen)
    if isinstance(chosen, list):
        config[CHOSEN] = [numbers.places[layer] for layer in chosen if layer in numbers.places]
    (directory / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    tensors = {new: tensor for name, tensor in load_file(ckpt / WEIGHTS).items() if (new := numbers.renamed(name)) is not None}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
