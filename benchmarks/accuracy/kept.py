"""What kept runs were made with. A directory of runs takes no others: numbers of two programs or two models would stand in one table."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from flora_export.base_model import load_base

FILE = "made_with.json"
ELSEWHERE = "made_elsewhere.json"
ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("torch", "transformers", "peft")
SOURCES = (  # what a run's numbers come from; not what counts and draws them
    *(f"benchmarks/accuracy/{name}.py" for name in ("methods", "placements", "training", "scoring")),
    *("benchmarks/accuracy/tasks/*.py", "benchmarks/accuracy/tasks/*.tsv", "flora_export/branch.py", "flora_export/ffba/*.py"),
    "examples/01_train_ffba/problems.py",  # the names and things of arithmetic, and how an answer is read
)


def made_with(base: Path) -> dict[str, Any]:
    """The base model, the versions, the device, and a hash of the code and data that decide a run's numbers."""
    import torch

    code = hashlib.sha256()
    for file in sorted(file for pattern in SOURCES for file in ROOT.glob(pattern)):
        code.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return {
        "base": load_base(str(base)).digests,
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "code": code.hexdigest(),
    }


def differing(then: dict[str, Any], now: dict[str, Any]) -> str:
    """In what runs made `then` differ from runs made `now`; empty where they may stand in one table."""
    return " and ".join(key for key in now if then.get(key) != now[key])


def claim(work: Path, base: Path) -> dict[str, Any]:
    """Take a directory for runs of this program and base. Returns what they are made with.

    Raises:
        ValueError: it holds runs that were made with something else.
        CheckpointError: `base` is no base model.
    """
    now, place = made_with(base), work / FILE
    if not place.is_file():
        work.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(now, indent=1))
    then = json.loads(place.read_text())
    if differ := differing(then, now):
        raise ValueError(f"{work} holds runs made with another {differ}: remove it, or choose another directory by --work")
    return now


def elsewhere(work: Path, environments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Remember where runs were made that were brought here. Returns all such environments, those of earlier calls too, each once."""
    place = work / ELSEWHERE
    known: list[dict[str, Any]] = json.loads(place.read_text()) if place.is_file() else []
    for environment in environments:
        if environment not in known:
            known.append(environment)
    place.write_text(json.dumps(known, indent=1))
    return known
