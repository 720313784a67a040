"""The campaign's supply chain and platforms, in their short form, and that they see what is planted."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import licences
from benchmarks.campaign import platforms, supply
from benchmarks.campaign.outcome import Outcome


def losses(outcomes: list[Outcome]) -> list[str]:
    return [loss for outcome in outcomes for loss in outcome.losses]


def test_supply_is_kept(tmp_path: Path) -> None:
    outcomes = supply.run(tmp_path, "short", 0)
    assert losses(outcomes) == []
    assert all(outcome.tried for outcome in outcomes if not outcome.not_tried)


def test_a_package_that_is_not_locked_is_reported() -> None:
    numpy = supply.installed_by("test")["numpy"].version
    assert supply.unlocked({"numpy": numpy, "flora-export": "0"}) == []
    found = supply.unlocked({"numpy": "0.1", "left-pad": "1.3"})
    assert found == [f"numpy 0.1 is installed, and {numpy} is locked", "left-pad 1.3 is installed, and none is locked"]


def test_a_licence_that_is_not_listed_or_not_permissive_is_reported() -> None:
    document = "| one | MIT |  |\n| two | GPL-3.0-only |  |\n"
    found = licences.losses({"one": "MIT AND (Apache-2.0 WITH LLVM-exception)", "two": "GPL-3.0-only", "three": "MIT"}, document)
    assert [loss.split(" ")[0] for loss in found] == ["two", "three"]
    assert licences.losses({"tqdm": "MPL-2.0 AND MIT"}, "") == []  # excepted


@pytest.mark.parametrize(
    ("source", "lost"),
    [
        ("AutoConfig.from_pretrained(path, trust_remote_code=False)", 0),
        ("AutoConfig.from_pretrained(path)", 1),
        ("transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)", 1),
        ("AutoTokenizer.from_pretrained(path, trust_remote_code=given)", 1),
        ("AutoTokenizer.from_pretrained(path, **options)", 1),
        ("pipeline.make(path, trust_remote_code=True)", 1),
        ("torch.load(file, weights_only=True)", 0),
        ("torch.load(file)", 1),
        ("pickle.load(file)", 1),
    ],
)
def test_a_careless_call_is_reported(source: str, lost: int) -> None:
    calls, found = supply.careless(source)
    assert (calls, len(found)) == (1, lost)


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace")
def test_a_connection_and_an_opened_pickle_are_reported(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").touch()
    program = """
import socket
open("{}/adapter_model.bin").close()
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
"""
    _, _, trace = supply.traced(tmp_path, [], (), program.format(tmp_path))
    assert len(supply.connections(trace)) == 1
    assert any(supply.opened(line, supply.PICKLES) for line in trace)


def test_planted_code_runs_where_it_is_trusted(tmp_path: Path) -> None:
    """Else the campaign's own trial would show nothing."""
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_text("{}")
    code, pickle = supply.plant(tmp_path / "base", tmp_path / "adapter")
    exec((tmp_path / "base" / supply.CODE).read_text())
    import pickle as reader

    reader.loads((tmp_path / "adapter" / supply.PICKLES[0]).read_bytes())
    assert code.exists()
    assert pickle.exists()


def test_platforms_are_kept(tmp_path: Path) -> None:
    outcomes = platforms.run(tmp_path, "short", 0)
    assert losses(outcomes) == []
    assert outcomes[0].tried


def test_a_source_that_a_python_warns_of_is_reported(tmp_path: Path) -> None:
    python = platforms.interpreter(sys.version_info.minor)
    assert python is not None
    for text, lost in (("x = 1", 0), ("x = '\\d'", 1), ("x =", 1)):
        (tmp_path / "source.py").write_text(text)
        assert len(platforms.faults(python, [tmp_path / "source.py"])) == lost
