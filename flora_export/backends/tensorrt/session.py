"""Run an engine: device buffers, a KV cache that stays on the device, and a CUDA graph for decode where the cache is static.

PyTorch holds the memory and the stream; it computes nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flora_export.artifact import ENGINE, Artifact
from flora_export.backends.tensorrt.engine import logged
from flora_export.backends.tensorrt.flavour import Flavour, load_flavour, machine_capability
from flora_export.backends.tensorrt.plan import EnginePlan, engine_plan
from flora_export.errors import ArtifactError, BackendError

Logits = npt.NDArray[np.float32]

_TORCH = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64}
PREFILL, DECODE = 0, 1  # optimization profiles, and one execution context each


def check_runnable(artifact: Artifact, plan: EnginePlan, here: str | None) -> Flavour:
    """The flavour that can run an artifact's engine on a GPU of compute capability `here`.

    Raises:
        BackendError: another flavour, version or GPU is needed.
        ArtifactError: the engine's file is not whole.
    """
    remedy = f"Make the engine for this machine: flora-export rebuild {artifact.path}"
    try:
        flavour = load_flavour(plan.flavour)
    except BackendError as error:
        raise BackendError(f"{artifact.path} has an engine of flavour {plan.flavour}, which cannot be loaded here: {error}") from error
    if flavour.version != plan.version and not plan.version_compatible:
        raise BackendError(
            f"{artifact.path}: its engine was built with {flavour.title} {plan.version}, but {flavour.version} is installed. {remedy}"
        )
    if here is None:
        raise BackendError(f"{artifact.path}: an engine needs an NVIDIA GPU, and PyTorch sees none on this machine")
    if here not in plan.compute_capabilities:
        raise BackendError(
            f"{artifact.path}: its engine is for compute capability {', '.join(plan.compute_capabilities)}, but this GPU has {here}. "
            f"{remedy}"
        )
    known = artifact.manifest.files.get(ENGINE, {}).get("bytes")
    file = artifact.path / ENGINE
    size = file.stat().st_size if file.is_file() else None
    if size is None or (known is not None and size != known):  # a manifest that is not sealed yet knows no files
        raise ArtifactError(f"{file}: {size or 'no'} bytes, but the manifest says {known}. {remedy}")
    return flavour


class EngineDecoder:
    """An engine that decodes a batch of prompts. Rows are padded on the side that the manifest declares."""

    def __init__(self, artifact: Artifact, device: str = "cuda") -> None:
        """Check the engine against this machine, then load it.

        Raises:
            BackendError: it cannot run here, or TensorRT refuses it.
            ArtifactError: its file is damaged.
        """
        plan = engine_plan(artifact)
        flavour = check_runnable(artifact, plan, machine_capability())
        self.artifact, self.plan, self.device = artifact, plan, torch.device(device)
        self.static, self.right = artifact.manifest.cache_tokens, artifact.manifest.padding == "right"
        with logged(flavour) as (logger, log):
            self.engine = flavour.trt.Runtime(logger).deserialize_cuda_engine((artifact.path / ENGINE).read_bytes())
        if self.engine is None:
            raise BackendError(
                f"{flavour.title} refuses {artifact.path / ENGINE}: {' '.join(log.errors) or 'no reason given'}. "
                f"Make it again: flora-export rebuild {artifact.path}"
            )
        self.stream: Any = torch.cuda.Stream() if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.contexts = [self.engine.create_execution_context() for _ in plan.profiles]
        for index, context in enumerate(self.contexts):
            context.set_optimization_profile_async(index, self._handle())
        self._wait()
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        self.types = {name: _TORCH[self.engine.get_tensor_dtype(name).name] for name in names}
        shapes = {tensor.name: tensor.shape for tensor in artifact.manifest.inputs}
        self.cache_names = [name for name in shapes if name.startswith("past_key_values.")]
        self.shapes = {name: (int(shapes[name][1]), int(shapes[name][3])) for name in self.cache_names}
        self.cache: dict[str, torch.Tensor] = {}
        self.vocabulary = int(artifact.manifest.outputs[0].shape[-1])
        self.unused = torch.zeros(1, device=self.device)  # the address of a tensor with no elements
        self.graphs: dict[int, tuple[Any, dict[str, torch.Tensor]]] = {}  # by batch size: a captured decode step and its buffers
        self.runtime = f"{flavour.title} {flavour.version}, compute capability {machine_capability()}"

    def start(self, prompts: Sequence[Sequence[int]]) -> list[Logits]:
        """Prefill. Returns for each prompt the logits [tokens, vocabulary] of its own tokens, padding left out."""
        self.lengths = np.array([len(prompt) for prompt in prompts])
        width = int(self.lengths.max())
        columns = np.arange(width)[None]
        mask = columns < self.lengths[:, None] if self.right else columns >= width - self.lengths[:, None]
        ids = np.zeros((len(prompts), width), np.int64)
        ids[mask] = np.concatenate([np.asarray(prompt, np.int64) for prompt in prompts])
        self.mask = mask.astype(np.int64)
        self.cache = self._room(len(prompts), self.static)
        positions = np.clip(np.cumsum(self.mask, axis=1) - 1, 0, None)
        if self.static:  # the cache is written from the first position on, place by place
            positions = np.tile(np.arange(width), (len(prompts), 1))
        logits = self._call(ids, positions, PREFILL, past=0)
        return [logits[row][mask[row]] for row in range(len(prompts))]

    def step(self, tokens: Sequence[int]) -> Logits:
        """Decode one token of each row. Returns logits [batch, vocabulary]."""
        past = self.mask.shape[1]
        self.lengths += 1
        self.mask = np.pad(self.mask, ((0, 0), (0, 1)), constant_values=1)
        return self._call(np.asarray(tokens, np.int64)[:, None], self.lengths[:, None] - 1, DECODE, past)[:, -1]

    def cache_shapes(self) -> list[tuple[int, int]]:
        """(KV heads, head size) of each layer."""
        return [shape for name, shape in self.shapes.items() if name.endswith(".key")]

    def resume(self, cache: Sequence[tuple[Logits, Logits]]) -> None:
        """Go on after a KV cache: keys and values per layer, each [batch, KV heads, past, head size], no row padded."""
        batch, _, past, _ = cache[0][0].shape
        self.lengths, self.mask = np.full(batch, past), np.ones((batch, past), np.int64)
        self.cache = self._room(batch, self.static or past)
        for layer, pair in enumerate(cache):
            for kind, array in zip(("key", "value"), pair, strict=True):
                self.cache[f"past_key_values.{layer}.{kind}"][:, :, :past] = torch.from_numpy(np.ascontiguousarray(array))

    def _room(self, batch: int, places: int) -> dict[str, torch.Tensor]:
        """Cache tensors [batch, KV heads, places, head size]. A static cache is kept: a captured graph knows its addresses."""
        if self.static and batch in self.graphs:
            return self.cache_of(batch)
        return {n: torch.zeros((batch, h, places, s), dtype=self.types[n], device=self.device) for n, (h, s) in self.shapes.items()}

    def cache_of(self, batch: int) -> dict[str, torch.Tensor]:
        buffers = self.graphs[batch][1]
        return {name: buffers[name] for name in self.cache_names}

    def _call(self, ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], profile: int, past: int) -> Logits:
        """Run the engine, and keep the cache that it leaves. Returns logits [batch, tokens, vocabulary]."""
        batch, tokens = ids.shape
        feeds = {"input_ids": ids, "position_ids": positions, "attention_mask": self.mask}
        buffers = {n: torch.from_numpy(np.ascontiguousarray(v)).to(self.device) for n, v in feeds.items() if n in self.types}
        if self.static and profile == DECODE and self.stream is not None:
            return self._replay(batch, buffers)
        buffers |= self.cache
        self._bind_outputs(buffers, batch, tokens, past)
        self._run(profile, buffers)
        self._wait()
        self.cache = {name: buffers[_present(name)] for name in self.cache_names}
        return _fp32(buffers["logits"])

    def _bind_outputs(self, buffers: dict[str, torch.Tensor], batch: int, tokens: int, past: int) -> None:
        for name in self.cache_names:
            heads, size = self.shapes[name]
            # A static cache is updated in place: the engine has the same memory as input and as output.
            grown = [batch, heads, past + tokens, size]
            new = buffers[name] if self.static else torch.empty(grown, dtype=self.types[name], device=self.device)
            buffers[_present(name)] = new
        buffers["logits"] = torch.empty((batch, tokens, self.vocabulary), dtype=self.types["logits"], device=self.device)

    def _run(self, profile: int, buffers: dict[str, torch.Tensor]) -> None:
        context = self.contexts[profile]
        for name, tensor in buffers.items():
            if (
                name in self.types
                and not name.startswith(("present.", "logits"))
                and not context.set_input_shape(name, tuple(tensor.shape))
            ):
                bounds = self.plan.profiles[profile]
                raise BackendError(f"the engine does not take {name} {tuple(tensor.shape)}: its profile {bounds.name} is {bounds}")
            context.set_tensor_address(name, tensor.data_ptr() or self.unused.data_ptr())
        if not context.execute_async_v3(self._handle()):
            raise BackendError(f"the engine failed on input_ids {tuple(buffers['input_ids'].shape)}")

    def _replay(self, batch: int, feeds: dict[str, torch.Tensor]) -> Logits:
        """A decode step with a static cache, as one CUDA graph; captured the first time that a batch of this size is decoded."""
        if batch not in self.graphs:
            buffers = feeds | self.cache
            self._bind_outputs(buffers, batch, 1, 0)
            self._run(DECODE, buffers)  # before the capture: the engine sets itself up. The step is done again by the graph's replay.
            self._wait()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self._run(DECODE, buffers)
            self.graphs[batch] = graph, buffers
        graph, buffers = self.graphs[batch]
        for name, value in feeds.items():
            buffers[name].copy_(value)
        graph.replay()
        self._wait()
        return _fp32(buffers["logits"])

    def _handle(self) -> int:
        return int(self.stream.cuda_stream) if self.stream is not None else 0

    def _wait(self) -> None:
        if self.stream is not None:
            torch.cuda.synchronize()


def _present(past: str) -> str:
    return past.replace("past_key_values.", "present.")


def _fp32(logits: torch.Tensor) -> Logits:
    array: Logits = logits.float().cpu().numpy()
    return array
