"""`flora-export convert`: what it writes is built and verified; a pickle's code is never run; nothing is left half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from flora_export.cli import main
from flora_export.pipeline import BuildOptions, build
from tests import methods
from tests.conftest import silent


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def reslora_source(base: Path, directory: Path, **config: Any) -> Path:
    directory.mkdir()
    tensors = {key.removeprefix(methods.PREFIX): t for key, t in methods.reslora_tensors(base).items()}
    torch.save(tensors, directory / "pytorch_model_lora.bin")
    start = {"rank": 4, "lora_alpha": 8, "target_modules": "q.f", "lora_num": 3, "res_flag": 2, "merge_flag": 0, "pre_num": 999}
    (directory / "reslora_config.json").write_text(json.dumps(start | config))
    return directory


def lora2_source(base: Path, directory: Path) -> Path:
    directory.mkdir()
    own = {key.removeprefix(methods.PREFIX): t for key, t in methods.lora2_tensors(base).items()}
    torch.save(load_file(base / "model.safetensors") | own, directory / "pytorch_model.bin")
    return directory


def melora_source(base: Path, directory: Path) -> Path:
    file = methods.melora(base, directory) / "adapter_model.safetensors"
    torch.save(load_file(file), directory / "adapter_model.bin")
    file.unlink()
    return directory


SOURCES = {"RESLORA": (reslora_source, []), "LORA2": (lora2_source, ["--alpha", "3"]), "MELORA": (melora_source, [])}


@pytest.mark.parametrize("kind", SOURCES)
def test_what_is_converted_is_built(kind: str, base: Path, tmp_path: Path) -> None:
    make, arguments = SOURCES[kind]
    done = run(make(base, tmp_path / "source"), tmp_path / "adapter", "--base", base, "--json", *arguments)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["method"] == kind and told["left_out"] == (len(load_file(base / "model.safetensors")) if kind == "LORA2" else 0)
    _, report = build(tmp_path / "adapter", None, tmp_path / "out", BuildOptions(), silent)
    assert report.verified and report.numerics is not None and not report.numerics.causes
    again = run(tmp_path / "source", tmp_path / "adapter", *arguments)
    assert again.exit_code == 2 and "exists already" in again.output


class Evil:
    """Pickled, it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_pickles_code_is_not_run(base: Path, tmp_path: Path) -> None:
    source = melora_source(base, tmp_path / "source")
    torch.save({"x": Evil(tmp_path / "evil")}, source / "adapter_model.bin")
    done = run(source, tmp_path / "adapter")
    assert done.exit_code == 2 and "cannot be read without running code of its own" in done.output
    assert not (tmp_path / "evil").exists() and {path.name for path in tmp_path.iterdir()} == {"source"}


def test_what_cannot_be_converted(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    bare = melora_source(base, tmp_path / "bare")
    torch.save([torch.zeros(2)], bare / "adapter_model.bin")
    unnamed = melora_source(base, tmp_path / "unnamed")
    (unnamed / "adapter_config.json").write_text('{"peft_type": "FOURIERFT"}')
    whole = tmp_path / "whole"
    whole.mkdir()
    torch.save({"a.weight": torch.zeros(2)}, whole / "pytorch_model.bin")
    spread = melora_source(base, tmp_path / "spread")
    torch.save({"a": torch.zeros(1).expand(10**12)}, spread / "adapter_model.bin")
    cases = [
        (spread, "a is no plain tensor of (1000000000000,)"),
        (tmp_path / "nowhere", "no such adapter directory"),
        (tmp_path / "empty", "no adapter that can be converted. Expected adapter_config.json and adapter_model.bin"),
        (methods.melora(base, tmp_path / "done"), "holds adapter_model.safetensors already"),
        (reslora_source(base, tmp_path / "shortcut", res_flag=1), "which no change of a weight can do"),
        (lora2_source(base, tmp_path / "alpha"), "Pass --alpha"),
        (bare, "holds a list, but tensors by name were expected"),
        (unnamed, "from a seed"),
        (whole, "no LoRA²"),
    ]
    for source, message in cases:
        done = run(source, tmp_path / "out")
        assert done.exit_code == 2 and message in done.output, done.output
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
