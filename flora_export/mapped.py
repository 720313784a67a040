"""Eager PyTorch with the weights of its base model as they lie in the files, mapped: for models that in fp32 would not fit into memory.

What runs makes them fp32 or fp64 a module at a time (exact.py), so that a model takes the room of its largest module.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from flora_export.base_model import BaseModel
from flora_export.checkpoint import CONFIG


def load_mapped(base: BaseModel) -> transformers.PreTrainedModel | None:
    """The base model, its weights mapped; None where transformers has them by other names than the files, or joins some.

    Raises what transformers raises.
    """
    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    with init_empty_weights():  # not the buffers, which no file has
        model: transformers.PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
    model.tie_weights()
    weights: dict[str, torch.Tensor] = {}
    for file in base.weights:
        with safe_open(file, framework="pt") as shard:
            weights |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118  # not a dict
    wanted = dict(model.named_parameters())
    if set(wanted) - set(weights) or any(parameter.shape != weights[name].shape for name, parameter in wanted.items()):
        return None
    model.load_state_dict({name: weights[name] for name in wanted}, strict=False, assign=True)
    model.tie_weights()
    return model if all(not parameter.is_meta for parameter in model.parameters()) else None


def keeps_base(checkpoint: Path) -> bool:
    """Whether an adapter leaves all tensors of the base as they are. PEFT would round to their precision what it puts in their place."""
    config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    whole = ("modules_to_save", "trainable_token_indices")
    return not any(config.get(key) for key in whole) and config.get("bias", "none") == "none" and config["peft_type"] != "LN_TUNING"
