"""The part of the campaign that reads hostile input: nothing is lost, and it would say so if anything were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.campaign import hostile, hostile_commands, hostile_cpp
from benchmarks.campaign.hostile_commands import Ran, faults
from tests.cpp import ROOT, what_is_missing

# Readers with a defect each, and one without, read one input each in a process of its own: its audit hook cannot be taken away.
PLANTED = """
import json, os, socket, sys, time
from pathlib import Path
from benchmarks.campaign import fuzz_guard
from benchmarks.campaign.fuzz import Run
from benchmarks.campaign.fuzz_mutate import mutate_json
from benchmarks.campaign.fuzz_targets import Target
from flora_export.errors import CheckpointError

fuzz_guard.SECONDS, fuzz_guard.PATIENCE, work = 2, 5, Path(sys.argv[1])

def refuse(data):
    raise CheckpointError("no")

def loop(data):
    while True:
        pass

def grow(data):
    return len(bytearray(os.urandom(1)) * 2**31)

readers = {
    "sound": len, "refuses": refuse, "KeyError": lambda data: {}[data], "loops": loop,
    "sleeps": lambda data: time.sleep(600), "grows": grow,
    "reads": lambda data: open("/etc/passwd").close(), "writes": lambda data: open(work.parent / "outside", "w").close(),
    "runs": lambda data: os.system("true"), "executes": lambda data: exec(compile("1", "stranger", "exec")),
    "talks": lambda data: socket.socket().connect_ex(("127.0.0.1", 9)), "imports": lambda data: __import__("stranger_module"),
}
guard, lost = fuzz_guard.Guard(work), {}
for name, read in readers.items():
    run = Run(Target(name, read, mutate_json, ()), guard, {"work": work, "lost": work / "lost"})
    run.one(name.encode())
    lost[name] = list(run.losses.values())
print(json.dumps(lost))
"""


def test_planted_defects_are_reported(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PLANTED, str(work)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lost = {name: " ".join(losses) for name, losses in json.loads(done.stdout).items()}
    assert lost.pop("sound") == lost.pop("refuses") == ""
    for name, words in {
        "KeyError": "KeyError at", "loops": "Hang at", "sleeps": "Hang at", "grows": "memory grew",
        "reads": "read /etc/passwd", "writes": "wrote", "runs": "os.system",
        "executes": "ran code of 'stranger'", "talks": "socket.connect", "imports": "imported stranger_module",
    }.items():  # fmt: skip
        assert words in lost.pop(name), name
    assert not lost
    assert (work / "lost").is_dir()  # the inputs that repeat them


def test_a_process_that_dies_is_a_loss(tmp_path: Path) -> None:
    """The job names a target that there is not."""
    job = {
        "targets": ["nothing"],
        "engine": "random",
        "runs": 1,
        "examples": 1,
        "seconds": 5,
        "seed": 0,
        "corpus": "",
        "lost": str(tmp_path),
    }
    figures, losses = hostile.fuzz(tmp_path / "job", job)
    assert figures == {}
    assert "the process ended with 1 (KeyError: 'nothing')" in losses[0]


def test_what_a_command_must_not_do() -> None:
    good = Ran(2, 0.1, 0, "", "checking the ledger ...\nerror: no\n", [])
    assert faults(good, (2,), 0.1, 0, "secret") == []
    for bad, words in (
        (Ran(3, 0.1, 0, "", "error: no\n", []), "exit code 3"),
        (Ran(2, 9.0, 0, "", "error: no\n", []), "9.0 s"),
        (Ran(2, 0.1, 2**32, "", "error: no\n", []), "4096 MiB"),
        (Ran(2, 0.1, 0, "", "Traceback\nerror: no\n", []), "2 lines"),
        (Ran(2, 0.1, 0, "", "error: \x1b[2J\n", []), "control characters"),
        (Ran(2, 0.1, 0, "", "error: secret\n", []), "outside"),
        (Ran(2, 0.1, 0, "", "error: no\n", ["os.system"]), "os.system"),
    ):
        assert any(words in fault for fault in faults(bad, (2,), 0.1, 0, "secret")), words


def test_the_short_form_loses_nothing(tmp_path: Path) -> None:
    outcomes = hostile.run(tmp_path, "short", 0)
    assert [outcome.losses for outcome in outcomes] == [[], [], []]
    fuzzed, commands, cpp = outcomes
    assert fuzzed.tried >= 2000
    assert set(fuzzed.figures["targets"]) == set(hostile.SHARES)
    assert all(row["executions"] >= row["corpus"] > 0 for row in fuzzed.figures["targets"].values())
    assert commands.promise == hostile_commands.PROMISE
    assert commands.tried >= 10
    assert cpp.promise == hostile_cpp.PROMISE
    assert cpp.tried >= 100 or (cpp.not_tried and what_is_missing() is not None)
