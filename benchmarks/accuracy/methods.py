"""The methods, as PEFT configures them, and the ranks at which all of them train as many numbers.

PEFT's own defaults throughout, but for what a method needs to be itself; LoRA's alpha is twice its rank, as its authors' successors use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from flora_export.ffba import FFBAConfig

MLP = r".*\.mlp\..*"  # the projections of an MLP, for a rank_pattern
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TOLERANCE = 0.02  # of the budget


Configure = Callable[[int, int, float], peft.PeftConfig]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune. `config` takes the rank for attention, the one for MLPs, and a factor on alpha; None: no adapter."""

    label: str
    config: Configure | None = None
    trains_base: bool = False
    rate: float = 1.0  # factor on the learning rates of the sweep: full fine-tuning needs far smaller steps
    unmerged: str = ""  # the arm of `flora-export bench` as which it runs beside the base, switchable; empty: not measured
    merges: bool = True  # into the base's weights, and then runs as the base; an FFBA adapter fuses instead
    placement: str = ""  # of placements.py: not a PEFT method, but hooks

    @property
    def trains(self) -> bool:
        return self.trains_base or self.config is not None

    @property
    def fuses(self) -> bool:
        return self.unmerged == "fused"


def _lora(**options: object) -> Configure:
    settings = {"target_modules": "all-linear", **options}

    def config(attention: int, mlp: int, scale: float) -> peft.PeftConfig:
        alpha = 2 * scale
        pattern, alphas = ({MLP: mlp}, {MLP: alpha * mlp}) if mlp != attention else ({}, {})
        return peft.LoraConfig(
            r=attention, lora_alpha=alpha * attention, rank_pattern=pattern, alpha_pattern=alphas, task_type="CAUSAL_LM", **settings
        )

    return config


def _delora(attention: int, mlp: int, scale: float) -> peft.PeftConfig:
    pattern = {MLP: mlp} if mlp != attention else {}
    if scale != 1:
        raise ValueError("DeLoRA trains its scale")
    return peft.DeloraConfig(r=attention, rank_pattern=pattern, target_modules="all-linear", task_type="CAUSAL_LM")


def _ffba(**options: object) -> Configure:
    def config(attention: int, mlp: int, scale: float) -> peft.PeftConfig:
        pattern = {"mlp": mlp} if mlp != attention else {}
        return FFBAConfig(r=attention, alpha=scale * attention, rank_pattern=pattern, task_type="CAUSAL_LM", **options)

    return config


def _beside(label: str, **options: Any) -> Method:
    return Method(label, _ffba(**options), unmerged="fused", merges=False)


COMPARED = {
    "base": Method("base model"),
    "full": Method("full fine-tuning", trains_base=True, rate=0.02),
    "lora": Method("LoRA, all linear", _lora(), unmerged="lora-budget"),
    "lora-attention": Method("LoRA, attention only", _lora(target_modules=ATTENTION)),
    "rslora": Method("rsLoRA", _lora(use_rslora=True), unmerged="lora-budget"),
    "pissa": Method("LoRA from singular vectors (PiSSA)", _lora(init_lora_weights="pissa")),
    "dora": Method("DoRA", _lora(use_dora=True)),
    "delora": Method("DeLoRA", _delora),
    "ffba": _beside("FFBA, attention and MLP"),
    "ffba-mlp": _beside("FFBA, MLP only", target_modules=["mlp"]),
    "ffba-identity": _beside("FFBA, identity", mlp_activation="identity"),
    "ffba-relu": _beside("FFBA, ReLU", attn_activation="relu", mlp_activation="relu"),
    "ffba-silu": _beside("FFBA, SiLU", attn_activation="silu", mlp_activation="silu"),
    "ffba-gelu": _beside("FFBA, GELU", attn_activation="gelu", mlp_activation="gelu"),
}

# FFBA's default with one thing changed.
ABLATIONS = {
    "ffba-random": _beside("FFBA, random start", init_ffba_weights="kaiming"),
    "ffba-gain-1": _beside("FFBA, gated gain 1", gated_gain=1.0),
}
# Branches in other places, tried and not built.
PLACED = {
    "next": Method("into the next block's projections, from the block's input", _ffba(), placement="next", merges=False),
    "carried": Method("into the next block's projections, from the last one's input", _ffba(), placement="carried", merges=False),
}
METHODS = COMPARED | ABLATIONS | PLACED


def budget_of(base: Path, rank: int) -> int:
    """The trainable numbers of LoRA on all linear projections at a rank: what every other method is given."""
    config = METHODS["lora"].config
    assert config is not None
    return _trainable(AutoConfig.from_pretrained(base), config(rank, rank, 1.0))


def configured(method: Method, base: Path, budget: int, rank: int, scale: float) -> peft.PeftConfig:
    """The method at the ranks that a budget allows; without a budget at a rank, with `scale` times its own alpha."""
    if budget:
        return fitted(method, base, budget)[0]
    assert method.config is not None
    return method.config(rank, rank, scale)


def fitted(method: Method, base: Path, budget: int) -> tuple[peft.PeftConfig, int]:
    """The method at the ranks whose trainable numbers come nearest to the budget, and how many those are.

    One rank for all, where that meets the budget within 2 %; else the MLPs get one more, or one less, than attention.

    Raises:
        ValueError: no ranks meet the budget within 2 %.
    """
    assert method.config is not None
    model, config = AutoConfig.from_pretrained(base), method.config
    one, two = (_trainable(model, config(rank, rank, 1.0)) for rank in (1, 2))
    rank = max(1, round((budget - one) / (two - one)) + 1)
    for ranks in ((rank, rank), (rank, rank + 1), (rank, max(1, rank - 1))):
        count = _trainable(model, config(*ranks, 1.0))
        if abs(count / budget - 1) <= TOLERANCE:
            return config(*ranks, 1.0), count
    raise ValueError(f"{method.label}: no rank near {rank} has {budget} trainable numbers within {TOLERANCE:.0%}; choose another budget")


def _trainable(model: PreTrainedConfig, config: peft.PeftConfig) -> int:
    """Trainable numbers of an adapter, counted beside one layer of random weights: every layer has as many."""
    one = type(model).from_dict(model.to_dict() | {"num_hidden_layers": 1, "vocab_size": 8, "layer_types": None, "pad_token_id": None})
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_config(one), config)
    count: int = adapted.get_nb_trainable_parameters()[0]
    return count * int(model.num_hidden_layers)
