"""What each method costs as it is deployed: `flora-export bench` on artifacts built, and verified, from adapters of its ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import write_random
from flora_export.bench import BenchOptions, bench
from flora_export.pipeline import BuildOptions, build
from flora_export.scratch import Scratch

if TYPE_CHECKING:
    from flora_export.ffba import FFBAConfig

ARMS = ("base", "unfused", "fused", "lora-budget")


def latency(methods: Mapping[str, FFBAConfig], base: Path, work: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Time an adapter of each FFBA method beside the base, and beside an unmerged LoRA of as many trainable numbers, on the CPU.

    A merged LoRA or DoRA is the base's graph with other numbers in it: it is the arm `base`. What is timed is the same for any numbers, so
    those of the adapters are random. Returns the bench's result for each method, and keeps it in `work`.
    """
    results = {}
    for method, config in methods.items():
        kept = work / f"latency-{method}-r{config.r}-{rounds}x{threads}.json"
        if not kept.is_file():
            kept.write_text(json.dumps(_measure(config, base, rounds, threads)))
        results[method] = json.loads(kept.read_text())
    return results


def _measure(config: FFBAConfig, base: Path, rounds: int, threads: int) -> dict[str, Any]:
    with Scratch("flora-export-accuracy-") as work:
        adapter = write_random(config, base, Path(work) / "adapter")
        artifact, _ = build(adapter, str(base), Path(work) / "out", BuildOptions(), silent)
        result = bench(artifact.path, str(base), BenchOptions(arms=ARMS, rounds=rounds, threads=threads), silent)
    return {key: value for key, value in result.items() if key not in ("command", "environment")}


def silent(what: str, done: int, of: int) -> None:
    pass
