"""DeLoRA (arXiv 2503.18225) as PEFT writes it: an adapter whose strength is a number of its own, λ.

    W' = W + B diag(λ / (r ‖A_i‖ ‖B_i‖)) A diag(w)     A: [r, in]  B: [out, r]  λ: [1]  w: [in], the norms of the base's columns when
                                                       training began; ‖A_i‖ of each row, ‖B_i‖ of each column, at least 1e-4

The authors' own code writes the same `peft_type` with other tensors, and subtracts a frozen term; it is told apart by these and refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flora_export.base_model import BaseModel
from flora_export.branch import by_pattern
from flora_export.change import Doubles, WeightChange
from flora_export.errors import CheckpointError
from flora_export.methods.arithmetic import low_rank, row_norms
from flora_export.methods.linear import check_linear, check_rank, linear_modules, named, promised
from flora_export.methods.reading import Header, Promise, Tensors, check_ranks

SMALLEST_NORM = 1e-4


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Check a DeLoRA configuration. λ stands in the file, so its start does not matter. Raises CheckpointError."""
    config.setdefault("r", 8)
    check_rank(file, config)
    check_ranks(file, config, "rank_pattern")
    check_linear(file, config, {"r", "rank_pattern"}, {"delora_lambda", "lambda_pattern", "init_weights", "module_dropout"})


def promise(path: Path, config: dict[str, Any], base: BaseModel, found: Header) -> Promise:
    """The changed weights that the configuration promises for this base model. Raises CheckpointError."""
    theirs = sorted(key for key in found if key.endswith((".delora_A.weight", ".frozen_C", ".frozen_D")) or ".frozen_C." in key)
    if theirs:
        raise CheckpointError(
            f"{path}: {theirs[0]}: this is DeLoRA as its authors' own code writes it, which subtracts a frozen term and has no smallest "
            "norm; PEFT writes `delora_A` under the same peft_type and means something else. It is not exported: merge it with the "
            "authors' code, or train it in PEFT 0.18 or newer."
        )
    changes: list[WeightChange] = []
    tensors: Tensors = {}
    for module, outputs, inputs in linear_modules(path, config, base):
        rank = by_pattern(module, config["r"], config["rank_pattern"])
        own = named(module, {"delora_A": (rank, inputs), "delora_B": (outputs, rank), "delora_lambda": (1,), "delora_w_norm": (inputs,)})
        tensors |= own
        changes.append(WeightChange(f"{module}.weight", "DeLoRA", tuple(own), partial(_derive, rank), rank))
    return promised(changes, tensors)


def _derive(rank: int, weight: Doubles, sources: Sequence[Doubles]) -> Doubles:
    a, b, strength, columns = sources
    norms = np.maximum(row_norms(a), SMALLEST_NORM) * np.maximum(row_norms(np.ascontiguousarray(b.T)), SMALLEST_NORM)
    return low_rank(weight, b * (strength[0] / rank / norms), a * columns, 1.0)
