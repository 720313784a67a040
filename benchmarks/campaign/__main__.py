"""Tries every promise of docs/reliability.md, prints one table, and exits with 1 where one was broken.

    make campaign                                        # under 60 minutes on two cores; writes benchmarks/results/reliability.json
    python -m benchmarks.campaign --size short           # what `make test` runs; writes nothing
    python -m benchmarks.campaign --part kills --seed 7  # one part, other random moments; writes nothing

Each part is a module with `run(work, size, seed)` that returns its outcomes. A part that fails to run is a loss.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.campaign.outcome import Outcome, Size
from flora_export.verify.latency import environment

RESULT = Path(__file__).parent.parent / "results" / "reliability.json"
PARTS = ("kills", "faults", "hostile", "served", "supply", "platforms")


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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("short", "full"), default="full")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given more than once")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="campaign-") as work:
        for part in options.part or PARTS:
            (Path(work) / part).mkdir()
            outcomes += run_part(part, Path(work) / part, options.size, options.seed)
    print(table(outcomes))
    if options.size == "full" and not options.part:
        content = {
            "command": "make campaign",
            "seed": options.seed,
            "seconds": round(sum(outcome.seconds for outcome in outcomes)),
            "parts": [asdict(outcome) for outcome in outcomes],
            "environment": environment(),
        }
        RESULT.write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(any(outcome.losses for outcome in outcomes))


if __name__ == "__main__":
    main()
