"""Hostile input: files of strangers, mutated and made by hand. No crash, hang, bomb, or file or code outside; exit 2 with one line.

fuzz.py, fuzz_targets.py    our readers, a file at a time, in processes of their own: random, hypothesis, and libFuzzer by Atheris
hostile_commands.py         directories that were made to do harm, through the real commands
hostile_cpp.py              the C++ reader under AddressSanitizer and UndefinedBehaviorSanitizer, with libFuzzer
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.campaign.outcome import Outcome, Size

ROOT = Path(__file__).parent.parent.parent
CORPUS = ROOT / "tests" / "corpus"
LOST = ROOT / "build" / "campaign"
PROMISE = "no crash, no hang over 5 s, no memory over a bound, no file, program or code outside, on a mutated file"
# Each target's share of the random executions, by how fast it is read. The last two bring PyTorch, and stand apart.
SHARES = {
    "adapter_config": 50, "lora_config": 60, "adapter_weights": 12, "lora_weights": 12, "base_config": 12, "base_weights": 8,
    "base_index": 6, "manifest": 10, "manifest_bank": 10, "manifest_quantized": 10, "manifest_shards": 8, "onnx": 6, "openvino": 8,
    "shards_index": 6, "golden": 30, "golden_bank": 12, "request": 120, "pbtxt": 4, "pickle": 8, "peft_config": 1,
}  # fmt: skip
HEAVY = ("pickle", "peft_config")
MUTATIONS = {"short": 2_000, "full": 700_000}
EXAMPLES = {"short": 10, "full": 500}  # of hypothesis, each target
COVERED_SECONDS = 22  # of libFuzzer, each target


def run(work: Path, size: Size, seed: int) -> list[Outcome]:
    """Mutated files, directories made by hand, and the C++ reader."""
    from benchmarks.campaign import hostile_commands, hostile_cpp

    outcome = Outcome("hostile", PROMISE)
    with in_memory(work) as scratch:
        fuzz_all(scratch, size, seed, outcome)
    return [outcome, hostile_commands.run(work, size, LOST), hostile_cpp.run(work, size, seed, LOST)]


@contextmanager
def in_memory(work: Path) -> Iterator[Path]:
    """A directory in memory where there is one, for a million small files one after the other."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="campaign-", dir=shared if os.access(shared, os.W_OK) else work) as directory:
        yield Path(directory)


def fuzz_all(scratch: Path, size: Size, seed: int, outcome: Outcome) -> None:
    """Two processes at a time. What each found goes into the outcome."""
    light = [name for name in SHARES if name not in HEAVY]
    total = sum(SHARES.values())
    jobs: list[dict[str, Any]] = []
    for group in [light, HEAVY] if size == "short" else [[name] for name in SHARES]:
        runs = MUTATIONS[size] * sum(SHARES[name] for name in group) // total // len(group)
        jobs.append({"targets": group, "engine": "random", "runs": runs, "examples": EXAMPLES[size]})
    if size == "full":
        if importlib.util.find_spec("atheris") is None:
            outcome.not_tried.append(
                f"coverage-guided fuzzing: Atheris has no wheel for Python {sys.version_info.major}.{sys.version_info.minor}"
            )
        else:
            covered = {"engine": "atheris", "seconds": COVERED_SECONDS, "runs": 10**9}
            jobs += [{"targets": [name]} | covered for name in SHARES]
    common = {"runs": 1, "seconds": 150, "seed": seed, "corpus": str(CORPUS), "lost": str(LOST)}
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda item: fuzz(scratch / str(item[0]), common | item[1]), enumerate(jobs)))
    targets: dict[str, dict[str, Any]] = {}
    for job, (figures, losses) in zip(jobs, results, strict=True):
        outcome.losses += losses
        for name, found in figures.items():
            outcome.tried += found["executions"]
            row = targets.setdefault(name, {"executions": 0, "seconds": 0.0, "corpus": len(list((CORPUS / name).glob("*")))})
            row["executions"] += found["executions"]
            row["seconds"] = round(row["seconds"] + found["seconds"], 1)
            row[job["engine"]] = found["executions"]
            row |= {key: found[key] for key in ("edges",) if key in found}
    for row in targets.values():
        row["per_second"] = round(row["executions"] / max(row["seconds"], 0.1))
    outcome.losses = list(dict.fromkeys(outcome.losses))
    outcome.figures = {"targets": targets}


def fuzz(directory: Path, job: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A job of fuzz.py in a process of its own. Returns its figures by target, and what was lost; the death of the process as well."""
    directory.mkdir(parents=True)
    report, file = directory / "report.json", directory / "job.json"
    work = directory / "work"
    file.write_text(json.dumps(job | {"work": str(work), "report": str(report)}))
    command = [sys.executable, "-m", "benchmarks.campaign.fuzz", str(file)]
    environment = os.environ | {
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    limit = 120 + (job["seconds"] + 10) * len(job["targets"])
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=limit, check=False
        )
        code, messages = done.returncode, done.stderr
    except subprocess.TimeoutExpired:
        code, messages = -1, f"it ran for {limit} s"
    figures: dict[str, Any] = json.loads(report.read_text()) if report.is_file() else {}
    if job["engine"] == "atheris":
        for name in figures:
            executed = re.findall(r"number_of_executed_units: (\d+)", messages) or [figures[name]["executions"]]
            figures[name] |= {"executions": int(executed[-1]), "edges": int((re.findall(r"cov: (\d+)", messages) or ["0"])[-1])}
    losses = [loss for found in figures.values() for loss in found["losses"]]
    if code != 0 or set(job["targets"]) - figures.keys():
        left = [_kept(current) for current in sorted(work.glob("*.current"), key=lambda path: path.stat().st_mtime)[-1:]]
        last = next((line for line in reversed(messages.splitlines()) if line.strip()), "")
        losses.append(f"{job['engine']} of {', '.join(job['targets'])}: the process ended with {code} ({last:.200}) {' '.join(left)}")
    shutil.rmtree(directory, ignore_errors=True)
    return figures, losses


def _kept(current: Path) -> str:
    """The input that a process died of, where a later run finds it."""
    LOST.mkdir(parents=True, exist_ok=True)
    return str(shutil.copyfile(current, LOST / f"{current.stem}-died"))


def keep_corpus(seconds: int, names: Sequence[str]) -> None:
    """Make tests/corpus anew: of what libFuzzer finds in some seconds, the fewest small files that reach the same lines."""

    def one(name: str) -> None:
        with in_memory(ROOT) as scratch:
            job = {"targets": [name], "seconds": seconds, "runs": 10**9, "seed": 0, "corpus": str(CORPUS), "grown": str(scratch / "grown")}
            for engine in ("atheris", "keep"):
                print(name, *fuzz(scratch / engine, job | {"engine": engine, "lost": str(LOST), "longest": 4096}))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, names))


if __name__ == "__main__":
    keep_corpus(int(sys.argv[1]), sys.argv[2:] or list(SHARES))
