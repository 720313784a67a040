"""Ctrl-C and a job's cancellation at random moments, and a reader that leaves before a command has said all."""

from __future__ import annotations

import random
import signal
from collections import Counter
from typing import Any

from benchmarks.campaign.disk import Writer, writers
from benchmarks.campaign.forks import Ended, Forks
from benchmarks.campaign.outcome import Outcome, Size
from benchmarks.campaign.refusals import Tally, fresh
from benchmarks.campaign.scene import Scene
from benchmarks.campaign.whole import digests

PART = "faults"
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def interrupted(forks: Forks, scene: Scene, size: Size, seed: int) -> Outcome:
    """Every command, at a moment of its duration or before a change of a file. What is left is old, or new where all was done."""
    tally = Tally(PART, "Ctrl-C and SIGTERM: exit 130 and 143, one line, and nothing is left behind")
    ends: Counter[str] = Counter()
    commands = writers(scene)[:4] + readers(scene)
    for writer in commands[::3] if size == "short" else commands:
        with fresh(forks, writer.before) as trial:
            whole = forks.one(writer.args(trial.place))
            new = digests(trial.place)
        if whole.code != 0:
            raise RuntimeError(f"{writer.name}: {whole.told()}")
        dice = random.Random(f"{seed} {writer.name}")
        for index in range(2 if size == "short" else 24):
            number = (signal.SIGINT, signal.SIGTERM)[index % 2]
            options: dict[str, Any] = {}
            event = 0
            if index % 4 < 2 and whole.events:
                event = dice.randint(1, whole.events)
                options["setups"] = {"signal_at_event": {"event": event, "delay": 0.0, "number": int(number)}}
                moment = f"before change {event}"
            else:
                options |= {"signal_after": dice.uniform(0.005, whole.seconds), "signal": int(number)}
                moment = f"after {options['signal_after']:.4f} s"
            with fresh(forks, writer.before) as trial:
                ended = forks.one(writer.args(trial.place), **options)
                came_late = ended.events < event if event else ended.seconds < options["signal_after"] + 0.5
                faults = _faults(ended, SIGNALS[number], came_late)
                if digests(trial.place) not in (trial.before, new):
                    faults += [fault for fault in trial.changed() if fault.endswith("changed")]
                faults += [fault for fault in trial.changed() if fault.endswith("is left")]
            ends[f"{number.name}: {ended.code}"] += 1
            tally.count(f"{writer.name}, seed {seed}, trial {index}, {number.name} {moment}", ended, faults)
    tally.outcome.figures["exit codes"] = dict(sorted(ends.items()))
    tally.outcome.not_tried.append("A signal while Python itself starts, before a command's first line.")
    return tally.done()


def readers(scene: Scene) -> list[Writer]:
    """Commands that change nothing."""
    s, out = scene.sources, scene.one
    bench = ["--rounds", 2, "--arms", "base,fused", "--prompt-tokens", 8, "--past-tokens", 8, "--new-tokens", 4]
    return [
        Writer("verify", {}, lambda _: ["verify", out, "--ckpt", s.one, "--base", s.base]),
        Writer("generate", {}, lambda _: ["generate", out, "hi", "--max-new-tokens", 48]),
        Writer("bench", {}, lambda _: ["bench", out, *bench]),
    ]


def _faults(ended: Ended, code: int, came_late: bool) -> list[str]:
    """What is wrong with how it ended: with that code and one line, or with 0 where the signal came as it was done."""
    if ended.code == 0 and came_late:
        return []
    if "Traceback" in ended.err:
        return [f"a traceback, {ended.told()}"]
    if ended.code != code:
        return [ended.told()]
    said = [line for line in ended.error.splitlines() if line.startswith("error: ")]
    return [] if len(said) == 1 and "interrupted" in said[0] else [f"it says {ended.error[:200]!r}"]


def closed_outputs(forks: Forks, scene: Scene) -> Outcome:
    """`... | head -1`, and an output on a full disk."""
    tally = Tally(PART, "a reader that has gone, or a full disk behind stdout: no traceback")
    s, out = scene.sources, scene.one
    commands: dict[str, list[object]] = {
        "explain": ["explain", out],
        "explain --json": ["explain", out, "--json"],
        "verify": ["verify", out],
        "inspect": ["inspect", s.one],
        "generate": ["generate", out, "hi", "--max-new-tokens", 4],
        "triton --check": ["triton", scene.repo, "--check"],
        "build --help": ["build", "--help"],
    }
    for setup, expected in {"closed_pipe": (141,), "full_device": (3,)}.items():
        for name, args in commands.items():
            ended = forks.one(args, setups={setup: {}})
            faults = ["a traceback"] * ("Traceback" in ended.err or "Exception ignored" in ended.err)
            tally.count(f"{name}, {setup}", ended, faults + [ended.told()] * (ended.code not in expected and name != "build --help"))
    return tally.done()
