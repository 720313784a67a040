"""An artifact in OpenVINO, decoding a batch of prompts; its KV cache is the request's own state. Rows are padded on the left."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import openvino as ov

from flora_export.artifact import IR, Artifact
from flora_export.backends import Limits
from flora_export.backends.choice import AdapterChoice
from flora_export.backends.openvino.convert import BEAM
from flora_export.backends.openvino.edited import silence
from flora_export.backends.padding import pad_prompts, positions_of
from flora_export.errors import BackendError

Logits = npt.NDArray[np.float32]

# A CPU with bfloat16 computes in it unless told otherwise: the first decimal of a logit is then another.
EXACTLY = {"INFERENCE_PRECISION_HINT": "f32"}


class Decoder:
    def __init__(self, artifact: Artifact, *, adapter: bool = True, threads: int = 0, model: ov.Model | None = None) -> None:
        """Compile the artifact; without its adapter, what is fed to each B is zeroed in memory.

        Args:
            threads: 0 leaves them to OpenVINO.
            model: run this graph instead of the artifact's.

        Raises:
            BackendError: OpenVINO refuses the graph.
        """
        self.artifact, self.limits, self.choice = artifact, Limits(), AdapterChoice(artifact)
        core = ov.Core()
        wanted = artifact.manifest.target.upper()
        there = [device for device in core.available_devices if device.startswith(wanted)]
        device = there[0] if there and wanted != "NPU" else "CPU"  # an NPU takes fixed shapes, which OpenVINO GenAI makes as it loads
        settings = {**EXACTLY, **({"INFERENCE_NUM_THREADS": threads} if threads and device == "CPU" else {})}
        try:
            graph = model if model is not None else core.read_model(artifact.path / IR)
            if not adapter:
                silence(graph, artifact)
            self.shapes = _cache_shapes(graph)
            self.request = core.compile_model(graph, device, settings).create_infer_request()
        except RuntimeError as error:
            raise BackendError(f"OpenVINO {ov.__version__} refuses {artifact.path / IR}: {error}") from error
        self.inputs = {name for value in graph.inputs for name in value.names}
        self.runtime = f"OpenVINO {ov.__version__}, {core.get_property(device, 'FULL_DEVICE_NAME')}"
        if device != wanted:
            self.runtime += f"; {wanted} itself was not run"

    def start(self, prompts: Sequence[Sequence[int]]) -> list[Logits]:
        """Prefill. Returns for each prompt the logits [tokens, vocabulary] of its own tokens, padding left out."""
        ids, self.mask = pad_prompts(prompts, right=False)
        self.request.reset_state()
        logits = self._run(ids, positions_of(self.mask))
        return [logits[row][self.mask[row] == 1] for row in range(len(prompts))]

    def step(self, tokens: Sequence[int]) -> Logits:
        """Decode one token of each row. Returns logits [batch, vocabulary]."""
        positions = self.mask.sum(1, keepdims=True)
        self.mask = np.pad(self.mask, ((0, 0), (0, 1)), constant_values=1)
        return self._run(np.asarray(tokens, np.int64)[:, None], positions)[:, -1]

    def cache_shapes(self) -> list[tuple[int, int]]:
        """(KV heads, head size) of each layer."""
        return self.shapes

    def resume(self, cache: Sequence[tuple[Logits, Logits]]) -> None:
        """Go on after a KV cache: keys and values per layer, each [batch, KV heads, past, head size], no row padded."""
        batch, _, past, _ = cache[0][0].shape
        self.mask = np.ones((batch, past), np.int64)
        self.request.reset_state()
        for state in self.request.query_state():
            layer, kind = _place(state.name)
            array = np.ascontiguousarray(cache[layer][kind]).astype(state.state.element_type.to_dtype())
            state.state = ov.Tensor(array)

    def _run(self, ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> Logits:
        """Logits [batch, tokens, vocabulary] of ids [batch, tokens]."""
        feeds = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions.astype(np.int64)}
        feeds[BEAM] = np.arange(len(ids), dtype=np.int32)
        try:
            self.results = self.request.infer({name: np.ascontiguousarray(value) for name, value in feeds.items() if name in self.inputs})
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed on input_ids {ids.shape}: {error}") from error
        return self.result("logits")

    def result(self, name: str) -> Logits:
        """Any output of the last call, as fp32."""
        return np.array(self.results[name], np.float32)


def _cache_shapes(model: ov.Model) -> list[tuple[int, int]]:
    found: dict[int, tuple[int, int]] = {}
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, size = node.get_output_partial_shape(0)
            layer, kind = _place(node.get_attributes()["variable_id"])
            if kind == 0:
                found[layer] = heads.get_length(), size.get_length()
    return [found[layer] for layer in sorted(found)]


def _place(variable: str) -> tuple[int, int]:
    """`past_key_values.3.valuepresent.3.value` -> (3, 1): layer, and key or value."""
    parts = variable.split(".")
    return int(parts[1]), int(parts[-1] == "value")
