"""EDoRA (arXiv 2501.12067) and LoRA-XS: a LoRA whose A and B are kept as they were made, with a trained matrix R between them.

    W' = W + s B R A, or DoRA's with B R for B      A: [r, in]   R: [r, r]   B: [out, r]

The authors' code writes `peft_type` LORA and one tensor more for each module, which PEFT drops in silence. A and B stand in the file, so
`reconstr_config.json`, which says how they were made, is not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from flora_export.change import Doubles, WeightChange
from flora_export.errors import CheckpointError
from flora_export.methods.arithmetic import low_rank
from flora_export.methods.reading import Header, Tensors

_B = ".lora_B.weight"
_MAPPING = "_lora_latent_mapping.weight"


def with_mappings(path: Path, changes: list[WeightChange], tensors: Tensors, found: Header) -> tuple[list[WeightChange], Tensors]:
    """LoRA's changes and tensors, each with its R where the file has such: then every module must have one.

    Raises:
        CheckpointError: the adapter changes something besides the weights of linear layers, which this method does not know.
    """
    if not any(key.endswith(_MAPPING) for key in found):
        return changes, tensors
    mapped, more = [], dict(tensors)
    for change in changes:
        if len(change.sources) < 2 or not change.sources[1].endswith(_B) or change.sources[-1].endswith("base_layer.weight"):
            raise CheckpointError(
                f"{path}: an EDoRA ({_MAPPING.removeprefix('_')}) that changes {change.tensor} ({change.what}) as well, but it is exported "
                "for the weights of linear layers alone. Train without modules_to_save, lora_bias and embeddings."
            )
        source = change.sources[1].removesuffix(_B) + _MAPPING
        more[source] = (f"{change.tensor.removesuffix('.weight')} R", (change.rank, change.rank))
        what = "EDoRA" if change.what == "DoRA" else "LoRA-XS"
        mapped.append(dataclasses.replace(change, what=what, sources=(*change.sources, source), derive=partial(_mapped, change.derive)))
    return mapped, more


def _mapped(derive: Callable[[Doubles, Sequence[Doubles]], Doubles], weight: Doubles, sources: Sequence[Doubles]) -> Doubles:
    a, b, *others, mapping = sources
    return derive(weight, [a, low_rank(np.zeros_like(b), b, mapping, 1.0), *others])
