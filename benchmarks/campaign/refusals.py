"""What a command must do that cannot do its work: end in time, with the exit code of its contract, and one line that says why."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.campaign.forks import Ended, Forks
from benchmarks.campaign.outcome import Outcome
from benchmarks.campaign.whole import Digests, digests

REFUSED = (2, 3)  # wrong input; a tool, or the machine


def refusal_faults(ended: Ended, codes: Collection[int] = REFUSED) -> list[str]:
    """What is wrong with how a command has refused, a line each. A failed verification (1) has a report; else there is one line."""
    if ended.code is None:
        return [f"it did not end within {ended.seconds:.0f} s"]
    if "Traceback" in ended.err:
        return [f"a traceback, {ended.told()}"]
    if ended.code not in codes:
        return [ended.told()]
    lines = [line for line in ended.error.splitlines() if line.startswith("error: ")]
    if ended.code != 1 and (len(lines) != 1 or ended.error != lines[0]):
        return [f"{len(ended.error.splitlines())} lines on stderr, not one: {ended.error[:200]!r}"]
    return []


@dataclass
class Trial:
    """A place of its own for a command, and what was there before."""

    place: Path
    temp: Path
    before: Digests = field(default_factory=dict)

    def changed(self) -> list[str]:
        """What is not as it was, or was left."""
        return self.altered() + self.left()

    def altered(self) -> list[str]:
        """What is not as it was. What is hidden was never in anyone's place, but may be left."""
        now = digests(self.place)
        names = sorted(name for name in now.keys() | self.before.keys() if now.get(name) != self.before.get(name) and name[0] != ".")
        return [f"{', '.join(names[:3])} changed"] * bool(names)

    def left(self) -> list[str]:
        """What a command has begun, and has not taken away."""
        left = sorted(path.name for path in self.place.iterdir() if path.name.startswith("."))
        left += sorted(f"{path.name} in TMPDIR" for path in self.temp.iterdir() if path.name.startswith("flora-export"))
        return [f"{name} is left" for name in left]


@contextmanager
def fresh(forks: Forks, before: dict[str, Path], place: Path | None = None) -> Iterator[Trial]:
    """A place with copies of what is named, and nothing else."""
    place = place or forks.work / "place"
    for directory in (place, forks.temp):
        shutil.rmtree(directory, ignore_errors=True)
    place.mkdir(parents=True)
    forks.temp.mkdir()
    for name, source in before.items():
        shutil.copytree(source, place / name, symlinks=True)
    yield Trial(place, forks.temp, digests(place))


class Tally:
    """An outcome in the making."""

    def __init__(self, part: str, promise: str) -> None:
        self.outcome = Outcome(part, promise)
        self.counts: Counter[str] = Counter()

    def count(self, what: str, ended: Ended, faults: list[str]) -> None:
        """One trial, and what was wrong with it."""
        self.outcome.tried += 1
        self.counts[f"exit {ended.code}"] += 1
        self.outcome.losses += [f"{what}: {fault}" for fault in faults]

    def done(self) -> Outcome:
        self.outcome.figures["ends"] = dict(sorted(self.counts.items()))
        return self.outcome
