"""What every arm of the frontier costs as it is served on the CPU: all of them in one interleaved run, for each precision."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.latency import silent
from benchmarks.accuracy.methods import METHODS
from benchmarks.common import write_random
from flora_export.artifact import Artifact
from flora_export.base_model import BaseModel, load_base
from flora_export.bench import BenchOptions, measure
from flora_export.methods import load_checkpoint
from flora_export.pipeline import BuildOptions, build
from flora_export.scratch import Scratch
from flora_export.verify.build_arms import FUSED, LORA, Built, build_arm
from flora_export.verify.latency import BASE

PRECISIONS = ("fp32", "int4")


def latency(arms: Sequence[tuple[str, int]], base: Path, work: Path, rounds: int, threads: int) -> dict[str, list[dict[str, Any]]]:
    """Precision -> a row of `flora-export bench` for each metric and arm, named "method rank", beside the base's; kept in `work`.

    What is timed is the same for any numbers in an adapter, so these are random. An FFBA adapter is fused, a LoRA on all linear projections
    stands beside the base; merged into it, it would be the base's graph with other numbers. Over an int4 base an FFBA is int4 as its hosts
    are, by the default of `build`; a LoRA stays in fp32 beside them.
    """
    results = {}
    for precision in PRECISIONS:
        kept = work / f"latency-{precision}-{'-'.join(f'{method}{rank}' for method, rank in arms)}-{rounds}x{threads}.json"
        if not kept.is_file():
            print(f"latency in {precision}", file=sys.stderr, flush=True)
            kept.write_text(json.dumps(list(_measured(arms, load_base(str(base)), precision, rounds, threads))))
        results[precision] = json.loads(kept.read_text())
    return results


def _measured(arms: Sequence[tuple[str, int]], base: BaseModel, precision: str, rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    with Scratch("flora-export-frontier-") as name:
        work = Path(name)
        built: dict[str, Built] = {}
        for index, (method, rank) in enumerate(arms):
            place = work / str(index)
            config = METHODS["ffba" if METHODS[method].merges else method].config  # a LoRA's arm takes no more than its rank from it
            assert config is not None
            adapter = write_random(config(rank, rank, 1.0), base.path, place / "adapter")
            checkpoint = load_checkpoint(adapter, base)
            if index == 0 or not METHODS[method].merges:
                artifact: Artifact
                artifact, _ = build(adapter, str(base.path), place / "out", BuildOptions(precision=precision, verify=False), silent)
            if index == 0:
                built[BASE] = build_arm(BASE, artifact, base, checkpoint, work / BASE)
            arm = LORA if METHODS[method].merges else FUSED
            built[f"{method} {rank}"] = build_arm(arm, artifact, base, checkpoint, place / "arm")
        yield from measure(built, None, BenchOptions(rounds=rounds, threads=threads), threads, base.vocabulary, silent)
