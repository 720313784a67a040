"""The graph algebra on tiny graphs written as ONNX text: structure, numbers, idempotence, and the refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from flora_export.branch import Branch
from flora_export.checkpoint import Checkpoint
from flora_export.errors import FusionError
from flora_export.passes import passes_for, run_passes
from flora_export.passes.hosts import find_hosts
from flora_export.weights import Part, parts_of, widen

D, F, R = 8, 12, 3
BLOCK = "model.layers.0.mlp"
RNG = np.random.default_rng(0)
MATRICES = {m: RNG.standard_normal((D, R) if m == "B" else (R, D)).astype(np.float32) for m in "ABG"}

GATED = """<ir_version: 10, opset_import: ["": 21]>
g (float[n, 8] x) => (float[n, 8] out) {
    gate = MatMul(x, W_gate)
    s = Sigmoid(gate)
    a = Mul(gate, s)
    up = MatMul(x, W_up)
    h = Mul(a, up)
    y = MatMul(h, W_down)
    out = Add(x, y)
}"""
PACKED = """<ir_version: 10, opset_import: ["": 21]>
g (float[n, 8] x) => (float[n, 8] out) {
    both = MatMul(x, W_gate_up)
    gate, up = Split<axis: int = -1>(both, sizes)
    a = Gelu(gate)
    h = Mul(a, up)
    y = MatMul(h, W_down)
    out = Add(x, y)
}"""
PLAIN = """<ir_version: 10, opset_import: ["": 21]>
g (float[n, 8] x) => (float[n, 8] out) {
    u = MatMul(x, W_up)
    ub = Add(u, W_up_bias)
    h = Relu(ub)
    y = MatMul(h, W_down)
    yb = Add(y, W_down_bias)
    out = Add(x, yb)
}"""


class Adapter(Checkpoint):
    """A checkpoint that has its numbers at hand."""

    def __init__(self) -> None:
        super().__init__(Path(), {}, (), {})

    def matrix(self, branch: Branch, matrix: str) -> Any:
        return MATRICES[matrix]


def graph(text: str, block: str = BLOCK) -> ir.Model:
    """The text's W_name are weights named {block}.name; ONNX text has no dots in names."""
    model = ir.from_onnx_text(text)
    shapes = {"gate": (D, F), "up": (D, F), "gate_up": (D, 2 * F), "down": (F, D), "up_bias": (F,), "down_bias": (D,)}
    rng = np.random.default_rng(1)
    found = {v.name: v for node in model.graph for v in node.inputs if v is not None and v.producer() is None}
    for name, value in found.items():
        if name == "x":
            continue
        array = np.array([F, F]) if name == "sizes" else rng.standard_normal(shapes[name[2:]]).astype(np.float32)
        value.name = name if name == "sizes" else f"{block}.{name[2:]}"
        value.const_value = ir.tensor(array, name=value.name)
        value.shape, value.dtype = value.const_value.shape, value.const_value.dtype
        model.graph.register_initializer(value)
    return model


def branch(activation: str) -> Branch:
    return Branch(BLOCK, "mlp", activation, R, 0.5)


def fused(text: str, activation: str, fuse: str) -> tuple[ir.Model, tuple[Branch, ...]]:
    model = graph(text)
    branches = find_hosts(model, [branch(activation)], D)
    run_passes(model, passes_for(fuse, branches, Adapter()))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model, branches


def run(model: ir.Model, x: np.ndarray[Any, Any]) -> Any:
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def effect(text: str, activation: str, x: np.ndarray[Any, Any]) -> Any:
    """s · B φ(A x), by hand."""
    a = x @ MATRICES["A"].T
    if activation == "gated":
        g = x @ MATRICES["G"].T
        host = g / (1 + np.exp(-g)) if text is GATED else g * 0.5 * (1 + np.vectorize(_erf)(g / np.sqrt(2)))
        z = host * a
    else:
        z = {"identity": a, "relu": np.maximum(a, 0), "silu": a / (1 + np.exp(-a))}[activation]
    return 0.5 * z @ MATRICES["B"].T


def _erf(value: float) -> float:
    import math

    return math.erf(value)


CASES = [(GATED, "gated"), (GATED, "identity"), (GATED, "silu"), (PACKED, "gated"), (PACKED, "relu"), (PLAIN, "relu"), (PLAIN, "identity")]


@pytest.mark.parametrize("fuse", ["none", "forward", "backward", "both"])
@pytest.mark.parametrize(("text", "activation"), CASES)
def test_numbers(text: str, activation: str, fuse: str) -> None:
    x = np.random.default_rng(2).standard_normal((5, D)).astype(np.float32)
    expected = run(graph(text), x) + effect(text, activation, x)
    model, _ = fused(text, activation, fuse)
    np.testing.assert_allclose(run(model, x), expected, rtol=0, atol=3e-5)  # fp32, values of about 30
    assert np.abs(effect(text, activation, x)).max() > 1


@pytest.mark.parametrize(
    ("text", "activation", "added"),
    [(GATED, "gated", []), (PACKED, "gated", []), (PLAIN, "relu", []), (GATED, "silu", ["Concat", "Mul", "Sigmoid", "Split"])],
)
def test_fused_graphs_have_no_more_gemms(text: str, activation: str, added: list[str]) -> None:
    before = sorted(node.op_type for node in graph(text).graph)
    model, _ = fused(text, activation, "both")
    assert sorted(node.op_type for node in model.graph) == sorted(before + added)


@pytest.mark.parametrize("fuse", ["none", "forward", "backward", "both"])
@pytest.mark.parametrize(("text", "activation"), CASES)
def test_a_second_run_changes_nothing(text: str, activation: str, fuse: str) -> None:
    model, branches = fused(text, activation, fuse)
    once = ir.to_proto(model).SerializeToString(deterministic=True)
    for pass_ in passes_for(fuse, branches, Adapter()):
        assert not pass_(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == once


def test_passes_report_what_they_did() -> None:
    model = graph(GATED)
    branches = find_hosts(model, [branch("silu")], D)
    assert [pass_(model).modified for pass_ in passes_for("both", branches, Adapter())] == [True, False, True, True]


def test_packed_halves_are_widened_half_by_half() -> None:
    model, _ = fused(PACKED, "gated", "both")
    axis, parts = parts_of(model.graph.initializers[f"{BLOCK}.gate_up"])
    assert axis == 1
    assert [(part.tensor.rpartition("model.")[2], part.size) for part in parts] == [
        (f"layers.0.mlp.gate_up[:{F}]", F), ("layers.0.mlp.ffba_G.weight", R),
        (f"layers.0.mlp.gate_up[{F}:]", F), ("layers.0.mlp.ffba_A.weight", R),
    ]  # fmt: skip


def test_the_scale_is_in_b_alone() -> None:
    model, _ = fused(GATED, "gated", "both")
    for name, scale in (("gate", 1.0), ("up", 1.0), ("down", 0.5)):
        assert [part.scale for part in parts_of(model.graph.initializers[f"{BLOCK}.{name}"])[1]] == [1.0, scale]


def test_weights_are_widened_lazily() -> None:
    """Nothing is read before the model is saved, and every weight then once."""
    reads = []
    part = Part("w", "adapter", 2, 1.0, lambda: reads.append(1) or np.ones((4, 2), np.float32))
    value = ir.Value(
        name="v", shape=ir.Shape([4, 3]), type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(np.zeros((4, 3), np.float32))
    )
    widen(value, 1, [(3, part)])
    assert (list(value.shape or ()), reads) == ([4, 5], [])
    assert value.const_value is not None
    np.testing.assert_array_equal(value.const_value.numpy(), [[0, 0, 0, 1, 1]] * 4)
    assert reads == [1]
    with pytest.raises(FusionError, match="widened along axis 1 already"):
        widen(value, 0, [(4, part)])


SHARED = GATED.replace("out = Add(x, y)", "z = ReduceMean(W_down)\n    t = Add(x, z)\n    out = Add(t, y)")
CURVED = GATED.replace("a = Mul(gate, s)", "a = Softmax(gate)")
TWO_INPUTS = GATED.replace("up = MatMul(x,", "up = MatMul(s2,").replace("up =", "s2 = Relu(x)\n    up =")
COMPUTED = PACKED.replace("sizes)", "computed)").replace("gate, up", "computed = Add(sizes, sizes)\n    gate, up")
REFUSALS = [
    (SHARED, r"mlp\.down is shared by 2 nodes \(MatMul .*, ReduceMean"),
    (CURVED, r"cannot prove that the input of model\.layers\.0\.mlp\.down"),
    (PLAIN, "is not a gated MLP in the graph"),
    (TWO_INPUTS, "expected first projections .* but the last ones are"),
    (COMPUTED, "has computed sizes"),
]


@pytest.mark.parametrize(("text", "message"), REFUSALS, ids=[r[1][:30] for r in REFUSALS])
def test_what_cannot_be_proved_is_refused(text: str, message: str) -> None:
    with pytest.raises(FusionError, match=message):
        fused(text, "gated", "both")


def test_another_block_is_refused() -> None:
    with pytest.raises(FusionError, match=r"model\.layers\.0\.mlp: the captured graph has no projection of that name"):
        find_hosts(graph(GATED, "model.layers.1.mlp"), [branch("gated")], D)


def test_another_width_is_refused() -> None:
    with pytest.raises(FusionError, match="should be the model's width 16"):
        find_hosts(graph(GATED), [branch("gated")], 16)


def test_overflow_of_fp16_is_refused() -> None:
    model = graph(GATED)
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)  # type: ignore[union-attr]
        value.dtype = ir.DataType.FLOAT16
    (host,) = find_hosts(model, [branch("gated")], D)
    run_passes(model, passes_for("both", [replace(host, scale=1e6)], Adapter()))
    with pytest.raises(FusionError, match="B, scaled, overflows FLOAT16: build with --precision fp32"):
        model.graph.initializers[f"{BLOCK}.down"].const_value.numpy()  # type: ignore[union-attr]
