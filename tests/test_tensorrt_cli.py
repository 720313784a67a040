"""`flora-export build --backend tensorrt`, `rebuild` and `explain --lint` as a user types them; bad input leaves OUT as it was."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flora_export.artifact import ENGINE, open_artifact
from flora_export.backends.tensorrt.engine import build_engine
from flora_export.backends.tensorrt.flavour import load_flavour
from flora_export.backends.tensorrt.plan import EngineOptions, profiles_for
from flora_export.cli import main
from flora_export.errors import BackendError
from flora_export.manifest import Tensor
from flora_export.pipeline import BuildOptions, build
from tests.conftest import silent

pytest.importorskip("tensorrt_rtx", reason="no TensorRT-RTX: pip install 'flora-export[tensorrt-rtx]'", exc_type=ImportError)

FAST = ["--precision", "fp16", "--profile", "prompt=1:16:64 past=1:32:127 batch=1:1:4", "--no-engine-cache", "--no-compare-base"]


def explain_json(out: Path) -> dict[str, Any]:
    result = run("explain", out, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def built(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("trt") / "out"
    result = run(
        "build", adapter, "--base", base, "--backend", "tensorrt", "--compute-capability", "8.6,8.9", "--output", out, *FAST, "--json"
    )
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


@pytest.fixture
def out(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(built[0], tmp_path / "out"))


def test_build(built: tuple[Path, dict[str, Any]]) -> None:
    out, answer = built
    assert answer["verified"] and answer["backend"] == "tensorrt" and answer["target"] == "cuda"
    assert "the engine itself was not run" in answer["report"]["environment"]["runtime"]
    manifest = open_artifact(out).manifest
    assert manifest.engine["compute_capabilities"] == ["8.6", "8.9"]
    assert {ENGINE, "model.onnx", "model.onnx.data", "engine.json", "golden.safetensors"} <= manifest.files.keys()
    assert "TensorRT-RTX" in manifest.versions


def test_explain_and_verify(out: Path) -> None:
    explained = run("explain", out)
    assert explained.exit_code == 0 and "ffba_A, ffba_G" in explained.output and "compute capability 8.6, 8.9" in explained.output
    assert run("explain", out, "--lint").exit_code == 0
    replayed = run("verify", out)
    assert replayed.exit_code == 0 and "the engine itself was not run" in replayed.output


def test_lint_of_another_backend(base: Path, adapter: Path, tmp_path: Path) -> None:
    build(adapter, str(base), tmp_path / "ort", BuildOptions(verify=False), silent)
    linted = run("explain", tmp_path / "ort", "--lint")
    assert linted.exit_code == 1 and "GroupQueryAttention" in linted.output
    assert run("explain", adapter, "--base", base, "--lint").exit_code == 0


def test_rebuild(out: Path) -> None:
    """For another GPU: a new engine, the rest as it was, the golden vectors replayed."""
    before = open_artifact(out).manifest
    gemms = explain_json(out)["gemms"]
    result = run("rebuild", out, "--compute-capability", "12.0", "--no-engine-cache")
    assert result.exit_code == 0, result.output
    after = open_artifact(out).manifest
    assert after.engine["compute_capabilities"] == ["12.0"] and after.engine["profiles"] == before.engine["profiles"]
    changed = {name for name in after.files if after.files[name] != before.files[name]}
    assert ENGINE in changed and changed <= {ENGINE, "engine.json"}
    held = [(gemm["profile"], gemm["adapters"]) for gemm in explain_json(out)["gemms"]]
    assert held == [(gemm["profile"], gemm["adapters"]) for gemm in gemms] and any(adapters for _, adapters in held)


def test_a_truncated_engine_is_found_and_can_be_rebuilt(out: Path) -> None:
    (out / ENGINE).write_bytes((out / ENGINE).read_bytes()[:1000])
    verified = run("verify", out)
    assert verified.exit_code == 1 and "model.engine has 1000 bytes, but the manifest says" in verified.output
    assert run("rebuild", out, "--compute-capability", "8.9", "--no-engine-cache").exit_code == 0
    assert run("verify", out).exit_code == 0


@pytest.mark.parametrize("name", ["model.onnx.data", "golden.safetensors"])
def test_rebuild_refuses_a_damaged_artifact(out: Path, name: str) -> None:
    content = bytearray((out / name).read_bytes())
    content[len(content) // 2] ^= 255
    (out / name).write_bytes(bytes(content))
    engine = (out / ENGINE).read_bytes()
    result = run("rebuild", out, "--compute-capability", "8.9")
    assert result.exit_code == 2 and f"is damaged: {name}" in result.output
    assert (out / ENGINE).read_bytes() == engine


def test_rebuild_whose_golden_vectors_differ(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flora_export.rebuild.replay", lambda artifact, decoder: ["golden prompt 0: logits are off by 1"])
    engine = (out / ENGINE).read_bytes()
    result = run("rebuild", out, "--compute-capability", "8.6", "--no-engine-cache")
    assert result.exit_code == 1 and "OUT is as it was" in result.output
    assert (out / ENGINE).read_bytes() == engine
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 3, "give it --compute-capability, one or more of"),
        (["--compute-capability", "9.0"], 2, "does not build for it; it builds for"),
        (["--compute-capability", "sm_89"], 2, "expected a number such as 8.9"),
        (["--compute-capability", "8.9", "--profile", "prompt=1:4:8"], 2, "--profile prompt goes up to 8, but the golden prompts"),
        (["--compute-capability", "8.9", "--profile", "prompt=1:4:8192"], 2, "but a context of 128 tokens has room for 128"),
        (["--compute-capability", "8.9", "--kv-cache", "static"], 2, "expected growing, or static:N"),
        (["--compute-capability", "8.9", "--workspace", "1", "--profile", "prompt=1:64:128"], 3, "Allow a larger --workspace"),
        (["--compute-capability", "8.9", "--refittable"], 3, "leave out --refittable"),
        (["--compute-capability", "8.9", "--version-compatible"], 2, "has no --version-compatible: engines are for one version"),
        (["--compute-capability", "8.9", "--timing-cache", "t"], 2, "has no --timing-cache: nothing is timed"),
        (["--compute-capability", "8.9", "--kv-cache", "static:16"], 2, "expected 32 places to 128, the model's context"),
        (["--compute-capability", "8.9", "--kv-cache", "static:500"], 2, "expected 32 places to 128, the model's context"),
        (["--compute-capability", "8.9", "--profile", "batch=2:2:4"], 2, "begin at 1"),
        (["--compute-capability", "8.9", "--profile", "past=1:2:3", "--no-verify"], 2, "--profile past goes up to 3"),
        (["--compute-capability", "8.9", "--target", "cpu"], 2, "backend tensorrt does not build for cpu"),
        (["--trt-flavor", "tensorrt"], 3, "pip install 'flora-export[tensorrt]'"),
    ],
)  # fmt: skip
def test_bad_input_leaves_the_output_as_it_was(
    arguments: list[str], code: int, message: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "tensorrt" in arguments:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    options = ["--precision", "fp16", "--no-engine-cache", "--no-compare-base", *arguments]
    result = run("build", adapter, "--base", base, "--backend", "tensorrt", "--output", tmp_path / "out", *options)
    assert (result.exit_code, message in result.output) == (code, True), result.output
    assert list(tmp_path.iterdir()) == []


def test_engine_options_are_refused_elsewhere(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = run("build", adapter, "--base", base, "--backend", "onnxruntime", "--output", tmp_path / "out", "--compute-capability", "8.9")
    assert result.exit_code == 2 and "--compute-capability is no option of --backend onnxruntime" in result.output


@pytest.mark.parametrize(
    "damage",
    [{"engine": {}}, {"engine": {"a": 1}}, {"layers": {}}, {"compute_capabilities": 8.9}, {"version": None}, {"flavour": "other"}],
    ids=str,
)
def test_a_damaged_plan(out: Path, damage: dict[str, Any]) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["engine"] = damage["engine"] if "engine" in damage else manifest["engine"] | damage
    (out / "manifest.json").write_text(json.dumps(manifest))
    for command in ("explain", "verify", "rebuild"):
        result = run(command, out)
        assert result.exit_code == 2 and "does not say how its engine was built" in result.output, (command, result.output)


@pytest.mark.parametrize("content", ["{}", '{"gemms": [{"a": 1}]}', "[", '{"gemms": 3}'])
def test_a_damaged_list_of_layers(out: Path, content: str) -> None:
    (out / "engine.json").write_text(content)
    result = run("explain", out)
    assert result.exit_code == 2 and "is damaged" in result.output, result.output


def test_rebuild_needs_golden_vectors(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--compute-capability", "8.9", *FAST, "--no-verify"]
    assert run("build", adapter, "--base", base, "--backend", "tensorrt", "--output", out, *options).exit_code == 0
    result = run("rebuild", out, "--compute-capability", "8.9")
    assert result.exit_code == 2 and "so no engine of it can be checked" in result.output


def test_building_for_another_machine_than_this(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU in the building machine that is not the one to serve: the lowered graph is verified on the CPU; the finished OUT is refused."""
    monkeypatch.setattr("flora_export.backends.tensorrt.machine_capability", lambda: "9.0")
    monkeypatch.setattr("flora_export.backends.tensorrt.session.machine_capability", lambda: "9.0")
    out = tmp_path / "out"
    result = run("build", adapter, "--base", base, "--backend", "tensorrt", "--compute-capability", "8.9", "--output", out, *FAST)
    assert result.exit_code == 0 and "the engine itself was not run" in result.output
    assert run("rebuild", out, "--compute-capability", "8.6", "--no-engine-cache").exit_code == 0
    refused = run("verify", out)
    assert refused.exit_code == 3 and "is for compute capability 8.6, but this GPU has 9.0" in refused.output


def test_what_the_parser_refuses_is_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    artifact, _ = build(adapter, str(base), tmp_path / "ort", BuildOptions(verify=False), silent)
    inputs: list[Tensor] = artifact.manifest.inputs
    with pytest.raises(BackendError, match=r"cannot parse node .*\(GroupQueryAttention\).*explain --lint"):
        build_engine(load_flavour("rtx"), artifact.model, inputs, profiles_for({}, 128, 0), ("8.9",), EngineOptions())
