"""The arms of the GPU benchmark in PyTorch: base, LoRA unmerged, FFBA unfused, and FFBA fused by hand, as the compiler fuses the graph.

Attention, and an MLP whose adapter is not `gated` (φ is not what its neurons compute); W is the value or up projection, Wo the last one:

    before   v = Wv x                 o = Wo h + s · B φ(A x)
    after    [v, a] = [Wv; A] x       o = [Wo, sB] [h; φ(a)]           forward and backward fusion: a split and a concat

Gated MLP: the adapter is r more neurons, and no operation is added:

    before   y = Wd (act(Wg x) ⊙ Wu x) + s · B (act(G x) ⊙ A x)
    after    y = [Wd, sB] (act([Wg; G] x) ⊙ [Wu; A] x)

One host is widened and q, k, v (gate, up) stay apart, where the design has one GEMM of all. With one GEMM of all, the fused arm would
launch two GEMMs a block fewer than the base arm, and its ratio to base would measure that, not the adapter. Of q, k and v the value
projection is the one to widen: it is small (512 rows in Llama-3.2-1B), so that r more rows round up to little where a GEMM is cut into
tiles; and its rows go nowhere but into the KV cache, by a copy that reads a slice as well as a whole tensor, where q and k would go
through the rotary embedding first. So the split is a view, eager and compiled; the concat is one small kernel a block.
The scale goes into B in fp32, before the cast to Wo's dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain

import peft
import torch
from torch import Tensor, nn

from flora_export.branch import GATED
from flora_export.ffba import FFBAConfig, FFBALayer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ARMS = ("base", "fused", "lora", "unfused")  # where time is short, the last go first

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
}


class _Carried:
    """Brings a from the widened first projection of a block to its last, past transformers' code in between."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def put(self, value: Tensor) -> None:
        self.value = value

    def take(self) -> Tensor:
        """Take it away again: nothing is left that a CUDA graph would have to keep alive."""
        value, self.value = self.value, None
        assert value is not None, "the block's last projection ran before its first"
        return value


class WidenedForward(nn.Module):
    """[W; A] x: [..., n + r] -> returns W x: [..., n], a view, and hands A x: [..., r] on."""

    def __init__(self, host: nn.Linear, a: Tensor, carried: _Carried) -> None:
        super().__init__()
        self.linear = widen_rows(host, a)
        self.rows = host.out_features
        self.carried = carried

    def forward(self, x: Tensor) -> Tensor:
        wide = self.linear(x)
        self.carried.put(wide[..., self.rows :])
        return wide[..., : self.rows]


class WidenedBackward(nn.Module):
    """[Wo, sB] [h; φ(a)]: [..., n + r] -> [..., d]."""

    def __init__(self, host: nn.Linear, sb: Tensor, activation: str, carried: _Carried) -> None:
        super().__init__()
        self.linear = widen_columns(host, sb)
        self.activation = _ACTIVATIONS[activation]
        self.carried = carried

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(torch.cat([h, self.activation(self.carried.take())], dim=-1))


def widen_rows(host: nn.Linear, rows: Tensor) -> nn.Linear:
    """[W; A]: a projection with more outputs. The adapter has no bias: zeros."""
    bias = None if host.bias is None else torch.cat([host.bias, host.bias.new_zeros(len(rows))])
    return _linear(torch.cat([host.weight, rows.to(host.weight.dtype)], dim=0), bias)


def widen_columns(host: nn.Linear, columns: Tensor) -> nn.Linear:
    """[Wo, sB]: a projection with more inputs; its bias stays."""
    return _linear(torch.cat([host.weight, columns.to(host.weight.dtype)], dim=1), host.bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def share_copy(model: nn.Module) -> nn.Module:
    """A second module tree over the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


@torch.no_grad()
def fuse(model: nn.Module) -> nn.Module:
    """The fused model of a Llama-like model with one FFBA adapter (`PeftModel.get_base_model()`), for inference.

    The argument stays as it is; what is not widened is shared with it.

    Raises:
        ValueError: a block has no adapter that is active, or several.
    """
    fused = share_copy(model).eval()
    for name, layer in list(fused.named_modules()):
        if isinstance(layer, FFBALayer):
            _fuse_one(layer)
            fused.set_submodule(name, layer.base_layer)
    return fused


def _fuse_one(layer: FFBALayer) -> None:
    """Widen the projections inside a layer's block, in place."""
    adapters = [name for name in layer.active_adapters if name in layer.ffba_A]
    if len(adapters) != 1:
        raise ValueError(f"{layer.block}: {len(adapters)} active adapters ({', '.join(adapters)}), but exactly one can be fused")
    (adapter,) = adapters
    block = layer.base_layer
    activation = layer.ffba_activation[adapter]
    a = layer.ffba_A[adapter].weight  # [r, d]
    b = layer.ffba_B[adapter].weight  # [d, r]
    sb = b.float() * layer.ffba_scale[adapter]
    if activation == GATED:
        block.gate_proj = widen_rows(block.gate_proj, layer.ffba_G[adapter].weight)
        block.up_proj = widen_rows(block.up_proj, a)
        block.down_proj = widen_columns(block.down_proj, sb)
        return
    first, last = ("v_proj", "o_proj") if layer.kind == "attention" else ("up_proj", "down_proj")
    carried = _Carried()
    setattr(block, first, WidenedForward(getattr(block, first), a, carried))
    setattr(block, last, WidenedBackward(getattr(block, last), sb, activation, carried))


def make_arm(arm: str, base: nn.Module, rank: int) -> nn.Module:
    """One arm over a base model's own weights, in eval mode. It shares what it does not widen: the same bytes are read either way.

    LoRA is PEFT's own, unmerged, of the same rank, on all seven projections. Every B is random and every scale 1; `unfused` and
    `fused` hold the same adapter. Adapters keep the base's dtype, where PEFT would make them fp32 for training.

    Raises:
        KeyError: no such arm.
    """
    if arm == "base":
        return base.eval()
    if arm == "fused":
        return fuse(make_arm("unfused", base, rank))
    config = {
        "lora": peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEAR, init_lora_weights=False),
        "unfused": FFBAConfig(r=rank, alpha=float(rank), gated_gain=1.0, init_ffba_weights=False),
    }[arm]
    torch.manual_seed(1)
    model: nn.Module = peft.get_peft_model(share_copy(base), config, autocast_adapter_dtype=False).get_base_model()
    return model.eval()
