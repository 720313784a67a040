"""Decoding in ONNX Runtime: a prompt is read alone, and all requests that are answering take each step together.

    KV cache of a layer, key or value: [rows, KV heads, places, head size]; row i holds `tokens` of them, the rest is not read

GroupQueryAttention counts a row's tokens by the attention mask, so rows need not be equally long, and writes the new key and value into
the cache that it was given where that is also bound as its result: a step reads the weights once for all rows, and copies no cache. Where a
graph has no GroupQueryAttention, or computes on a GPU (which we have not run), each row steps alone with a cache of its own.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

PREFILL = 512  # prompt tokens in one turn: a longer prompt would keep the others waiting
GROWTH = 256  # places of the KV cache are a multiple of this
BFLOAT16 = 16  # onnx.TensorProto's number
TYPES = {"tensor(float)": (np.float32, 1), "tensor(float16)": (np.float16, 10), "tensor(bfloat16)": (np.uint16, BFLOAT16)}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

Logits = npt.NDArray[np.float32]


class Row:
    """A request in the decoder: its prompt, of a bank its adapter's slot, and how far it has come."""

    def __init__(self, prompt: Sequence[int], room: int, slot: int | None = None) -> None:
        """`room`: at most so many tokens are added to the prompt."""
        self.prompt, self.slot = prompt, slot
        self.most = len(prompt) + room
        self.token = -1  # the next one to be run
        self.tokens = 0  # in its KV cache
        self.cache: dict[str, Any] = {}  # by the name of the input, while it has one of its own


class Decoder:
    """An artifact's graph, and the rows that take its steps."""

    def __init__(self, directory: Path, threads: int = 0) -> None:
        """Load it. `threads` of one operator; 0 leaves it to ONNX Runtime."""
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        names = json.loads((directory / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # a plan of memory for each of many shapes
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # an idle model leaves the processor to others
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # a DequantizeLinear is what the graph says it is
        self._device = manifest["target"]
        self._session = ort.InferenceSession(directory / names["filename"], options, providers=[PROVIDERS[self._device]])
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._logits = next(value for value in self._session.get_outputs() if value.name == names["outputs"]["logits"])
        self._present = {
            names["inputs"][f"past_{kind}_names"] % layer: names["outputs"][f"present_{kind}_names"] % layer
            for layer in range(names["num_hidden_layers"])
            for kind in ("key", "value")
        }  # by the name of the input, the output that follows it
        self._together = manifest["padding"] == "right" and self._device == "cpu"
        self._switch = _longrope_switch(json.loads((directory / "config.json").read_text(encoding="utf-8")))
        self._room = 0, 0  # rows, places
        self._memory: dict[str, npt.NDArray[Any]] = {}
        self._bindings: dict[tuple[int, int], Any] = {}  # of rows [first, last)
        self.rows: list[Row] = []

    def read(self, row: Row) -> Logits | None:
        """The next part of a prompt. Returns logits [vocabulary] once it has been read to its end."""
        whole = 0 < self._switch < len(row.prompt)  # with the frequencies of its full length, as transformers has them
        part = row.prompt[row.tokens : None if whole else row.tokens + PREFILL]
        logits = self._alone(row, part)
        return logits[-1] if row.tokens == len(row.prompt) else None

    def join(self, row: Row) -> None:
        """From now on a row that has been read takes each step. Raises MemoryError where its cache finds no room, and changes nothing."""
        if self._together:
            self._resize([*self.rows, row])
            for name, value in row.cache.items():
                self._memory[name][len(self.rows), :, : row.tokens] = value.numpy()[0]
            row.cache, self._bindings = {}, {}
        self.rows.append(row)

    def leave(self, row: Row) -> None:
        """Take a row out; the last one takes its place."""
        place, last = self.rows.index(row), self.rows.pop()
        if last is not row:
            self.rows[place] = last
            for array in self._memory.values():
                array[place, :, : last.tokens] = array[len(self.rows), :, : last.tokens]
        row.cache, self._bindings = {}, {}
        if self._together:
            with contextlib.suppress(MemoryError):  # it stays as large as it is
                self._resize(self.rows)

    def step(self) -> list[tuple[Row, Logits]]:
        """Run the next token of each row. Returns the rows with their logits [vocabulary]."""
        if not self._together:
            return [(row, self._alone(row, [row.token])[-1]) for row in self.rows]
        logits = [row for first, last in self._spans() for row in self._step(first, last)]
        return list(zip(self.rows, logits, strict=True))

    def _spans(self) -> list[tuple[int, int]]:
        """Rows [first, last) of one run. longrope has one frequency for a run: no row's is to depend on another's length."""
        longer = {row.tokens + 1 > self._switch for row in self.rows}
        if self._switch and len(longer) > 1:
            return [(place, place + 1) for place in range(len(self.rows))]
        return [(0, len(self.rows))]

    def _step(self, first: int, last: int) -> Logits:
        rows = self.rows[first:last]
        binding = self._bindings.get((first, last))
        if binding is None:
            binding = self._bindings[first, last] = self._session.io_binding()
            for name, present in self._present.items():
                value = self._value(self._memory[name][first:last], name)
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(present, value)
        logits: Logits = self._run(binding, rows, np.array([[row.token] for row in rows], np.int64))[:, -1]
        return logits

    def _alone(self, row: Row, tokens: Sequence[int]) -> Logits:
        """Some tokens more in the cache of one row. Returns logits [tokens, vocabulary]."""
        binding = self._session.io_binding()
        for name, present in self._present.items():
            _, heads, _, size = self._inputs[name].shape
            empty = [1, heads, 0, size], TYPES[self._inputs[name].type][1]
            binding.bind_ortvalue_input(name, row.cache.get(name) or ort.OrtValue.ortvalue_from_shape_and_type(*empty))
            binding.bind_output(present, self._device)
        logits: Logits = self._run(binding, [row], np.array([tokens], np.int64))[0]
        row.cache = dict(zip(self._present, binding.get_outputs(), strict=False))  # in the order of binding: the logits come last
        return logits

    def _run(self, binding: Any, rows: Sequence[Row], ids: npt.NDArray[np.int64]) -> Logits:
        """Run ids [rows, tokens], each row's after those in its cache. Returns logits [rows, tokens, vocabulary]."""
        past, count = np.array([row.tokens for row in rows]), ids.shape[1]
        feeds = {
            "input_ids": ids,
            "attention_mask": (np.arange(past.max() + count) < (past + count)[:, None]).astype(np.int64),
            "position_ids": past[:, None] + np.arange(count),
            "adapter_ids": np.array([row.slot if row.slot is not None else -1 for row in rows], np.int64),
        }
        for name in feeds.keys() & self._inputs.keys():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(feeds[name])))
        kind, element = TYPES[self._logits.type]
        logits: npt.NDArray[Any] = np.empty((*ids.shape, self._logits.shape[-1]), kind)
        binding.bind_ortvalue_output(self._logits.name, ort.OrtValue.ortvalue_from_numpy_with_onnx_type(logits, element))
        self._session.run_with_iobinding(binding)
        for row in rows:
            row.tokens += count
        if element == BFLOAT16:
            logits = (logits.astype(np.uint32) << 16).view(np.float32)
        return logits.astype(np.float32, copy=False)

    def _resize(self, rows: Sequence[Row]) -> None:
        """Have room for `rows`, and give back what is more than four times that. Pages that no row has written take no memory."""
        places = -(-max((row.most for row in rows), default=0) // GROWTH) * GROWTH
        room = 1 << (len(rows) - 1).bit_length() if rows else 0, places
        if all(new <= old for new, old in zip(room, self._room, strict=True)) and math.prod(self._room) <= 4 * math.prod(room):
            return
        memory = {}
        for name in self._present if rows else ():
            _, heads, _, size = self._inputs[name].shape
            memory[name] = np.zeros((room[0], heads, room[1], size), TYPES[self._inputs[name].type][0])
            for place, row in enumerate(self.rows):
                memory[name][place, :, : row.tokens] = self._memory[name][place, :, : row.tokens]
        self._memory, self._room, self._bindings = memory, room, {}

    def _value(self, array: npt.NDArray[Any], name: str) -> Any:
        """An OrtValue on the memory of an array."""
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, TYPES[self._inputs[name].type][1])


def _longrope_switch(config: dict[str, Any]) -> int:
    """The tokens beyond which longrope has other frequencies; 0 where there are none."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) != "longrope":
        return 0
    return int(rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or 0)
