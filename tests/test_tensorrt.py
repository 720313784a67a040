"""The parts of the TensorRT backend that need no TensorRT: plans, lint, lowering, layer lists, the checks before an engine is loaded."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from flora_export.artifact import Artifact
from flora_export.backends.tensorrt import cache, session
from flora_export.backends.tensorrt.flavour import Flavour, choose_capabilities, load_flavour
from flora_export.backends.tensorrt.layers import parse_layers, report_layers
from flora_export.backends.tensorrt.lint import lint
from flora_export.backends.tensorrt.plan import (
    Profile,
    check_prompts,
    engine_plan,
    parse_cache,
    parse_capabilities,
    parse_ranges,
    profiles_for,
    to_json,
)
from flora_export.base_model import load_base
from flora_export.capture import capture
from flora_export.errors import ArtifactError, BackendError, FloraExportError
from flora_export.ledger import planned_entries
from flora_export.manifest import Manifest, Tensor
from flora_export.passes import lowering, run_passes

# Plans


def test_ranges() -> None:
    assert parse_ranges(["prompt=1:128:2048 batch=1:1:8"]) == {"prompt": (1, 128, 2048), "batch": (1, 1, 8)}
    assert parse_ranges(["batch=4", "past=0:1:2"]) == {"batch": (4, 4, 4), "past": (0, 1, 2)}


@pytest.mark.parametrize("text", ["tokens=1:2:3", "prompt=1:2", "prompt=3:2:1", "batch=0:1:2", "prompt", "prompt=1:2:3:4", "prompt=-1:1:1"])
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises(FloraExportError, match="--profile"):
        parse_ranges([text])


@pytest.mark.parametrize(("text", "places"), [("growing", 0), ("static:2048", 2048)])
def test_cache_forms(text: str, places: int) -> None:
    assert parse_cache(text) == places


@pytest.mark.parametrize("text", ["static", "static:0", "static:-1", "2048", ""])
def test_cache_forms_that_are_none(text: str) -> None:
    with pytest.raises(FloraExportError, match=r"growing, or static:N"):
        parse_cache(text)


def test_capabilities_that_are_none() -> None:
    assert parse_capabilities("8.6, 8.9") == ("8.6", "8.9")
    with pytest.raises(FloraExportError, match=r"a number such as 8\.9"):
        parse_capabilities("sm_89")


def test_profiles_fit_the_context_and_the_cache() -> None:
    prefill, decode = profiles_for({}, 8192, 0)
    assert (prefill.tokens, prefill.past) == ((1, 128, 2048), (0, 0, 0))
    assert (decode.tokens, decode.past) == ((1, 1, 1), (1, 256, 4095))
    prefill, decode = profiles_for({}, 64, 0)
    assert prefill.tokens[2] == 64 and decode.past[2] == 63
    prefill, decode = profiles_for({}, 8192, 100)
    assert prefill.tokens == (1, 100, 100) and decode.past[2] == 99
    prefill, decode = profiles_for({"prompt": (1, 128, 8000)}, 131072, 0)
    assert decode.past == (1, 256, 15999)  # what can be prefilled can be decoded
    with pytest.raises(FloraExportError, match="prompt goes up to 65, but a context of 64 tokens"):
        profiles_for({"prompt": (1, 1, 65)}, 64, 0)
    with pytest.raises(FloraExportError, match="past goes up to 100, but a static cache of 100 places has room for 99"):
        profiles_for({"past": (1, 1, 100)}, 8192, 100)


def test_shapes_of_a_profile() -> None:
    profile = Profile("decode", (1, 2, 4), (1, 1, 1), (1, 16, 63))
    assert profile.shape(Tensor("input_ids", "INT64", ["b", "s"]), 2) == [4, 1]
    assert profile.shape(Tensor("attention_mask", "INT64", ["b", "t"]), 1) == [2, 17]
    assert profile.shape(Tensor("past_key_values.0.key", "FLOAT16", ["b", 3, "p", 64]), 0) == [1, 3, 1, 64]
    assert profile.shape(Tensor("past_key_values.0.key", "FLOAT16", ["b", 3, 100, 64]), 0) == [1, 3, 100, 64]


@pytest.mark.parametrize(
    ("ranges", "what"),
    [
        ({"prompt": (1, 4, 10)}, "--profile prompt goes up to 10, but the golden prompts"),
        ({"prompt": (1, 4, 20), "past": (1, 4, 20)}, "--profile past goes up to 20, but the golden prompts"),
        ({"batch": (2, 2, 4)}, "--profile batch begins at 2"),
        ({"past": (1, 4, 20)}, "so a prompt of 128 tokens has no next token"),
    ],
)
def test_profiles_that_leave_out_the_golden_prompts(ranges: dict[str, Any], what: str) -> None:
    check_prompts(profiles_for({}, 128, 0), [[1] * 11], 16)
    check_prompts(profiles_for({"prompt": (1, 4, 11), "past": (1, 4, 26)}, 128, 0), [[1] * 11], 16)
    with pytest.raises(FloraExportError, match=what):
        check_prompts(profiles_for(ranges, 128, 0), [[1] * 11], 16)


# Flavours


def _flavour(name: str, version: str, capabilities: tuple[str, ...] = ("SM86", "SM89", "SM120")) -> Flavour:
    members = dict.fromkeys(("NONE", "CURRENT", *capabilities))
    return Flavour(name, version, types.SimpleNamespace(ComputeCapability=types.SimpleNamespace(__members__=members)))


def test_a_flavour_that_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"pip install 'flora-export\[tensorrt\]'"):
        load_flavour("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__="10.13.0"))  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"tensorrt is 10\.13\.0, but 11\.0 or newer is needed"):
        load_flavour("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__="11.1.0"))  # type: ignore[arg-type]
    assert load_flavour("auto").name == "tensorrt"


def test_compute_capabilities_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    at = "flora_export.backends.tensorrt.flavour.machine_capability"
    rtx, full = _flavour("rtx", "1.7"), _flavour("tensorrt", "11.0")
    monkeypatch.setattr(at, lambda: None)
    assert choose_capabilities(rtx, ("8.6", "12.0")) == ("8.6", "12.0")
    with pytest.raises(BackendError, match=r"this machine has none: give it --compute-capability, one or more of 8\.6, 8\.9, 12\.0"):
        choose_capabilities(rtx, ())
    with pytest.raises(FloraExportError, match=r"9\.0: TensorRT-RTX 1\.7 does not build for it; it builds for 8\.6, 8\.9, 12\.0"):
        choose_capabilities(rtx, ("9.0",))
    with pytest.raises(FloraExportError, match=r"TensorRT builds for the GPU of the machine alone, which is none"):
        choose_capabilities(full, ("8.9",))
    monkeypatch.setattr(at, lambda: "8.9")
    assert choose_capabilities(rtx, ()) == choose_capabilities(full, ()) == ("8.9",)


# Lint

GRAPH = """<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]>
g (float16[B,T,64] q, float16[B,2,S,16] k, float16[B,2,S,16] v, float[B,2,S,16] k32, int64[2] n, int64[B] w) => (float16[B,T,64] y) {{
  {body}
}}"""
FAULTS = {
    "y = com.microsoft.GroupQueryAttention(q, k, v)": "no operator of the ONNX standard (com.microsoft)",
    "y, a, b = Attention<q_num_heads=4, kv_num_heads=2>(q, q, q, , k, v)": "it returns the KV cache",
    "y = Attention<is_causal=1>(q, k, v)": "is_causal is aligned with the first key",
    "y = Attention(q, k, v, , , , n)": "nonpad_kv_seqlen is dropped silently",
    "y = Attention<softcap=50.0>(q, k, v)": "softcap is not supported",
    "y = Attention(k32, k32, k32)": "no kernel for Attention in fp32",
    "y = TensorScatter(k, v, w)": "no static length",
    "y, z = Split<axis=-1>(q, n)": "its sizes are computed",
}


@pytest.mark.parametrize("body", FAULTS)
def test_lint_names_the_node_and_the_reason(body: str) -> None:
    model = ir.from_onnx_text(GRAPH.format(opset=24, body=body))
    next(iter(model.graph)).name = "culprit"
    (found,) = lint(model)
    assert found.startswith("culprit (") and FAULTS[body] in found


def test_lint_of_an_opset_and_of_a_good_graph() -> None:
    assert lint(ir.from_onnx_text(GRAPH.format(opset=24, body="y = Attention(q, k, v)"))) == []
    assert "opset 21" in lint(ir.from_onnx_text(GRAPH.format(opset=21, body="y = Identity(q)")))[0]


def test_lint_knows_the_captures(base: Path) -> None:
    """What is built for other targets is refused, what is lowered is taken."""
    known = load_base(str(base))
    assert any("GroupQueryAttention" in line for line in lint(capture(known, "cpu", "fp32").model))
    model = capture(known, "tensorrt", "fp16").model
    assert any("it returns the KV cache" in line for line in lint(model))
    run_passes(model, lowering("tensorrt"))
    assert lint(model) == []


# Lowering


@pytest.mark.parametrize("cache_tokens", [0, 32])
def test_lowering_is_done_once(base: Path, cache_tokens: int) -> None:
    model = capture(load_base(str(base)), "tensorrt", "fp16").model
    (pass_,) = lowering("tensorrt", cache_tokens)
    assert pass_(model).modified
    operators = [node.op_type for node in model.graph]
    assert not pass_(model).modified
    assert [node.op_type for node in model.graph] == operators
    assert operators.count("TensorScatter") == (4 if cache_tokens else 0)
    names = [value.name for value in model.graph.inputs]
    assert ("attention_mask" in names) == (cache_tokens == 0)
    assert [value.name for value in model.graph.outputs][1:3] == ["present.0.key", "present.0.value"]


@pytest.mark.parametrize("window", [0, 3])
def test_the_mask_of_a_growing_cache(window: int, bases: Callable[[str], Path]) -> None:
    """Against the definition, token by token: left padding, a past, a window."""
    model = capture(load_base(str(bases("llama"))), "tensorrt", "fp16").model
    for node in model.graph:
        if node.op_type == "Attention" and window:
            node.metadata_props["flora_export.sliding_window"] = str(window)
    run_passes(model, lowering("tensorrt"))
    name = "ffba_mask.3.seen.out" if window else "ffba_mask.seen.out"
    model.graph.outputs[:] = [value for node in model.graph for value in node.outputs if value.name == name]
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    feeds: dict[str, Any] = {"input_ids": np.zeros((2, 2), np.int64), "attention_mask": mask, "position_ids": np.zeros((2, 2), np.int64)}
    feeds |= {v.name: np.zeros((2, 2, 3, 16), np.float16) for v in model.graph.inputs if str(v.name).startswith("past")}
    (seen,) = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options).run(None, feeds)
    assert seen.shape == (2, 1, 2, 5)
    for row in range(2):
        for token, place in enumerate((3, 4)):
            for key in range(5):
                inside = key <= place and (not window or key > place - window)
                assert seen[row, 0, token, key] == ((mask[row, key] and inside) or key == place)


# Layer lists

LAYERS = """Layers:
Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], Metadata:
Name: q+A_myl1_1, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,64] }], Metadata: [ONNX Layer: q]\x1f[ONNX Layer: A]
Name: __myl_Add_myl1_2, LayerType: kgen, Inputs: [], Metadata: [ONNX Layer: add]
Name: q [profile 1]_myl3_1, LayerType: gemm, Inputs: [], Metadata: [ONNX Layer: q]
Name: A_myl3_2, LayerType: gemm, Inputs: [], Metadata: [ONNX Layer: A]

I/O Tensors:"""


def test_layer_lists_are_traced_to_weights() -> None:
    from flora_export.weights import Part, Stacked

    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 24]> g (float[2,4] x) => (float[2,3] y, float[2,2] z)'
        " <float[4,3] w = {0,0,0,0,0,0,0,0,0,0,0,0}, float[4,2] a = {0,0,0,0,0,0,0,0}> { y = MatMul(x, w) z = MatMul(x, a) }"
    )
    for node, name in zip(model.graph, ("q", "A"), strict=True):
        node.name = name
    part = Part("block.ffba_A.weight", "adapter", 2, 1.0, lambda: np.zeros((4, 2), np.float32))
    model.graph.initializers["a"].const_value = Stacked("a", [part], 1, ir.DataType.FLOAT, [4])
    report = report_layers(LAYERS, model, planned_entries(model))
    assert report.kernels == (2, 2)
    assert [report.gemm_count(profile) for profile in (0, 1)] == [1, 2]
    merged, alone = report.gemms[0], report.gemms[2]
    assert (merged.rows, merged.columns, merged.adapters, merged.alone) == (4, 5, ("block.ffba_A.weight",), False)
    assert (alone.columns, alone.alone) == (2, True)


def test_no_layer_list_is_an_error() -> None:
    with pytest.raises(BackendError, match="lists no layers"):
        parse_layers("Layers:\n")


# Before an engine is loaded


def _artifact(path: Path, **changes: Any) -> Artifact:
    counts = {key: {"prefill": 1, "decode": 1} for key in ("kernels", "gemms")}
    engine = {
        "flavour": "rtx",
        "version": "1.7",
        "compute_capabilities": ["8.9"],
        "profiles": to_json(profiles_for({}, 128, 0)),
        "workspace_mib": None,
        "version_compatible": False,
        "refittable": False,
        "layers": {"adapted": counts, "base": None, "adapter_gemms_alone": []},
    }
    fields: dict[str, Any] = {field.name: None for field in dataclasses.fields(Manifest)}
    (path / "model.engine").write_bytes(b"engine")
    return Artifact(path, Manifest(**(fields | {"engine": engine | changes, "files": {"model.engine": {"bytes": 6}}})))


def test_an_engine_is_checked_against_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "load_flavour", lambda name: _flavour(name, "1.7"))
    artifact = _artifact(tmp_path)
    plan = engine_plan(artifact)
    assert session.check_runnable(artifact, plan, "8.9").name == "rtx"
    with pytest.raises(BackendError, match=r"for compute capability 8\.9, but this GPU has 8\.6\. Make the engine .* flora-export rebuild"):
        session.check_runnable(artifact, plan, "8.6")
    with pytest.raises(BackendError, match=r"needs an NVIDIA GPU, and PyTorch .* sees none"):
        session.check_runnable(artifact, plan, None)
    (tmp_path / "model.engine").write_bytes(b"eng")
    with pytest.raises(ArtifactError, match="3 bytes, but the manifest says 6"):
        session.check_runnable(artifact, plan, "8.9")
    monkeypatch.setattr(session, "load_flavour", lambda name: _flavour(name, "1.8"))
    with pytest.raises(BackendError, match=r"built with TensorRT-RTX 1\.7, but 1\.8 is installed"):
        session.check_runnable(artifact, plan, "8.9")


@pytest.mark.parametrize("change", [{"flavour": "other"}, {"profiles": {}}, {"profiles": {"prefill": 1}}, {"compute_capabilities": None}])
def test_a_manifest_without_a_plan(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="does not say how its engine was built"):
        engine_plan(_artifact(tmp_path, **change))


def test_the_cache_keeps_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLORA_EXPORT_CACHE", str(tmp_path))
    for index in range(cache.ENTRIES + 2):
        cache.store(f"key{index}", b"engine%d" % index, "layers")
        (tmp_path / f".part-{index}").mkdir()  # a killed build has left it
    cache.store("last", b"engine", "layers")
    assert len(list(tmp_path.iterdir())) == cache.ENTRIES
    assert cache.load(f"key{cache.ENTRIES + 1}") == (b"engine%d" % (cache.ENTRIES + 1), "layers")
    assert cache.load("key0") is None
    (tmp_path / f"key{cache.ENTRIES}" / "model.engine").write_bytes(b"other")
    assert cache.load(f"key{cache.ENTRIES}") is None
    monkeypatch.setenv("FLORA_EXPORT_CACHE", "/proc/none")
    cache.store("key", b"", "")  # nowhere to write: nothing is kept, and nothing fails
    assert cache.load("key") is None
