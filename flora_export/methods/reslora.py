"""ResLoRA (arXiv 2402.18039): a LoRA with shortcuts to those of the layers before. `flora-export convert` writes it as `peft_type` RESLORA.

    res_flag 0        W' = W + s Σ_i B_i A_i                      the LoRAs of the module itself, `loras.0`, `loras.1`, ...
    res_flag 2 (bs)   W' = W + s Σ_j Σ_i B_{n-j,i} A_{n-j,i}      and of the `pre_num` modules of the same name before it, s = alpha / r

res_flag 1 (is) and 3 (ms) add what other layers were given, so that no weights can hold them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from flora_export.base_model import BaseModel
from flora_export.change import WeightChange
from flora_export.methods.arithmetic import low_ranks
from flora_export.methods.linear import check_linear, check_rank, linear_modules, named, promised
from flora_export.methods.reading import Header, Promise, Tensors, number, refuser, whole

MAX_LORAS = 1000


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Check what `flora-export convert` has written. Raises CheckpointError."""
    refuse = refuser(file, config)
    check_rank(file, config)
    if not number(config.get("lora_alpha")):
        refuse("lora_alpha", "must be a finite number")
    if config.get("res_flag") in (1, 3):
        refuse(
            "res_flag",
            "1 (input shortcut) and 3 (middle shortcut) add what other layers are given, which no change of a weight can do; the authors' "
            "merge of these is an approximation. Train with res_flag 2 or 0",
        )
    if config.get("res_flag") not in (0, 2) or isinstance(config["res_flag"], bool):
        refuse("res_flag", "must be 0 or 2")
    if not whole(config.setdefault("pre_num", 0)) or config["pre_num"] < -1:
        refuse("pre_num", "must be a whole number, or -1 for all")
    if not whole(config.setdefault("lora_num", 1)) or not 1 <= config["lora_num"] <= MAX_LORAS:
        refuse("lora_num", f"must be a whole number from 1 to {MAX_LORAS}")
    check_linear(file, config, {"r", "lora_alpha", "res_flag", "pre_num", "lora_num"}, {"merge_flag"})


def promise(path: Path, config: dict[str, Any], base: BaseModel, found: Header) -> Promise:
    """The changed weights that the configuration promises for this base model. Raises CheckpointError."""
    rank, scale = config["r"], config["lora_alpha"] / config["r"]
    tensors: Tensors = {}
    chains: dict[str, list[tuple[int, tuple[int, int], str, tuple[str, ...]]]] = {}  # (layer, shape, module, its tensors), by last name
    for module, outputs, inputs in linear_modules(path, config, base):
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(config["lora_num"]):
            shapes |= {f"loras.{i}.lora_A": (rank, inputs), f"loras.{i}.lora_B": (outputs, rank)}
        own = named(module, shapes)
        tensors |= own
        layer = next((int(part) for part in module.split(".") if part.isdigit()), -1)
        chains.setdefault(module.rpartition(".")[2], []).append((layer, (outputs, inputs), module, tuple(own)))
    before = 0 if config["res_flag"] == 0 else config["pre_num"] if config["pre_num"] >= 0 else len(tensors)
    changes = []
    for chain in chains.values():
        chain.sort()
        for n, (_, shape, module, own_names) in enumerate(chain):
            sources = own_names
            for _, other, _, names in chain[max(0, n - before) : n][::-1]:
                if other != shape:  # the authors' code links modules of one shape alone, and follows links
                    break
                sources = (*sources, *names)
            pairs = len(sources) // 2
            derive = partial(low_ranks, (scale,) * pairs)
            changes.append(WeightChange(f"{module}.weight", "ResLoRA", sources, derive, rank * pairs, scale))
    return promised(changes, tensors)
