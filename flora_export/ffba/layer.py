"""The FFBA layer: a block and, beside it, its adapter branches. This is the definition; the fused graph must equal it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from flora_export.branch import GATED, Kind, adapter_scale
from flora_export.ffba.init import TRAINABLE, kaiming, start_at_leading_directions

_ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
}


class FFBALayer(nn.Module, BaseTunerLayer):
    """Wraps a block and adds `s · B φ(A x)` for each active adapter.

    x: [..., d] is what the block receives. A, G: [r, d] and B: [d, r] are bias-free `nn.Linear`s per adapter name.
    """

    adapter_layer_names = ("ffba_A", "ffba_B", "ffba_G")
    other_param_names = ("ffba_rank", "ffba_scale", "ffba_activation", "ffba_dropout")

    def __init__(self, base_layer: nn.Module, block: str, kind: Kind, width: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.block, self.kind, self.width = block, kind, width
        self.ffba_A = nn.ModuleDict()
        self.ffba_B = nn.ModuleDict()
        self.ffba_G = nn.ModuleDict()
        self.ffba_dropout = nn.ModuleDict()
        self.ffba_rank: dict[str, int] = {}
        self.ffba_scale: dict[str, float] = {}
        self.ffba_activation: dict[str, str] = {}
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """Let model code reach attributes of the block that stands inside, such as `self_attn.layer_idx`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not yet set: do not look for it inside itself
                raise
            return getattr(self.base_layer, name)

    def update_layer(
        self,
        adapter_name: str,
        *,
        rank: int,
        alpha: float,
        use_rslora: bool,
        gated_gain: float,
        activation: str,
        dropout: float,
        init_weights: bool | str,
        inference_mode: bool,
    ) -> None:
        """Add a branch. `init_weights` is the configuration's `init_ffba_weights`.

        Raises:
            ValueError: the rank is above the width, or `gated` is asked of an MLP that is not gated.
        """
        if rank > self.width:
            raise ValueError(f"{self.block}: rank {rank} is above the model's width {self.width}; choose a rank of at most {self.width}")
        if activation == GATED:
            _host_activation(self.base_layer, self.block)
        self.ffba_rank[adapter_name] = rank
        self.ffba_scale[adapter_name] = adapter_scale(alpha, rank, use_rslora, gated_gain if activation == GATED else 1.0)
        self.ffba_activation[adapter_name] = activation
        self.ffba_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        host: Tensor = next(itertools.chain(self.base_layer.parameters(), self.base_layer.buffers()))  # some quantizers keep buffers alone
        self.ffba_A[adapter_name] = _linear(self.width, rank, host)
        self.ffba_B[adapter_name] = _linear(rank, self.width, host, zero=bool(init_weights))
        if activation == GATED:
            self.ffba_G[adapter_name] = _linear(self.width, rank, host)
        if init_weights is True and not inference_mode and host.device.type != "meta":  # else a checkpoint's numbers come later
            forward = [self.ffba_A[adapter_name], *([self.ffba_G[adapter_name]] if activation == GATED else [])]
            start_at_leading_directions(self.base_layer, self.kind, self.block, forward)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`block(x) + Σ s · B φ(A x)` over the active adapters; what else the block returns passes through."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(
                "FFBA does not mix adapters within a batch (adapter_names); call set_adapter, and run each adapter's rows apart"
            )
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        x: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        y = output[0] if isinstance(output, tuple) else output
        for adapter_name in self.active_adapters:
            if adapter_name in self.ffba_A:
                y = y + self._branch(x, adapter_name).to(y.dtype)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _branch(self, x: Tensor, adapter_name: str) -> Tensor:
        """x: [..., d] -> s · B φ(A x): [..., d], computed in the adapter's dtype."""
        a = self.ffba_A[adapter_name]
        x = self.ffba_dropout[adapter_name](x.to(next(a.parameters()).dtype))
        activation = self.ffba_activation[adapter_name]
        if activation == GATED:
            z = _host_activation(self.base_layer, self.block)(self.ffba_G[adapter_name](x)) * a(x)
        else:
            z = _ACTIVATION_FUNCTIONS[activation](a(x))
        result: Tensor = self.ffba_B[adapter_name](z) * self.ffba_scale[adapter_name]
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        raise NotImplementedError(NOT_MERGEABLE)

    def __repr__(self) -> str:
        return "ffba." + super().__repr__()


NOT_MERGEABLE = (
    "An FFBA adapter cannot be merged into the base weights: it runs beside a whole block, and no change of the block's own "
    "weights, at their own sizes, computes attention(x) + B φ(A x). Fuse it instead, at the cost of r more rows and columns: "
    "`flora-export build CKPT --base DIR --backend onnxruntime --output OUT`. To get the base model back, call `unload()`."
)


def _linear(in_features: int, out_features: int, host: Tensor, zero: bool = False) -> nn.Linear:
    """A projection beside its host, on its device and of its dtype: zero, or random as LoRA's A is."""
    linear = nn.Linear(in_features, out_features, bias=False)
    if zero:
        nn.init.zeros_(linear.weight)
    else:
        kaiming(linear)
    if linear.weight.device.type == "meta":  # PEFT's low_cpu_mem_usage: the numbers come later
        return linear
    return linear.to(device=host.device, dtype=host.dtype if host.dtype in TRAINABLE else torch.float32)


def _host_activation(mlp: nn.Module, block: str) -> Callable[[Tensor], Tensor]:
    """The activation of a gated MLP: one with gate and up projections, apart or packed."""
    modules = dict(mlp.named_children())
    gated = "gate_up_proj" in modules or ("gate_proj" in modules and "up_proj" in modules)  # torch 2.11 compiles no set comparison
    activation = modules.get("act_fn") or modules.get("activation_fn")
    if not gated or activation is None:
        raise ValueError(
            f"{block} ({type(mlp).__name__}) is not a gated MLP: it has {', '.join(modules)}. "
            "Choose mlp_activation 'identity', 'relu', 'silu' or 'gelu' for it."
        )
    return activation
