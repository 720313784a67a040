"""The contract of the command line: exit codes, one JSON object on stdout, people's text on stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flora_export.cli import main
from tests.families import make_adapter


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def built(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("built") / "out"
    return out, run("build", adapter, "--base", base, "--backend", "onnxruntime", "--output", out, "--json")


def test_build(built: tuple[Path, Result]) -> None:
    out, result = built
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["verified"] is True
    assert content["output"] == str(out)
    assert content["files"].keys() == {p.name for p in out.iterdir()} - {"manifest.json", "report.json"}
    assert "comparing with PyTorch" in result.stderr


def test_verify(built: tuple[Path, Result], base: Path, adapter: Path, tmp_path: Path) -> None:
    out, _ = built
    result = run("verify", out, "--ckpt", adapter, "--base", base, "--json", "--report", tmp_path / "r.json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["verified"] is True
    assert json.loads((tmp_path / "r.json").read_text())["numerics"]["steps"] == 16
    assert run("verify", out).stdout.startswith("VERIFIED")
    other = make_adapter(base, tmp_path / "other", seed=3)
    result = run("verify", out, "--ckpt", other, "--base", base, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["causes"]
    assert run("verify", out, "--base", base).exit_code == 2


def test_explain_an_artifact(built: tuple[Path, Result], adapter: Path) -> None:
    from safetensors.numpy import load_file

    out, _ = built
    content = json.loads(run("explain", out, "--json").stdout)
    assert content["ok"] is True
    assert {t["tensor"] for t in content["tensors"]} == load_file(adapter / "adapter_model.safetensors").keys()
    assert all(t["stop"] - t["start"] == 4 for t in content["tensors"])
    text = run("explain", out).stdout
    assert "model.layers.0.mlp" in text
    assert "GEMMs   11 in the base model, 11 with the adapter" in text
    assert "10 adapter tensors: every one is in its place" in text


def test_explain_of_a_damaged_artifact(built: tuple[Path, Result], tmp_path: Path) -> None:
    import shutil

    out = Path(shutil.copytree(built[0], tmp_path / "out"))
    data = bytearray((out / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 4
    (out / "model.onnx.data").write_bytes(data)
    result = run("explain", out, "--json")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert content["ok"] is False
    assert any("its bytes are not in" in fault for fault in content["faults"])
    assert "FAULT" in run("explain", out).stdout


def test_explain_a_checkpoint(base: Path, adapter: Path) -> None:
    result = run("explain", adapter, "--base", base, "--fuse", "forward")
    assert result.exit_code == 0
    assert "forward" in result.stdout
    assert "(--fuse forward)" in result.stdout
    content = json.loads(run("explain", adapter, "--base", base, "--json").stdout)
    assert {block["fusion"] for block in content["blocks"]} == {"neurons", "forward+backward"}


def test_generate_without_a_tokenizer(built: tuple[Path, Result]) -> None:
    result = run("generate", built[0], "hello")
    assert result.exit_code == 2
    assert "has no tokenizer" in result.stderr


BAD: list[tuple[Callable[[Path, Path, Path], list[Any]], int, str]] = [
    (lambda c, b, o: ["build", c, "--backend", "onnxruntime"], 2, "Missing option '--output'"),
    (lambda c, b, o: ["build", c, "--backend", "nonsense", "--output", o], 2, "Invalid value for '--backend'"),
    (lambda c, b, o: ["build", c / "no", "--base", b, "--backend", "onnxruntime", "--output", o], 2, "no such adapter directory"),
    (lambda c, b, o: ["build", c, "--base", "/no/where", "--backend", "onnxruntime", "--output", o], 2, "no such directory"),
    (lambda c, b, o: ["build", c, "--base", b, "--backend", "onnxruntime", "--output", b], 2, "exists already"),
    (
        lambda c, b, o: ["build", c, "--base", b, "--backend", "onnxruntime", "--output", o, "--precision", "bf16"],
        3,
        "does not run on target cpu",
    ),
    (lambda c, b, o: ["build", c, "--base", b, "--backend", "other", "--output", o], 2, "'other' is not one of 'onnxruntime', 'tensorrt'"),
    (lambda c, b, o: ["verify", o], 2, "is no artifact"),
    (lambda c, b, o: ["explain", o], 2, "is no artifact"),
    (lambda c, b, o: ["generate", o], 2, "Missing argument"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD, ids=[case[2] for case in BAD])
def test_exit_codes(adapter: Path, base: Path, tmp_path: Path, arguments: Callable[..., list[Any]], code: int, message: str) -> None:
    result = run(*arguments(adapter, base, tmp_path / "out"))
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_errors_as_json(adapter: Path, tmp_path: Path) -> None:
    result = run("build", adapter, "--base", "/no/where", "--backend", "onnxruntime", "--output", tmp_path / "out", "--json")
    assert result.exit_code == 2
    content = json.loads(result.stdout)
    assert (content["verified"], content["error"], content["exit_code"]) == (False, "CheckpointError", 2)


def test_a_fault_of_ours_is_no_failed_verification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("flora_export.pipeline.verify", lambda *_: 1 / 0)
    result = run("verify", tmp_path, "--json")
    assert result.exit_code == 3
    assert "bug in flora-export" in json.loads(result.stdout)["message"]


def test_the_real_program_is_quiet(adapter: Path, base: Path, tmp_path: Path) -> None:
    """Nothing foreign on stdout or stderr: no bars, no logs, no warnings of the packages underneath."""
    command = [
        sys.executable,
        "-m",
        "flora_export.cli",
        "build",
        str(adapter),
        "--base",
        str(base),
        "--backend",
        "onnxruntime",
        "--output",
        str(tmp_path / "out"),
        "--json",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    assert json.loads(result.stdout)["verified"] is True
    stages = {
        "reading the checkpoint",
        "capturing the base model",
        "fusing",
        "writing",
        "loading eager PyTorch",
        "asking PyTorch in fp64",
        "measuring the noise floor",
        "comparing with PyTorch",
        "checking the ledger",
    }
    assert {line.removesuffix(" ...") for line in result.stderr.splitlines()} == stages
