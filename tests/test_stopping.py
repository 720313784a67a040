"""Signals, outputs that nobody reads, and a machine that refuses: an exit code, one line, never a traceback."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors import SafetensorError

from flora_export import quantized_base
from flora_export.artifact import staged, writing
from flora_export.cli import common, main
from flora_export.cli.stopping import OUT_OF_MEMORY
from flora_export.errors import BackendError
from flora_export.pipeline import BuildOptions, build
from tests.conftest import silent


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flora_export.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def quantize(monkeypatch: pytest.MonkeyPatch, base: Path, out: Path, act: Callable[[], None], *more: str) -> tuple[int, str, str]:
    """`quantize-base`, with something that happens as it begins to write."""

    def write_shards(directory: Path, planned: object) -> None:
        (directory / "half").touch()
        act()

    monkeypatch.setattr(quantized_base, "write_shards", write_shards)
    done = CliRunner().invoke(main, ["quantize-base", str(base), "--precision", "int4", "--output", str(out), *more])
    return done.exit_code, done.stdout, done.stderr


SIGNALLED = """
import signal, sys, time
from flora_export import quantized_base
from flora_export.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's command in the background inherits that it is ignored

class Going:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def write_shards(directory, planned):
    (directory / "half").touch()
    {}
    time.sleep(20)

quantized_base.write_shards = write_shards
before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
try:
    main()
finally:
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
"""


def signalled(act: str, base: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """`quantize-base` in a process of its own, where a signal comes as it begins to write."""
    arguments = ["quantize-base", str(base), "--precision", "int4", "--output", str(out), *more]
    return subprocess.run(
        [sys.executable, "-c", SIGNALLED.format(act), *arguments], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number: signal.Signals, code: int, base: Path, tmp_path: Path) -> None:
    ended = signalled(f"signal.raise_signal({int(number)})", base, tmp_path / "out", "--json")
    assert (ended.returncode, ended.stderr) == (code, "error: interrupted; the output is as it was, or whole and new\n")
    assert json.loads(ended.stdout)["exit_code"] == code
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_an_object_goes(base: Path, tmp_path: Path) -> None:
    """Python drops what a finalizer raises: the command must end all the same, and not run on."""
    started = time.monotonic()
    ended = signalled("Going()", base, tmp_path / "out")
    assert (ended.returncode, ended.stderr) == (130, "error: interrupted; the output is as it was, or whole and new\n")
    assert time.monotonic() < started + 19
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory (MemoryError)"),
        (RuntimeError("std::bad_alloc"), "out of memory (std::bad_alloc)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory:\nyou tried"), "can't allocate memory: you tried"),
    ],
)
def test_no_memory(error: Exception, message: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    code, _, said = quantize(monkeypatch, base, tmp_path / "out", fail)
    assert code == 3 and message in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_to_say_so(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(common, "_fail", fail)
    code, _, _ = quantize(monkeypatch, base, tmp_path / "out", fail)
    assert code == 3
    assert capfd.readouterr().err == OUT_OF_MEMORY.decode()
    assert list(tmp_path.iterdir()) == []


def test_files_that_may_not_be_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "model.onnx")

    monkeypatch.setattr(quantized_base, "load_base", fail)
    done = CliRunner().invoke(main, ["quantize-base", str(base), "--precision", "int4", "--output", "out"])
    assert done.exit_code == 3 and done.stderr.startswith("error: model.onnx: Permission denied") and done.stderr.count("\n") == 1


def test_a_full_disk_that_safetensors_meets(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"No space left.*make room"), staged(tmp_path / "out", force=False), writing(tmp_path / "out"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_reader_that_has_gone(adapter: Path) -> None:
    reading, writing_ = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "flora_export.cli", "inspect", str(adapter)]
    ended = subprocess.run(command, stdout=writing_, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writing_)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--json"], ["--help"]])
def test_an_output_on_a_full_disk(arguments: list[str], adapter: Path) -> None:
    command = [sys.executable, "-m", "flora_export.cli", *arguments, *([str(adapter)] if "inspect" in arguments else [])]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert ended.returncode == 3 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


def test_a_damaged_artifact_answers_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    build(adapter, str(base), tmp_path / "out", BuildOptions(verify=False), silent)
    with (tmp_path / "out" / "model.onnx.data").open("r+b") as stream:
        stream.write(b"\1\2\3\4")
    ended = run("generate", tmp_path / "out", "hi")
    assert ended.returncode == 2 and "is damaged: model.onnx.data is not the file that was built" in ended.stderr
