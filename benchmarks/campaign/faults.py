"""Accidents that are no kill: full disks, lost permissions, damaged files, wrong clocks, two commands at once, no memory, Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.campaign.damage import damaged_files
from benchmarks.campaign.disk import full_disks, little_memory, lost_permissions
from benchmarks.campaign.forks import Forks
from benchmarks.campaign.interrupts import closed_outputs, interrupted
from benchmarks.campaign.outcome import Outcome, Size
from benchmarks.campaign.races import at_the_same_time, wrong_clocks
from benchmarks.campaign.scene import make_scene


def run(work: Path, size: Size, seed: int) -> list[Outcome]:
    """One outcome for each kind of accident."""
    with Forks(work / "forks") as forks:
        scene = make_scene(forks, work)
        kinds: list[Callable[[], Outcome]] = [
            lambda: full_disks(forks, scene, size, seed),
            lambda: lost_permissions(forks, scene, size),
            lambda: damaged_files(forks, scene, size, seed),
            lambda: wrong_clocks(forks, scene, size),
            lambda: at_the_same_time(forks, scene, size, seed),
            lambda: little_memory(forks, scene, size),
            lambda: interrupted(forks, scene, size, seed),
            lambda: closed_outputs(forks, scene),
        ]
        return [_timed(kind) for kind in kinds]


def _timed(kind: Callable[[], Outcome]) -> Outcome:
    started = time.monotonic()
    outcome = kind()
    outcome.seconds = round(time.monotonic() - started, 1)
    return outcome
