"""Disks that are full or may not be written, and memory that runs out, at every size at which another file is the first that fails."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.campaign.forks import Forks
from benchmarks.campaign.outcome import Outcome, Size
from benchmarks.campaign.refusals import Tally, fresh, refusal_faults
from benchmarks.campaign.scene import Scene
from benchmarks.campaign.whole import digests

MEGABYTES = (512, 384, 256, 192, 128, 96, 64, 48, 32, 16, 8, 4, 2, 1)
PART = "faults"
PAGE = 4096
CAPACITY = 64 * 2**20


@dataclass(frozen=True)
class Writer:
    """A command that writes into a place, and what is there before."""

    name: str
    before: dict[str, Path]
    args: Callable[[Path], list[object]]


def writers(scene: Scene) -> list[Writer]:
    """Commands that write."""
    s, name = scene.sources, ["--name", "second", "--base", scene.sources.base]
    return [
        Writer("build", {}, lambda place: s.build([s.one], place / "out", "--no-verify")),
        Writer("build --force", {"out": scene.two}, lambda place: s.build([s.one], place / "out", "--force")),
        Writer("publish", {"repo": scene.repo}, lambda place: ["triton", scene.two, place / "repo"]),
        Writer("set-adapter", {"out": scene.bank}, lambda place: ["set-adapter", place / "out", s.three, *name]),
        Writer("convert", {}, lambda place: ["convert", s.pickle, place / "out"]),
        Writer("quantize-base", {}, lambda place: ["quantize-base", s.base, "--precision", "int4", "--output", place / "out"]),
        Writer("roll back", {"repo": scene.repo2}, lambda place: ["triton", place / "repo", "--rollback"]),
        Writer("publish-adapter", {"repo": scene.bank_repo}, lambda place: ["publish-adapter", place / "repo", s.three, *name]),
    ]


def full_disks(forks: Forks, scene: Scene, size: Size, seed: int) -> Outcome:
    """A file system that has room for the first n bytes that a command writes; and, of any size, one that lets no file grow beyond n."""
    tally = Tally(PART, "a full disk: exit 2 or 3, one line, and nothing has changed")
    dice = random.Random(f"{seed} disk")
    with _mounted(forks.work / "disk") as disk:
        if disk is None:
            tally.outcome.not_tried.append("A full disk: mounting a small file system needs root. Only the sizes of files were limited.")
        for writer in writers(scene)[:: 2 if size == "short" else 1]:
            sizes = _written(forks, writer)
            many = 1 if size == "short" else 99
            if disk is not None:
                reached = list(itertools.accumulate(sizes))
                rooms = [0, *(end - size // 2 for end, size in zip(reached, sizes, strict=True))]
                for room in dice.sample(rooms, min(many, len(rooms))):
                    _fill(tally, forks, writer, disk, room)
            limits = sorted({size // 2 for size in sizes})
            for limit in dice.sample(limits, min(many, 6, len(limits))):
                with fresh(forks, writer.before) as trial:
                    ended = forks.one(writer.args(trial.place), setups={"file_size": {"limit": limit}})
                    faults = refusal_faults(ended) + trial.changed()
                tally.count(f"{writer.name}, no file larger than {limit:,} bytes", ended, faults)
    return tally.done()


def _written(forks: Forks, writer: Writer) -> list[int]:
    """The sizes of the files that a command writes, in order, in pages of a tmpfs."""
    with fresh(forks, writer.before) as trial:
        ended = forks.one(writer.args(trial.place))
        if ended.code != 0:
            raise RuntimeError(f"{writer.name}: {ended.told()}")
        now = digests(trial.place)
        new = {path.stat().st_ino: path for name in now if trial.before.get(name) != now[name] for path in [trial.place / name]}
        return [-(-path.stat().st_size // PAGE) * PAGE for path in sorted(new.values(), key=lambda path: path.stat().st_mtime_ns)]


@contextlib.contextmanager
def _mounted(disk: Path) -> Iterator[Path | None]:
    disk.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={CAPACITY}", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _fill(tally: Tally, forks: Forks, writer: Writer, disk: Path, room: int) -> None:
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    with fresh(forks, writer.before, disk / "place") as trial:
        free = os.statvfs(disk)
        with ballast.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(1, free.f_bavail * free.f_frsize - room))
        ended = forks.one(writer.args(trial.place))
        ballast.unlink()
        tally.count(f"{writer.name}, room for {room:,} bytes", ended, refusal_faults(ended) + trial.changed())


def lost_permissions(forks: Forks, scene: Scene, size: Size) -> Outcome:
    """A place that may be read and not written; and, in the tree of what is there before, one directory."""
    tally = Tally(PART, "a directory that may not be written: exit 2 or 3, one line, and nothing has changed")
    for writer in writers(scene)[2:3] if size == "short" else writers(scene):
        with fresh(forks, writer.before) as trial:
            inside = sorted(path for path in trial.place.rglob("*") if path.is_dir())
        for name in [Path(), *(path.relative_to(trial.place) for path in inside)]:
            with fresh(forks, writer.before) as trial:
                (trial.place / name).chmod(0o555)
                ended = forks.one(writer.args(trial.place), setups={"unprivileged": {}})
                (trial.place / name).chmod(0o755)
                # What is replaced as a whole may well be a directory that nobody writes into.
                faults = refusal_faults(ended) + trial.changed() if ended.code else []
            tally.count(f"{writer.name}, {name} of mode 0555", ended, faults)
    return tally.done()


def little_memory(forks: Forks, scene: Scene, size: Size) -> Outcome:
    """Address space, swept downward: a command ends with one line, or dies or hangs in a library; the next clears up."""
    tally = Tally(PART, "no memory: one line, exit 1, 2 or 3, and nothing has changed, or death in a library; the next run clears up")
    died, hung, unfinished = 0, 0, 0
    for megabytes in (256, 24) if size == "short" else MEGABYTES:
        for writer in writers(scene)[:1] if size == "short" else writers(scene)[1:4]:
            with fresh(forks, writer.before) as trial:
                ended = forks.one(writer.args(trial.place), setups={"memory": {"megabytes": megabytes}}, timeout=30.0)
                died += ended.code is not None and ended.code < 0
                hung += ended.code is None  # Python waits for ever for a thread that had no memory to begin
                refused = ended.code is not None and ended.code > 0
                faults = refusal_faults(ended, (1, 2, 3)) + trial.altered() if refused else []
                unfinished += refused and bool(trial.left())  # no memory to list a directory with
                if ended.code != 0 and (not refused or trial.left()):
                    again = forks.one(writer.args(trial.place))
                    faults += [again.told()] * (again.code != 0) + trial.left()
            tally.count(f"{writer.name} with {megabytes} MiB more", ended, faults)
    tally.outcome.figures |= {"died in native code": died, "hung until it was killed": hung, "left a directory to the next": unfinished}
    return tally.done()
