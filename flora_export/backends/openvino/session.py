"""An artifact in OpenVINO, decoding a batch of prompts; its KV cache is the request's own state. Rows are padded on the left."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from flora_export.artifact import IR, Artifact
from flora_export.backends import Limits
from flora_export.backends.choice import AdapterChoice
from flora_export.backends.openvino.convert import BEAM
from flora_export.backends.openvino.edited import silence
from flora_export.backends.padding import pad_prompts, positions_of
from flora_export.errors import ArtifactError, BackendError

if TYPE_CHECKING:
    from flora_export.backends import Cache

_VARIABLE = re.compile(r"past_key_values\.(?P<layer>\d{1,6})\.(?P<kind>key|value)present\.(?P=layer)\.(?P=kind)")
Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Feeds = dict[str, npt.NDArray[Any]]

VERSION = ov.__version__.partition("-")[0]

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
            raise BackendError(f"OpenVINO {VERSION} refuses {artifact.path / IR}: {error}") from error
        self.inputs = {name for value in graph.inputs for name in value.names}
        self.runtime = f"OpenVINO {VERSION}, {core.get_property(device, 'FULL_DEVICE_NAME')}"
        if not device.startswith(wanted):
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

    def resume(self, cache: Cache) -> None:
        """Go on after a KV cache: keys and values per layer, each [batch, KV heads, past, head size], no row padded."""
        batch, _, past, _ = cache[0][0].shape
        self.mask = np.ones((batch, past), np.int64)
        self.request.reset_state()
        for state in self.request.query_state():
            layer, kind = _place(state.name)
            array = np.ascontiguousarray(cache[layer][kind]).astype(state.state.element_type.to_dtype())
            state.state = ov.Tensor(array)

    def _run(self, ids: Ids, positions: Ids) -> Logits:
        """Logits [batch, tokens, vocabulary] of ids [batch, tokens]."""
        self.results = self.infer(self.feeds(ids, self.mask, positions))
        return self.result("logits")

    def feeds(self, ids: Ids, mask: Ids, positions: Ids) -> Feeds:
        """All that the graph takes, by name."""
        given: Feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, BEAM: np.arange(len(ids), dtype=np.int32)}
        return {name: np.ascontiguousarray(value) for name, value in given.items() if name in self.inputs}

    def infer(self, feeds: Feeds) -> Any:
        """Run the graph once; the request's state grows. Returns its outputs by name, valid until the next call."""
        try:
            return self.request.infer(feeds, share_inputs=True, share_outputs=True)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed on input_ids {feeds['input_ids'].shape}: {error}") from error

    def result(self, name: str) -> Logits:
        """Any output of the last call, as fp32."""
        return np.array(self.results[name], np.float32)


class Timed:
    """A decoder as the benchmark times it. A request has one state, which nothing copies: a cache is the calls that lead to it."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.history: tuple[Feeds, ...] = ()

    def feeds(self, ids: Ids, past: int) -> Feeds:
        """All inputs, for ids [batch, tokens] after `past` tokens."""
        batch, tokens = ids.shape
        return self.decoder.feeds(ids, np.ones((batch, past + tokens), np.int64), np.tile(np.arange(past, past + tokens), (batch, 1)))

    def empty_cache(self, batch: int) -> tuple[Feeds, ...]:
        """No calls: a state of no tokens."""
        return ()

    def bind(self, feeds: Feeds, cache: tuple[Feeds, ...]) -> tuple[Feeds, ...]:
        """What `run` takes; the request's state is made what `cache` says, where it is another.

        Its last token comes alone: a step right after a prompt first sets the graph up for one token, which no later step does.
        """
        if not cache or cache is not self.history:
            self.decoder.request.reset_state()
            for call in cache:
                for part in _last_alone(call):
                    self.decoder.infer(part)
        return (*cache, feeds)

    def run(self, binding: tuple[Feeds, ...]) -> tuple[Feeds, ...]:
        """Run the graph once."""
        self.decoder.infer(binding[-1])
        self.history = binding
        return binding

    def cache_after(self, binding: tuple[Feeds, ...]) -> tuple[Feeds, ...]:
        """The KV cache that a run has left, for the next."""
        return binding


def _last_alone(call: Feeds) -> list[Feeds]:
    """A call as two, the second of its last token alone; a call of one token as itself."""
    if call["input_ids"].shape[1] == 1:
        return [call]
    before, last = ({**call, **{name: call[name][:, part] for name in ("input_ids", "position_ids")}} for part in (np.s_[:-1], np.s_[-1:]))
    return [{**before, "attention_mask": call["attention_mask"][:, :-1]}, last]


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
    match = _VARIABLE.fullmatch(variable)
    if match is None:
        raise ArtifactError(f"{IR} has a state {variable!r}, which is no layer's keys or values. Build the artifact again.")
    return int(match["layer"]), int(match["kind"] == "value")
