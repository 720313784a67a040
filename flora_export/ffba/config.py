"""FFBAConfig: what `adapter_config.json` holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType

from flora_export.branch import ACTIVATIONS, BLOCK_KINDS, FORMAT, format_defaults


@dataclass
class FFBAConfig(PeftConfig):
    """Configuration of a fused forward-backward adapter (FFBA).

    Beside each target block with input x of width d it adds `y = block(x) + s · B φ(A x)`, with A: [r, d], B: [d, r].

    Args:
        r: rank, 1 to d.
        alpha: scale numerator; s = alpha / r, or alpha / sqrt(r) with `use_rslora`.
        use_rslora: scale by 1 / sqrt(r) instead of 1 / r.
        dropout: probability of dropping an element of the branch's input while training.
        target_modules: block modules that get a branch, out of `self_attn` and `mlp`; or a regular expression.
        attn_activation: φ of attention branches: identity, relu, silu or gelu.
        mlp_activation: φ of MLP branches: the same, or `gated`, φ(x) = act(G x) ⊙ (A x) with a third matrix G: [r, d]
            and the host MLP's own activation; the host MLP must then be gated itself.
        gated_gain: factor on s of `gated` branches, whose φ(x) is a product of two small numbers; 16 where None.
        rank_pattern: block name, or regular expression for its end -> rank, where it differs from r.
        layers_to_transform: indices of the layers that get branches; all where None.
        layers_pattern: name of the layer list, where it is not one of PEFT's usual ones.
        exclude_modules: block modules that get none although `target_modules` names them.
        modules_to_save: further modules to train and save. They can be trained, but not exported.
        init_ffba_weights: True, or None, starts A and G at the leading directions of the block's own first projections (`ffba/init.py`),
            "kaiming" at random numbers, as LoRA's A; B is zero in both, so that training starts from the base model. False draws all
            of them at random, for tests.
        ffba_version: version of the format of `adapter_config.json`. `save_pretrained` writes it; nobody needs to set it. It tells what a
            file means where it is silent (`branch.FORMATS`, docs/checkpoint.md):
            0, or no version: gated_gain 1, init_ffba_weights "kaiming"; so were files read before there were versions.
            1: gated_gain 16, init_ffba_weights True; so is a configuration made in Python.
            A file names its `peft_type`, and so does what PEFT makes of one, or of a dict (`peft.get_peft_config`); Python code does not.
            Once read, nothing is silent any more, and what `save_pretrained` writes then is of the newest version.

    Raises:
        ValueError: a value is out of its range or unknown, or a newer flora-export wrote the file; the message names it.
    """

    peft_type: str | None = field(default=None, metadata={"help": "FFBA; named by what was read from a file"})
    r: int = field(default=16, metadata={"help": "rank, 1 to the model's width"})
    alpha: float = field(default=16.0, metadata={"help": "scale numerator: s = alpha / r"})
    use_rslora: bool = field(default=False, metadata={"help": "s = alpha / sqrt(r)"})
    dropout: float = field(default=0.0, metadata={"help": "dropout of the branch's input while training"})
    target_modules: list[str] | str | None = field(
        default_factory=lambda: list(BLOCK_KINDS), metadata={"help": "self_attn, mlp, or a regular expression"}
    )
    attn_activation: str = field(default="identity", metadata={"help": "activation of attention branches"})
    mlp_activation: str = field(default="gated", metadata={"help": "activation of MLP branches"})
    gated_gain: float = field(default=None, metadata={"help": "factor on s of gated branches"})  # type: ignore[assignment]
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "rank where it differs from r"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "layer indices"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the layer list"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules left without a branch"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "further modules to train and save"})
    init_ffba_weights: bool | str = field(default=None, metadata={"help": "True, 'kaiming', or False"})  # type: ignore[assignment]
    ffba_version: int = field(default=0, metadata={"help": "version of the format of adapter_config.json"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peft_type is None and self.ffba_version == 0:  # made in Python, not read from a file without a version
            self.ffba_version = FORMAT
        defaults = format_defaults(self.ffba_version)
        if self.gated_gain is None:  # as the fields' defaults are
            self.gated_gain = defaults.gated_gain
        if self.init_ffba_weights is None:
            self.init_ffba_weights = defaults.init_weights
        self.ffba_version = FORMAT  # nothing is left unsaid, so that it means the same in every version
        self.peft_type = PeftType.FFBA  # added in flora_export/ffba/__init__.py
        if isinstance(self.target_modules, set):  # a set would be written in an order that changes from run to run
            self.target_modules = sorted(self.target_modules)
        if self.target_modules is None:
            self.target_modules = list(BLOCK_KINDS)
        for name, rank in (("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"{name} is {rank!r}, but a rank is a whole number of at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout!r}, but must be at least 0 and below 1")
        if self.init_ffba_weights not in (True, False, "kaiming"):
            raise ValueError(f"init_ffba_weights is {self.init_ffba_weights!r}, but must be True, 'kaiming' or False")
        for name, kind, value in (
            ("attn_activation", ACTIVATIONS["attention"], self.attn_activation),
            ("mlp_activation", ACTIVATIONS["mlp"], self.mlp_activation),
        ):
            if value not in kind:
                raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(kind)}")

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """PEFT makes what it has read from a file. A file without a `peft_type`, read by this class, is a file nevertheless."""
        return super().from_peft_type(**({"peft_type": PeftType.FFBA} | kwargs))
