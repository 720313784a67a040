"""Decode and prefill latency of base, unfused and fused graphs in ONNX Runtime on the CPU, in one interleaved run.

    python benchmarks/decode.py --base models/smollm2

Every round times each arm once, in an order that changes from round to round; ratios are taken round by round, so a machine that
changes its speed changes both sides. Sessions share one process, so their threads do not spin (`session.intra_op.allow_spinning` = 0).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import random_adapter, summary, write_result

from flora_export.artifact import Artifact
from flora_export.backends.onnxruntime import Decoder, write
from flora_export.base_model import load_base
from flora_export.capture import capture
from flora_export.checkpoint import load_checkpoint
from flora_export.ledger import write_model
from flora_export.passes import fuse_adapter

ARMS = {"unfused": "none", "forward": "forward", "backward": "backward", "fused": "both"}


def make_arms(base_dir: Path, adapter: Path, work: Path) -> dict[str, Artifact]:
    """An artifact per fuse level, and the base model alone under a manifest like theirs."""
    base = load_base(str(base_dir))
    checkpoint = load_checkpoint(adapter, base)
    artifacts = {}
    for arm, fuse in ARMS.items():
        (work / arm).mkdir()
        fused = fuse_adapter(capture(base, "cpu", "fp32"), base, checkpoint, fuse)
        artifacts[arm] = Artifact(work / arm, write(fused, work / arm))
    (work / "base").mkdir()
    write_model(capture(base, "cpu", "fp32").model, work / "base")
    return {"base": Artifact(work / "base", dataclasses.replace(artifacts["unfused"].manifest, blocks=[], ledger=[])), **artifacts}


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, warmup: int) -> dict[str, Any]:
    """Milliseconds and round-by-round ratios to `base`."""
    times: dict[str, list[float]] = {arm: [] for arm in calls}
    order = list(calls)
    rng = random.Random(0)
    for round_ in range(rounds + warmup):
        rng.shuffle(order)
        for arm in order:
            started = time.perf_counter()
            calls[arm]()
            if round_ >= warmup:
                times[arm].append((time.perf_counter() - started) * 1000)
    ratios = {arm: sorted(t / b for t, b in zip(values, times["base"], strict=True)) for arm, values in times.items()}
    return {
        arm: {
            "milliseconds": summary(times[arm]),
            "ratio_to_base": statistics.median(ratios[arm]),
            "ratio_interval": _interval(ratios[arm]),
        }
        for arm in calls
    }


def _interval(ratios: list[float]) -> list[float]:
    """Bootstrap 95 % interval of the median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, size=(2000, len(ratios))), axis=1)
    return [float(np.quantile(medians, q)) for q in (0.025, 0.975)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    try:
        adapter = random_adapter(options.base, work / "adapter", options.rank)
        prompt = np.random.default_rng(0).integers(3, 40000, options.past).tolist()
        artifacts = make_arms(options.base, adapter, work)
        sizes = {arm: (artifact.path / "model.onnx.data").stat().st_size for arm, artifact in artifacts.items()}
        decoders = {arm: Decoder(artifact, threads=options.threads) for arm, artifact in artifacts.items()}
        decode = {arm: one_step(decoder, prompt) for arm, decoder in decoders.items()}
        prefill = {arm: functools.partial(decoder.start, [prompt]) for arm, decoder in decoders.items()}
        write_result(
            "decode",
            {
                "what": f"SmolLM2-135M fp32, ONNX Runtime CPU, {options.threads} threads, rank {options.rank}, batch 1",
                "rounds": options.rounds,
                f"decode, past {options.past}": interleaved(decode, options.rounds, 10),
                f"prefill {options.past}": interleaved(prefill, options.rounds // 5, 3),
                "bytes_ratio_to_base": {arm: size / sizes["base"] for arm, size in sizes.items()},
                "allowed": {"fused decode": 1.03},
            },
        )
    finally:
        shutil.rmtree(work)


def one_step(decoder: Decoder, prompt: list[int]) -> Callable[[], object]:
    """A call that decodes one token after the prompt, the same one each time."""
    decoder.start([prompt])
    cache, mask = decoder.cache, decoder.mask

    def call() -> object:
        decoder.cache, decoder.mask, decoder.lengths = cache, mask, np.array([len(prompt)])
        return decoder.step([7])

    return call


if __name__ == "__main__":
    main()
