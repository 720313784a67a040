"""Where ONNX Runtime reads a weight that a program gives it, in every run: a bank's stacks are replaced there (examples/cpp/stack.hpp)."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

WRITES = {  # what reads the weight -> whether a later write counts
    "at an index that goes in": ("a = Gather(W, i) y = MatMul(x, a)", (3, 8, 8), "0", True),
    "at a constant index": ("zero = Constant<value_ints = [0]>() a = Gather(W, zero) y = MatMul(x, a)", (3, 8, 8), "0", False),
    "packed": ("y = MatMul(x, W)", (8, 8), "0", False),
    "not packed": ("y = MatMul(x, W)", (8, 8), "1", True),
}


@pytest.mark.parametrize("name", WRITES)
def test_where_onnxruntime_reads_given_memory_in_every_run(name: str) -> None:
    """Not where a copy was made of it when the session was."""
    body, shape, unpacked, counts = WRITES[name]
    dims = ", ".join(map(str, shape))
    text = f'<ir_version: 10, opset_import: ["": 20]> g (float[1, 2, 8] x, int64[1] i) => (float[a, b, c] y) <float[{dims}] W> {{ {body} }}'
    model = onnx.parser.parse_model(text)
    memory = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(memory, "W"))
    options, lent = ort.SessionOptions(), ort.OrtValue.ortvalue_from_numpy(memory)
    options.add_initializer("W", lent)
    options.add_session_config_entry("session.disable_prepacking", unpacked)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": np.ones((1, 2, 8), np.float32), "i": np.array([1])}
    before = session.run(None, feeds)[0]
    memory *= 2
    np.testing.assert_array_equal(session.run(None, feeds)[0], before * 2 if counts else before)  # twice is exact
    memory /= 2
    np.testing.assert_array_equal(session.run(None, feeds)[0], before)
