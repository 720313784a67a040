"""LoRA (arXiv 2106.09685), rsLoRA (2312.03732) and DoRA (2402.09353), as PEFT writes them: changes of the base's own weights.

    LoRA     W' = W + s B A                                  A: [r, in]   B: [out, r]   s = alpha / r, or alpha / sqrt(r)
    DoRA     W' = diag(m / ‖V‖) V,  V = W + s B A            m: [out],  ‖V‖ of each row
    bias     b' = b + s B.bias                               with lora_bias
    saved    W' is in the file, whole                        modules_to_save, bias, trainable_token_indices: trained_whole.py

An embedding [vocabulary, d] is W' = W + s Aᵀ Bᵀ, with A: [r, vocabulary] and B: [d, r].
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flora_export.base_model import BaseModel
from flora_export.branch import by_pattern
from flora_export.change import Doubles, WeightChange
from flora_export.checkpoint import CONFIG
from flora_export.errors import CheckpointError
from flora_export.methods.arithmetic import low_rank, row_norms
from flora_export.methods.edora import with_mappings
from flora_export.methods.reading import (
    PREFIX,
    Header,
    Promise,
    Tensors,
    check_pattern,
    check_ranks,
    check_selection,
    in_layers,
    matches,
    number,
    refuser,
    whole,
)
from flora_export.methods.trained_whole import check_trained, trained_whole

ALL_LINEAR = "all-linear"
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
MERGE = "Merge it in PEFT with merge_and_unload(), and export that model with an adapter of another kind, or as it is."

# What says how training went, or how PEFT works, and nothing of what the adapter computes.
SILENT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ephemeral_gpu_offload", "eva_config", "inference_mode", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip
READ = {
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_bias", "modules_to_save", "r", "rank_pattern", "target_modules", "trainable_token_indices", "use_dora",
    "use_rslora",
}  # fmt: skip
# What changes the result in a way that is not exported: why, and what to do.
REFUSED = {
    "alora_invocation_tokens": "an activated LoRA acts on some tokens alone, so that no weights can hold it. Train a plain LoRA",
    "arrow_config": "Arrow chooses among adapters for each token, so that no weights can hold it. Export one adapter",
    "ensure_weight_tying": "tied adapters are not exported. Untie the base model's embeddings before training",
    "kasa_config": f"KaSA is not exported. {MERGE}",
    "layer_replication": "layers that share their weights cannot be merged one by one. Write out the replicated model, and train on that",
    "megatron_config": "Megatron's layers are not exported. Train on the model as transformers has it",
    "monteclora_config": f"MonteCLoRA is not exported. {MERGE}",
    "target_parameters": "LoRA on the parameters of experts is not exported. Train on linear layers",
    "use_bdlora": f"block-diagonal LoRA is not exported. {MERGE}",
    "use_qalora": "QA-LoRA belongs to a quantized base model. Train a plain LoRA",
    "velora_config": f"VeLoRA is not exported. {MERGE}",
}
# `init_lora_weights` that leave the base model as it is. Others take the adapter's first numbers out of it.
HARMLESS = (True, False, "gaussian", "eva", "orthogonal", "mica")
CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")

Derive = Callable[[Doubles, Sequence[Doubles]], Doubles]


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Check a LoRA configuration, and fill in PEFT's defaults where it is silent. Raises CheckpointError."""
    refuse = refuser(file, config)
    for key, why in REFUSED.items():
        if config.get(key):
            refuse(key, why)
    for key in sorted(config.keys() - SILENT - READ - REFUSED.keys()):
        if config[key]:
            refuse(key, f"this flora-export does not know what it means for the weights. Was it written by a newer PEFT? {MERGE}")
    if not whole(config.setdefault("r", 8)) or config["r"] < 1:
        refuse("r", "a rank is a whole number of at least 1")
    if not number(config.setdefault("lora_alpha", 8)):
        refuse("lora_alpha", "must be a finite number")
    for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        if not isinstance(config.setdefault(key, False), bool):
            refuse(key, "must be true or false")
    if config["fan_in_fan_out"]:
        refuse("fan_in_fan_out", f"weights that are stored [in, out] (GPT-2's Conv1D) are not exported. {MERGE}")
    if config["lora_bias"] and config["use_dora"]:
        refuse("lora_bias", "PEFT has no DoRA with it")
    _check_start(file, config)
    check_ranks(file, config, "rank_pattern")
    config["alpha_pattern"] = pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict) or not all(number(alpha) for alpha in pattern.values()):
        refuse("alpha_pattern", "must map module names to finite numbers")
    for name in pattern:
        check_pattern(file, "alpha_pattern", rf"(.*\.)?({name})$", name)
    check_selection(file, config, "module")
    layers = config.get("layers_pattern")
    patterns = [layers] if isinstance(layers, str) else layers or []
    if not isinstance(patterns, list) or not all(isinstance(each, str) for each in patterns):
        refuse("layers_pattern", "must be names of lists of layers, or null")
    for each in patterns:
        check_pattern(file, "layers_pattern", each, each)
    config["layers_pattern"] = patterns
    check_trained(file, config)


def _check_start(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that was started by taking its numbers out of the base: it fits another base than the one that it names."""
    start = config.get("init_lora_weights", True)
    if start is None or start in HARMLESS:
        return
    if isinstance(start, str) and start.startswith(CHANGING):
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r}, which changes the base model before training, so the adapter does not belong to the "
            "base model that it names. Convert it: in PEFT, save the adapter before training as well, and after training call "
            "model.save_pretrained(DIR, path_initial_model_for_weight_conversion=THE_ADAPTER_BEFORE_TRAINING)."
        )
    raise CheckpointError(f"{file}: init_lora_weights is {start!r}, but known are {', '.join(map(repr, HARMLESS))}. {MERGE}")


def promise(path: Path, config: dict[str, Any], base: BaseModel, found: Header) -> Promise:
    """The changed weights that the configuration promises for this base model. Raises CheckpointError."""
    shapes = base.shapes
    refuse_tied(path / CONFIG, config, base)
    changes: list[WeightChange] = []
    tensors: Tensors = {}
    for module in (name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2):
        if not targeted(config, module, shapes[f"{module}.weight"], base):
            continue
        rank = by_pattern(module, config["r"], config["rank_pattern"])
        alpha = by_pattern(module, config["lora_alpha"], config["alpha_pattern"])
        scale = alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank
        made = _of_module(path, config, module, shapes, rank, scale, found)
        changes += made[0]
        tensors |= made[1]
    if not changes and not config["modules_to_save"] and not config["trainable_token_indices"]:
        raise CheckpointError(
            f"{path / CONFIG}: target_modules {config['target_modules']!r} selects no weight of the base model {base.name}"
        )
    adapted = {change.tensor.removesuffix(".weight") for change in changes}
    trained = trained_whole(
        path / CONFIG, config, base, adapted, [n[:-7] for n in shapes if n.endswith(".weight") and is_embedding(n[:-7])]
    )
    changes += trained[0]
    tensors |= trained[1]
    twice = sorted(c.tensor for i, c in enumerate(changes) if any(c.tensor == other.tensor for other in changes[:i]))
    if twice:
        raise CheckpointError(f"{path / CONFIG}: {twice[0]} is changed by LoRA and saved or trained whole as well; only one can be meant")
    changes, tensors = with_mappings(path, changes, tensors, found)
    return Promise((), tuple(changes), tensors)


def _of_module(
    path: Path, config: Mapping[str, Any], module: str, shapes: Mapping[str, tuple[int, ...]], rank: int, scale: float, found: Header
) -> tuple[list[WeightChange], Tensors]:
    """The changes of one module's weight and bias, and the tensors of the adapter that they take."""
    weight, at = f"{module}.weight", f"{PREFIX}{module}."
    outputs, inputs = shapes[weight]
    if is_embedding(module):
        if config["use_dora"]:
            raise CheckpointError(f"{path / CONFIG}: DoRA on the embedding {module} is not exported. Train without it in target_modules.")
        tensors: Tensors = {
            f"{at}lora_embedding_A": (f"{module} A", (rank, outputs)),
            f"{at}lora_embedding_B": (f"{module} B", (inputs, rank)),
        }
        what: str = "LoRA"
        derive: Derive = partial(_embedding, scale)
    else:
        tensors = {f"{at}lora_A.weight": (f"{module} A", (rank, inputs)), f"{at}lora_B.weight": (f"{module} B", (outputs, rank))}
        what, derive = "LoRA", partial(_linear, scale)
        if config["use_dora"]:
            tensors[f"{at}lora_magnitude_vector"] = (f"{module} magnitude", (outputs,))
            what, derive = "DoRA", partial(_dora, scale)
    if f"{at}base_layer.weight" in found:  # PEFT saves an embedding or a head that has a LoRA beside it, and would take that for the base's
        tensors[f"{at}base_layer.weight"] = (f"{module}, the base's own", (outputs, inputs))
        derive = partial(_beside_itself, module, derive)
    factors = (f"{at}lora_A.weight", f"{at}lora_B.weight")
    beside = factors if tuple(tensors) == factors else None
    changes = [WeightChange(weight, what, tuple(tensors), derive, rank, scale, factors=beside)]
    if config["lora_bias"] and not is_embedding(module):
        bias = f"{module}.bias"
        if bias not in shapes:
            raise CheckpointError(
                f"{path / CONFIG}: lora_bias, but {module} of the base model has no bias to add it to. Train without lora_bias."
            )
        tensors[f"{at}lora_B.bias"] = (f"{module} bias of B", (outputs,))
        changes.append(WeightChange(bias, "LoRA bias", (f"{at}lora_B.bias",), partial(_bias, scale), 0, scale))
    return changes, tensors


def _linear(scale: float, weight: Doubles, sources: Sequence[Doubles]) -> Doubles:
    a, b = sources
    return low_rank(weight, b, a, scale)


def _dora(scale: float, weight: Doubles, sources: Sequence[Doubles]) -> Doubles:
    a, b, magnitude = sources
    directed = low_rank(weight, b, a, scale)
    return (magnitude / row_norms(directed))[:, None] * directed


def _embedding(scale: float, weight: Doubles, sources: Sequence[Doubles]) -> Doubles:
    a, b = sources
    return low_rank(weight, a.T, b.T, scale)


def _beside_itself(module: str, derive: Derive, weight: Doubles, sources: Sequence[Doubles]) -> Doubles:
    if not np.array_equal(sources[-1], weight):
        raise CheckpointError(
            f"{PREFIX}{module}.base_layer.weight: the adapter brings a base weight of its own, which is not the base model's. Trained on "
            "another base model? Weights that are trained whole belong into modules_to_save."
        )
    return derive(weight, sources[:-1])


def _bias(scale: float, bias: Doubles, sources: Sequence[Doubles]) -> Doubles:
    return bias + scale * sources[0]


def is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] in EMBEDDINGS


def refuse_tied(file: Path, config: Mapping[str, Any], base: BaseModel) -> None:
    """An adapter on one use of a table that the base uses twice: PEFT trains one of them, and a merge would change both."""
    if not base.tied:
        return
    saved = config["modules_to_save"]
    for module in ("lm_head", "model.embed_tokens", *(n.removesuffix(".weight") for n in base.shapes if is_embedding(n[:-7]))):
        targeted = config["target_modules"] != ALL_LINEAR and matches(config["target_modules"], module)
        if (targeted and not matches(config.get("exclude_modules"), module)) or any(module.endswith(name) for name in saved):
            raise CheckpointError(
                f"{file}: the adapter changes {module}, but the base model {base.name} has one table for embeddings and head (tied), so a "
                "change of one cannot be merged without changing the other. Train without it, or on a base model whose table was untied."
            )


def targeted(config: Mapping[str, Any], module: str, shape: tuple[int, ...], base: BaseModel) -> bool:
    """Whether PEFT would put a LoRA there."""
    if matches(config.get("exclude_modules"), module):
        return False
    if any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in config["modules_to_save"]):
        return False
    targets = config["target_modules"]
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return module != "lm_head" and not is_embedding(module)
    return matches(targets, module) and (in_layers(config, _layer(config, module)) or module in targets)


def _layer(config: Mapping[str, Any], module: str) -> int | None:
    """The layer that PEFT counts a module to."""
    patterns = [rf"(?:^|.*?\.){pattern}" for pattern in config["layers_pattern"]] or [r".*?\.[^.]*"]
    found = next((match for pattern in patterns if (match := re.match(rf"{pattern}\.(?P<layer>\d+)\.", module))), None)
    return int(found["layer"]) if found is not None else None
