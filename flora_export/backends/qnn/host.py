"""What a host does with QNN: compile graphs to contexts, open them, prefill, decode. It imports nothing of flora_export.

Run as a program, it works in a process of its own: QNN's libraries for x86 print to stdout, take memory that they do not give back, and
have been seen to abort the process that they fail in.

    python host.py TASK.json ANSWER.json
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import onnxruntime_qnn as qnn

GRAPHS = ("prefill", "decode")
PROVIDER = "QNNExecutionProvider"

Array = npt.NDArray[Any]
Cache = dict[str, Array]


def devices() -> list[Any]:
    """QNN's devices here, an NPU first. On x86-64 there is one, a CPU, in which libQnnHtp simulates the HTP."""
    if not any(device.ep_name == PROVIDER for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(PROVIDER, qnn.get_library_path())
    found = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    return sorted(found, key=lambda device: device.device.type != ort.OrtHardwareDeviceType.NPU)


def open_session(file: Path, soc_model: int, htp_arch: int | None, entries: Mapping[str, str], **settings: str) -> Any:
    """A session on the HTP, or on its simulator; what the HTP does not take is an error, and does not fall back to the CPU.

    `entries` are of the session's configuration, `settings` are options of QNN.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors: nodes that are refused are named there alone
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # folds constants, fuses nothing
    for key, value in {"session.disable_cpu_ep_fallback": "1", **entries}.items():
        options.add_session_config_entry(key, value)
    provider = {"backend_path": qnn.get_qnn_htp_path(), "enable_htp_fp16_precision": "1"}
    provider |= {"soc_model": str(soc_model)} | ({"htp_arch": str(htp_arch)} if htp_arch is not None else {}) | settings
    options.add_provider_for_devices(devices()[:1], provider)
    return ort.InferenceSession(str(file), options)


def compile_contexts(
    graphs: Mapping[str, str], directory: Path, soc_model: int, htp_arch: int | None, share: bool
) -> dict[str, dict[str, Any]]:
    """A context `NAME.onnx` of each graph, by name. With `share`, all are in one binary.

    Returns for each its seconds, and how many of QNN's operators it has, before the HTP's own compiler changes them.

    The graphs are best named from their own directory: QNN names what it compiles after the path, in the context's bytes.
    """
    made, open_ = {}, []
    for name, graph in graphs.items():
        entries = {"ep.context_enable": "1", "ep.context_embed_mode": "0", "ep.context_file_path": str(directory / f"{name}.onnx")}
        if share:
            entries["ep.share_ep_contexts"] = "1"
            if name == list(graphs)[-1]:
                entries["ep.stop_share_ep_contexts"] = "1"
        with tempfile.TemporaryDirectory() as described:
            start = time.perf_counter()
            dump = {"dump_json_qnn_graph": "1", "json_qnn_graph_dir": described}
            session = open_session(Path(graph), soc_model, htp_arch, entries, **dump)
            made[name] = {"seconds": time.perf_counter() - start, "operators": count_operators(Path(described))}
        open_ += [session] if share else []  # the next is added to it
        del session
    return made


def count_operators(directory: Path) -> dict[str, int]:
    """How many operators of each type the graph has that QNN has described there."""
    graphs = [json.loads(file.read_text(encoding="utf-8")).get("graph") for file in directory.glob("*.json")]
    return dict(sorted(Counter(node["type"] for graph in graphs if graph for node in graph["nodes"].values()).items()))


class Contexts:
    """`prefill.onnx` and `decode.onnx` of a directory, opened. One row at a time."""

    def __init__(self, directory: Path, soc_model: int, htp_arch: int | None, share: bool) -> None:
        entries = {"ep.share_ep_contexts": "1"} if share else {}
        self.prefill, self.decode = (open_session(directory / f"{name}.onnx", soc_model, htp_arch, entries) for name in GRAPHS)
        self.tokens = int(self.prefill.get_inputs()[0].shape[1])
        self.shapes = {value.name: value.shape for value in self.decode.get_inputs() if value.name.startswith("past_key_values.")}
        self.outputs = [value.name for value in self.decode.get_outputs()]

    def start(self, prompt: Sequence[int]) -> tuple[Array, Cache]:
        """Prefill, in `prefill` as far as that goes, the rest token by token. Returns logits [tokens, vocabulary] in fp32, and the cache.

        Padding follows the prompt; what it leaves in the cache is overwritten before it is seen.
        """
        first = min(len(prompt), self.tokens)
        ids = np.zeros((1, self.tokens), np.int64)
        ids[0, :first] = prompt[:first]
        logits, cache = self._run(self.prefill, {"input_ids": ids})
        rows = [logits[0, :first]]
        for position in range(first, len(prompt)):
            row, cache = self.step(prompt[position], position, cache)
            rows.append(row[None])
        return np.concatenate(rows), cache

    def step(self, token: int, position: int, cache: Cache) -> tuple[Array, Cache]:
        """Decode a token at its position. Returns logits [vocabulary] in fp32, and the cache."""
        feeds = {"input_ids": np.array([[token]], np.int64), "position_ids": np.array([[position]], np.int64)}
        logits, cache = self._run(self.decode, feeds | cache)
        return logits[0, 0], cache

    def _run(self, session: Any, feeds: Mapping[str, Array]) -> tuple[Array, Cache]:
        results = dict(zip(self.outputs, session.run(self.outputs, feeds), strict=True))
        cache = {name: results[name.replace("past_key_values.", "present.")] for name in self.shapes}
        return results["logits"].astype(np.float32), cache


def main(task: dict[str, Any]) -> dict[str, Any]:
    chip = (task["soc_model"], task["htp_arch"])
    directory = Path(task["directory"])
    if "graphs" in task:
        return {"done": True, "made": compile_contexts(task["graphs"], directory, *chip, task["share"])}
    contexts = Contexts(directory, *chip, task["share"])
    rows, cache = contexts.start(task["prompt"])
    logits = [*rows]
    for position, token in enumerate(task["tokens"], len(task["prompt"])):
        row, cache = contexts.step(token, position, cache)
        logits.append(row)
    np.save(task["logits"], np.stack(logits))
    return {"done": True}


if __name__ == "__main__":
    try:
        answer = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except Exception as failure:  # ONNX Runtime raises several types, none public
        answer = {"error": str(failure)}
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
