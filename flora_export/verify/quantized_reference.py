"""Eager PyTorch on the numbers that a quantized artifact stands for: the truth that its graph is held to.

Each weight of a linear layer, of the embeddings and of the adapter is quantized and read back, by its name and nothing of the graph.
What an adapter changes in the base's weights is changed before it is quantized, as a build does it; that the change itself is right, the
ledger and `price.py` say.

Of a large base, what has been read back lies in temporary files, in fp32, and is mapped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from flora_export.base_model import BaseModel
from flora_export.checkpoint import Checkpoint
from flora_export.errors import CheckpointError
from flora_export.methods.reading import PREFIX
from flora_export.passes.change_weights import changed_values
from flora_export.quantization import Quantization
from flora_export.quantization.packing import DTYPES, Array, read_back
from flora_export.quiet import quiet
from flora_export.reference import Reference, load_or_map
from flora_export.scratch import Scratch
from flora_export.verify.coverage import Run, measure_floors

Tensors = dict[str, torch.Tensor]


class QuantizedReference(Reference):
    """As Reference, with the adapter or without, on dequantized weights."""

    def __init__(self, base: BaseModel, checkpoint: Checkpoint, quantization: Quantization) -> None:
        """Load both, and quantize.

        Raises:
            CheckpointError: transformers or PEFT cannot load them; or the adapter both changes weights and stands beside others.
        """
        self.quantization = quantization
        self._files = Scratch("flora-export-reference-") if base.is_large else None
        self._changed: Tensors = {}
        if not checkpoint.changes:
            super().__init__(base, checkpoint.path, checkpoint.parts)
        elif checkpoint.branches:
            raise CheckpointError(
                f"{checkpoint.path} changes weights and has branches beside them as well: such an artifact cannot be verified quantized. "
                "Build it in fp32 or fp16."
            )
        else:
            try:
                with quiet():
                    self.model = load_or_map(base, [checkpoint.path, *(path for path, _ in checkpoint.parts)]).eval()
            except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
                raise CheckpointError(f"eager PyTorch cannot load {base.name} ({type(error).__name__}: {error})") from error
            for change in checkpoint.changes:
                values = changed_values(checkpoint, change, base, DTYPES[quantization.compute])
                self._changed[change.tensor] = self._kept(self._read_back(change.tensor, values).astype(np.float32))
        packed = base.packed
        names = {name: parameter for name, parameter in self.model.named_parameters() if parameter.ndim == 2}
        own = {
            tensor: (branch, matrix) for branch in checkpoint.branches for matrix in branch.matrices for tensor in [branch.tensor(matrix)]
        }
        beside = set(checkpoint.tensors) - {source for change in checkpoint.changes for source in change.sources}
        self._adapter: Tensors = {}  # A, B and G before they were quantized
        for name, parameter in names.items():
            tensor = name.replace(".default.", ".")
            if tensor in beside and tensor not in own:
                continue  # it keeps its precision
            values = parameter.detach().float().numpy()
            if tensor in own:
                branch, matrix = own[tensor]
                self._adapter[name] = parameter.detach().clone()
                scale = np.float32(branch.scale if matrix == "B" else 1.0)
                read = read_back(values * scale, quantization.adapter_bits, quantization.block_size, quantization.compute) / scale
            elif packed is not None and name.replace(".base_layer.", ".").removeprefix(PREFIX) in packed.modules:
                continue  # it is on its own steps already
            else:
                read = self._read_back(name, values)
            parameter.data = self._kept(read)

    def _kept(self, values: Array) -> torch.Tensor:
        """A matrix in memory; of a large base, mapped from a file of its own. Raises CheckpointError where there is no room for it."""
        tensor = torch.from_numpy(values)
        if self._files is None:
            return tensor
        home = Path(self._files.name)
        file = home / f"{len(list(home.iterdir()))}.safetensors"
        try:
            save_file({file.stem: tensor}, file)
            return load_file(file)[file.stem]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"the quantized base model, in fp32, does not fit into {home.parent} ({error}). Make room, or set TMPDIR to another disk."
            ) from error

    def _read_back(self, name: str, values: Array) -> Array:
        return (
            read_back(values, self.quantization.bits_of(name), self.quantization.block_size, self.quantization.compute)
            if values.ndim == 2
            else values
        )

    @property
    def _inner(self) -> nn.Module:
        return self.model if self._changed else super()._inner

    def _silenced(self, silent: bool) -> contextlib.AbstractContextManager[None]:
        """A merged adapter is in the weights themselves: they trade places with the base's."""
        return self._holding({} if silent else self._changed) if self._changed else super()._silenced(silent)

    @contextlib.contextmanager
    def _holding(self, values: Tensors) -> Iterator[None]:
        """Within, parameters have other values."""
        parameters = dict(self.model.named_parameters())
        kept = {name: parameters[name].data for name in values}
        for name, value in values.items():
            parameters[name].data = value.to(kept[name].dtype)
        try:
            yield
        finally:
            for name, value in kept.items():
                parameters[name].data = value

    @property
    def quantizes_adapter(self) -> bool:
        """Whether there are A, B and G that are quantized."""
        return bool(self._adapter) and self.quantization.adapter_bits > 0

    def exact_adapter(self) -> contextlib.AbstractContextManager[None]:
        """Within, A, B and G are what they were before they were quantized; the base stays as it is."""
        return self._holding(self._adapter)

    @contextlib.contextmanager
    def rounded_activations(self) -> Iterator[None]:
        """Within, what a quantized layer reads is rounded to int8, each block with a scale of its own: as a runtime does it for speed."""
        block = self.quantization.block_size
        layers = [(name, module) for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        adapters = {name.removesuffix(".weight") for name in self._adapter}
        handles = [
            module.register_forward_pre_hook(lambda _, arguments: (_round(arguments[0], block), *arguments[1:]))
            for name, module in layers
            if (self.quantization.adapter_bits if name in adapters else self.quantization.bits_of(name))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def with_rounding(eager: QuantizedReference, runs: Sequence[Run]) -> list[Run]:
    """The same runs, their noise floor what eager PyTorch is off by with rounded activations."""
    rounded: list[Run] = [(replace(item, eager=None), cache) for item, cache in runs]
    with eager.rounded_activations():
        measure_floors(eager, rounded, eager.quantization.precision)
    return rounded


def _round(x: torch.Tensor, block: int) -> torch.Tensor:
    """x [..., in] in blocks along its last axis, each rounded to 255 steps of its own size."""
    padded = nn.functional.pad(x, (0, -x.shape[-1] % block))
    blocks = padded.reshape(*padded.shape[:-1], -1, block)
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    rounded = torch.where(scale > 0, (blocks / scale.clamp(min=1e-30)).round() * scale, blocks)
    return rounded.flatten(-2)[..., : x.shape[-1]]
