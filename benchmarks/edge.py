"""What a rank-32 adapter costs in OpenVINO, fused, beside its hosts and as LoRA, with ONNX Runtime on the same model in the same run.

    python benchmarks/edge.py --base models/smollm2

Besides: what ranks that are no multiple of anything cost in fp32, padded to 1, 8, 16 and 64. The browser has a benchmark of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import random_adapter, write_result

from flora_export.base_model import load_base
from flora_export.bench import BenchOptions, measure
from flora_export.methods import load_checkpoint
from flora_export.pipeline import BuildOptions, build
from flora_export.verify.build_arms import Built, build_arm

OPENVINO_ARMS = ("base", "unfused", "fused", "lora")
ORT_ARMS = ("base", "fused", "lora")
ALIGNED = (1, 8, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--odd-rank", type=int, default=6, help="for what padding costs")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    what = (
        f"{options.base.name}, rank {options.rank} on attention and MLP, {options.threads} threads, arms of both runtimes interleaved "
        "in one process and loaded several times, medians; ratios are to OpenVINO's base of the same precision; OpenVINO computes in fp32 "
        "(INFERENCE_PRECISION_HINT) and rounds no activations, ONNX Runtime rounds those of int8 and int4 to int8"
    )
    latency = [row for precision in options.precision for row in runtimes(precision, options)]
    write_result("edge", {"what": what, "latency": latency, "alignment": list(alignment(options))})


def runtimes(precision: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each metric and arm of both runtimes."""
    with tempfile.TemporaryDirectory() as name:
        work, base = Path(name), load_base(str(options.base))
        adapter = random_adapter(options.base, work / "adapter", options.rank)
        checkpoint, built = load_checkpoint(adapter, base), {}
        for backend, prefix, arms in (("openvino", "", OPENVINO_ARMS), ("onnxruntime", "onnxruntime-", ORT_ARMS)):
            wanted = BuildOptions(backend=backend, precision=precision, verify=False)
            artifact, _ = build(adapter, str(options.base), work / backend, wanted, show)
            built |= {prefix + arm: build_arm(arm, artifact, base, checkpoint, work / f"{prefix}{arm}") for arm in arms}
        yield from timed(built, options, base.vocabulary, {"precision": precision, "rank": options.rank})


def alignment(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each metric and multiple that an odd rank is padded to, fp32."""
    with tempfile.TemporaryDirectory() as name:
        work, base = Path(name), load_base(str(options.base))
        adapter = random_adapter(options.base, work / "adapter", options.odd_rank)
        built = {}
        for align in ALIGNED:
            wanted = BuildOptions(backend="openvino", align=align, verify=False)
            artifact, _ = build(adapter, str(options.base), work / str(align), wanted, show)
            built |= {} if built else {"base": build_arm("base", artifact, base, load_checkpoint(adapter, base), work / "base")}
            built[f"align {align}"] = Built(artifact, 0)
        yield from timed(built, options, base.vocabulary, {"precision": "fp32", "rank": options.odd_rank})


def timed(built: dict[str, Built], options: argparse.Namespace, vocabulary: int, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    settings = BenchOptions(threads=options.threads, rounds=options.rounds, new_tokens=16)
    for row in measure(built, None, settings, options.threads, vocabulary, show):
        yield {**facts, "bytes": built[row["arm"]].bytes, **row}


def show(what: str, done: int, of: int) -> None:
    print(f"{what}: {done}/{of}", end="\r", flush=True)


if __name__ == "__main__":
    main()
