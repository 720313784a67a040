"""Seconds and peak memory of a build, beside mobius's own build and save of the base, as whole processes in turn.

python benchmarks/build.py --base models/smollm2
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import random_adapter, summary, write_result

MOBIUS = "import sys, mobius; mobius.build(sys.argv[1], execution_provider='cpu', dtype='f32').save(sys.argv[2])"


def measure(command: list[str]) -> tuple[float, float]:
    """(wall seconds, peak MB) of one process."""
    started = time.perf_counter()
    with open(os.devnull, "wb") as nothing:
        pid = os.posix_spawn(
            command[0],
            command,
            os.environ | {"TQDM_DISABLE": "1"},
            file_actions=[(os.POSIX_SPAWN_DUP2, nothing.fileno(), 1), (os.POSIX_SPAWN_DUP2, nothing.fileno(), 2)],
        )
        _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"failed with {status}: {' '.join(command)}")
    return time.perf_counter() - started, usage.ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    try:
        adapter = random_adapter(options.base, work / "adapter", options.rank)
        arms = {
            "mobius build and save of the base": [sys.executable, "-c", MOBIUS, str(options.base), str(work / "mobius")],
            "flora-export build": [
                sys.executable, "-m", "flora_export.cli", "build", str(adapter), "--base", str(options.base), "--backend", "onnxruntime",
                "--no-verify", "--force", "--output", str(work / "out"),
            ],
        }  # fmt: skip
        measured: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
        for run in range(options.runs + 1):
            for arm, command in arms.items():
                result = measure(command)
                if run:  # the first warms the page cache
                    measured[arm].append(result)
        ours, theirs = measured["flora-export build"], measured["mobius build and save of the base"]
        write_result(
            "build",
            {
                "what": f"build of SmolLM2-135M fp32 with a rank {options.rank} adapter, without verify; whole processes, imports included",
                "runs": options.runs,
                "seconds": {arm: summary([s for s, _ in values]) for arm, values in measured.items()},
                "peak_memory_mb": {arm: summary([m for _, m in values]) for arm, values in measured.items()},
                "ratio_seconds": statistics.median(a / b for (a, _), (b, _) in zip(ours, theirs, strict=True)),
                "ratio_memory": statistics.median(a / b for (_, a), (_, b) in zip(ours, theirs, strict=True)),
                "allowed": {"ratio_seconds": 1.5, "ratio_memory": 1.3},
            },
        )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
