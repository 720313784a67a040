"""What methods share that change the weights of linear layers, one by one, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from flora_export.base_model import BaseModel
from flora_export.change import WeightChange
from flora_export.checkpoint import CONFIG
from flora_export.errors import CheckpointError
from flora_export.methods.lora import SILENT, is_embedding, refuse_tied, targeted
from flora_export.methods.reading import PREFIX, Promise, Tensors, check_pattern, check_selection, refuser, whole

# Keys of which modules are meant, and switches that must be off.
_SELECTION = {"exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"}
_OFF = {"bias": "none", "fan_in_fan_out": False, "modules_to_save": None}


def check_linear(file: Path, config: dict[str, Any], read: Set[str], silent: Set[str] = frozenset()) -> None:
    """Check what such methods' configurations have in common, and fill in defaults.

    `read` are the keys that the method reads itself, `silent` those that say nothing of what the adapter computes.

    Raises:
        CheckpointError: a key that is not known is set, or something besides the weights of linear layers was trained.
    """
    refuse = refuser(file, config)
    for key, off in _OFF.items():
        if config.get(key) and config[key] != off:
            refuse(
                key, f"{config['peft_type']} is exported for weights of linear layers alone. Train without it, or merge the adapter first"
            )
    for key in sorted(config.keys() - SILENT - _SELECTION - _OFF.keys() - read - silent):
        if config[key]:
            refuse(key, "this flora-export does not know what it means for the weights. Was it written by a newer version?")
    check_selection(file, config, "module")
    layers = config.get("layers_pattern")
    config["layers_pattern"] = patterns = [layers] if isinstance(layers, str) else layers or []
    if not isinstance(patterns, list) or not all(isinstance(each, str) for each in patterns):
        refuse("layers_pattern", "must be names of lists of layers, or null")
    for each in patterns:
        check_pattern(file, "layers_pattern", each, each)
    config["modules_to_save"] = []


def check_rank(file: Path, config: Mapping[str, Any], key: str = "r") -> None:
    """A rank is a whole number of at least 1. Raises CheckpointError."""
    if not whole(config.get(key)) or config[key] < 1:
        refuser(file, config)(key, "a rank is a whole number of at least 1")


def linear_modules(path: Path, config: Mapping[str, Any], base: BaseModel) -> Iterator[tuple[str, int, int]]:
    """(module, outputs, inputs) of each linear layer that the configuration selects. Raises CheckpointError: an embedding, or none."""
    refuse_tied(path / CONFIG, config, base)
    none = True
    for tensor, shape in base.shapes.items():
        module = tensor.removesuffix(".weight")
        if module == tensor or len(shape) != 2 or not targeted(config, module, shape, base):
            continue
        if is_embedding(module):
            raise CheckpointError(
                f"{path / CONFIG}: target_modules selects the embedding {module}, but {config['peft_type']} is exported for linear layers "
                "alone. Train without it in target_modules."
            )
        none = False
        yield module, shape[0], shape[1]
    if none:
        raise CheckpointError(
            f"{path / CONFIG}: target_modules {config['target_modules']!r} selects no linear layer of the base model {base.name}"
        )


def promised(changes: list[WeightChange], tensors: Tensors) -> Promise:
    """Changes alone."""
    return Promise((), tuple(changes), tensors)


def named(module: str, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """The tensors of a module, by the last parts of their names."""
    return {f"{PREFIX}{module}.{name}": (f"{module} {name}", shape) for name, shape in shapes.items()}
