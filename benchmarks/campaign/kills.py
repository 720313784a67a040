"""SIGKILL at random moments of everything that writes: what was there is still there whole, or what is new is there whole.

Half the kills fall on a moment of the operation's own duration. The others fall before a change of a file (a rename, a removal, an open for
writing, a lock), each in turn, or up to 3 ms after it: between two changes lies what a crash can break, however short it is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.campaign.fleets import Trial
from benchmarks.campaign.forks import Forks, Run
from benchmarks.campaign.outcome import Outcome, Size
from benchmarks.campaign.scene import Sources, do, make_scene
from benchmarks.campaign.whole import (
    ABSENT,
    BETWEEN,
    NEW,
    OLD,
    State,
    cache_faults,
    digests,
    directory_state,
    live_content,
    repository_state,
    strays_of_repository,
)
from flora_export.backends.triton.repository import versions
from flora_export.pipeline import BuildOptions, build

PART = "kills"
WHOLE = "OUT, a repository, a bank and the cache are absent, old and whole, or new and whole"
NEXT = "the next operation succeeds, and leaves nothing behind"
FLEETS = "a fleet does all of its jobs though workers die, and after its own death what is left"
WORKER_KILLS, FLEET_KILLS = 12, 4
SMOLLM2 = Path(__file__).parents[2] / "models" / "smollm2"
ADAPTER = Path(__file__).parents[2] / "examples" / "01_train_ffba" / "adapter"


@dataclass(frozen=True)
class Operation:
    """A command that writes `target`, and what is there before. `again`: what follows where the command cannot be repeated as it is."""

    name: str
    before: Path | None
    args: Callable[[Path], list[object]]
    kills: int  # in a full run
    again: Callable[[Path], list[object]] | None = None
    repository: bool = False
    compiled: tuple[str, ...] = ()  # as `directory_state` has it
    link: bool = False  # what is before is large: its files are linked, not copied

    @property
    def target(self) -> str:
        return "repo" if self.repository else "out"


class Trials:
    """An operation, killed again and again in a place of its own."""

    def __init__(self, operation: Operation, forks: Forks, seed: int, setups: dict[str, dict[str, Any]] | None = None) -> None:
        """`setups`: what is done to every child before it is killed."""
        self.operation, self.forks, self.seed, self.setups = operation, forks, seed, setups or {}
        self.place = forks.work / "place"
        self.target = self.place / operation.target
        self.cache = forks.cache
        self._clear()
        undisturbed = forks.one(operation.args(self.target), setups=self.setups)
        if undisturbed.code != 0:
            raise RuntimeError(f"{operation.name}: {undisturbed.told()}")
        self.seconds, self.events = undisturbed.seconds, undisturbed.events
        self.temporary = {path.name for path in forks.temp.iterdir()}  # ONNX Runtime leaves a file of a fixed name
        self.state = _teller(operation, self.target)
        self.found: Counter[str] = Counter()
        self.tried, self.timed = 0, 0
        self.broken: list[str] = []
        self.left: list[str] = []

    def _clear(self) -> None:
        for directory in (self.place, self.cache, self.forks.temp):
            shutil.rmtree(directory, ignore_errors=True)
        self.place.mkdir(parents=True)
        self.forks.temp.mkdir()
        if self.operation.before is not None:
            shutil.copytree(self.operation.before, self.target, copy_function=os.link if self.operation.link else shutil.copy2)

    def run(self, count: int) -> None:
        """Kill it so many times; which moments, the seed says."""
        dice = random.Random(f"{self.seed} {self.operation.name}")
        events: list[int] = []
        for trial in range(count):
            if trial % 2:
                moment = dice.uniform(0, self.seconds)
                self._try(trial, Run([], signal_after=moment), f"after {moment:.4f} s")
            else:
                events = events or dice.sample(range(1, self.events + 1), self.events)
                event, delay = events.pop(), dice.choice((0.0, dice.uniform(0, 0.003)))
                setups = {"signal_at_event": {"event": event, "delay": delay}}
                self._try(trial, Run([], setups), f"at change {event} of {self.events} + {delay * 1000:.2f} ms")

    def _try(self, trial: int, how: Run, moment: str) -> None:
        operation = self.operation
        what = f"{operation.name}, seed {self.seed}, trial {trial}, killed {moment}"
        self._clear()
        killed = self.forks.one(operation.args(self.target), setups=self.setups | how.setups, signal_after=how.signal_after)
        self.tried += 1
        self.timed += how.signal_after is not None
        state = self.state(self.target)
        self.found[state if state in (ABSENT, OLD, NEW, BETWEEN) else "broken"] += 1
        self.found["ended before it was killed"] += killed.code == 0
        if state not in (ABSENT, OLD, NEW, BETWEEN):
            self.broken.append(f"{what}: {state}")
        self.broken += [f"{what}: {fault}" for fault in cache_faults(self.cache)]
        self.left += [f"{what}: {fault}" for fault in self._next(state)]

    def _next(self, state: str) -> list[str]:
        """What is wrong after the next operation of the same kind."""
        operation, again = self.operation, self.operation.args
        if operation.again is not None and state in (NEW, BETWEEN):
            again = operation.again
        elif not operation.repository and operation.before is None and state == NEW:
            shutil.rmtree(self.target)  # a command that replaces nothing
        ended = self.forks.one(again(self.target))
        if ended.code != 0:
            return [f"the next one failed: {ended.told()}"]
        faults = [] if (then := self.state(self.target)) == NEW else [f"after the next one: {then}"]
        faults += [f"{path.name} is left" for path in self.place.iterdir() if path != self.target]
        faults += [f"{name} is left in TMPDIR" for name in {path.name for path in self.forks.temp.iterdir()} - self.temporary]
        faults += [f"{path.name} is left in the cache" for path in self.cache.glob(".*")]
        if operation.repository:
            held = 0 if operation.before is None else len(versions(operation.before, "decoder"))
            published = 0 if operation.again is not None else 1 + (state in (NEW, BETWEEN))
            faults += strays_of_repository(self.target, held + published)
        return faults


def _teller(operation: Operation, done: Path) -> State:
    """Tells the states of an operation's target, after one that was left alone is done."""
    before = operation.before
    if operation.repository:
        return repository_state(None if before is None else live_content(before), live_content(done))
    return directory_state(None if before is None else digests(before), digests(done), operation.compiled)


def operations(forks: Forks, root: Path, size: Size) -> list[Operation]:
    """What is killed, and what it needs, made."""
    scene = make_scene(forks, root)
    s = scene.sources
    name = ["--name", "second", "--base", s.base]

    def back(at: Path) -> list[object]:
        """A rollback that is done cannot be repeated: there is none before the first version."""
        return ["triton", at, "--to", 1]

    short = [
        Operation("build", None, lambda out: s.build([s.one], out, "--no-verify"), 80),
        Operation("build --force", scene.two, lambda out: s.build([s.one], out, "--no-verify", "--force"), 80),
        Operation("publish a first version", None, lambda repo: ["triton", scene.one, repo], 150, repository=True),
        Operation("publish", scene.repo, lambda to: ["triton", scene.two, to], 150, repository=True),
        Operation("roll back", scene.repo2, lambda at: ["triton", at, "--rollback"], 160, back, repository=True),
        Operation("set-adapter", scene.bank, lambda out: ["set-adapter", out, s.three, *name], 80),
        Operation("publish-adapter", scene.bank_repo, lambda to: ["publish-adapter", to, s.three, *name], 80, repository=True),
        Operation("convert", None, lambda out: ["convert", s.pickle, out], 70),
        Operation("quantize-base", None, lambda out: ["quantize-base", s.base, "--precision", "int4", "--output", out], 70),
    ]
    if size == "short":
        return short
    return [
        *short,
        Operation("build, verified", scene.two, lambda out: s.build([s.one], out, "--force"), 25),
        Operation("build --backend triton", scene.repo, lambda to: s.build([s.two], to, "--force", backend="triton"), 25, repository=True),
        *_engines(forks, root, s),
    ]


def _engines(forks: Forks, root: Path, s: Sources) -> list[Operation]:
    """Rebuilds, where the compilers are there."""
    made = []
    if importlib.util.find_spec("onnxruntime_qnn") is not None:
        contexts = root / "contexts"
        do(forks, *s.build([s.one], contexts, "--precision", "fp16", "--no-simulate", backend="qnn"))
        made.append(
            Operation(
                "rebuild, QNN", contexts, lambda out: ["rebuild", out, "--no-simulate", "--soc-model", 60], 15, compiled=("_qnn.bin",)
            )
        )
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        engine = root / "engine"
        do(forks, *s.build([s.one], engine, "--compute-capability", "8.9", backend="tensorrt"))
        made.append(
            Operation(
                "rebuild, TensorRT-RTX", engine, lambda out: ["rebuild", out, "--compute-capability", "12.0"], 15, compiled=(".engine",)
            )
        )
    return made


def large(forks: Forks, root: Path) -> list[Operation]:
    """The same of SmolLM2."""
    old, base = root / "large", ["--base", SMOLLM2, "--backend", "onnxruntime", "--no-verify", "--output"]
    do(forks, "build", ADAPTER, *base, old, "--fuse", "none")
    return [
        Operation("build, SmolLM2", None, lambda out: ["build", ADAPTER, *base, out], 25),
        Operation("build --force, SmolLM2", old, lambda out: ["build", ADAPTER, *base, out, "--force"], 25, link=True),
    ]


def run(work: Path, size: Size, seed: int) -> list[Outcome]:
    """Kill every operation, on two processes in a full run."""
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        forks = [stack.enter_context(Forks(work / f"forks{index}")) for index in range(1 if size == "short" else 2)]
        todo = operations(forks[0], work, size)
        not_tried = [
            "A power failure: what a killed process has written is still the kernel's to write; what a dead machine has not, is lost.",
        ]
        if size == "full" and (SMOLLM2 / "model.safetensors").is_file():
            todo = large(forks[0], work) + todo
        elif size == "full":
            not_tried.append(f"SmolLM2: it is not at {SMOLLM2}.")
        free: queue.SimpleQueue[Forks] = queue.SimpleQueue()
        for each in forks:
            free.put(each)

        def kill(operation: Operation) -> Trials:
            mine = free.get()
            try:
                trials = Trials(operation, mine, seed)
                trials.run(2 if size == "short" else operation.kills)
            finally:
                free.put(mine)
            print(f"  {operation.name}: {trials.tried} kills, {len(trials.broken + trials.left)} losses", file=sys.stderr, flush=True)
            return trials

        with ThreadPoolExecutor(len(forks)) as pool:
            done = list(pool.map(kill, todo))
    outcomes = _outcomes(done, not_tried, time.monotonic() - started)
    if size == "short":
        return outcomes
    if importlib.util.find_spec("ray") is None:
        return [*outcomes, Outcome(PART, FLEETS, not_tried=["Ray is not installed: pip install 'flora-export[fleet]'"])]
    return [*outcomes, kill_fleets(work / "fleets", seed)]


def kill_fleets(work: Path, seed: int) -> Outcome:
    """Workers of fleets, and whole fleets, on Ray."""
    from tests.families import make_adapter, make_speaking_base

    started, base = time.monotonic(), make_speaking_base(work / "base")
    adapters = [make_adapter(base, work / f"adapter{number}", seed=number) for number in range(4)]
    for adapter in adapters:
        build(adapter, str(base), work / "right" / adapter.name, BuildOptions(), lambda *_: None)
    trial = Trial(base, adapters, work / "right", work / "killed", random.Random(seed))
    figures = {"workers": trial.workers(WORKER_KILLS), "fleets": trial.fleets(FLEET_KILLS), "Ctrl-C": trial.interrupted()}
    losses = [loss for found in figures.values() for loss in found.pop("losses")]
    return Outcome(PART, FLEETS, WORKER_KILLS + FLEET_KILLS + 1, losses, figures, seconds=round(time.monotonic() - started, 1))


def _outcomes(done: Sequence[Trials], not_tried: list[str], seconds: float) -> list[Outcome]:
    tried, timed = sum(trials.tried for trials in done), sum(trials.timed for trials in done)
    figures: dict[str, Any] = {
        "killed at a moment of time": timed,
        "killed at a change of a file": tried - timed,
        "found": {trials.operation.name: dict(+trials.found) for trials in done},
        "changes of files": {trials.operation.name: trials.events for trials in done},
        "seconds undisturbed": {trials.operation.name: round(trials.seconds, 2) for trials in done},
    }
    broken, left = [loss for trials in done for loss in trials.broken], [loss for trials in done for loss in trials.left]
    return [
        Outcome(PART, WHOLE, tried, broken, figures, not_tried, round(seconds, 1)),
        Outcome(PART, NEXT, tried, left, seconds=round(seconds, 1)),
    ]
