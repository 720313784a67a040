"""DoRA (arXiv 2402.09353) as its authors' fork of PEFT writes it, `peft_type` DORA.

    W' = diag(m / ‖V‖) V,  V = W + s B A      m: [out, 1]   A: [r, in]   B: [out, r]   s = alpha / r, ‖V‖ of each row
    W' = diag(m / ‖W‖) W                      modules of `Wdecompose_target_modules`, whose magnitude alone was trained

`dora_simple` is about gradients alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flora_export.base_model import BaseModel
from flora_export.change import Doubles, WeightChange
from flora_export.checkpoint import CONFIG
from flora_export.errors import CheckpointError
from flora_export.methods.arithmetic import low_rank, row_norms
from flora_export.methods.linear import check_linear, check_rank, linear_modules, named, promised
from flora_export.methods.reading import Header, Promise, Tensors, matches, number, refuser

_MAGNITUDES = "Wdecompose_target_modules"


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Check the fork's configuration. Raises CheckpointError."""
    refuse = refuser(file, config)
    check_rank(file, config)
    if not number(config.get("lora_alpha")):
        refuse("lora_alpha", "must be a finite number")
    config[_MAGNITUDES] = alone = config.get(_MAGNITUDES) or []
    if not isinstance(alone, list) or not all(isinstance(name, str) for name in alone):
        refuse(_MAGNITUDES, "must be a list of module names or null")
    check_linear(file, config, {"r", "lora_alpha", _MAGNITUDES}, {"dora_simple", "merge_weights"})


def promise(path: Path, config: dict[str, Any], base: BaseModel, found: Header) -> Promise:
    """The changed weights that the configuration promises for this base model. Raises CheckpointError."""
    changes: list[WeightChange] = []
    tensors: Tensors = {}
    rank, scale = config["r"], config["lora_alpha"] / config["r"]
    targets = config["target_modules"]
    if config[_MAGNITUDES] and isinstance(targets, str):
        raise CheckpointError(f"{path / CONFIG}: {_MAGNITUDES} beside a regular expression in target_modules. List the modules' names.")
    for module, outputs, inputs in linear_modules(path, config | {"target_modules": _both(targets, config[_MAGNITUDES])}, base):
        magnitude = {"weight_m_wdecomp.weight": (outputs, 1)}
        if matches(config[_MAGNITUDES], module):
            own = named(module, magnitude)
            changes.append(WeightChange(f"{module}.weight", "DoRA, magnitude", tuple(own), _magnitude))
        else:
            own = named(module, {"lora_A.weight": (rank, inputs), "lora_B.weight": (outputs, rank)} | magnitude)
            changes.append(WeightChange(f"{module}.weight", "DoRA", tuple(own), partial(_derive, scale), rank, scale))
        tensors |= own
    return promised(changes, tensors)


def _both(targets: str | list[str], alone: list[str]) -> str | list[str]:
    return targets if isinstance(targets, str) else [*targets, *alone]


def _derive(scale: float, weight: Doubles, sources: Sequence[Doubles]) -> Doubles:
    a, b, magnitude = sources
    return _magnitude(low_rank(weight, b, a, scale), [magnitude])


def _magnitude(weight: Doubles, sources: Sequence[Doubles]) -> Doubles:
    return (sources[0][:, 0] / row_norms(weight))[:, None] * weight
