"""Run an engine: device buffers, a KV cache that stays on the device, and a CUDA graph for decode where the cache is static.

PyTorch holds the memory and the stream; it computes nothing here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from flora_export.artifact import ENGINE, Artifact
from flora_export.backends.choice import AdapterChoice
from flora_export.backends.padding import pad_prompts, positions_of
from flora_export.backends.tensorrt.engine import logged
from flora_export.backends.tensorrt.flavour import Flavour, load_flavour, machine_capability
from flora_export.backends.tensorrt.plan import EnginePlan, engine_plan
from flora_export.bank import ADAPTER_IDS
from flora_export.errors import ArtifactError, BackendError
from flora_export.stacks import fitting, layers_of, matrices_of, read_stacks
from flora_export.weights import Array

if TYPE_CHECKING:
    from flora_export.backends import Cache

Logits = npt.NDArray[np.float32]
Buffers = dict[str, torch.Tensor]  # by the name of the engine's input or output

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
        raise BackendError(
            f"{artifact.path}: an engine needs an NVIDIA GPU, and PyTorch {torch.__version__}, which holds its memory, sees none"
        )
    if here not in plan.compute_capabilities:
        raise BackendError(
            f"{artifact.path}: its engine is for compute capability {', '.join(plan.compute_capabilities)}, but this GPU has {here}. "
            f"{remedy}"
        )
    known = artifact.manifest.files.get(ENGINE, {}).get("bytes")
    file = artifact.path / ENGINE
    size = file.stat().st_size if file.is_file() else None
    if size is None or (known is not None and size != known):  # an artifact that is being built has no hashes yet
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
        self.artifact, self.plan, self.device = artifact, engine_plan(artifact), torch.device(device)
        self.flavour = check_runnable(artifact, self.plan, machine_capability())
        self.limits = self.plan.limits
        self.choice = AdapterChoice(artifact)
        self.static, self.right = artifact.manifest.cache_tokens, artifact.manifest.padding == "right"
        with logged(self.flavour) as (logger, self.log):
            runtime = self.flavour.trt.Runtime(logger)
            runtime.engine_host_code_allowed = self.plan.version_compatible  # such engines bring the code that runs them
            self.engine = runtime.deserialize_cuda_engine((artifact.path / ENGINE).read_bytes())
        if self.engine is None:
            raise BackendError(
                f"{self.flavour.title} refuses {artifact.path / ENGINE}: {self._reason()}. "
                f"Make it again: flora-export rebuild {artifact.path}"
            )
        self.stream: Any = torch.cuda.Stream() if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.contexts = [self._context(profile) for profile in (PREFILL, DECODE)]
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        self.types = {name: _TORCH[self.engine.get_tensor_dtype(name).name] for name in names}
        shapes = {tensor.name: tensor.shape for tensor in artifact.manifest.inputs}
        self.shapes = {n: (int(shape[1]), int(shape[3])) for n, shape in shapes.items() if n.startswith("past_key_values.")}
        self.stacks = self._load_stacks()
        self.present = {name: name.replace("past_key_values.", "present.") for name in self.shapes}
        self.cache: Buffers = {}
        self.vocabulary = int(artifact.manifest.outputs[0].shape[-1])
        self.unused = torch.zeros(1, device=self.device)  # the address of a tensor with no elements
        self.captured: tuple[int, Any, Buffers] | None = None  # batch size, CUDA graph and buffers of a decode step
        self.runtime = f"{self.flavour.title} {self.flavour.version}, compute capability {machine_capability()}"

    def start(self, prompts: Sequence[Sequence[int]]) -> list[Logits]:
        """Prefill. Returns for each prompt the logits [tokens, vocabulary] of its own tokens, padding left out."""
        self.lengths = np.array([len(prompt) for prompt in prompts])
        ids, mask = pad_prompts(prompts, right=self.right)
        self.mask = mask
        self._check(len(prompts), ids.shape[1], self.limits.prompt)
        self.cache = self._room(len(prompts), self.static)
        logits = self._call(ids, positions_of(mask), PREFILL, past=0)
        return [logits[row][mask[row] == 1] for row in range(len(prompts))]

    def step(self, tokens: Sequence[int]) -> Logits:
        """Decode one token of each row. Returns logits [batch, vocabulary]."""
        past = self.mask.shape[1]
        self.lengths += 1
        self.mask = np.pad(self.mask, ((0, 0), (0, 1)), constant_values=1)
        self._check(len(tokens), int(self.lengths.max()) if self.static else past + 1, self.limits.total)
        return self._call(np.asarray(tokens, np.int64)[:, None], self.lengths[:, None] - 1, DECODE, past)[:, -1]

    def cache_shapes(self) -> list[tuple[int, int]]:
        """(KV heads, head size) of each layer."""
        return [shape for name, shape in self.shapes.items() if name.endswith(".key")]

    def resume(self, cache: Cache) -> None:
        """Go on after a KV cache: keys and values per layer, each [batch, KV heads, past, head size], no row padded."""
        batch, _, past, _ = cache[0][0].shape
        self._check(batch, past, self.limits.total)
        self.lengths, self.mask = np.full(batch, past), np.ones((batch, past), np.int64)
        self.cache = self._room(batch, self.static or past)
        with self._on_stream():
            for layer, pair in enumerate(cache):
                for kind, array in zip(("key", "value"), pair, strict=True):
                    self.cache[f"past_key_values.{layer}.{kind}"][:, :, :past] = torch.from_numpy(np.ascontiguousarray(array))

    def set_adapter(self, slot: int, ckpt: Path) -> None:
        """Put another adapter into a slot of a bank that is a stack. No request may be under way.

        Raises:
            CheckpointError: it is damaged or does not fit; nothing has changed.
        """
        layers = [(stack.name, layer) for stack, _, layer in layers_of(read_stacks(self.artifact), fitting(self.artifact, ckpt))]
        with self._on_stream():
            for name, layer in layers:
                self.stacks[name][slot + 1].copy_(_tensor(layer[0]))
        self._wait()

    def _load_stacks(self) -> Buffers:
        """The adapters of a bank, which are inputs of the engine."""
        if not matrices_of(self.artifact.manifest):
            return {}
        return {stack.name: _tensor(stack.read()).to(self.device) for stack in read_stacks(self.artifact)}

    def _check(self, batch: int, tokens: int, most: int) -> None:
        """Shapes of a static cache never change, so nothing else would stop a write beyond its end."""
        if batch > self.limits.batch or tokens > most:
            raise BackendError(
                f"{batch} rows of {tokens} tokens: the engine was built for up to {self.limits.batch} rows, prompts of "
                f"{self.limits.prompt} tokens, and {self.limits.total} in all. Build with wider --profile bounds, or a larger --kv-cache."
            )

    def _room(self, batch: int, places: int) -> Buffers:
        """Cache tensors [batch, KV heads, places, head size]. A static cache is kept: a captured graph knows its addresses."""
        if self.captured is not None and self.captured[0] == batch:
            return {name: self.captured[2][name] for name in self.shapes}
        with self._on_stream():
            return {n: torch.zeros((batch, h, places, s), dtype=self.types[n], device=self.device) for n, (h, s) in self.shapes.items()}

    def _call(self, ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], profile: int, past: int) -> Logits:
        """Run the engine, and keep the cache that it leaves. Returns logits [batch, tokens, vocabulary]."""
        batch, tokens = ids.shape
        feeds = {"input_ids": ids, "position_ids": positions, "attention_mask": self.mask, ADAPTER_IDS: self.choice.ids(batch)}
        try:
            with self._on_stream():
                buffers = {n: torch.from_numpy(np.ascontiguousarray(v)).to(self.device) for n, v in feeds.items() if n in self.types}
                if self.static and profile == DECODE:
                    buffers = self._decode_static(batch, buffers)
                else:
                    buffers |= self.stacks | self.cache
                    self._add_outputs(buffers, batch, tokens, past)
                    self._run(profile, buffers)
                self._wait()
                self.cache = {name: buffers[self.present[name]] for name in self.shapes}
                logits: Logits = buffers["logits"].float().cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise BackendError(f"the GPU has no memory left for {batch} rows of {past + tokens} tokens: {error}") from error
        return logits

    def _add_outputs(self, buffers: Buffers, batch: int, tokens: int, past: int) -> None:
        for name, (heads, size) in self.shapes.items():
            # A static cache is updated in place: the engine has the same memory as input and as output.
            grown = [batch, heads, past + tokens, size]
            new = buffers[name] if self.static else torch.empty(grown, dtype=self.types[name], device=self.device)
            buffers[self.present[name]] = new
        buffers["logits"] = torch.empty((batch, tokens, self.vocabulary), dtype=self.types["logits"], device=self.device)

    def _run(self, profile: int, buffers: Buffers) -> None:
        context = self.contexts[profile]
        for name, tensor in buffers.items():
            is_input = not name.startswith(("present.", "logits"))
            if is_input and not context.set_input_shape(name, tuple(tensor.shape)):
                bounds = self.plan.profiles[profile]
                raise BackendError(f"the engine does not take {name} {tuple(tensor.shape)}: its profile {bounds.name} is {bounds}")
            context.set_tensor_address(name, tensor.data_ptr() or self.unused.data_ptr())
        if not context.execute_async_v3(self._handle()):
            raise BackendError(f"the engine failed on input_ids {tuple(buffers['input_ids'].shape)}: {self._reason()}")

    def _decode_static(self, batch: int, feeds: Buffers) -> Buffers:
        """A decode step with a static cache: always the same memory, so that it is one CUDA graph from the second step on.

        A graph holds what its context computed for its shapes: another batch size has a context and a graph of its own, one at a time.
        """
        if self.captured is None or self.captured[0] != batch:
            if self.captured is not None:
                self.captured = None
                self.contexts[DECODE] = self._context(DECODE)
            buffers = feeds | self.stacks | self.cache
            self._add_outputs(buffers, batch, 1, 0)
            self._run(DECODE, buffers)  # before a capture the engine must have run, to set itself up
            self.captured = batch, self._capture(buffers), buffers
            return buffers
        _, replay, buffers = self.captured
        for name, value in feeds.items():
            buffers[name].copy_(value)
        replay()
        return buffers

    def _capture(self, buffers: Buffers) -> Any:
        """What does the step once more. TensorRT-RTX captures by itself, by its context's configuration."""

        def again() -> None:
            self._run(DECODE, buffers)

        if self.stream is None or self.flavour.name == "rtx":
            return again
        self._wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            again()
        return graph.replay

    def _context(self, profile: int) -> Any:
        """An execution context for one profile. Raises BackendError where the GPU has no room for it."""
        arguments = []
        if self.static and self.flavour.name == "rtx":
            arguments = [self.engine.create_runtime_config()]
            arguments[0].cuda_graph_strategy = self.flavour.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        context = self.engine.create_execution_context(*arguments)
        if context is None or not context.set_optimization_profile_async(profile, self._handle()):
            raise BackendError(f"{self.flavour.title} cannot make an execution context for {self.artifact.path / ENGINE}: {self._reason()}")
        self._wait()
        return context

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Copies and the engine's work in one order."""
        if self.stream is None:
            yield
        else:
            with torch.cuda.stream(self.stream):
                yield

    def _handle(self) -> int:
        return int(self.stream.cuda_stream) if self.stream is not None else 0

    def _wait(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()

    def _reason(self) -> str:
        return " ".join(self.log.errors) or "TensorRT gives no reason"


def _tensor(array: Array) -> torch.Tensor:
    """An array of numpy as a tensor; PyTorch does not know ml_dtypes' bfloat16."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
