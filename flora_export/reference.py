"""Base model and adapter as eager PyTorch, unfused: in fp64 the truth, in fp32 what users know. Shares no code with the capture."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

import flora_export.ffba  # noqa: F401  # registers FFBA with PEFT
from flora_export.base_model import BaseModel
from flora_export.errors import CheckpointError
from flora_export.exact import computing_in, in_double
from flora_export.formulas import beside_layers
from flora_export.mapped import keeps_base, load_mapped
from flora_export.quiet import quiet

_Array = npt.NDArray[np.float32]
_Cache = Sequence[tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]]  # keys and values per layer
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BATCH_BYTES = 512 * 2**20  # of logits in fp64 that are computed at a time


class Reference:
    """Eager PyTorch, computing in fp32."""

    _dtype = torch.float32  # what it computes in

    def __init__(self, base: BaseModel, checkpoint: Path, parts: Sequence[tuple[Path, float]] = ()) -> None:
        """Load both; a large base is mapped. With `parts`, several adapters are active together, each times its weight, the first of them
        the checkpoint.

        Raises:
            CheckpointError: transformers or PEFT cannot load them; their words are quoted.
        """
        try:
            with quiet():
                model = load_or_map(base, [checkpoint, *(path for path, _ in parts)])
                # PEFT writes trained biases over the base's own, and does not take them back where the adapter is disabled.
                self._biases = [(p, p.detach().clone()) for name, p in model.named_parameters() if name.endswith("bias")]
                beside = beside_layers(model, checkpoint)
                # one or the other: a FormulaModel has of a PeftModel what is used of it
                self.model = cast("peft.PeftModel", beside or peft.PeftModel.from_pretrained(model, str(checkpoint)))
                if parts:
                    activate_together(self.model, parts)
                self.model.eval()
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError, KeyError, ImportError) as error:
            raise CheckpointError(f"eager PyTorch cannot load {checkpoint} on {base.name} ({type(error).__name__}: {error})") from error

    def to_precision(self, precision: str) -> Reference:
        """Compute in the precision of an artifact from now on, and return this very reference."""
        self._dtype = _DTYPES[precision]
        return self

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], *, adapter: bool = True, cache: _Cache | None = None) -> list[npt.NDArray[np.float32]]:
        """Logits [tokens, vocabulary] of each row, a whole sequence or one that follows a KV cache, with or without the adapter."""
        return self._together(rows, adapter, cache, lambda: computing_in(self.model, self._dtype))

    @torch.no_grad()
    def exact_logits(
        self, rows: Sequence[Sequence[int]], *, adapter: bool = True, cache: _Cache | None = None
    ) -> list[npt.NDArray[np.float32]]:
        """The true logits [tokens, vocabulary] of each row: computed in fp64, and rounded to fp32 at the end."""
        return self._together(rows, adapter, cache, lambda: in_double(self.model))

    def _together(
        self,
        rows: Sequence[Sequence[int]],
        adapter: bool,
        cache: _Cache | None,
        computing: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> list[npt.NDArray[np.float32]]:
        """Rows run together, padded on the right, which causal attention does not see; one by one with longrope, whose frequencies depend
        on the longest of them.
        """
        longest = max(map(len, rows))
        together = max(1, BATCH_BYTES // (8 * longest * int(self.model.config.vocab_size)))
        if any(getattr(module, "rope_type", None) == "longrope" for module in self.model.modules()):
            together = 1
        results = []
        for start in range(0, len(rows), together):
            some = [list(row) for row in rows[start : start + together]]
            longest = max(map(len, some))
            with computing():
                logits = self._run([row + [0] * (longest - len(row)) for row in some], adapter, cache)
            results += [values[: len(row)].to(torch.float32).numpy() for row, values in zip(some, logits, strict=True)]
        if cache is not None:
            give_back_memory()  # a KV cache is large, and in pieces that malloc would keep
        return results

    def _run(self, rows: Sequence[Sequence[int]], adapter: bool, cache: _Cache | None) -> torch.Tensor:
        """Logits [rows, tokens, vocabulary]."""
        past = None if cache is None else transformers.Cache([_GivenLayer(*pair) for pair in cache])
        with self._silenced(not adapter):
            output = self.model(input_ids=torch.tensor([list(row) for row in rows]), past_key_values=past, use_cache=past is not None)
        logits: torch.Tensor = output.logits
        return logits

    def _silenced(self, silent: bool) -> contextlib.AbstractContextManager[None]:
        """The model with its adapter, or without."""
        return self._without_adapter() if silent else contextlib.nullcontext()

    @contextlib.contextmanager
    def _without_adapter(self) -> Iterator[None]:
        trained = [parameter.data for parameter, _ in self._biases]
        with self.model.disable_adapter():
            for parameter, own in self._biases:
                parameter.data = own.to(parameter.dtype)
            try:
                yield
            finally:
                for (parameter, _), data in zip(self._biases, trained, strict=True):
                    parameter.data = data

    @torch.no_grad()
    def block_outputs(self, tokens: Sequence[int], blocks: Sequence[str], *, adapter: bool) -> dict[str, npt.NDArray[np.float32]]:
        """What each block returns, [tokens, d], by the name of its module, with or without the adapter."""
        modules = dict(self._inner.named_modules())
        with kept_outputs({block: modules[block] for block in blocks}) as outputs:
            self.logits([tokens], adapter=adapter)
        return outputs

    @property
    def _inner(self) -> torch.nn.Module:
        """The model as transformers has it, the adapter's layers in it."""
        inner: torch.nn.Module = self.model.base_model.model
        return inner

    @torch.no_grad()
    def greedy(self, prompts: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
        """The next `steps` tokens of each prompt, decoded greedily with a KV cache and with the adapter. An end token does not stop it.

        The prompts run together, padded on the left.
        """
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        tokens, cache = [], None
        with computing_in(self.model, self._dtype):
            for _ in range(steps):
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                ids = output.logits[:, -1:].argmax(-1)
                mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)
                tokens.append(ids)
        rows: list[list[int]] = torch.cat(tokens, dim=-1).tolist()
        return rows


def activate_together(model: peft.PeftModel, parts: Sequence[tuple[Path, float]]) -> None:
    """Load the other adapters beside the first, and scale each: PEFT then adds them up in every forward pass."""
    names = ["default", *(f"part{index}" for index in range(1, len(parts)))]
    for name, (path, _) in zip(names[1:], parts[1:], strict=True):
        model.load_adapter(str(path), name)
    model.base_model.set_adapter(names)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, (_, weight) in zip(names, parts, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= weight


def load_or_map(base: BaseModel, adapters: Sequence[Path]) -> transformers.PreTrainedModel:
    """The base model in fp32, as transformers has it; a large one as it lies in its files, unless an adapter takes a tensor's place.

    Raises what transformers raises.
    """
    if base.is_large and all(map(keeps_base, adapters)) and (mapped := load_mapped(base)) is not None:
        return mapped
    model: transformers.PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        base.path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True, attn_implementation="eager"
    )
    return model


class _GivenLayer(transformers.cache_utils.DynamicLayer):  # type: ignore[misc]
    """A layer of a KV cache for one pass: it stays in fp16 as it was given; there is a copy to compute with only while the layer runs."""

    def __init__(self, keys: npt.NDArray[np.float16], values: npt.NDArray[np.float16]) -> None:
        super().__init__()
        given = torch.from_numpy(keys), torch.from_numpy(values)
        self.lazy_initialization(*given)
        self.keys, self.values = given

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, those of the pass at the end."""
        return (
            torch.cat([self.keys.to(key_states.dtype), key_states], dim=-2),
            torch.cat([self.values.to(value_states.dtype), value_states], dim=-2),
        )


def give_back_memory() -> None:
    """Let the system have what has been freed, where the C library can say so; glibc keeps what lies between pieces in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def kept_outputs(modules: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, _Array]]:
    """What modules return for the first row, [tokens, d], by the names that they are given here; filled by what runs in the block."""
    outputs: dict[str, _Array] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: object, _arguments: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            outputs[name] = (output[0] if isinstance(output, tuple) else output)[0].float().numpy()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
