"""What each method costs as it is deployed: `flora-export bench` on artifacts built, and verified, from the adapters just trained."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flora_export.bench import BenchOptions, bench
from flora_export.pipeline import BuildOptions, build

ARMS = ("base", "unfused", "fused", "lora-budget")


def latency(adapters: Mapping[str, Path], base: Path, work: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Time one adapter of each FFBA method beside the base, and beside an unmerged LoRA of as many trainable numbers, on the CPU.

    A merged LoRA or DoRA is the base's graph with other numbers in it: it is the arm `base`. What is timed is the same for any numbers, so
    one adapter stands for all of its shape. Returns the bench's result for each method, and keeps it in `work`.
    """
    results = {}
    for method, adapter in adapters.items():
        kept = work / f"latency-{adapter.name}.json"
        if not kept.is_file():
            kept.write_text(json.dumps(_measure(adapter, base, rounds, threads)))
        results[method] = json.loads(kept.read_text())
    return results


def _measure(adapter: Path, base: Path, rounds: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="flora-export-accuracy-") as work:
        artifact, _ = build(adapter, str(base), Path(work) / "out", BuildOptions(), silent)
        result = bench(artifact.path, str(base), BenchOptions(arms=ARMS, rounds=rounds, threads=threads), silent)
    return {key: value for key, value in result.items() if key not in ("command", "environment")}


def silent(what: str, done: int, of: int) -> None:
    pass
