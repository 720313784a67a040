"""Temporary directories: what a killed process has left goes with the next, what a living one has does not, and signals wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flora_export.scratch import Scratch

HOLD = """
import os, sys
from pathlib import Path
from flora_export.scratch import Scratch
kept = Scratch(".part-", Path(sys.argv[1]))
print(kept.name, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), 9)
"""


def test_the_next_one_removes_what_a_killed_process_has_left(tmp_path: Path) -> None:
    (tmp_path / ".other-1").mkdir()
    (tmp_path / ".part-link").symlink_to(tmp_path / ".other-1")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    held = Path(process.stdout.readline().strip())
    (held / "file").touch()
    with Scratch(".part-", tmp_path):
        assert (held / "file").exists()
    process.communicate("\n", timeout=60)
    assert process.returncode == -9
    assert held.exists()
    with Scratch(".part-", tmp_path) as name:
        assert not held.exists()
        assert Path(name).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other-1", ".part-link"]


def test_one_that_is_swept_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, swept = os.open, []

    def sweep_first(path: str, *rest: int, **more: int) -> int:
        if not swept:
            swept.append(path)
            os.rmdir(path)
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", sweep_first)
    with Scratch(".part-", tmp_path) as name:
        assert Path(name).exists()
        assert swept and swept[0] != name
    assert list(tmp_path.iterdir()) == []


WAITS = """
import signal
from flora_export.scratch import undisturbed
done = []
signal.signal(signal.SIGINT, lambda number, _: done.append("signal"))
with undisturbed():
    signal.raise_signal(signal.SIGINT)
    done.append("went on")
done.append("after it")
print(*done, sep=", ")
"""


def test_a_signal_waits() -> None:
    """In a process of its own: a signal has ended a test runner's, whose libraries handle signals too, and its other tests were lost."""
    ended = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "went on, signal, after it\n", "")
