"""What the adapter costs a TensorRT engine in kernels: base, fused, unfused, LoRA, and forward fusion of our own, with either KV cache.

python benchmarks/engines.py --base models/smollm2

Counted from the builder's list of layers; no GPU is needed, and nothing is timed on one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from common import random_adapter, write_result

from flora_export.artifact import MODEL
from flora_export.backends.graph_files import describe_value
from flora_export.backends.tensorrt.engine import build_engine
from flora_export.backends.tensorrt.flavour import load_flavour
from flora_export.backends.tensorrt.layers import report_layers
from flora_export.backends.tensorrt.plan import EngineOptions, profiles_for, to_json
from flora_export.base_model import BaseModel, load_base
from flora_export.capture import capture
from flora_export.checkpoint import Checkpoint
from flora_export.ledger import write_model
from flora_export.methods import load_checkpoint
from flora_export.passes import (
    Attach,
    FoldNeurons,
    FuseBackward,
    FuseForward,
    lowering,
    passes_for,
    place_branches,
    run_passes,
)
from flora_export.passes.attach_detours import place_detours
from flora_export.verify.build_arms import random_lora

ARMS = ("base", "fused", "fused, forward by us", "unfused", "lora")


def measure(
    arm: str, base: BaseModel, checkpoint: Checkpoint, lora: Checkpoint, cache_tokens: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Build one arm's engine, and count what it is made of."""
    flavour = load_flavour("rtx")
    captured = capture(base, "tensorrt", options.precision)
    run_passes(captured.model, lowering("tensorrt", cache_tokens))
    if arm == "lora":
        detours = place_detours(captured.model, lora, base)
        run_passes(captured.model, passes_for("none", (), lora, "tensorrt", base, detours))
    elif arm != "base":
        branches = place_branches(captured.model, checkpoint, base, 8)
        forward = [Attach(branches, checkpoint), FoldNeurons(branches), FuseForward(branches), FuseBackward(branches)]
        level = "none" if arm == "unfused" else "both"
        run_passes(captured.model, forward if "by us" in arm else passes_for(level, branches, checkpoint, "tensorrt"))
    profiles = profiles_for({}, base.context, cache_tokens)
    inputs = [describe_value(value) for value in captured.model.graph.inputs]
    with tempfile.TemporaryDirectory() as name:
        write_model(captured.model, Path(name))
        started = time.perf_counter()
        engine, layers = build_engine(flavour, Path(name) / MODEL, inputs, profiles, (options.compute_capability,), EngineOptions())
        seconds = time.perf_counter() - started
    report = report_layers(layers, captured.model)
    return {
        "arm": arm,
        "kv_cache": f"static:{cache_tokens}" if cache_tokens else "growing",
        "kernels": dict(zip(("prefill", "decode"), report.kernels, strict=True)),
        "gemms": {profile.name: report.gemm_count(index) for index, profile in enumerate(profiles)},
        "adapter_gemms_alone": sum(gemm.alone for gemm in report.gemms),
        "engine_bytes": len(engine),
        "build_seconds": round(seconds, 1),
        "profiles": to_json(profiles),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--precision", default="fp16", choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--compute-capability", default="8.9")
    parser.add_argument("--cache-tokens", type=int, default=2048)
    options = parser.parse_args()
    base = load_base(str(options.base))
    with tempfile.TemporaryDirectory() as name:
        checkpoint = load_checkpoint(random_adapter(options.base, Path(name) / "adapter", options.rank), base)
        lora = random_lora(base, options.rank, Path(name) / "lora")
        rows = [measure(arm, base, checkpoint, lora, places, options) for places in (0, options.cache_tokens) for arm in ARMS]
    flavour = load_flavour("rtx")
    facts = {"flavour": flavour.title, "version": flavour.version, "compute_capability": options.compute_capability}
    model = {"base": options.base.name, "rank": options.rank, "precision": options.precision, "layers": base.layers}
    write_result("engines", facts | model | {"arms": rows})


if __name__ == "__main__":
    main()
