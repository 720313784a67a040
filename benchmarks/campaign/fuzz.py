"""Fuzzes targets in a process of its own, which may die: `python -m benchmarks.campaign.fuzz JOB`, a JSON file.

    {"targets": [...], "engine": "random", "runs": 1000, "examples": 100, "seconds": 60, "seed": 0,
     "work": DIR, "corpus": DIR, "lost": DIR, "report": FILE}

Engines: `random` reads the corpus, lets hypothesis grow JSON, and changes the corpus at random; `atheris` lets libFuzzer choose by the
coverage of flora_export, one target a process; `keep` writes the corpus. It has a folder for each target.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import logging
import random
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.campaign.fuzz_guard import PATIENCE, SECONDS, Guard, Hang, limit_memory, report_opens_of_safetensors, stay_inside
from benchmarks.campaign.fuzz_mutate import mutate_json

if TYPE_CHECKING:
    from benchmarks.campaign.fuzz_targets import Target

MOST_LOSSES = 20  # of one target, each of another place
LONGEST = 16384  # bytes of an input


class Run:
    """Executions of one target, and what was lost."""

    def __init__(self, target: Target, guard: Guard, job: dict[str, Any]) -> None:
        self.target, self.guard, self.job = target, guard, job
        self.executions, self.accepted, self.started = 0, 0, time.monotonic()
        self.watched = 0.0
        self.losses: dict[str, str] = {}
        self.current = Path(job["work"]) / f"{target.name}.current"  # what a death of the process leaves behind

    def one(self, data: bytes) -> None:
        """Read an input. Whatever goes wrong is noted, and the next may come."""
        self.executions += 1
        self.current.write_bytes(data)
        if time.monotonic() - self.watched > 1:
            self.watched = time.monotonic()
            faulthandler.dump_traceback_later((PATIENCE + 2) * SECONDS, exit=True)  # of what does not even take a signal
        from benchmarks.campaign.fuzz_targets import REFUSALS

        try:
            with self.guard.watching():
                self.target.read(data)
            self.accepted += 1
        except REFUSALS as refusal:
            if len(str(refusal)) > 20_000:
                self._lose(f"a message of {len(str(refusal))} characters", data)
        except (Hang, Exception) as error:
            self._lose(f"{type(error).__name__} at {_place(error)}", data, f": {error!s:.150}")
        for event in (*self.guard.events, *(f"imported {name}" for name in self.guard.imports)):
            self._lose(event, data)

    def _lose(self, what: str, data: bytes, more: str = "") -> None:
        if what in self.losses or len(self.losses) >= MOST_LOSSES:
            return
        directory = Path(self.job["lost"])
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / f"{self.target.name}-{hashlib.sha256(data).hexdigest()[:12]}"
        file.write_bytes(data)
        self.losses[what] = f"{self.target.name}: {what}{more} ({file})"

    def figures(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.started
        return {"executions": self.executions, "accepted": self.accepted, "seconds": round(seconds, 1), "losses": [*self.losses.values()]}


def _place(error: BaseException) -> str:
    """The last line of ours that an error came through, or of whoever raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "flora_export" in frame.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


def corpus_of(job: dict[str, Any], target: Target) -> list[bytes]:
    """The seeds of a target, and its corpus."""
    return [*target.seeds, *(file.read_bytes() for file in sorted((Path(job["corpus"]) / target.name).glob("*")))]


def try_at_random(run: Run, job: dict[str, Any]) -> None:
    """The corpus as it is, JSON grown by hypothesis, and the corpus changed once or more."""
    rng, corpus = random.Random(f"{job['seed']} {run.target.name}"), corpus_of(job, run.target)
    for data in corpus:
        run.one(data)
    if run.target.mutate is mutate_json:
        hypothesize(run, job)
    until = run.executions + job["runs"]
    while run.executions < until and time.monotonic() - run.started < job["seconds"]:
        run.one(run.target.mutate(rng, rng.choice(corpus))[:LONGEST])


def hypothesize(run: Run, job: dict[str, Any]) -> None:
    """JSON grown by hypothesis, put in the place of values of a seed."""
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st

    seeds = [content for data in run.target.seeds if isinstance(content := _json(data), (dict, list)) and content]
    if not seeds:
        return
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4))
    edits = st.lists(st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=5), values), min_size=1, max_size=4)

    @seed(job["seed"])
    @settings(max_examples=job["examples"], database=None, deadline=None, suppress_health_check=[*HealthCheck], phases=[Phase.generate])
    @given(st.sampled_from(range(len(seeds))), edits)
    def try_them(which: int, changes: list[tuple[list[int], Any]]) -> None:
        content = json.loads(json.dumps(seeds[which]))
        for path, value in changes:
            _put(content, path, value)
        if time.monotonic() - run.started < job["seconds"]:
            run.one(json.dumps(content).encode())

    try_them()


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _put(node: Any, path: list[int], value: Any) -> None:
    for index, step in enumerate(path):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[step % len(keys)]
        if index == len(path) - 1 or not isinstance(node[key], (dict, list)) or not node[key]:
            node[key] = value
            return
        node = node[key]


def cover(run: Run, job: dict[str, Any]) -> None:
    """libFuzzer, guided by coverage; it ends the process."""
    import atheris

    corpus = Path(job.get("grown", job["work"])) / run.target.name
    corpus.mkdir(parents=True, exist_ok=True)
    for data in corpus_of(job, run.target):
        (corpus / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)

    def change(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        return bytes(run.target.mutate(rng, data)[:most]) if rng.random() < 0.6 else bytes(atheris.Mutate(data, most))

    def one(data: bytes) -> None:
        run.one(data)
        if run.executions % 512 == 0:  # libFuzzer ends the process without a word to Python
            Path(job["report"]).write_text(json.dumps({run.target.name: run.figures()}))

    limits = [f"-max_total_time={job['seconds']}", f"-runs={job['runs']}", f"-timeout={(PATIENCE + 2) * SECONDS}", "-rss_limit_mb=4096"]
    others = [f"-max_len={LONGEST}", f"-seed={job['seed'] + 1}", "-print_final_stats=1", f"-artifact_prefix={job['work']}/"]
    atheris.Setup([sys.argv[0], *limits, *others, str(corpus)], one, custom_mutator=change)
    atheris.Fuzz()


def keep(run: Run, job: dict[str, Any]) -> None:
    """Write into `corpus` the smallest of the `grown` inputs that together reach all lines of flora_export that any of them reaches."""
    reached: set[tuple[str, int]] = set()
    kept = Path(job["corpus"]) / run.target.name
    files = sorted((Path(job["grown"]) / run.target.name).glob("*"), key=lambda file: (file.stat().st_size, file.name))
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for data in (file.read_bytes() for file in files if file.stat().st_size <= job["longest"]):
        found: set[tuple[str, int]] = set()

        def trace(frame: Any, event: str, _: Any, found: set[tuple[str, int]] = found) -> Any:
            found.add((frame.f_code.co_filename, frame.f_lineno))
            return trace if "flora_export" in frame.f_code.co_filename else None

        sys.settrace(trace)
        run.one(data)
        sys.settrace(None)
        ours = {place for place in found if "flora_export" in place[0]}
        if ours - reached:
            reached |= ours
            (kept / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)


ENGINES: dict[str, Callable[[Run, dict[str, Any]], None]] = {
    "random": try_at_random, "atheris": cover, "keep": keep
}  # fmt: skip


@contextlib.contextmanager
def instrumented(engine: str) -> Iterator[None]:
    """flora_export is imported so that libFuzzer sees which of its lines are reached."""
    if engine != "atheris":
        yield
        return
    import atheris

    with atheris.instrument_imports(include=["flora_export"], enable_loader_override=False):
        yield


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    work = Path(job["work"])
    warnings.simplefilter("ignore")
    logging.disable()
    report_opens_of_safetensors()
    with instrumented(job["engine"]):
        from benchmarks.campaign.fuzz_targets import make_targets

        targets = make_targets(work, job["targets"])
    stay_inside(work)
    guard = Guard(work)
    done: dict[str, Any] = {}
    for target in targets:
        for data in target.seeds:  # what is imported when it is needed is imported now
            with contextlib.suppress(Exception):
                target.read(data)
    limit_memory()
    for target in targets:
        run = Run(target, guard, job)
        ENGINES[job["engine"]](run, job)
        faulthandler.cancel_dump_traceback_later()
        done[target.name] = run.figures()
        Path(job["report"]).write_text(json.dumps(done))


if __name__ == "__main__":
    main()
