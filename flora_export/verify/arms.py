"""Arms of the benchmark: what is timed in prefill, in a decode step and in a whole generation, for ONNX Runtime and for eager PyTorch.

Token ids are [batch, tokens], rows of equal length. The tokens of a generation are given, not chosen, so that every arm does the
same work. A `Call` times the model alone: inputs are made, and caches copied, in its untimed part.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flora_export.base_model import BaseModel
from flora_export.checkpoint import Checkpoint
from flora_export.errors import BackendError
from flora_export.verify.latency import Call

Ids = npt.NDArray[np.int64]


class Arm(Protocol):
    def prefill(self, prompt: Ids) -> Call:
        """TTFT: a prompt, with no cache before it."""

    def step(self, past: Ids, token: Ids) -> Call:
        """TPOT: one token [batch, 1] after a prompt, the same step on the same cache each time."""

    def generation(self, prompt: Ids, tokens: Ids) -> Call:
        """Total: prefill, which makes the first of the new tokens, then a step for each of the others."""


class OnnxArm:
    """An artifact, through a backend's `Bound`."""

    def __init__(self, bound: Any) -> None:
        self.bound = bound

    def prefill(self, prompt: Ids) -> Call:
        bound, feeds, empty = self.bound, self.bound.feeds(prompt, 0), self.bound.empty_cache(len(prompt))
        return Call(lambda: bound.bind(feeds, empty), bound.run)

    def step(self, past: Ids, token: Ids) -> Call:
        bound, feeds = self.bound, self.bound.feeds(token, past.shape[1])
        prefilled = self.prefill(past)
        cache = bound.cache_after(prefilled.run(prefilled.prepare()))
        return Call(lambda: bound.bind(feeds, cache), bound.run)

    def generation(self, prompt: Ids, tokens: Ids) -> Call:
        bound, prefilled = self.bound, self.prefill(prompt)
        steps = [bound.feeds(tokens[:, i : i + 1], prompt.shape[1] + i) for i in range(tokens.shape[1] - 1)]

        def run(binding: Any) -> object:
            bound.run(binding)
            for feeds in steps:
                binding = bound.run(bound.bind(feeds, bound.cache_after(binding)))
            return binding

        return Call(prefilled.prepare, run)


class EagerArm:
    """Base model and adapter as PEFT runs them, unfused, in PyTorch with transformers' KV cache and its fast attention where it has one."""

    def __init__(self, base: BaseModel, checkpoint: Checkpoint, target: str, precision: str, threads: int) -> None:
        """Load both.

        Raises:
            BackendError: the target is CUDA, and PyTorch has none.
            CheckpointError: transformers or PEFT cannot load them.
        """
        import torch

        from flora_export.reference import Reference

        if target == "cuda" and not torch.cuda.is_available():
            raise BackendError("the eager arm of an artifact for cuda needs a PyTorch that sees a CUDA machine: leave it out of --arms")
        self.torch, self.target = torch, "cuda" if target == "cuda" else "cpu"
        self.threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        self.model = Reference(base, checkpoint.path, checkpoint.parts).model.to(device=self.target, dtype=dtype)
        inner = self.model.get_base_model()
        with contextlib.suppress(ValueError):  # a model without it keeps the attention that it has
            inner.set_attn_implementation("sdpa")
        last = "logits_to_keep" in inspect.signature(inner.forward).parameters
        self.prefill_options = {"logits_to_keep": 1} if last else {}  # as transformers' own generate() calls it

    def close(self) -> None:
        """Give PyTorch back the number of threads that it had."""
        self.torch.set_num_threads(self.threads_before)

    def prefill(self, prompt: Ids) -> Call:
        ids = self._tensor(prompt)
        return Call(lambda: None, lambda _: self._synchronised(ids, None, self.prefill_options))

    def step(self, past: Ids, token: Ids) -> Call:
        cache, ids = self._synchronised(self._tensor(past), None, self.prefill_options), self._tensor(token)
        return Call(lambda: copy.deepcopy(cache), lambda copied: self._synchronised(ids, copied, {}))

    def generation(self, prompt: Ids, tokens: Ids) -> Call:
        ids = self._tensor(prompt)
        steps = [self._tensor(tokens[:, i : i + 1]) for i in range(tokens.shape[1] - 1)]

        def run(_: object) -> object:
            cache = self._forward(ids, None, self.prefill_options)
            for token in steps:
                cache = self._forward(token, cache, {})
            return self._wait(cache)

        return Call(lambda: None, run)

    def _tensor(self, ids: Ids) -> Any:
        return self.torch.from_numpy(np.ascontiguousarray(ids)).to(self.target)

    def _synchronised(self, ids: Any, cache: Any, options: dict[str, Any]) -> Any:
        return self._wait(self._forward(ids, cache, options))

    def _forward(self, ids: Any, cache: Any, options: dict[str, Any]) -> Any:
        with self.torch.no_grad():
            return self.model(input_ids=ids, past_key_values=cache, use_cache=True, **options).past_key_values

    def _wait(self, result: Any) -> Any:
        if self.target == "cuda":
            self.torch.cuda.synchronize()
        return result
