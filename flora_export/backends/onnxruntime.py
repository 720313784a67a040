"""ONNX Runtime: writes the fused graph as an artifact, and runs it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from flora_export.artifact import Artifact
from flora_export.backends import Backend, Golden, Limits, Plan, Progress, Runner
from flora_export.backends.choice import AdapterChoice
from flora_export.backends.edited import edited_graph
from flora_export.backends.exposed import expose
from flora_export.backends.graph_files import write_graph
from flora_export.backends.mapped_weights import giving_back, keep_weights_mapped, multiply_tables_as_they_lie
from flora_export.backends.padding import pad_prompts, padding_mask, positions_of
from flora_export.backends.quantizing import QUANTIZING, QuantizationOptions, choose_quantization, read_options
from flora_export.bank import ADAPTER_IDS
from flora_export.base_model import BaseModel
from flora_export.branch import Branch
from flora_export.capture import capture
from flora_export.errors import BackendError
from flora_export.manifest import Manifest
from flora_export.passes import Fused, lowering, run_passes
from flora_export.passes.quantize import Quantize

if TYPE_CHECKING:
    from flora_export.backends import Cache

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

Logits = npt.NDArray[np.float32]


class GraphBackend(Backend):
    """What backends have in common whose artifact holds a graph that ONNX Runtime can run."""

    def block_outputs(self, artifact: Artifact, branches: Sequence[Branch], tokens: list[int]) -> dict[str, tuple[str, Logits]]:
        graph, names = expose(artifact.model, branches)
        decoder = self.decode_graph(artifact, graph)
        decoder.start([tokens])
        return {block: (name, decoder.result(name)[0]) for block, name in names.items()}

    def decode_base(self, artifact: Artifact, base: BaseModel, directory: Path, *, exact: bool = False) -> Runner:
        manifest = artifact.manifest
        captured = capture(base, self.form(manifest.target), manifest.compute)
        run_passes(captured.model, lowering(captured.form, manifest.cache_tokens))
        if manifest.quantization is not None:
            run_passes(captured.model, [Quantize(manifest.quantization, base.packed)])
        self.store(captured.model, directory)
        bare = dataclasses.replace(manifest, blocks=[], ledger=[], changes=[], bank=None)
        return self.decode_stored(Artifact(directory, bare), exact=exact)

    def decode_stored(self, artifact: Artifact, *, exact: bool = False) -> Runner:
        """What `store` has written: a bare graph, of which nothing is compiled."""
        return self.decode(artifact, exact=exact)

    def decode_graph(self, artifact: Artifact, graph: bytes) -> Decoder:
        """Another graph than the artifact's, with the artifact's weights."""
        return Decoder(artifact, graph=graph, exact=True)


class OnnxRuntime(GraphBackend):
    name = "onnxruntime"
    banks = True
    targets = {"cpu": "cpu", "cuda": "cuda"}  # noqa: RUF012  # never written to

    def options(self, given: Mapping[str, Any]) -> QuantizationOptions:
        super().options({name: value for name, value in given.items() if name not in QUANTIZING})
        return read_options(given)

    def prepare(
        self, base: BaseModel, target: str | None, precision: str, align: int | None, options: QuantizationOptions | None, golden: Golden
    ) -> Plan:
        plan = super().prepare(base, target, precision, align, options, golden)
        return dataclasses.replace(
            plan, quantization=choose_quantization(precision, plan.target, options or QuantizationOptions(), base.packed)
        )

    def write(self, fused: Fused, directory: Path, plan: Plan, progress: Progress) -> Manifest:
        return write_graph(fused, directory, self.name, plan.target, progress)

    def decode(self, artifact: Artifact, *, adapter: bool = True, threads: int = 0, exact: bool = False) -> Decoder:
        return Decoder(artifact, adapter=adapter, threads=threads, exact=exact)

    def timed(self, artifact: Artifact, threads: int) -> Bound:
        return Bound(self.decode(artifact, threads=threads))


class Decoder:
    """An artifact in ONNX Runtime, decoding a batch of prompts with a KV cache.

    Rows of different lengths are padded on the side that the manifest declares. A graph with GroupQueryAttention counts each row's tokens
    by the sum of its attention mask, and writes new keys at that place: it is right with padding on the right, and silently wrong with
    padding on the left. The others take an exact mask and positions, and are padded on the left as usual.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        adapter: bool = True,
        threads: int = 0,
        graph: bytes | None = None,
        provider: str | None = None,
        exact: bool = False,
        initializers: Mapping[str, Any] | None = None,
    ) -> None:
        """Load the artifact; without its adapter, what each B would add is zeroed in memory, so that the base model is left.

        Of a bank every row has the adapter of the artifact's `slot`, or none, until its `choice` is another.

        Args:
            threads: of one operator; 0 leaves it to ONNX Runtime.
            graph: run this graph instead of the artifact's, with the artifact's weights.
            provider: execution provider of ONNX Runtime; without it, the one of the artifact's target.
            exact: multiply quantized weights in fp32, where ONNX Runtime would round activations to int8. Weights of a large artifact
                stay mapped then, and are cast as they are used.
            initializers: OrtValues, by name, that are read in place of those in the file.

        Raises:
            BackendError: ONNX Runtime refuses the model, or has no provider for its target.
        """
        self.artifact = artifact
        self.choice = AdapterChoice(artifact, adapter=adapter)
        self.right = artifact.manifest.padding == "right"
        self.places = artifact.manifest.cache_tokens
        provider = provider or PROVIDERS[artifact.manifest.target]
        if provider not in ort.get_available_providers():
            raise BackendError(
                f"the artifact is for {artifact.manifest.target}, but this ONNX Runtime has {', '.join(ort.get_available_providers())}: "
                "install flora-export[gpu] on a CUDA machine, or build with --no-verify and verify there."
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # its errors are raised as well, and would be a second line
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # two sessions in one process would fight
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # a DequantizeLinear is what the graph says it is
        mapped = exact and artifact.is_large and provider == PROVIDERS["cpu"]
        if mapped:
            keep_weights_mapped(options)
        self.run_options = giving_back() if mapped else None
        model = graph or edited_graph(artifact, adapter=adapter, exact=exact)
        model = multiply_tables_as_they_lie(model) if mapped else model
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(artifact.path))
        self.initializers = dict(initializers or {})  # the session reads their memory
        for name, value in self.initializers.items():
            options.add_initializer(name, value)
        try:
            self.session = ort.InferenceSession(model, options, providers=[provider])
        except Exception as error:  # ONNX Runtime raises several types, none public
            raise BackendError(f"ONNX Runtime refuses {artifact.model}: {error}") from error
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.cache_inputs = {i.name: i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")}
        self.cache: dict[str, Any] = {}
        self.inputs = {i.name for i in self.session.get_inputs()}
        self.runtime = f"ONNX Runtime {ort.__version__}, {provider}" + (" (weights mapped, graph as it is written)" if mapped else "")
        self.limits = Limits(self.places, self.places) if self.places else Limits()

    def sibling(self) -> Decoder:
        """A decoder of another batch, on the same session."""
        other = copy.copy(self)
        other.choice, other.cache = AdapterChoice(self.artifact), {}
        return other

    def start(self, prompts: Sequence[Sequence[int]]) -> list[Logits]:
        """Prefill. Returns for each prompt the logits [tokens, vocabulary] of its own tokens, padding left out."""
        self.lengths = np.array([len(prompt) for prompt in prompts])
        ids, self.mask = pad_prompts(prompts, right=self.right)
        self.cache = {name: self._empty(value, len(prompts)) for name, value in self.cache_inputs.items()}
        logits = self._run(ids, positions_of(self.mask))
        return [logits[row][self.mask[row] == 1] for row in range(len(prompts))]

    def step(self, tokens: Sequence[int]) -> Logits:
        """Decode one token of each row. Returns logits [batch, vocabulary]."""
        self.lengths += 1
        if self.right:
            self.mask = padding_mask(self.lengths, self.mask.shape[1] + 1, right=True)
        else:
            self.mask = np.pad(self.mask, ((0, 0), (0, 1)), constant_values=1)
        return self._run(np.asarray(tokens, np.int64)[:, None], self.lengths[:, None] - 1)[:, -1]

    def cache_shapes(self) -> list[tuple[int, int]]:
        """(KV heads, head size) of each layer."""
        keys = [value.shape for name, value in self.cache_inputs.items() if name.endswith(".key")]
        return [(heads, size) for _, heads, _, size in keys]

    def resume(self, cache: Cache) -> None:
        """Go on after a KV cache: keys and values per layer, each [batch, KV heads, past, head size], no row padded."""
        batch, _, past, _ = cache[0][0].shape
        self.lengths, self.mask = np.full(batch, past), np.ones((batch, past), np.int64)
        self.results: dict[str, Any] = {}
        for layer, pair in enumerate(cache):
            for kind, array in zip(("key", "value"), pair, strict=True):
                name = f"past_key_values.{layer}.{kind}"
                room = max(0, self.places - past)
                self.cache[name] = _in_dtype(np.pad(array, ((0, 0), (0, 0), (0, room), (0, 0))), self.cache_inputs[name].type)

    def _run(self, ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> Logits:
        feeds = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions, ADAPTER_IDS: self.choice.ids(len(ids))}
        if self.places and int(positions.max()) >= self.places:
            raise BackendError(f"position {positions.max()} is beyond the {self.places} places of the artifact's KV cache")
        values = {n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for n, v in feeds.items() if n in self.inputs}
        try:
            results = self.session.run_with_ort_values(self.outputs, values | self.cache, self.run_options)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed on input_ids {ids.shape}: {error}") from error
        self.results = dict(zip(self.outputs, results, strict=True))
        self.cache = self.next_cache(self.results)
        return self.result("logits")

    def next_cache(self, results: dict[str, Any]) -> dict[str, Any]:
        """The KV cache that a run's outputs, by name, leave for the next one, by the name of its input."""
        return {name: results[name.replace("past_key_values.", "present.")] for name in self.cache_inputs}

    def result(self, name: str) -> Logits:
        """Any output of the last call, as fp32."""
        return _as_float32(self.results[name])

    def _empty(self, value: Any, batch: int, device: str = "cpu") -> Any:
        """A KV cache of no tokens: [batch, KV heads, 0, head size], or as many places as a static one has, all zero."""
        _, heads, _, size = value.shape
        element = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}[value.type]  # onnx.TensorProto's numbers
        if self.places:
            return _in_dtype(np.zeros((batch, heads, self.places, size), np.float32), value.type)
        return ort.OrtValue.ortvalue_from_shape_and_type([batch, heads, 0, size], element, device, 0)


class Bound:
    """A decoder as the benchmark times it: rows of equal length, inputs and outputs where its provider computes, no copies to the host."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.session = decoder, decoder.session
        self.device = decoder.artifact.manifest.target  # cpu and cuda are ONNX Runtime's own words

    def feeds(self, ids: npt.NDArray[np.int64], past: int) -> dict[str, Any]:
        """All inputs but the cache, for ids [batch, tokens] after `past` tokens."""
        batch, tokens = ids.shape
        positions = np.tile(np.arange(past, past + tokens), (batch, 1))
        feeds = {"input_ids": ids, "attention_mask": np.ones((batch, past + tokens), np.int64), "position_ids": positions}
        feeds[ADAPTER_IDS] = self.decoder.choice.ids(batch)
        known = {name: np.ascontiguousarray(value) for name, value in feeds.items() if name in self.decoder.inputs}
        return {name: ort.OrtValue.ortvalue_from_numpy(value, self.device, 0) for name, value in known.items()}

    def empty_cache(self, batch: int) -> dict[str, Any]:
        """A KV cache of no tokens, by the name of its input."""
        return {name: self.decoder._empty(value, batch, self.device) for name, value in self.decoder.cache_inputs.items()}

    def bind(self, feeds: dict[str, Any], cache: dict[str, Any]) -> Any:
        """What `run` takes. Its outputs are new ones: a binding that has run would write over the old."""
        binding = self.session.io_binding()
        for name, value in (feeds | cache).items():
            binding.bind_ortvalue_input(name, value)
        for name in self.decoder.outputs:
            binding.bind_output(name, self.device)
        return binding

    def run(self, binding: Any) -> Any:
        """Run the graph once, and wait until its device has done. Returns the binding, for `cache_after`."""
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed on {self.decoder.artifact.model}: {error}") from error
        return binding

    def cache_after(self, binding: Any) -> dict[str, Any]:
        """The KV cache that a run has left, for the next. The binding lets go of the cache before it."""
        binding.clear_binding_inputs()
        return self.decoder.next_cache(dict(zip(self.decoder.outputs, binding.get_outputs(), strict=True)))


def _in_dtype(array: Logits, kind: str) -> Any:
    """An OrtValue of a graph input's dtype."""
    if kind == "tensor(bfloat16)":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.astype(ml_dtypes.bfloat16).view(np.uint16), 16)
    return ort.OrtValue.ortvalue_from_numpy(array.astype(np.float16 if kind == "tensor(float16)" else np.float32))


def _as_float32(value: Any) -> Logits:
    if value.data_type() == "tensor(bfloat16)":  # numpy has no bfloat16 of its own
        import torch

        return torch.utils.dlpack.from_dlpack(value).float().cpu().numpy()
    return value.numpy().astype(np.float32)  # type: ignore[no-any-return]


BACKEND = OnnxRuntime()
