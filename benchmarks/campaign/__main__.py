"""Tries every promise of docs/reliability.md, prints one table, and exits with 1 where one was broken.

    make campaign                                        # under 60 minutes on two cores; writes benchmarks/results/reliability.json
    python -m benchmarks.campaign --size short           # a few of each; writes nothing
    python -m benchmarks.campaign --part kills --seed 7  # one part, other random moments; writes nothing but --report FILE
    python -m benchmarks.campaign --join DIR             # the result of parts that were run one by one: their reports are DIR/PART.json

Each part is a module with `run(work, size, seed)` that returns its outcomes. A part that fails to run is a loss.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks.campaign.outcome import Outcome, Size
from flora_export.verify.latency import environment

ROOT = Path(__file__).parents[2]
RESULT, LOGS = ROOT / "benchmarks" / "results" / "reliability.json", ROOT / "build" / "campaign"
LANES = ("kills", "faults"), ("hostile", "supply", "platforms")
ALONE = ("served",)
NOT_RUN, LEFT = "was not run whole", "not run whole on this code; its short form runs in `make test`"
PARTS = (*LANES[0], *LANES[1], *ALONE)


def run_part(part: str, work: Path, size: Size, seed: int) -> list[Outcome]:
    """The outcomes of a part; one loss where it fails to run."""
    print(f"{part} ...", file=sys.stderr, flush=True)
    started = time.monotonic()
    try:
        outcomes: list[Outcome] = importlib.import_module(f"benchmarks.campaign.{part}").run(work, size, seed)
    except Exception as error:  # the campaign goes on, and fails
        traceback.print_exc()
        outcomes = [Outcome(part, "it runs", 1, [f"it did not run: {type(error).__name__}: {error}"])]
    for outcome in outcomes:
        outcome.seconds = outcome.seconds or round(time.monotonic() - started, 1)
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """One row an outcome, and each loss and each thing not tried beneath."""
    rows = [("part", "promise", "tried", "lost", "seconds")]
    rows += [(o.part, o.promise, f"{o.tried:,}", str(len(o.losses)), f"{o.seconds:.0f}") for o in outcomes]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]
    lines += [f"LOST {o.part}: {loss}" for o in outcomes for loss in o.losses]
    lines += [f"not tried, {o.part}: {sentence}" for o in outcomes for sentence in o.not_tried]
    return "\n".join(lines)


def apart(part: str, work: Path, size: Size, seed: int) -> list[Outcome]:
    """The outcomes of a part in a process of its own, whose words go to build/campaign/PART.log."""
    LOGS.mkdir(parents=True, exist_ok=True)
    report, log = work / f"{part}.json", LOGS / f"{part}.log"
    print(f"{part} ... ({log.relative_to(ROOT)})", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.campaign", "--part", part, "--size", size, "--seed", str(seed), "--report", str(report)]
    with log.open("w") as words:
        ended = subprocess.run(command, cwd=ROOT, stdout=words, stderr=words, check=False)
    if not report.is_file():
        return [Outcome(part, "it runs", 1, [f"it ended with {ended.returncode}: see {log.relative_to(ROOT)}"])]
    return [Outcome(**outcome) for outcome in json.loads(report.read_text())]


def whole(work: Path, size: Size, seed: int) -> list[Outcome]:
    """All parts: two lanes side by side, then the part whose times are figures, alone."""
    with ThreadPoolExecutor(len(LANES)) as pool:
        lanes = list(pool.map(lambda lane: [apart(part, work, size, seed) for part in lane], LANES))
    done = {part: outcomes for lane, found in zip(LANES, lanes, strict=True) for part, outcomes in zip(lane, found, strict=True)}
    done |= {part: apart(part, work, size, seed) for part in ALONE}
    return [outcome for part in PARTS for outcome in done[part]]


def write(command: str, seed: int, seconds: float | None, outcomes: Sequence[Outcome]) -> None:
    """benchmarks/results/reliability.json. `seconds` is None where the parts were not run in one go."""
    rows = [asdict(outcome) for outcome in outcomes]
    facts = {"command": command, "seed": seed, "seconds": seconds, "parts": rows, "environment": environment()}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")


def join(directory: Path, seed: int) -> None:
    """Parts without a report are named as not run."""
    outcomes: list[Outcome] = []
    for part in PARTS:
        report = directory / f"{part}.json"
        rows = json.loads(report.read_text()) if report.is_file() else [asdict(Outcome(part, NOT_RUN, not_tried=[LEFT]))]
        outcomes += [Outcome(**row) for row in rows]
    print(table(outcomes))
    write("python -m benchmarks.campaign --part PART, one by one", seed, None, outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("short", "full"), default="full")
    parser.add_argument("--part", choices=PARTS, help="only this part, in this process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="write the outcomes there, as JSON")
    parser.add_argument("--join", type=Path, metavar="DIR", help="run nothing: write the result of the reports there")
    options = parser.parse_args()
    if options.join:
        return join(options.join, options.seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        work = Path(name)
        outcomes = run_part(options.part, work, options.size, options.seed) if options.part else whole(work, options.size, options.seed)
    print(table(outcomes))
    if options.report:
        options.report.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
    if options.size == "full" and not options.part:
        write("make campaign", options.seed, round(time.monotonic() - started), outcomes)
    sys.exit(any(outcome.losses for outcome in outcomes))


if __name__ == "__main__":
    main()
