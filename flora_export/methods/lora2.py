"""LoRA² (arXiv 2408.06854): two LoRAs in a row, between them AdaLoRA's diagonal. `flora-export convert` writes it as `peft_type` LORA2.

    W' = W + alpha / (n + 1e-5) · bb aa diag(E) B A      A: [8, in]  B: [r, 8]  E: [r, 1]  aa: [8, r]  bb: [out, 8]
                                                         n: [1], the rank that is left after pruning (`ranknum`)

The authors' own merge has wrong shapes; this is their `forward`, 1e-5 included.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flora_export.base_model import BaseModel
from flora_export.change import Doubles, WeightChange
from flora_export.methods.arithmetic import low_rank
from flora_export.methods.linear import check_linear, check_rank, linear_modules, named, promised
from flora_export.methods.reading import Header, Promise, Tensors, number, refuser

INNER = 8  # the authors' k
EPSILON = 1e-5


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Check what `flora-export convert` has written. Raises CheckpointError."""
    check_rank(file, config)
    if not number(config.get("lora_alpha")) or config["lora_alpha"] <= 0:
        refuser(file, config)("lora_alpha", "must be a finite number above 0")
    check_linear(file, config, {"r", "lora_alpha"})


def promise(path: Path, config: dict[str, Any], base: BaseModel, found: Header) -> Promise:
    """The changed weights that the configuration promises for this base model. Raises CheckpointError."""
    r, alpha = config["r"], config["lora_alpha"]
    changes: list[WeightChange] = []
    tensors: Tensors = {}
    for module, outputs, inputs in linear_modules(path, config, base):
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (INNER, inputs), "lora_B": (r, INNER), "lora_E": (r, 1), "lora_aa": (INNER, r), "lora_bb": (outputs, INNER),
            "ranknum": (1,),
        }  # fmt: skip
        own = named(module, shapes)
        tensors |= own
        changes.append(WeightChange(f"{module}.weight", "LoRA²", tuple(own), partial(_derive, alpha), min(INNER, r)))
    return promised(changes, tensors)


def _derive(alpha: float, weight: Doubles, sources: Sequence[Doubles]) -> Doubles:
    a, b, e, aa, bb, left = sources
    inner = low_rank(np.zeros((INNER, INNER)), aa, e * b, 1.0)  # aa diag(E) B: [8, 8]
    return low_rank(weight, low_rank(np.zeros_like(bb), bb, inner, 1.0), a, alpha / (float(left[0]) + EPSILON))
