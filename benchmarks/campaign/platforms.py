"""Platforms: every Python that the package is for, as far as it is here, and Linux on Arm.

Full: an environment from the locks for each other Python, as `make demo` makes it, and tests in it that need no more than the demo.
Short: each Python compiles every source, and a warning is an error.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from benchmarks.campaign.locks import REQUIREMENTS, read
from benchmarks.campaign.outcome import Outcome, Size

ROOT = Path(__file__).parents[2]
MINORS = (11, 12, 13, 14)
SOURCES = ("flora_export", "benchmarks", "tests", "examples")
TESTS = ("tests/test_passes.py", "tests/test_checkpoint.py", "tests/test_artifact.py")
RUNNER = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")
COMPILE = "import sys\nfor file in sys.argv[1:]:\n    with open(file, 'rb') as source: compile(source.read(), file, 'exec')"


def run(work: Path, size: Size, seed: int) -> list[Outcome]:
    found = {minor: interpreter(minor) for minor in MINORS}
    absent = [f"Python 3.{minor}: no such interpreter on this machine" for minor, python in found.items() if python is None]
    files = [file for source in SOURCES for file in sorted((ROOT / source).rglob("*.py")) if "node_modules" not in file.parts]
    sources = Outcome("platforms: sources", "each Python compiles every source, without a warning", not_tried=list(absent))
    for minor, python in found.items():
        if python is not None:
            sources.tried += len(files)
            sources.losses += [f"Python 3.{minor}: {loss}" for loss in faults(python, files)]
    outcomes = [sources]
    if size == "full":
        tests = Outcome(
            "platforms: Pythons", "locks install and tests pass under each Python but this, which `make test` tries", not_tried=list(absent)
        )
        for minor, python in found.items():
            if python is not None and minor != sys.version_info.minor:
                _try(tests, minor, python, work / f"python3-{minor}")
        outcomes.append(tests)
    arm = Outcome("platforms: Linux on Arm", "it runs on aarch64 as on x86-64")
    if platform.machine() == "aarch64":
        arm.tried = 1  # the campaign itself runs on it
    else:
        arm.not_tried = [f"this machine is {platform.machine()}, and has no emulator: run the campaign on an Arm machine"]
    return [*outcomes, arm]


def interpreter(minor: int) -> Path | None:
    """A Python 3.minor that runs: this one, one installed beside it, or one on the path."""
    if sys.version_info[:2] == (3, minor):
        return Path(sys.base_prefix) / "bin" / f"python3.{minor}"
    beside = sorted(Path(sys.base_prefix).parent.glob(f"*/bin/python3.{minor}"))
    on_path = shutil.which(f"python3.{minor}")
    for python in (*beside, *([Path(on_path)] if on_path else [])):
        asked = subprocess.run([python, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True, check=False)
        if asked.stdout.strip() == f"(3, {minor})":
            return python
    return None


def faults(python: Path, files: Sequence[Path]) -> list[str]:
    """The first error or warning of a Python that compiles the files, writing none."""
    done = subprocess.run([python, "-W", "error", "-c", COMPILE, *files], capture_output=True, text=True, check=False, timeout=120)
    return [] if done.returncode == 0 else [done.stderr.strip().splitlines()[-1]]


def _try(outcome: Outcome, minor: int, python: Path, venv: Path) -> None:
    """Make an environment, run tests in it, and remove it: a plain torch brings gigabytes."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "PYTHON"))}
    environment |= {"OMP_WAIT_POLICY": "passive"}
    lock, report = venv.with_suffix(".lock"), venv.with_suffix(".xml")
    lines = [" ".join([str(line.requirement), *(f"--hash={digest}" for digest in line.hashes)]) for line in read(REQUIREMENTS / "test.txt")]
    lock.write_text("\n".join(line for line in lines if line.split("==")[0] in RUNNER) + "\n")
    source = venv.with_suffix(".source")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "build", "models", "out", "node_modules", "__pycache__"))
    commands: list[list[str | Path]] = [
        ["make", f"VENV={venv}", f"PYTHON={python}", venv / "installed-demo"],
        [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", lock],
        [venv / "bin" / "python", "-m", "pytest", "-o", "addopts=", "-q", f"--junitxml={report}", *TESTS],
    ]
    try:
        for command in commands:
            done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False, timeout=900)
            if done.returncode != 0:
                outcome.losses.append(f"Python 3.{minor}: {' '.join(map(str, command[:4]))} ends with {(done.stdout + done.stderr)[-600:]}")
                break
        if report.is_file():
            counts = next(ET.parse(report).iter("testsuite")).attrib
            outcome.tried += int(counts["tests"])
            outcome.figures[f"3.{minor}"] = {name: int(counts[name]) for name in ("tests", "failures", "errors", "skipped")}
    finally:
        shutil.rmtree(venv, ignore_errors=True)
        shutil.rmtree(source, ignore_errors=True)
