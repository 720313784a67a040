"""The truth of formats that PEFT cannot load: linear layers with the formula of the method beside them, computed as it is written.

    y = x Wᵀ + s (x Aᵀ) Bᵀ      and its relatives: products with activations, never a merged weight

This shares no code with methods/: which module a tensor belongs to is read off its name, and scales off the raw configuration.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn

from flora_export.checkpoint import CONFIG, WEIGHTS
from flora_export.errors import CheckpointError

_PREFIX = "base_model.model."
_MAPPING = "_lora_latent_mapping.weight"
_Own = Mapping[str, torch.Tensor]
# (x, W, tensors of the module, configuration, number of modules of the same name before it) -> y without the bias
_Formula = Callable[[torch.Tensor, torch.Tensor, _Own, Mapping[str, Any], int], torch.Tensor]


def beside_layers(model: nn.Module, checkpoint: Path) -> FormulaModel | None:
    """A model with the adapter of a format that PEFT cannot load beside its linear layers; None for what PEFT loads itself.

    Raises:
        CheckpointError: the file has a tensor of no linear layer of the model.
    """
    config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    formula = _FORMULAS.get(config["peft_type"])
    if formula is None and config["peft_type"] != "LORA":
        return None
    tensors = load_file(checkpoint / WEIGHTS)
    if formula is None:
        if not any(key.endswith(_MAPPING) for key in tensors):
            return None
        formula = _edora
    layers: dict[str, dict[str, torch.Tensor]] = {}
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for key, tensor in tensors.items():
        whole = key.removeprefix(_PREFIX)
        parts = whole.removesuffix(_MAPPING).split(".")
        module = next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in names), None)
        if module is None:
            raise CheckpointError(f"{checkpoint / WEIGHTS}: {key} belongs to no linear layer of the model")
        layers.setdefault(module, {})[whole.removeprefix(module).lstrip("._")] = tensor.float()
    chains: dict[str, list[Beside]] = {}
    for name in [name for name, _ in model.named_modules() if name in layers]:  # in the model's order
        chain = chains.setdefault(name.rpartition(".")[2], [])
        before = list(chain) if formula is _reslora else []
        layer = Beside(model.get_submodule(name), layers[name], formula, config, before)  # type: ignore[arg-type]
        chain.append(layer)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return FormulaModel(model)


class Beside(nn.Module):
    """A linear layer and what an adapter does beside it."""

    def __init__(self, base_layer: nn.Linear, tensors: _Own, formula: _Formula, config: Mapping[str, Any], before: list[Beside]) -> None:
        super().__init__()
        self.base_layer, self.formula, self.config, self.silent = base_layer, formula, config, False
        self.own = nn.ParameterDict({key.replace(".", "/"): nn.Parameter(t, requires_grad=False) for key, t in tensors.items()})
        # What the formula reads of others is held here as well, the same parameters: so that all of it is of one dtype while it runs.
        self.shared = nn.ParameterDict({"W": base_layer.weight})
        self.before = 0
        for other in reversed(before):
            if other.base_layer.weight.shape != base_layer.weight.shape:
                break
            self.before += 1
            self.shared.update({f"{self.before}/{key}": value for key, value in other.own.items()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.silent:
            result: torch.Tensor = self.base_layer(x)
            return result
        own = {key.replace("/", "."): value for table in (self.own, self.shared) for key, value in table.items()}
        result = self.formula(x, own["W"], own, self.config, self.before)
        if self.base_layer.bias is None:
            return result
        # the layer's own bias: the layer runs for zero, so that it is of the dtype that its module gives it
        bias: torch.Tensor = self.base_layer(torch.zeros_like(x[..., :1, :]))
        return result + bias


class FormulaModel(nn.Module):
    """What `reference.py` and the eager arm use of a PeftModel, with formulas in place of PEFT's layers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        self.config = model.config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def get_base_model(self) -> nn.Module:
        return cast("nn.Module", self.base_model.model)

    def forward(self, **inputs: Any) -> Any:
        return self.get_base_model()(**inputs)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within, the base model alone."""
        layers = [module for module in self.modules() if isinstance(module, Beside)]
        for layer in layers:
            layer.silent = True
        try:
            yield
        finally:
            for layer in layers:
                layer.silent = False


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = nn.functional.linear(x, weight)
    return result


def _dora(x: torch.Tensor, weight: torch.Tensor, own: _Own, config: Mapping[str, Any], before: int) -> torch.Tensor:
    magnitude = own["weight_m_wdecomp.weight"][:, 0]
    if "lora_A.weight" not in own:
        norms: torch.Tensor = torch.linalg.vector_norm(weight, dim=1)
        return magnitude / norms * _linear(x, weight)
    return _directed(x, weight, own["lora_A.weight"], own["lora_B.weight"], config["lora_alpha"] / config["r"], magnitude)


def _directed(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, magnitude: torch.Tensor
) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(weight + scale * (b @ a), dim=1)
    return magnitude / norms * (_linear(x, weight) + scale * _linear(_linear(x, a), b))


def _edora(x: torch.Tensor, weight: torch.Tensor, own: _Own, config: Mapping[str, Any], before: int) -> torch.Tensor:
    a, b, mapping = own["lora_A.weight"], own["lora_B.weight"], own["lora_latent_mapping.weight"]
    rank = len(a)
    alpha = config["lora_alpha"]
    if config.get("alpha_pattern"):
        raise CheckpointError(
            f"EDoRA with an alpha_pattern ({config['alpha_pattern']}) cannot be verified: no code of its authors reads it"
        )
    scale = float(alpha / rank**0.5) if config.get("use_rslora") else float(alpha / rank)
    if config.get("use_dora"):
        return _directed(x, weight, mapping @ a, b, scale, own["lora_magnitude_vector"])
    return _linear(x, weight) + scale * _linear(_linear(_linear(x, a), mapping), b)


def _melora(x: torch.Tensor, weight: torch.Tensor, own: _Own, config: Mapping[str, Any], before: int) -> torch.Tensor:
    ranks, alphas = config["r"], config["lora_alpha"]
    pieces = x.chunk(len(ranks), dim=-1)
    added = [
        float(alphas[i] / ranks[i]) * _linear(_linear(piece, own[f"lora_A.{i}.weight"]), own[f"lora_B.{i}.weight"])
        for i, piece in enumerate(pieces)
    ]
    return _linear(x, weight) + torch.cat(added, dim=-1)


def _lora2(x: torch.Tensor, weight: torch.Tensor, own: _Own, config: Mapping[str, Any], before: int) -> torch.Tensor:
    inner = _linear(_linear(x, own["lora_A"]), own["lora_B"]) * own["lora_E"][:, 0]
    scale = float(config["lora_alpha"]) / (own["ranknum"] + 1e-5)
    return _linear(x, weight) + scale * _linear(_linear(inner, own["lora_aa"]), own["lora_bb"])


def _reslora(x: torch.Tensor, weight: torch.Tensor, own: _Own, config: Mapping[str, Any], before: int) -> torch.Tensor:
    scale = float(config["lora_alpha"] / config["r"])
    shortcuts = (config["pre_num"] if config["pre_num"] >= 0 else before) if config["res_flag"] == 2 else 0
    result = _linear(x, weight)
    for j in range(min(before, shortcuts) + 1):
        at = f"{j}." if j else ""
        for i in range(config["lora_num"]):
            result = result + scale * _linear(_linear(x, own[f"{at}loras.{i}.lora_A"]), own[f"{at}loras.{i}.lora_B"])
    return result


_FORMULAS: dict[str, _Formula] = {"DORA": _dora, "LORA2": _lora2, "MELORA": _melora, "RESLORA": _reslora}
