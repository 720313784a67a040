"""Two commands on one place at a time, and clocks that are years off: one wins, or one follows the other, and never is there a mix."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.campaign.damage import unsound
from benchmarks.campaign.forks import Ended, Forks, Run
from benchmarks.campaign.outcome import Outcome, Size
from benchmarks.campaign.refusals import Tally, Trial, fresh, refusal_faults
from benchmarks.campaign.scene import Scene
from benchmarks.campaign.whole import Digests, differing, digests
from flora_export.artifact import open_artifact
from flora_export.backends.triton.repository import live, versions
from flora_export.base_model import file_sha256
from flora_export.checkpoint import CONFIG, WEIGHTS, digest_of_files

PART = "faults"
YEAR = 365.25 * 86400
Judge = Callable[[Path, Sequence[Ended]], list[str]]


@dataclass(frozen=True)
class Race:
    """Two commands, and what is wrong with what they leave, when both have ended."""

    name: str
    before: dict[str, Path]
    commands: tuple[Callable[[Path], list[object]], Callable[[Path], list[object]]]
    judge: Judge


def races(scene: Scene) -> list[Race]:
    s = scene.sources
    known = [digests(scene.one), digests(scene.two)]
    name = ["--base", s.base, "--name"]

    def built(place: Path, ended: Sequence[Ended]) -> list[str]:
        faults = [] if (there := digests(place / "out")) in known else [f"OUT is a mix: {differing(there, known[0])}"]
        return faults + ["neither was built"] * all(each.code for each in ended)

    def both_live(place: Path, ended: Sequence[Ended]) -> list[str]:
        repo, made = place / "repo", 1 + sum(each.code == 0 for each in ended)
        found = unsound(repo) + [each.told() for each in ended if each.code]
        if versions(repo, "decoder") != list(range(1, made + 1)) or set(live(repo).values()) != {made}:
            found.append(f"versions {versions(repo, 'decoder')}, live {live(repo)}")
        return found

    def one_of_three(place: Path, ended: Sequence[Ended]) -> list[str]:
        """Published last, 3 is live; rolled back last, what was live before: 2 where 3 was published first, else 1."""
        now = live(place / "repo")
        found = unsound(place / "repo") + [each.told() for each in ended if each.code]
        return found + [f"live: {now}"] * (set(now.values()) not in ({3}, {2}, {1}))

    def every_adapter_that_was_set(place: Path, ended: Sequence[Ended]) -> list[str]:
        bank = open_artifact(place / "out").manifest.bank
        assert bank is not None
        names = {adapter for adapter, each in zip(("second", "third"), ended, strict=True) if each.code == 0}
        digest = {adapter: bank.digests[slot] for adapter, slot in bank.taken.items()}
        lost = [adapter for adapter in names if digest.get(adapter) != _digest(s.three)]
        return unsound(place / "out") + [f"{adapter} was set and is not there" for adapter in lost] + ["neither"] * (not names)

    def building(adapter: Path, *more: str) -> Callable[[Path], list[object]]:
        return lambda place: s.build([adapter], place / "out", *more)

    def setting(adapter: str) -> Callable[[Path], list[object]]:
        return lambda place: ["set-adapter", place / "out", s.three, *name, adapter]

    def publishing(out: Path) -> Callable[[Path], list[object]]:
        return lambda place: ["triton", out, place / "repo"]

    return [
        Race("two builds", {}, (building(s.one), building(s.two)), built),
        Race("two builds --force", {"out": scene.one}, (building(s.one, "--force"), building(s.two, "--force")), built),
        Race("two publishers", {"repo": scene.repo}, (publishing(scene.one), publishing(scene.two)), both_live),
        Race(
            "a publisher and a rollback",
            {"repo": scene.repo2},
            (publishing(scene.one), lambda place: ["triton", place / "repo", "--rollback"]),
            one_of_three,
        ),
        Race("two adapters into one bank", {"out": scene.bank}, (setting("second"), setting("third")), every_adapter_that_was_set),
    ]


def _digest(adapter: Path) -> str:
    return digest_of_files({name: file_sha256(adapter / name) for name in (CONFIG, WEIGHTS)})


def at_the_same_time(forks: Forks, scene: Scene, size: Size, seed: int) -> Outcome:
    """Pairs of commands, started up to half a second apart."""
    tally = Tally(PART, "two commands on one place: one wins or one follows the other, and nothing is a mix")
    ends: Counter[str] = Counter()
    for race in races(scene)[:: 2 if size == "short" else 1]:
        dice = random.Random(f"{seed} {race.name}")
        for trial in range(1 if size == "short" else 12):
            with fresh(forks, race.before) as at:
                runs = [
                    Run([str(arg) for arg in command(at.place)], start_after=dice.choice((0.0, dice.uniform(0, 0.5))))
                    for command in race.commands
                ]
                ended = forks.run(runs)
                faults = [fault for each in ended if each.code for fault in refusal_faults(each)]
                faults += race.judge(at.place, ended) + _left(at)
            ends[f"{race.name}: {' and '.join(str(code) for code in sorted(str(each.code) for each in ended))}"] += 1
            tally.count(f"{race.name}, seed {seed}, trial {trial}", ended[0], faults)
    tally.outcome.figures["exit codes of both"] = dict(sorted(ends.items()))
    return tally.done()


def _left(trial: Trial) -> list[str]:
    return [fault for fault in trial.changed() if fault.endswith("is left")]


def wrong_clocks(forks: Forks, scene: Scene, size: Size) -> Outcome:
    """Steps at other times: a clock ten years back or ahead, and files of 1980 or 2090. Bytes and decisions stay."""
    tally = Tally(PART, "a clock that is years off: the same bytes, the same decisions")
    s, expected = scene.sources, digests(scene.one)
    for years in (-10,) if size == "short" else (-30, -10, -1, 1, 10, 60):
        setups = {"clock": {"seconds": years * YEAR}}
        with fresh(forks, {"adapter": s.one, "base": s.base}) as trial:
            _date(trial.place, years)
            command = s.build([trial.place / "adapter"], trial.place / "out")
            ended = forks.one([*command[:2], "--base", trial.place / "base", *command[4:]], setups=setups)
            there: Digests = digests(trial.place / "out") if ended.code == 0 else {}
            faults = [ended.told()] * (ended.code != 0) + [f"other bytes: {differing(there, expected)}"] * (there != expected)
            tally.count(f"build, {years} years off", ended, faults)
        for name, before, args, live_then in (
            ("verify", {"out": scene.one}, ["verify", "out"], None),
            ("rebuild a bank", {"out": scene.bank}, ["set-adapter", "out", s.three, "--base", s.base, "--name", "second"], None),
            ("publish", {"repo": scene.repo}, ["triton", scene.two, "repo"], 2),
            ("roll back", {"repo": scene.repo2}, ["triton", "repo", "--rollback"], 1),
            ("check", {"repo": scene.repo2}, ["triton", "repo", "--check"], 2),
        ):
            with fresh(forks, before) as trial:
                _date(trial.place, -years)
                placed = [trial.place / arg if arg in ("out", "repo") else arg for arg in args]
                ended = forks.one(placed, setups=setups)
                faults = [ended.told()] * (ended.code != 0)
                if live_then is not None and set(live(trial.place / "repo").values()) != {live_then}:
                    faults.append(f"live is {live(trial.place / 'repo')}")
                tally.count(f"{name}, {years} years off", ended, faults + _left(trial))
    return tally.done()


def _date(place: Path, years: int) -> None:
    """Give every file another time."""
    moment = max(0.0, 1.8e9 + years * YEAR)
    for path in place.rglob("*"):
        os.utime(path, (moment, moment))
