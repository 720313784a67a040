"""fp64 truth: an fp32 model, computed exactly enough that its own rounding plays no part.

The model's own code runs, with every float32 in it read as float64. That is more than `model.double()`: transformers computes norms,
softmax and rotary angles in fp32 whatever the weights are, and makes rotary frequencies in fp32 when a model is made.

Weights become fp64 one module at a time, while that module runs, so that memory grows by the largest of them alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _DoubleForFloat(TorchFunctionMode):
    """Reads float32 as float64, in what is called while it is active."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **named)


@contextlib.contextmanager
def in_double(model: nn.Module) -> Iterator[None]:
    """Within, a `model` computes in fp64: from the numbers of its weights, and from frequencies that were never rounded to fp32."""
    with contextlib.ExitStack() as undo:
        undo.enter_context(_DoubleForFloat())
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if (remade := _remade(child)) is not None:
                    setattr(parent, name, remade)
                    undo.callback(setattr, parent, name, child)
        undo.enter_context(computing_in(model, torch.float64, unsaved=True))
        yield


@contextlib.contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype, *, unsaved: bool = False) -> Iterator[None]:
    """Within, the weights of each module are of a dtype while it runs, whatever they are kept in.

    Args:
        unsaved: buffers that are not saved with a model as well. They stay as they are when transformers loads a model in some precision:
            rotary frequencies in fp16 would turn every far position by whole radians.
    """
    with contextlib.ExitStack() as undo:
        for module in model.modules():
            held = [t for each in (module, *_read_by(module)) for t in _tensors_of(each, unsaved)]
            if type(module) is nn.Embedding and module.max_norm is None:  # it looks rows up: no need to cast the others
                undo.callback(module.register_forward_hook(lambda _, __, rows: rows.to(dtype)).remove)
            elif own := [t for t in held if t.is_floating_point() and t.dtype != dtype]:
                before, after = _hooks(own, dtype)
                undo.callback(module.register_forward_pre_hook(before).remove)
                undo.callback(module.register_forward_hook(after, always_call=True).remove)
        yield


def _tensors_of(module: nn.Module, unsaved: bool) -> list[torch.Tensor]:
    left_out = () if unsaved else module._non_persistent_buffers_set
    buffers = (buffer for name, buffer in module.named_buffers(recurse=False) if name not in left_out)
    return [*module.parameters(recurse=False), *buffers]


def _read_by(module: nn.Module) -> list[nn.Module]:
    """Modules whose tensors a module reads itself, so that they may never run: tables; in a layer of PEFT, all but blocks."""
    if not hasattr(module, "adapter_layer_names"):
        return [child for child in module.children() if isinstance(child, nn.ParameterDict)]
    own = [child for name, child in module.named_children() if name != "base_layer"]
    return [*(each for child in own for each in child.modules()), *(child for n, child in module.named_children() if n == "base_layer")]


def _remade(module: nn.Module) -> nn.Module | None:
    """A rotary module, made anew with fp64 frequencies; None for every other module.

    Its buffers are computed from the configuration, and saved with no checkpoint.
    """
    if not any(name.endswith("inv_freq") for name in module._non_persistent_buffers_set):
        return None
    return type(module)(module.config).to(next(module.buffers()).device)


def _hooks(tensors: list[torch.Tensor], dtype: torch.dtype) -> tuple[Callable[..., None], Callable[..., None]]:
    """Make tensors of a dtype before their module runs, and what they were after it."""
    kept: list[torch.Tensor] = []

    def before(*_: object) -> None:
        kept[:] = [tensor.data for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.to(dtype)

    def after(*_: object) -> None:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data
        kept.clear()

    return before, after
