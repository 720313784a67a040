"""Dry runs: what they say of a build is what the build takes, what it would refuse they refuse, and they leave nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from flora_export import forecast
from flora_export.base_model import load_base
from flora_export.cli import main
from flora_export.forecast import Cost
from flora_export.methods import load_checkpoint
from flora_export.pipeline import BuildOptions, build
from flora_export.shortened import layers_to_keep, shorten_adapter, shorten_base
from tests.conftest import silent
from tests.families import FAMILIES, SHAPE, make_adapter, make_lora

LAYERS = 6


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with more layers than a calibration has."""
    directory = tmp_path_factory.mktemp("deep") / "base"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE | {"num_hidden_layers": LAYERS}))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapter(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(deep, tmp_path_factory.mktemp("adapters") / "one", r=16)


def dry_run(adapter: Path, base: Path, out: Path, *more: object) -> tuple[int, dict[str, Any], str]:
    arguments = ["build", adapter, "--base", base, "--backend", "onnxruntime", "--output", out, "--dry-run", "--json", *more]
    done = CliRunner().invoke(main, [str(each) for each in arguments])
    return done.exit_code, json.loads(done.stdout), done.stderr


def test_the_bytes_are_those_of_the_build(deep: Path, adapter: Path, tmp_path: Path) -> None:
    code, told, _ = dry_run(adapter, deep, tmp_path / "out", "--precision", "fp16", "--no-verify")
    assert code == 0
    assert told["possible"] and told["layers"] == LAYERS and list(told["calibration"]) == ["1", "3"]
    assert told["cost"]["seconds"] > 0 and told["cost"]["memory"] > 2**24
    assert list(tmp_path.iterdir()) == []
    artifact, _ = build(adapter, str(deep), tmp_path / "out", BuildOptions(precision="fp16", verify=False), silent)
    written = sum(file.stat().st_size for file in artifact.path.iterdir())
    assert told["cost"]["disk"] == pytest.approx(written, rel=0.01)  # numbers have other digits in JSON


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (make_adapter, {"rank_pattern": {"layers.4.mlp": 24, "layers.0.mlp": 8}}),
        (make_adapter, {"rank_pattern": {r".*\.layers\.4\.mlp": 24}, "target_modules": r".*\.layers\.\d\.(mlp|self_attn)"}),
        (make_adapter, {"layers_to_transform": [0, 2, 5]}),
        (make_adapter, {"layers_to_transform": 5}),
        (make_lora, {"target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.5.self_attn.q_proj", "up_proj"]}),
        (make_lora, {"target_modules": ["up_proj"], "trainable_token_indices": [1, 40, 77]}),
        (make_lora, {"use_dora": True, "modules_to_save": ["lm_head"], "alpha_pattern": {"layers.3.mlp.up_proj": 2}}),
    ],
)
def test_a_shortened_adapter_does_what_it_did_to_the_layers_that_are_there(
    make: Callable[..., Path], config: dict[str, Any], deep: Path, tmp_path: Path
) -> None:
    whole = load_checkpoint(make(deep, tmp_path / "whole", **config), load_base(str(deep)))
    layers = (5, 1, 4)
    shorten_base(load_base(str(deep)), layers, tmp_path / "base")
    shorten_adapter(tmp_path / "whole", load_base(str(deep)), layers, tmp_path / "short")
    short = load_checkpoint(tmp_path / "short", load_base(str(tmp_path / "base")))

    def before(name: str) -> str:
        """A name as it is in the whole."""
        return re.sub(r"(?<=layers\.)\d+", lambda number: str(sorted(layers)[int(number[0])]), name)

    gone = tuple(f"layers.{layer}." for layer in set(range(LAYERS)) - set(layers))
    own = [branch for branch in whole.branches if not any(name in f"{branch.block}." for name in gone)]
    assert [(before(branch.block), branch.rank, branch.scale) for branch in short.branches] == [(b.block, b.rank, b.scale) for b in own]
    kept = [change for change in whole.changes if not any(name in change.tensor for name in gone)]
    assert [(before(change.tensor), change.rank, change.scale) for change in short.changes] == [(c.tensor, c.rank, c.scale) for c in kept]
    assert 0 < len(short.branches) + len(short.changes) <= len(whole.branches) + len(whole.changes)
    for name in short.tensors:
        assert (short.tensor(name) == whole.tensor(before(name))).all()


@pytest.mark.parametrize("layers", [[4], [1, 3], 5])
def test_an_adapter_on_late_layers_has_its_forecast(layers: list[int] | int, deep: Path, tmp_path: Path) -> None:
    late = make_adapter(deep, tmp_path / "late", layers_to_transform=layers)
    code, told, error = dry_run(late, deep, tmp_path / "out", "--no-verify")
    assert (code, told.get("possible")) == (0, True), error


def test_a_bank_has_a_layer_of_each_of_its_adapters(deep: Path, tmp_path: Path) -> None:
    members = [make_adapter(deep, tmp_path / str(layer), layers_to_transform=[layer]) for layer in (2, 0, 5)]
    assert layers_to_keep(members, load_base(str(deep))) == ([2, 0, 5, 1, 3, 4], 3)
    assert layers_to_keep(members[:1], load_base(str(deep))) == ([2, 0, 1, 3, 4, 5], 1)
    code, told, error = dry_run(members[0], deep, tmp_path / "out", members[1], members[2], "--no-verify")
    assert (code, list(told["calibration"])) == (0, ["3", "5"]), error


def test_what_cannot_be_shortened_says_so(deep: Path, tmp_path: Path) -> None:
    pattern = make_adapter(deep, tmp_path / "pattern", target_modules=r".*\.layers\.(4|5)\.mlp")
    code, told, _ = dry_run(pattern, deep, tmp_path / "out", "--no-verify")
    assert code == 2 and "what it takes is not known, for a build with fewer of its layers is refused" in told["message"]


def test_what_else_stops_a_build_is_found_beforehand(deep: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "_cost", lambda *_: Cost(1.0, 1.0, 0, {}))
    code, told, _ = dry_run(adapter, deep, tmp_path / "out", "--sign", tmp_path / "missing.pem")
    assert code == 2 and "missing.pem" in told["message"]
    monkeypatch.setattr(forecast.os, "access", lambda place, mode: Path(place) != tmp_path)
    code, told, _ = dry_run(adapter, deep, tmp_path / "out")
    assert code == 3 and told["causes"] == [f"{tmp_path} may not be written to: choose another --output"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_shortened(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = load_base(str(bases(family)))
    shorten_base(base, [0], tmp_path / "base")
    short = load_base(str(tmp_path / "base"))
    assert short.layers == 1 and short.tied == base.tied
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert all((short.read(name) == base.read(name)).all() for name in short.tensors)


@pytest.mark.parametrize(("damage", "said"), [("output", "exists already"), ("weights", "adapter_model.safetensors"), ("device", "cuda")])
def test_what_a_build_refuses_is_refused_before_anything_is_built(
    damage: str, said: str, deep: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Cost:
        raise AssertionError("something is built")

    monkeypatch.setattr(forecast, "_cost", never)
    broken, more = tmp_path / "broken", ["--target", "gpu"] if damage == "device" else []
    shutil.copytree(adapter, broken)
    if damage == "weights":
        (broken / "adapter_model.safetensors").unlink()
    if damage == "output":
        (tmp_path / "out").mkdir()
    code, told, error = dry_run(broken, deep, tmp_path / "out", *more)
    assert code == 2 and said in told["message"] and error.splitlines()[-1].startswith("error: ")
    assert (tmp_path / "out").exists() == (damage == "output")


def test_a_repository_is_no_artifact(deep: Path, adapter: Path, tmp_path: Path) -> None:
    arguments = ["build", adapter, "--base", deep, "--backend", "triton", "--output", tmp_path / "repo", "--dry-run"]
    done = CliRunner().invoke(main, [str(each) for each in arguments])
    assert done.exit_code == 2 and "ask for --backend onnxruntime" in done.stderr


def test_a_machine_that_is_too_small_is_exit_code_3(deep: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {1: Cost(2.0, 2.0, 2**50, {"head": 2**41, "layers": 0}), 3: Cost(3.0, 3.0, 2**50, {"head": 2**41, "layers": 2**41})}
    monkeypatch.setattr(forecast, "_cost", lambda place, base, layers, *_: costs[len(layers)])
    code, told, _ = dry_run(adapter, deep, tmp_path / "no" / "such" / "out")
    assert code == 3 and not told["possible"]
    assert told["cost"]["seconds"] == 4.5  # the line through both, at six layers
    assert told["cost"]["memory"] == 5 * 2**40  # of the phase that needs most there, though not with one layer, nor more with three
    assert "has room for" in told["causes"][0] and "of memory to give" in told["causes"][1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "possible"), [(["--precision", "int4"], False), (["--precision", "int4", "--no-verify"], True), ([], True)]
)
def test_the_temporary_directory_has_to_hold_what_a_large_quantized_base_is_compared_with(
    more: list[str], possible: bool, deep: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "temporary"
    home.mkdir()
    needed = load_base(str(deep)).fp32_bytes
    room = shutil.disk_usage(home)
    monkeypatch.setattr("flora_export.base_model.LARGE", 0)
    monkeypatch.setattr(forecast.tempfile, "tempdir", str(home))
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda place: room._replace(free=needed - 1 if place == str(home) else 2**50))
    monkeypatch.setattr(forecast, "_cost", lambda *_: Cost(1.0, 1.0, 0, {}))
    code, told, _ = dry_run(adapter, deep, tmp_path / "out", *more)
    assert (code, told["possible"]) == ((0, True) if possible else (3, False))
    assert ["set TMPDIR" in cause for cause in told["causes"]] == [True] * (not possible)


def test_a_smaller_build_that_other_work_made_slow_does_not_make_layers_free() -> None:
    """A build of 28 layers was once told to take less than the one with a single layer that told it."""
    disturbed, larger = Cost(180.0, 100.0, 0, {}), Cost(160.0, 140.0, 0, {})
    told = disturbed.line(larger, 27 / 2, cores=2)
    assert told.seconds == 180 + 20 * 27 / 2
    assert told.processors == 100 + 40 * 27 / 2
    assert disturbed.line(dataclasses.replace(larger, seconds=240.0), 27 / 2, cores=2).seconds == 180 + 60 * 27 / 2  # as measured


def test_a_calibration_that_dies_or_fails_is_an_error(deep: Path, tmp_path: Path) -> None:
    with pytest.raises(forecast.FloraExportError, match=r"adapter_config\.json is missing"):
        forecast._measured(tmp_path, str(deep), tmp_path / "out", BuildOptions(), 0)
