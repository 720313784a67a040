"""Files that are cut, swapped, lost or no files any more, between one step and the next: that one refuses, or they do not matter."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.campaign.forks import Forks
from benchmarks.campaign.outcome import Outcome, Size
from benchmarks.campaign.refusals import Tally, fresh, refusal_faults
from benchmarks.campaign.scene import Scene
from flora_export.artifact import MANIFEST, REPORT, changed_files, open_artifact
from flora_export.backends.triton.config import CONFIG
from flora_export.backends.triton.repository import check
from flora_export.errors import FloraExportError

PART = "faults"


def _half(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _empty(file: Path, other: Path) -> None:
    os.truncate(file, 0)


def _swapped(file: Path, other: Path) -> None:
    file.unlink()
    shutil.copyfile(other, file)


def _removed(file: Path, other: Path) -> None:
    file.unlink()


def _directory(file: Path, other: Path) -> None:
    file.unlink()
    file.mkdir()


def _link(file: Path, other: Path) -> None:
    """To another build's file."""
    file.unlink()
    file.symlink_to(other)


def _dangling(file: Path, other: Path) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


def _fifo(file: Path, other: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _unreadable(file: Path, other: Path) -> None:
    file.chmod(0)


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "half": _half,
    "empty": _empty,
    "swapped": _swapped,
    "removed": _removed,
    "a directory": _directory,
    "a link to another": _link,
    "a dangling link": _dangling,
    "a FIFO": _fifo,
    "unreadable": _unreadable,
}


@dataclass(frozen=True)
class Step:
    """A command that reads what was damaged. `unproved` says of a file, relative, whether it may succeed all the same, and why."""

    name: str
    before: dict[str, Path]
    damaged: str  # which of them
    other: Path  # the same, of another build
    args: Callable[[Path], list[object]]
    unproved: Callable[[Path, str], bool]
    made: str = ""  # what it makes, which must be sound where it succeeds


# Inputs: what a build does not read or can do without. Its weights and configurations it must have.
NEEDED = ("config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors")


def _input(file: Path, damage: str) -> bool:
    """Another base or adapter, whole, is another input, and the artifact is verified against it."""
    return file.name not in NEEDED or damage in ("swapped", "a link to another")


def _report(file: Path, damage: str) -> bool:
    return file.name == REPORT  # the manifest has no hash of it: it holds times


def steps(scene: Scene) -> list[Step]:
    """What follows on a checkpoint, a base, an OUT and a repository."""
    s = scene.sources
    inputs = {"base": s.base, "adapter": s.one}

    def build(place: Path) -> list[object]:
        return ["build", place / "adapter", "--base", place / "base", "--backend", "onnxruntime", "--output", place / "out"]

    def nothing(file: Path, damage: str) -> bool:
        return False

    def elsewhere(file: Path, damage: str) -> bool:
        """A rollback proves the version that it makes live, not the one that it leaves; and it replaces the models' configurations."""
        return file.name in (REPORT, CONFIG) or "2" in file.parts or file.name.startswith("2.")

    out = {"out": scene.one}
    return [
        Step("build", inputs, "adapter", s.two, build, _input, "out"),
        Step("build", inputs, "base", s.other_base, build, _input, "out"),
        Step("verify", out, "out", scene.two, lambda p: ["verify", p / "out"], _report),
        Step("publish", out, "out", scene.two, lambda p: ["triton", p / "out", p / "repo"], _report, "repo"),
        Step("explain", out, "out", scene.two, lambda p: ["explain", p / "out"], _report),
        Step("generate", out, "out", scene.two, lambda p: ["generate", p / "out", "hi", "--max-new-tokens", "4"], _report),
        Step("check", {"repo": scene.repo}, "repo", scene.repo2, lambda p: ["triton", p / "repo", "--check"], _report),
        Step("roll back", {"repo": scene.repo2}, "repo", scene.repo2, lambda p: ["triton", p / "repo", "--rollback"], elsewhere, "repo"),
        Step(
            "publish over it",
            {"repo": scene.repo},
            "repo",
            scene.repo2,
            lambda p: ["triton", scene.two, p / "repo"],
            lambda *_: True,
            "repo",
        ),
    ]


def unsound(made: Path) -> list[str]:
    """What is wrong with an OUT or a repository, by the package's own check."""
    try:
        return changed_files(open_artifact(made)) if (made / MANIFEST).is_file() else check(made)
    except FloraExportError as error:
        return [str(error)]


def damaged_files(forks: Forks, scene: Scene, size: Size, seed: int) -> Outcome:
    """Each file, each damage, each next step; in a short run a few of them."""
    tally = Tally(PART, "a damaged file: the next step refuses with exit 1, 2 or 3 and one line, unless the file is not proved")
    dice = random.Random(f"{seed} damage")
    accepted: Counter[str] = Counter()
    for step in steps(scene):
        root = step.before[step.damaged]
        files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file() and path.name != "__pycache__")
        cases = [(file, damage) for file in files for damage in DAMAGES]
        for file, damage in cases if size == "full" else dice.sample(cases, 2):
            with fresh(forks, step.before) as trial:
                other = step.other / file
                target = trial.place / step.damaged / file
                same = other.is_file() and other.read_bytes() == target.read_bytes()
                if damage in ("swapped", "a link to another") and (same or not other.is_file()):
                    continue
                DAMAGES[damage](target, other)
                ended = forks.one(step.args(trial.place), setups={"unprivileged": {}}, timeout=20.0)
                faults = refusal_faults(ended, (1, 2, 3)) if ended.code else []
                if ended.code == 0 and not step.unproved(file, damage):
                    faults = ["it succeeds"]
                elif ended.code == 0 and step.made:
                    faults = [f"what it makes: {fault}" for fault in unsound(trial.place / step.made)]
                accepted[f"{step.name}: {file.name}"] += ended.code == 0
            tally.count(f"{step.name} after {step.damaged}/{file} is {damage}", ended, faults)
    tally.outcome.figures["not proved, and accepted"] = dict(+accepted)
    return tally.done()
