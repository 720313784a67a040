"""The campaign's kills and faults in their short form: nothing is lost; and what a broken product would do is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.campaign import faults, kills
from benchmarks.campaign.forks import Ended, Forks
from benchmarks.campaign.outcome import Outcome
from benchmarks.campaign.refusals import refusal_faults
from benchmarks.campaign.whole import ABSENT, NEW, OLD, cache_faults, digests, directory_state, live_content, repository_state
from flora_export.artifact import DATA, MANIFEST, open_artifact, seal
from flora_export.backends.triton.config import CONFIG

pytest.importorskip("tritonclient.grpc", reason="extra triton is not installed")
pytest.importorskip("onnxruntime_genai", reason="extra genai is not installed")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """Where the kills were run, which has the artifacts that they happened to, and what came of them."""
    work = tmp_path_factory.mktemp("kills")
    return work, kills.run(work, "short", 0)


def test_kills(killed: tuple[Path, list[Outcome]]) -> None:
    assert [loss for outcome in killed[1] for loss in outcome.losses] == []
    assert all(outcome.tried >= 18 for outcome in killed[1])


def test_faults(tmp_path: Path) -> None:
    outcomes = faults.run(tmp_path, "short", 0)
    assert [loss for outcome in outcomes for loss in outcome.losses] == []
    assert all(outcome.tried for outcome in outcomes)


def test_a_step_that_is_not_atomic_is_found(killed: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    """The commands of a product that copies into place, file by file, where it should rename."""
    convert = kills.Operation("convert", None, lambda out: ["convert", killed[0] / "pickle", out], 1)
    with Forks(tmp_path) as forks:
        trials = kills.Trials(convert, forks, 0, {"copies": {}})
        trials.run(24)
    assert any("neither old nor new" in loss for loss in trials.broken)


def test_half_an_output_is_found(killed: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    one, two = killed[0] / "out1", killed[0] / "out2"
    state = directory_state(digests(one), digests(two))
    assert [state(path) for path in (one, two)] == [OLD, NEW]
    assert directory_state(None, digests(one))(tmp_path / "out") == ABSENT
    assert "was there, and is not" in state(tmp_path / "out")
    out = Path(shutil.copytree(two, tmp_path / "out"))
    shutil.copyfile(one / MANIFEST, out / MANIFEST)
    assert f"{MANIFEST} differs" in state(out)
    (out / "config.json").unlink()
    assert "config.json is missing" in state(out)


def test_what_a_compiler_makes_anew_is_held_to_its_manifest(killed: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    one, two = killed[0] / "out1", killed[0] / "out2"
    compiled = directory_state(digests(one), digests(two), [DATA])
    out = Path(shutil.copytree(two, tmp_path / "out"))
    (out / DATA).write_bytes((out / DATA).read_bytes()[::-1])
    assert "its manifest says" in compiled(out)
    seal(out, open_artifact(out).manifest)
    assert compiled(out) == NEW
    assert "differs" in directory_state(digests(one), digests(two))(out)
    (out / "config.json").write_text("{}")
    assert "config.json differs" in compiled(out)


def test_half_a_repository_is_found(killed: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    root = killed[0]
    state = repository_state(live_content(root / "repo1"), live_content(root / "repo2"))
    assert [state(root / name) for name in ("repo1", "repo2")] == [OLD, NEW]
    repo = Path(shutil.copytree(root / "repo2", tmp_path / "repo"))
    shutil.copyfile(repo / "decoder" / "1" / CONFIG, repo / "decoder" / CONFIG)
    assert state(repo) == "one model old, one new"
    shutil.rmtree(repo / "generate" / "2")
    assert "version 2, which is not there" in state(repo)


def test_half_a_cache_is_found(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "layers.json").write_text(json.dumps({"sha256": "0", "layers": ""}))
    assert cache_faults(tmp_path) == ["key in the cache is not whole"]


@pytest.mark.parametrize(
    ("code", "err", "fault"),
    [
        (2, "reading ...\nerror: no such file\n", None),
        (0, "", "exit 0"),
        (None, "", "did not end"),
        (3, "Traceback (most recent call last)\nerror: OSError\n", "traceback"),
        (2, "error: one\nand another\n", "2 lines"),
        (70, "error: no such code\n", "exit 70"),
    ],
)
def test_a_wrong_refusal_is_found(code: int | None, err: str, fault: str | None) -> None:
    found = refusal_faults(Ended(code, 1.0, 0, "", err))
    assert found == [] if fault is None else fault in found[0]
