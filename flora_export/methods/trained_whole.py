"""What PEFT trains beside a LoRA's matrices: tensors and rows of the base model that are replaced by those in the adapter's file.

modules_to_save            every tensor of a module
bias                       "all": every bias of the model; "lora_only": those of the modules that have a LoRA
trainable_token_indices    rows of an embedding; a tied head has the same ones
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flora_export.base_model import BaseModel
from flora_export.change import Doubles, WeightChange
from flora_export.errors import CheckpointError
from flora_export.methods.reading import PREFIX, Tensors, refuser, whole

DELTA = "token_adapter.trainable_tokens_delta"
BIASES = ("none", "all", "lora_only")


def check_trained(file: Path, config: dict[str, Any]) -> None:
    """Check these keys of a configuration, and fill in PEFT's defaults. Raises CheckpointError."""
    refuse = refuser(file, config)
    if config.setdefault("bias", "none") not in BIASES:
        refuse("bias", f"must be one of {', '.join(BIASES)}")
    saved = config.get("modules_to_save") or []
    config["modules_to_save"] = [saved] if isinstance(saved, str) else saved
    tokens = config.get("trainable_token_indices") or {}
    config["trainable_token_indices"] = tokens = {"": tokens} if isinstance(tokens, list) else tokens
    for indices in tokens.values() if isinstance(tokens, dict) else [None]:
        if not isinstance(indices, list) or not all(whole(index) and index >= 0 for index in indices) or len(set(indices)) != len(indices):
            refuse("trainable_token_indices", "must be tokens, each once, or lists of them by the name of an embedding")


def trained_whole(
    file: Path, config: Mapping[str, Any], base: BaseModel, adapted: Collection[str], embeddings: Sequence[str]
) -> tuple[list[WeightChange], Tensors]:
    """The changes, and the tensors that they take.

    Args:
        adapted: modules that have a LoRA.
        embeddings: modules of the base model that are one.

    Raises:
        CheckpointError: the base model has no such module, bias or token; or the tensor is a single number.
    """
    changes: list[WeightChange] = []
    tensors: Tensors = {}

    def add(tensor: str, what: str, source: str, shape: tuple[int, ...], derive: Any) -> None:
        changes.append(WeightChange(tensor, what, (source,), derive))
        tensors[source] = (f"{tensor}, {what}", shape)

    for tensor, shape in base.shapes.items():
        module = tensor.removesuffix(".bias")
        if any(_module_of(tensor, part).endswith(name) for name in config["modules_to_save"] for part in range(tensor.count("."))):
            if not shape:
                raise CheckpointError(
                    f"{file}: modules_to_save takes in {tensor}, a single number, which is not exported. Train without it."
                )
            add(tensor, "saved whole", f"{PREFIX}{tensor}", shape, replaced)
        elif module != tensor and (config["bias"] == "all" or (config["bias"] == "lora_only" and module in adapted)):
            inside = ".base_layer" if module in adapted else ""
            add(tensor, "trained bias", f"{PREFIX}{module}{inside}.bias", shape, replaced)
    for name, indices in config["trainable_token_indices"].items():
        chosen = [module for module in embeddings if not name or module == name or module.endswith(f".{name}")]
        if len(chosen) != 1:
            raise CheckpointError(
                f"{file}: trainable_token_indices names {name or 'no module'!r}, but the base model's embeddings are "
                f"{', '.join(embeddings)}"
            )
        tensor = f"{chosen[0]}.weight"
        rows, width = base.shapes[tensor]
        if max(indices, default=0) >= rows:
            raise CheckpointError(
                f"{file}: trainable_token_indices has token {max(indices)}, but {tensor} has {rows} rows. Another base model?"
            )
        what = f"{len(indices)} token{'s' if len(indices) > 1 else ''} trained"
        add(tensor, what, f"{PREFIX}{chosen[0]}.{DELTA}", (len(indices), width), partial(_rows, tuple(indices)))
    return changes, tensors


def replaced(weight: Doubles, sources: Sequence[Doubles]) -> Doubles:
    """W' is in the file, whole."""
    return sources[0]


def _rows(indices: Sequence[int], weight: Doubles, sources: Sequence[Doubles]) -> Doubles:
    changed = weight.copy()
    changed[list(indices)] = sources[0]
    return changed


def _module_of(tensor: str, parts: int) -> str:
    """A module that a tensor lies in: without the last 1 + `parts` parts of its name."""
    return tensor.rsplit(".", 1 + parts)[0]
