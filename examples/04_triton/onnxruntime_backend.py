"""Stands in for Triton's ONNX Runtime backend where only the Python backend is at hand: backends/onnxruntime/model.py.

For tests and trials on a machine without NVIDIA's container. It runs the same model.onnx in the same runtime, on the CPU, but through the
Python backend: tensors are copied once more, so it says nothing of the real backend's speed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before it is imported, else it reports to its makers

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(config["parameters"].get("intra_op_thread_count", {}).get("string_value", 0))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        file = Path(args["model_repository"]) / args["model_version"] / (config["default_model_filename"] or "model.onnx")
        self.session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.outputs = [output["name"] for output in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run a dynamic batch: requests of equal shapes but for the first dimension."""
        feeds = [{tensor.name(): tensor.as_numpy() for tensor in request.inputs()} for request in requests]
        try:
            results = self.session.run(self.outputs, {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]})
        except Exception as error:  # ONNX Runtime raises several types, none public
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))) for _ in requests]
        ends = np.cumsum([len(feed["input_ids"]) for feed in feeds])
        split = [np.split(result, ends[:-1]) for result in results]
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(n, np.ascontiguousarray(part[i])) for n, part in zip(self.outputs, split, strict=True)]
            )
            for i in range(len(requests))
        ]
