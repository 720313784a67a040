"""FFBAModel: puts FFBA layers around the target blocks of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from flora_export.branch import BLOCK_KINDS, by_pattern
from flora_export.ffba.config import FFBAConfig
from flora_export.ffba.layer import NOT_MERGEABLE, FFBALayer


class FFBAModel(BaseTuner):
    """The FFBA tuner. Made by `peft.get_peft_model(model, FFBAConfig(...))`."""

    prefix = "ffba_"
    tuner_layer_cls = FFBALayer

    def _create_and_replace(
        self,
        peft_config: FFBAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        kind = BLOCK_KINDS.get(target_name)
        if kind is None:
            raise ValueError(f"FFBA runs beside whole blocks, {' or '.join(BLOCK_KINDS)}, but target_modules selects {current_key}")
        layer = target
        if not isinstance(layer, FFBALayer):
            layer = FFBALayer(target, current_key, kind, self._width())
        layer.update_layer(
            adapter_name,
            rank=by_pattern(current_key, peft_config.r, peft_config.rank_pattern),
            alpha=peft_config.alpha,
            use_rslora=peft_config.use_rslora,
            gated_gain=peft_config.gated_gain,
            activation=peft_config.attn_activation if kind == "attention" else peft_config.mlp_activation,
            dropout=peft_config.dropout,
            init_weights=peft_config.init_ffba_weights,
            inference_mode=peft_config.inference_mode,
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:  # an additional adapter is not trained until it is made active
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's own copies the weight of a layer; a block has none of its own, and update_layer has placed the branch."""
        setattr(parent, child_name, new_module)

    def _width(self) -> int:
        width = self.get_model_config(self.model).get("hidden_size")
        if not isinstance(width, int):
            raise ValueError("the base model's config has no hidden_size, so the width of its blocks is unknown")
        return width

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT asks here before each forward; without an answer it would drop the argument and use the active adapter for every row."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "FFBA does not mix adapters within a batch (adapter_names): call set_adapter, and run each adapter's rows apart"
            )
        yield

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise NotImplementedError(NOT_MERGEABLE)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(NOT_MERGEABLE)
