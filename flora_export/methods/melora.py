"""MELoRA (arXiv 2402.17263), as its authors' fork of PEFT writes it: n small LoRAs on the diagonal.

W' = W + blockdiag(s_i B_i A_i)      A_i: [r_i, in / n]   B_i: [out / n, r_i]   s_i = alpha_i / r_i
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flora_export.base_model import BaseModel
from flora_export.change import Doubles, WeightChange
from flora_export.checkpoint import CONFIG
from flora_export.errors import CheckpointError
from flora_export.methods.arithmetic import low_rank
from flora_export.methods.linear import check_linear, linear_modules, named, promised
from flora_export.methods.reading import Header, Promise, Tensors, number, refuser, whole

_SILENT = {"merge_weights", "mode", "rank_pattern", "alpha_pattern", "init_lora_weights"}


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Check MELoRA's two lists, which are of one length. Raises CheckpointError."""
    refuse = refuser(file, config)
    ranks, alphas = config.get("r"), config.get("lora_alpha")
    if not isinstance(ranks, list) or not ranks or not all(whole(r) and r >= 1 for r in ranks):
        refuse("r", "must be a list of ranks of at least 1, one for each small LoRA")
    if not isinstance(alphas, list) or not isinstance(ranks, list) or len(alphas) != len(ranks) or not all(number(a) for a in alphas):
        refuse("lora_alpha", f"must be a list of finite numbers, as many as r has ({config['r']})")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            refuse(key, "MELoRA has one list of ranks for all modules")
    check_linear(file, config, {"r", "lora_alpha"}, _SILENT)


def promise(path: Path, config: dict[str, Any], base: BaseModel, found: Header) -> Promise:
    """The changed weights that the configuration promises for this base model. Raises CheckpointError."""
    ranks: list[int] = config["r"]
    n = len(ranks)
    scales = [alpha / rank for alpha, rank in zip(config["lora_alpha"], ranks, strict=True)]
    changes: list[WeightChange] = []
    tensors: Tensors = {}
    for module, outputs, inputs in linear_modules(path, config, base):
        if outputs % n or inputs % n:
            raise CheckpointError(
                f"{path / CONFIG}: {module} is ({outputs}, {inputs}), which cannot be cut into {n} blocks (r has {n} ranks)"
            )
        shapes: dict[str, tuple[int, ...]] = {}
        for i, rank in enumerate(ranks):
            shapes |= {f"lora_A.{i}.weight": (rank, inputs // n), f"lora_B.{i}.weight": (outputs // n, rank)}
        own = named(module, shapes)
        tensors |= own
        scale = scales[0] if len(set(scales)) == 1 else 1.0  # of the ledger's row, where there is one for all
        changes.append(WeightChange(f"{module}.weight", "MELoRA", tuple(own), partial(_derive, tuple(scales)), sum(ranks), scale))
    return promised(changes, tensors)


def _derive(scales: Sequence[float], weight: Doubles, sources: Sequence[Doubles]) -> Doubles:
    result = weight.copy()
    rows, columns = (size // len(scales) for size in weight.shape)
    for i, scale in enumerate(scales):
        block = np.s_[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns]
        result[block] = low_rank(np.ascontiguousarray(weight[block]), sources[2 * i + 1], sources[2 * i], scale)
    return result
