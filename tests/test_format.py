"""The version of an adapter's configuration: what an old file means does not change, and what a newer one means is not guessed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from flora_export.backends.onnxruntime import Decoder
from flora_export.base_model import load_base
from flora_export.branch import FORMAT, FORMATS
from flora_export.cli import main
from flora_export.errors import CheckpointError
from flora_export.ffba import FFBAConfig
from flora_export.methods import load_checkpoint, read_config
from flora_export.pipeline import BuildOptions, build
from tests.conftest import ADAPTER, MLP_ADAPTER, silent
from tests.families import LAYERS

IDS = [5, 6, 7, 8, 9, 10, 11]
UNKNOWN: list[Any] = [2, -1, "1", 1.0, True, None, [1], {}]


def read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return config


def write(path: Path, config: dict[str, Any]) -> None:
    (path / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def old(adapter: Path, tmp_path: Path) -> Path:
    """An adapter from before versions and gains: its file is silent on both, and on how it started."""
    copy = Path(shutil.copytree(adapter, tmp_path / "old"))
    config = read(copy)
    assert config["gated_gain"] == 1.0
    write(copy, {key: value for key, value in config.items() if key not in ("ffba_version", "gated_gain", "init_ffba_weights")})
    return copy


def eager(base: Path, adapter: Path) -> np.ndarray:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def test_what_the_versions_mean() -> None:
    """These are promises to files that exist: a new meaning is a new line, and no line changes."""
    assert {version: (known.gated_gain, known.init_weights) for version, known in FORMATS.items()} == {0: (1.0, "kaiming"), 1: (16.0, True)}
    assert FORMAT == 1


@pytest.mark.parametrize("load", [peft.PeftConfig.from_pretrained, FFBAConfig.from_pretrained], ids=["PeftConfig", "FFBAConfig"])
def test_an_old_file_keeps_its_meaning_in_peft(old: Path, load: Callable[[Path], FFBAConfig], tmp_path: Path) -> None:
    config = load(old)
    assert (config.gated_gain, config.init_ffba_weights) == (1.0, "kaiming")
    config.save_pretrained(tmp_path / "again")  # the meaning is written out, so that the version may be today's
    assert {"ffba_version": 1, "gated_gain": 1.0, "init_ffba_weights": "kaiming"}.items() <= read(tmp_path / "again").items()
    write(old, read(old) | {"gated_gain": 3.0, "init_ffba_weights": True})
    config = load(old)
    assert (config.gated_gain, config.init_ffba_weights) == (3.0, True)


def test_a_file_that_does_not_name_its_method_is_a_file_too(old: Path) -> None:
    write(old, {key: value for key, value in read(old).items() if key != "peft_type"})
    assert FFBAConfig.from_pretrained(old).gated_gain == 1.0


def test_an_old_file_keeps_its_meaning_in_our_reader(old: Path, base: Path) -> None:
    def scales() -> list[float]:
        return [branch.scale for branch in load_checkpoint(old, load_base(str(base))).branches]

    assert scales() == [2.0, 2.0] * LAYERS
    write(old, read(old) | {"gated_gain": 3.0})
    assert scales() == [2.0, 6.0] * LAYERS


def test_a_file_of_version_1_has_the_defaults_of_python(old: Path, base: Path) -> None:
    write(old, read(old) | {"ffba_version": 1})
    loaded, made = peft.PeftConfig.from_pretrained(old), FFBAConfig()
    assert (loaded.gated_gain, loaded.init_ffba_weights) == (made.gated_gain, made.init_ffba_weights) == (16.0, True)
    assert [branch.scale for branch in load_checkpoint(old, load_base(str(base))).branches] == [2.0, 32.0] * LAYERS


def test_the_artifact_of_an_old_file_is_what_the_file_meant(old: Path, adapter: Path, base: Path, tmp_path: Path) -> None:
    artifact, report = build(old, str(base), tmp_path / "out", BuildOptions(), silent)
    assert report.verified, report.to_text()  # against eager, which reads the old file through PEFT
    (got,) = Decoder(artifact).start([IDS])
    strong = Path(shutil.copytree(adapter, tmp_path / "strong"))
    write(strong, read(adapter) | {"gated_gain": 16.0})
    meant, wrong = eager(base, adapter), eager(base, strong)  # the first says its gain of 1 aloud
    np.testing.assert_allclose(got, meant, rtol=0, atol=1e-4)  # fp32: sums in another order; logits are about 1
    assert np.abs(got - wrong).max() > 0.05
    np.testing.assert_array_equal(eager(base, old), meant)


def test_a_new_adapter_carries_the_version_and_says_everything(base: Path, tmp_path: Path) -> None:
    """So that a flora-export from before versions, which does not read the number, reads the same meaning."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), FFBAConfig(r=4))
    model.save_pretrained(tmp_path)
    assert {"ffba_version": FORMAT, "gated_gain": 16.0, "init_ffba_weights": True}.items() <= read(tmp_path).items()
    model.save_pretrained(tmp_path / "copy")
    before = read(tmp_path)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path, is_trainable=True)
    loaded.save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again") == before | {"base_model_name_or_path": str(base)}
    assert sorted(file.name for file in (tmp_path / "again").iterdir() if file.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("version", UNKNOWN, ids=str)
def test_an_unknown_version_is_refused_on_both_sides(old: Path, base: Path, tmp_path: Path, version: Any) -> None:
    write(old, read(old) | {"ffba_version": version, "gated_gain": 1.0})
    message = r"ffba_version is .*, but this flora-export reads versions up to 1\..*pip install --upgrade flora-export"
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {message}"):
        read_config(old)
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), old)
    command = ["build", str(old), "--base", str(base), "--backend", "onnxruntime", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "--upgrade flora-export" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_newer_file_with_keys_of_its_own_is_refused_by_its_version(old: Path) -> None:
    """PEFT drops a key that it does not know, with a warning alone; the version says whether that may be."""
    write(old, read(old) | {"ffba_version": 2, "ffba_invented_later": 1})
    with pytest.warns(UserWarning, match="ffba_invented_later"), pytest.raises(ValueError, match="ffba_version is 2"):
        peft.PeftConfig.from_pretrained(old)


def test_a_dict_that_names_its_method_is_read_as_a_file() -> None:
    assert peft.get_peft_config({"peft_type": "FFBA"}).gated_gain == 1.0
    assert peft.get_peft_config({"peft_type": "FFBA", "ffba_version": 1}).gated_gain == 16.0
    assert peft.get_peft_config(FFBAConfig().to_dict()) == FFBAConfig()


def test_an_old_pickle_is_refused_as_any(old: Path, base: Path) -> None:
    (old / "adapter_model.safetensors").rename(old / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_checkpoint(old, load_base(str(base)))


@pytest.mark.parametrize("path", [ADAPTER, MLP_ADAPTER], ids=lambda path: path.name)
def test_the_committed_adapters_carry_the_version_and_their_meaning(path: Path) -> None:
    assert {"ffba_version": FORMAT, "gated_gain": 1.0, "init_ffba_weights": "kaiming"}.items() <= read(path).items()
    assert peft.PeftConfig.from_pretrained(path).gated_gain == read_config(path)["gated_gain"] == 1.0
