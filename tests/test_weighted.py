"""Several LoRAs weighted into one: PEFT with all of them active is the truth, and order, weights and files are part of the artifact."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from flora_export.artifact import open_artifact
from flora_export.cli import main
from flora_export.errors import CheckpointError
from flora_export.methods.weighted import read_weighted
from flora_export.pipeline import BuildOptions, VerifyOptions, build, verify
from tests.conftest import silent
from tests.families import make_adapter, make_lora


@pytest.fixture(scope="module")
def three(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Path, float], ...]:
    """On other weights, of other ranks and scales, one subtracted."""
    root = tmp_path_factory.mktemp("weighted")
    one = make_lora(base, root / "one", seed=1)
    two = make_lora(base, root / "two", seed=2, r=2, lora_alpha=16, target_modules=["q_proj", "down_proj"])
    last = make_lora(base, root / "three", seed=3, r=1, use_rslora=True, target_modules=["up_proj"])
    return (one, 0.7), (two, 1.0), (last, -0.4)


def test_it_is_what_peft_computes_with_all_of_them(three: tuple[tuple[Path, float], ...], base: Path, tmp_path: Path) -> None:
    artifact, report = build(three[0][0], str(base), tmp_path / "out", BuildOptions(weighted=three), silent)
    assert report.verified and report.numerics is not None
    assert max(case.effect_error for case in report.numerics.cases) < 1e-5
    manifest = artifact.manifest
    assert report.ledger.changed_tensors_equal == len(manifest.changes) == 14
    assert manifest.checkpoint["weights"] == [0.7, 1.0, -0.4]
    assert {change.what for change in manifest.changes} >= {"0.7 LoRA + 1 LoRA", "0.7 LoRA + -0.4 LoRA", "0.7 LoRA"}
    again = verify(artifact.path, three[0][0], str(base), VerifyOptions(weighted=three), silent)
    assert again.verified, again.to_text()


@pytest.mark.parametrize("wrong", ["a weight", "an adapter lost", "the order"])
def test_others_are_told_apart(wrong: str, three: tuple[tuple[Path, float], ...], base: Path, tmp_path: Path) -> None:
    build(three[0][0], str(base), tmp_path / "out", BuildOptions(weighted=three, verify=False), silent)
    one, two, last = three
    other = {"a weight": (one, (two[0], 0.98), last), "an adapter lost": (one, last), "the order": (two, one, last)}[wrong]
    report = verify(tmp_path / "out", other[0][0], str(base), VerifyOptions(weighted=other), silent)
    assert any("is not the checkpoint that the artifact was built from" in fault for fault in report.ledger.faults)
    assert report.numerics is not None
    assert bool(report.numerics.causes) == (wrong != "the order")  # in which they are added makes no more than a rounding


def test_the_command_line(three: tuple[tuple[Path, float], ...], base: Path, tmp_path: Path) -> None:
    (one, _), (two, _), _ = three
    out = tmp_path / "out"
    adapters = [f"{one}=0.5", "--adapter", f"{two}=2"]
    result = CliRunner().invoke(main, ["build", *adapters, "--base", str(base), "--backend", "hf", "--output", str(out)])
    assert result.exit_code == 0, result.output
    assert open_artifact(out).manifest.checkpoint["weights"] == [0.5, 2.0]
    checked = CliRunner().invoke(main, ["verify", str(out), "--ckpt", f"{one}=0.5", "--adapter", f"{two}=2", "--base", str(base)])
    assert checked.exit_code == 0, checked.output
    alone = CliRunner().invoke(main, ["verify", str(out), "--adapter", str(two)])
    assert alone.exit_code == 2 and "--adapter needs --ckpt" in alone.output


def test_a_path_with_a_weight(tmp_path: Path) -> None:
    (tmp_path / "a=1").mkdir()
    assert read_weighted(str(tmp_path / "a=1")) == (tmp_path / "a=1", 1.0)
    assert read_weighted("adapter=-.5") == (Path("adapter"), -0.5)
    assert read_weighted("adapter") == (Path("adapter"), 1.0)
    for text in ("adapter=", "adapter=much", "adapter=nan", "adapter=1e9"):
        with pytest.raises(CheckpointError, match=r"weight"):
            read_weighted(text)


def test_what_is_no_plain_lora_is_refused(three: tuple[tuple[Path, float], ...], base: Path, tmp_path: Path) -> None:
    dora = make_lora(base, tmp_path / "dora", use_dora=True)
    ffba = make_adapter(base, tmp_path / "ffba")
    for other, words in ((dora, "DoRA, and only plain LoRAs"), (ffba, "branches run beside blocks, and only plain LoRAs")):
        with pytest.raises(CheckpointError, match=words):
            build(three[0][0], str(base), tmp_path / "out", BuildOptions(weighted=(three[0], (other, 1.0))), silent)
    with pytest.raises(CheckpointError, match="Build with --merge"):
        build(three[0][0], str(base), tmp_path / "out", BuildOptions(weighted=three, merge=False), silent)
