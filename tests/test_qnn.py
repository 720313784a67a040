"""The QNN backend: static graphs beside the portable one, refusals; and, with onnxruntime-qnn, contexts made, run, damaged, rebuilt."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result

from flora_export.artifact import MODEL, Artifact, open_artifact
from flora_export.backends import load_backend
from flora_export.backends.edited import edited_graph
from flora_export.backends.qnn import session
from flora_export.backends.qnn.apart import failure, run_apart
from flora_export.backends.qnn.context import CONTEXTS, compile_contexts, static_graphs
from flora_export.backends.qnn.lint import lint
from flora_export.backends.qnn.plan import ContextOptions, choose_chip, choose_shapes, context_plan, read_options
from flora_export.backends.qnn.session import PortableDecoder, QnnDecoder, check_contexts
from flora_export.backends.qnn.simulate import SHARE, compare, portable_logits, prove
from flora_export.backends.qnn.static import fix_shapes
from flora_export.base_model import load_base
from flora_export.capture import capture
from flora_export.cli import main
from flora_export.errors import ArtifactError, BackendError, FloraExportError, FusionError, VerificationError
from flora_export.passes import lowering, run_passes
from flora_export.pipeline import BuildOptions, build
from tests.conftest import silent
from tests.families import FAMILIES, make_adapter, make_lora

TOKENS, PLACES = 16, 64
SMALL = ["--precision", "fp16", "--kv-cache", f"static:{PLACES}", "--prompt-tokens", TOKENS]


def _why_not() -> str:
    """Why contexts cannot be compiled here; empty where they can."""
    try:
        from flora_export.backends.qnn import host

        return "" if host.devices() else "QNN has no device here"
    except (ImportError, OSError, RuntimeError) as error:
        return f"onnxruntime-qnn cannot be loaded: {error}"


compiles = pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "it can")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# Static graphs, without QNN


@pytest.fixture(scope="module")
def portable(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact whose contexts are missing: all that needs no QNN."""
    out = tmp_path_factory.mktemp("portable") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flora_export.backends.qnn.installed_version", lambda: "0")
        patch.setattr("flora_export.backends.qnn.Qnn._compile", lambda self, artifact, *_: artifact.manifest)
        own = ContextOptions(TOKENS, PLACES, simulate=False)
        artifact, _ = build(adapter, str(base), out, BuildOptions("qnn", precision="fp16", verify=False, settings=own), silent)
    return artifact


def _session(file: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # both sides in the same order of operations
    options.log_severity_level = 3
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _call(runner: ort.InferenceSession, feeds: dict[str, Any]) -> dict[str, Any]:
    wanted = {value.name for value in runner.get_inputs()}
    names = [value.name for value in runner.get_outputs()]
    return dict(zip(names, runner.run(names, {name: feeds[name] for name in wanted}), strict=True))


@pytest.mark.parametrize("tokens", [TOKENS, PLACES])
def test_static_graphs_are_the_portable_graph(portable: Artifact, tokens: int, tmp_path: Path) -> None:
    """Prefill and two steps, the cache of each included, bit for bit: the rewriting moves numbers and computes none."""
    out = Path(shutil.copytree(portable.path, tmp_path / "out"))
    whole = _session(out / MODEL)
    with static_graphs(out, tokens) as files:
        for file in files:
            model = ir.load(file)
            values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
            assert all(value.shape is not None and all(isinstance(size, int) for size in value.shape) for value in values)
            assert not {"TensorScatter", "Attention"} & {node.op_type for node in model.graph}
        prefill, decode = map(_session, files)
    assert [value.name for value in prefill.get_inputs()] == ["input_ids"]
    assert not list(out.glob(".*")), "the static graphs are gone"
    ids = np.random.default_rng(0).integers(0, 128, (1, tokens))
    empty = {v.name: np.zeros([1, *v.shape[1:]], np.float16) for v in whole.get_inputs() if v.name.startswith("past")}
    expected = _call(whole, {"input_ids": ids, "position_ids": np.arange(tokens)[None], **empty})
    got = _call(prefill, {"input_ids": ids})
    for position in (5, 6):  # after a padded prompt: what padding has written is overwritten before it is seen
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)
        feeds = {"input_ids": np.array([[position]]), "position_ids": np.array([[position]])}
        expected, got = (
            _call(runner, feeds | {name.replace("present.", "past_key_values."): value for name, value in before.items()})
            for runner, before in ((whole, expected), (decode, got))
        )
    np.testing.assert_array_equal(got["logits"], expected["logits"])
    assert np.any(got["present.0.key"][:, :, 6]) and np.array_equal(got["present.0.key"], expected["present.0.key"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dimension_is_fixed_for_each_family(family: str, bases: Callable[[str], Path]) -> None:
    """And nothing is left of a rank that QNN refuses (a soft cap's Tanh) or gets wrong (the norms of queries and keys)."""
    for tokens in (8, 1):
        model = capture(load_base(str(bases(family))), "qnn", "fp16").model
        run_passes(model, lowering("qnn", 32))
        assert lint(model) == []
        fix_shapes(model, tokens)
        for node in model.graph:
            assert all(value.shape is not None and all(isinstance(size, int) for size in value.shape) for value in node.outputs), node.name
            if node.op_type in ("RMSNormalization", "Tanh"):
                assert node.inputs[0] is not None and node.inputs[0].shape is not None and len(node.inputs[0].shape) <= 3


def test_a_growing_cache_is_refused(base: Path) -> None:
    model = capture(load_base(str(base)), "qnn", "fp16").model
    run_passes(model, lowering("qnn"))
    with pytest.raises(FusionError, match="not every dimension of it is known"):
        fix_shapes(model, 1)


def test_lint_knows_the_captures(base: Path) -> None:
    known = load_base(str(base))
    assert any("GroupQueryAttention" in line for line in lint(capture(known, "cpu", "fp32").model))
    assert any("QNN has no Attention" in line for line in lint(capture(known, "qnn", "fp16").model))


# Options and refusals, without QNN


def test_shapes_and_chips() -> None:
    assert choose_shapes(ContextOptions(), 8192) == (128, 512)
    assert choose_shapes(ContextOptions(), 64) == (64, 64)
    assert choose_shapes(ContextOptions(16, 100), 8192) == (16, 100)
    for options, message in (
        (ContextOptions(200, 100), "--prompt-tokens 200: expected 2 to 100"),
        (ContextOptions(None, 16), "32 places to"),
    ):
        with pytest.raises(FloraExportError, match=message):
            choose_shapes(options, 8192)
    assert choose_chip(ContextOptions()) == (69, 79)
    assert choose_chip(ContextOptions(soc_model=57)) == (57, None), "another chip has another architecture: its own"
    assert choose_chip(ContextOptions(), 57, 75) == (57, 75)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_cache": "growing"}, "a context has fixed shapes"),
        ({"htp_arch": 61}, "--htp-arch 61: QNN knows 68, 69, 73"),
        ({"compute_capability": "8.9"}, "--compute-capability is no option of --backend qnn"),
        ({"block_size": 32}, "--block-size is no option of --backend qnn"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(FloraExportError, match=message):
        read_options(given)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "the HTP has no arithmetic in fp32, and would compute in fp16 whatever the graph says. Pass --precision fp16"),
        (["--precision", "bf16"], 2, "Pass --precision fp16"),
        (["--precision", "int8"], 2, "moved logits of SmolLM2 by 2.5 to 3.4"),
        (["--precision", "int4"], 2, "Pass --precision fp16"),
        (["--precision", "fp16", "--target", "cpu"], 2, "backend qnn does not build for cpu; it builds for npu"),
        (["--precision", "fp16", "--prompt-tokens", "200"], 2, "--prompt-tokens 200: expected 2 to 128"),
        (["--precision", "fp16", "--workspace", "64"], 2, "--workspace is no option of --backend qnn"),
        (["--precision", "fp16"], 3, "pip install 'flora-export[qnn]'"),
    ],
)  # fmt: skip
def test_bad_input_leaves_the_output_as_it_was(
    arguments: list[str], code: int, message: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("build", adapter, "--base", base, "--backend", "qnn", "--output", tmp_path / "out", *arguments)
    assert (result.exit_code, message in result.output) == (code, True), result.output
    assert list(tmp_path.iterdir()) == []


def test_options_are_refused_elsewhere(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = run("build", adapter, "--base", base, "--backend", "onnxruntime", "--output", tmp_path / "out", "--soc-model", "57")
    assert result.exit_code == 2 and "--soc-model is no option of --backend onnxruntime" in result.output


def test_a_backend_that_cannot_be_imported_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flora_export.backends.qnn", None)
    with pytest.raises(BackendError, match=r"pip install 'flora-export\[qnn\]'"):
        load_backend("qnn")
    monkeypatch.setitem(sys.modules, "flora_export.backends.onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install 'flora-export\[cpu\]' or \[gpu\]"):
        load_backend("onnxruntime")


def test_what_qnn_says_becomes_a_reason() -> None:
    log = "E: Unsupported nodes in QNN EP: { name: a.tanh, type: Tanh }{ name: b, type: Attention }\nE: { name: b, type: Attention }"
    assert "does not take 2 nodes of the graph: a.tanh (Tanh), b (Attention)" in failure("fallback is disabled", log, 0)
    assert "QNN_DEVICE_ERROR_INVALID_CONFIG: Invalid" in failure("fallback", "x Error: QNN_DEVICE_ERROR_INVALID_CONFIG: Invalid values", 0)
    assert "died of signal 6" in failure("", "something", -6)


def test_the_rule_of_the_simulator() -> None:
    portable = np.array([[1.0, 4.0, 0.0], [0.0, 8.0, 7.95]], np.float32)
    assert compare(portable + np.float32(0.09), portable, effect=1.0).faults == []
    assert "logits are off by 0.2" in compare(portable + np.float32(0.2), portable, effect=1.0).faults[0]
    swapped = portable.copy()
    swapped[1] = 0.0, 7.95, 8.0  # within TIE of the largest: equals
    assert compare(swapped, portable, effect=1.0).faults == []
    swapped[0] = 4.0, 1.0, 0.0
    assert compare(swapped, portable, effect=100.0).faults == ["another token is first at 1 of 2 positions"]
    assert compare(portable * np.float32(np.nan), portable, effect=1.0).faults
    assert compare(portable, portable, effect=0.0).faults == [] and compare(portable + np.float32(0.1), portable, effect=0.0).faults


def test_a_host_with_an_npu(portable: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is an NPU the contexts are run; a finished artifact alone, since one that is built may be meant for another chip."""
    monkeypatch.setattr("flora_export.backends.qnn.has_npu", lambda: True)
    monkeypatch.setattr("flora_export.backends.qnn.QnnDecoder", lambda artifact: "on the NPU")
    monkeypatch.setattr("flora_export.backends.qnn.context_plan", lambda artifact: None)  # it has none
    backend = load_backend("qnn")
    assert backend.decode(portable) == "on the NPU"
    assert isinstance(backend.decode(portable, adapter=False), PortableDecoder)
    assert isinstance(backend.decode_stored(portable), PortableDecoder)  # the base model, of a merged adapter
    assert isinstance(backend.decode(Artifact(portable.path, dataclasses.replace(portable.manifest, files={}))), PortableDecoder)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert not session.has_npu()


# Contexts, with QNN


@pytest.fixture(scope="module")
def built(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("qnn") / "out"
    result = run("build", adapter, "--base", base, "--backend", "qnn", "--output", out, *SMALL, "--json")
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


@pytest.fixture
def out(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(built[0], tmp_path / "out"))


@compiles
def test_build(built: tuple[Path, dict[str, Any]]) -> None:
    out, answer = built
    assert answer["verified"] and answer["backend"] == "qnn" and answer["target"] == "npu"
    assert "the contexts were not run" in answer["report"]["environment"]["runtime"]
    manifest = open_artifact(out).manifest
    assert {*CONTEXTS, "model.onnx", "model.onnx.data", "golden.safetensors"} <= manifest.files.keys()
    assert "genai_config.json" not in manifest.files
    engine = manifest.engine
    assert (engine["soc_model"], engine["htp_arch"], engine["prompt_tokens"], engine["cache_tokens"]) == (69, 79, TOKENS, PLACES)
    assert engine["bytes"] == {name: manifest.files[name]["bytes"] for name in CONTEXTS}
    found = engine["simulated"]
    assert found["agreeing"] == found["positions"] == len(engine["prompt"]) + 2
    assert found["error_at_most"] < SHARE * found["effect_at_least"]
    for name in ("prefill", "decode"):
        (node,) = ir.load(out / f"{name}.onnx").graph
        assert node.op_type == "EPContext" and node.attributes["ep_cache_context"].as_string() == f"{name}_qnn.bin"
        # q, k, v, o, gate, up, down and the two products of attention, of two layers, and the head: the adapter adds none
        assert sum(engine["operators"][name].get(kind, 0) for kind in ("MatMul", "FullyConnected")) == 2 * 9 + 1
    assert {"ffba_A", "ffba_B"} <= {entry.tensor.split(".")[-2] for entry in manifest.ledger if entry.origin == "adapter"}


@compiles
def test_explain_verify_and_lint(out: Path, adapter: Path, base: Path) -> None:
    explained = run("explain", out)
    assert explained.exit_code == 0 and "these contexts ran in QNN's simulator of the HTP" in explained.output
    assert dict(json.loads(run("explain", out, "--json").stdout))["engine"]["soc_model"] == 69
    assert run("explain", out, "--lint").exit_code == 0
    replayed = run("verify", out)
    assert replayed.exit_code == 0 and "the contexts were not run" in replayed.output
    assert run("verify", out, "--ckpt", adapter, "--base", base).exit_code == 0


@compiles
def test_the_contexts_on_a_host(out: Path) -> None:
    """What a Snapdragon runs, in the simulator: rows of a batch, a prompt longer than prefill, a cache that is given."""
    artifact = open_artifact(out)
    contexts, portable = QnnDecoder(artifact), PortableDecoder(artifact)
    prompts = [[5, 6, 7], list(range(20, 20 + TOKENS + 3))]
    allowed = 0.01 * max(1.0, float(np.abs(portable.start(prompts)[1]).max()))  # fp16's ceiling of the verification
    for got, expected in zip(contexts.start(prompts), portable.start(prompts), strict=True):
        np.testing.assert_allclose(got, expected, atol=allowed)
    for tokens in ([3, 4], [9, 8]):
        np.testing.assert_allclose(contexts.step(tokens), portable.step(tokens), atol=allowed)
    assert contexts.cache_shapes() == portable.cache_shapes() == [(2, 16)] * 2
    cache = [tuple(np.random.default_rng(i).standard_normal((1, 2, 7, 16)).astype(np.float32) for i in (layer, 9)) for layer in range(2)]
    for runner in (contexts, portable):
        runner.resume(cache)  # type: ignore[arg-type]
    np.testing.assert_allclose(contexts.step([5]), portable.step([5]), atol=allowed)
    with pytest.raises(BackendError, match=f"beyond the {PLACES} places"):
        contexts.start([[1] * (PLACES + 1)])


@compiles
def test_contexts_without_their_adapter_are_noticed(out: Path) -> None:
    """B is silenced in the graph that is compiled, and nowhere else."""
    artifact = open_artifact(out)
    plan = context_plan(artifact)
    right = PortableDecoder(artifact), PortableDecoder(artifact, adapter=False)
    assert prove(out, plan, *right).faults == []
    (out / MODEL).write_bytes(edited_graph(artifact, adapter=False))
    compile_contexts(out, out, plan)
    with pytest.raises(VerificationError, match="logits are off by"):
        prove(out, plan, *right)
    logits, tokens = portable_logits(right[0], plan.prompt, None)
    assert len(logits) == len(plan.prompt) + len(tokens)


@compiles
def test_a_damaged_context_is_refused(out: Path) -> None:
    """QNN itself loads a context that has lost a bit."""
    artifact, file = open_artifact(out), out / "decode_qnn.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match=r"decode_qnn\.bin is not the file that was built"):
        QnnDecoder(artifact)
    verified = run("verify", out)
    assert verified.exit_code == 1 and "decode_qnn.bin is not the file that was built" in verified.output
    file.write_bytes(bytes(content[:1000]))
    unsealed = Artifact(out, dataclasses.replace(artifact.manifest, files={}))
    with pytest.raises(BackendError, match="QNN refuses the contexts"):
        QnnDecoder(unsealed)
    assert run("rebuild", out).exit_code == 0
    check_contexts(open_artifact(out))
    assert run("verify", out).exit_code == 0


@compiles
def test_rebuild_for_another_chip(out: Path, built: tuple[Path, dict[str, Any]]) -> None:
    before = open_artifact(out).manifest
    result = run("rebuild", out, "--soc-model", 57)
    assert result.exit_code == 0, result.output
    after = open_artifact(out).manifest
    assert (after.engine["soc_model"], after.engine["htp_arch"]) == (57, None)
    assert after.engine["simulated"]["agreeing"] == after.engine["simulated"]["positions"]
    changed = {name for name in after.files if after.files[name] != before.files[name]}
    assert {"decode_qnn.bin", "prefill_qnn.bin"} <= changed <= set(CONTEXTS)
    assert (built[0] / "decode_qnn.bin").read_bytes() != (out / "decode_qnn.bin").read_bytes()
    refused = run("rebuild", out, "--soc-model", 9999)
    assert refused.exit_code == 3 and "QNN_DEVICE_ERROR_INVALID_CONFIG" in refused.output
    assert open_artifact(out).manifest.files == after.files
    assert run("rebuild", out, "--trt-flavor", "rtx").exit_code == 2


@compiles
def test_weights_that_are_shared(out: Path) -> None:
    """One binary for both graphs. QNN's simulator does not load it, so that others of the same graphs are simulated."""
    apart = sum(open_artifact(out).manifest.engine["bytes"].values())
    assert run("rebuild", out, "--share-weights").exit_code == 0
    engine = open_artifact(out).manifest.engine
    assert set(engine["bytes"]) == {"prefill.onnx", "decode.onnx", "prefill_qnn.bin"} and sum(engine["bytes"].values()) < 0.7 * apart
    assert engine["share_weights"] and engine["simulated"] is not None and not (out / "decode_qnn.bin").exists()
    assert "each with weights of its own" in run("explain", out).output and run("verify", out).exit_code == 0


@compiles
def test_what_qnn_does_not_take_is_named(out: Path, base: Path, tmp_path: Path) -> None:
    """Nothing falls back to the CPU in silence."""
    artifact = open_artifact(out)
    with static_graphs(out, TOKENS) as files:
        model = ir.load(files[1])
        node = next(node for node in model.graph if node.op_type == "Softmax")
        node.op_type = "Hardmax"
        node.name = "culprit"
        ir.save(model, files[1])
        task = {"directory": str(tmp_path), "soc_model": 69, "htp_arch": 79, "share": False, "graphs": {"decode": files[1].name}}
        with pytest.raises(BackendError, match=r"does not take 1 nodes of the graph: culprit \(Hardmax\)"):
            run_apart(task, out)
    assert context_plan(artifact).share_weights is False


@compiles
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "phi3"])
def test_families_whose_ranks_are_folded(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Norms of queries and keys, soft caps, packed projections. Without the folding Qwen 3 and Gemma 3 are off, and Gemma 2 is refused."""
    adapter = make_adapter(bases(family), tmp_path / "adapter")
    options = BuildOptions("qnn", precision="fp16", verify=False, settings=ContextOptions(TOKENS, PLACES))
    artifact, _ = build(adapter, str(bases(family)), tmp_path / "out", options, silent)
    assert artifact.manifest.engine["simulated"]["agreeing"] == artifact.manifest.engine["simulated"]["positions"]


@compiles
def test_merged_and_not_simulated(base: Path, tmp_path: Path) -> None:
    """A merged LoRA cannot be silenced: its effect is told by the base model at the build, and remembered."""
    adapter, out = make_lora(base, tmp_path / "lora"), tmp_path / "out"
    arguments = ["build", adapter, "--base", base, "--backend", "qnn", "--output", out, *SMALL]
    assert run(*arguments).exit_code == 0
    assert open_artifact(out).manifest.engine["simulated"]["effect_at_least"] > 0
    assert run("rebuild", out, "--soc-model", 57).exit_code == 0
    assert run(*arguments, "--force", "--no-simulate").exit_code == 0
    assert "not simulated" in run("explain", out).output
    refused = run("rebuild", out)
    assert refused.exit_code == 2 and "its effect cannot be told without the base: --no-simulate" in refused.output
    assert run("rebuild", out, "--no-simulate").exit_code == 0


@compiles
@pytest.mark.parametrize(
    "damage",
    [
        {"engine": {}}, {"prompt": []}, {"soc_model": "69"}, {"versions": {}}, {"operators": 3}, {"simulated": {}}, {"prompt_tokens": 1000},
        {"prompt": [10**40]}, {"prompt": [True]}, {"prompt": [-1]}, {"cache_tokens": 32}, {"soc_model": 0}, {"bytes": {}},
        {"bytes": {"prefill.onnx": 1, "decode.onnx": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_plan(out: Path, damage: dict[str, Any]) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["engine"] = damage["engine"] if "engine" in damage else manifest["engine"] | damage
    (out / "manifest.json").write_text(json.dumps(manifest))
    for command in ("explain", "rebuild", "verify"):
        result = run(command, out)
        assert result.exit_code == 2 and "does not say how its contexts were built" in result.output, (command, result.output)
