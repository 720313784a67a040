"""Random adapters of methods besides LoRA: by PEFT where PEFT has the method, else in the form that its authors' code has written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.families import make_lora

PREFIX = "base_model.model."
LINEAR = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
Shapes = Callable[[int, int], dict[str, tuple[int, ...]]]


def save_adapter(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / "adapter_model.safetensors")
    return directory


def weights_of(base: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """The weights of linear layers, by module."""
    weights = load_file(base / "model.safetensors")
    return {key.removesuffix(".weight"): value for key, value in weights.items() if key.split(".")[-2] in names and value.ndim == 2}


def random_tensors(base: Path, names: list[str], shapes: Shapes, seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        f"{PREFIX}{module}.{name}": 0.15 * torch.randn(*shape)
        for module, weight in weights_of(base, names).items()
        for name, shape in shapes(*weight.shape).items()
    }


def delora(base: Path, directory: Path) -> Path:
    torch.manual_seed(3)
    config = peft.DeloraConfig(r=4, target_modules=LINEAR, rank_pattern={"up_proj": 6}, init_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "delora_lambda" in name:
                parameter.copy_(1 + torch.rand(1))
            elif "delora_A" in name and "q_proj" in name:
                parameter[0] *= 1e-5  # a row below the smallest norm
    model.save_pretrained(directory)
    return directory


def dora_fork(base: Path, directory: Path) -> Path:
    tensors = random_tensors(base, ["q_proj", "up_proj"], lambda o, i: {"lora_A.weight": (4, i), "lora_B.weight": (o, 4)})
    for module, weight in weights_of(base, ["q_proj", "up_proj", "o_proj"]).items():
        tensors[f"{PREFIX}{module}.weight_m_wdecomp.weight"] = weight.norm(dim=1, keepdim=True) * (1 + 0.2 * torch.randn(len(weight), 1))
    config = {
        "peft_type": "DORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "Wdecompose_target_modules": ["o_proj"],
        "bias": "none", "dora_simple": True, "enable_lora": None, "fan_in_fan_out": False, "lora_dropout": 0.05, "merge_weights": False,
    }  # fmt: skip
    return save_adapter(directory, config, tensors)


def edora(base: Path, directory: Path, **config: Any) -> Path:
    make_lora(base, directory, **({"target_modules": LINEAR, "use_dora": True} | config))
    tensors = load_file(directory / "adapter_model.safetensors")
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        rank = len(tensors[key])
        tensors[key.replace(".lora_A.weight", "_lora_latent_mapping.weight")] = torch.randn(rank, rank)
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def lora_xs(base: Path, directory: Path) -> Path:
    return edora(base, directory, use_dora=False, rank_pattern={"q_proj": 6})


def melora(base: Path, directory: Path) -> Path:
    def shapes(o: int, i: int) -> dict[str, tuple[int, ...]]:
        return {
            "lora_A.0.weight": (2, i // 2), "lora_B.0.weight": (o // 2, 2), "lora_A.1.weight": (3, i // 2), "lora_B.1.weight": (o // 2, 3)
        }  # fmt: skip

    config = {"peft_type": "MELORA", "r": [2, 3], "lora_alpha": [4, 9], "target_modules": LINEAR, "bias": "none"}
    return save_adapter(directory, config, random_tensors(base, LINEAR, shapes))


def lora2_tensors(base: Path, r: int = 5) -> dict[str, torch.Tensor]:
    def shapes(o: int, i: int) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (8, i), "lora_B": (r, 8), "lora_E": (r, 1), "lora_aa": (8, r), "lora_bb": (o, 8), "ranknum": (1,)}

    tensors = random_tensors(base, ["q_proj", "up_proj"], shapes)
    for key in tensors:
        tensors[key] = torch.tensor([4.0]) if key.endswith("ranknum") else 4 * tensors[key]
    return tensors


def lora2(base: Path, directory: Path) -> Path:
    config = {"peft_type": "LORA2", "r": 5, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"]}
    return save_adapter(directory, config, lora2_tensors(base))


def reslora_tensors(base: Path) -> dict[str, torch.Tensor]:
    return random_tensors(
        base,
        ["q_proj", "down_proj"],
        lambda o, i: {f"loras.{n}.lora_{m}": ((4, i) if m == "A" else (o, 4)) for n in (0, 1) for m in "AB"},
    )


def reslora(base: Path, directory: Path, **config: Any) -> Path:
    start = {
        "peft_type": "RESLORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "res_flag": 2, "pre_num": 1,
        "lora_num": 2,
    }  # fmt: skip
    return save_adapter(directory, start | config, reslora_tensors(base))


def reslora_plain(base: Path, directory: Path) -> Path:
    return reslora(base, directory, res_flag=0)


# method -> (its maker, how many weights it changes in a Llama of two layers, what the ledger says)
MADE: dict[str, tuple[Callable[[Path, Path], Path], int, set[str]]] = {
    "delora": (delora, 10, {"DeLoRA"}),
    "dora_fork": (dora_fork, 6, {"DoRA", "DoRA, magnitude"}),
    "edora": (edora, 10, {"EDoRA"}),
    "lora_xs": (lora_xs, 10, {"LoRA-XS"}),
    "melora": (melora, 10, {"MELoRA"}),
    "lora2": (lora2, 4, {"LoRA²"}),
    "reslora": (reslora, 4, {"ResLoRA"}),
    "reslora_plain": (reslora_plain, 4, {"ResLoRA"}),
}
