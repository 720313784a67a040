"""What the adapter costs a QNN context: base, fused, unfused, and LoRA. Bytes, operators, compile time, and the error in the simulator.

python benchmarks/qnn.py --base models/smollm2 --adapter examples/01_train_ffba/adapter

Everything is compiled and simulated on this machine. How long the simulator takes says nothing about a device, so it is not reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import write_result

from flora_export.artifact import Artifact
from flora_export.backends.graph_files import write_graph
from flora_export.backends.qnn import products
from flora_export.backends.qnn.apart import installed_version
from flora_export.backends.qnn.context import CONTEXTS, binaries, compile_contexts
from flora_export.backends.qnn.plan import HTP_ARCH, SOC_MODEL, ContextPlan
from flora_export.backends.qnn.session import PortableDecoder
from flora_export.backends.qnn.simulate import compare, portable_logits, simulated_logits
from flora_export.base_model import BaseModel, load_base
from flora_export.capture import capture
from flora_export.checkpoint import Checkpoint
from flora_export.errors import BackendError
from flora_export.ledger import write_model
from flora_export.methods import load_checkpoint
from flora_export.passes import fuse_adapter, lowering, run_passes
from flora_export.verify.build_arms import random_lora
from flora_export.verify.parity import golden_prompts

ARMS = {"fused": "both", "unfused": "none", "lora": "none"}  # arm -> fusion level


def write_arm(level: str, base: BaseModel, checkpoint: Checkpoint, places: int, directory: Path) -> Artifact:
    """An adapter on the base, as the backend writes it before it compiles."""
    fused = fuse_adapter(capture(base, "qnn", "fp16"), base, checkpoint, level, cache_tokens=places)
    return Artifact(directory, write_graph(fused, directory, "qnn", "npu", lambda *_: None))


def measure(artifact: Artifact, plan: ContextPlan, bare: PortableDecoder | None) -> dict[str, Any]:
    """Compile one arm's contexts, and run them beside its portable graph."""
    place = artifact.path
    compiled = compile_contexts(place, place, plan)
    logits, tokens = portable_logits(PortableDecoder(artifact), plan.prompt, None)
    effect = 0.0 if bare is None else float(np.abs(logits - portable_logits(bare, plan.prompt, tokens)[0]).max())
    found = compare(simulated_logits(place, plan, tokens), logits, effect)
    sizes = binaries(place)
    for name in CONTEXTS:
        (place / name).unlink(missing_ok=True)
    return {
        "weights_bytes": (place / "model.onnx.data").stat().st_size,
        "context_bytes": sizes,
        "compile_seconds": {name: round(seconds, 1) for name, seconds in compiled.seconds.items()},
        "operators": {name: sum(counts.values()) for name, counts in compiled.operators.items()},
        "products": {name: products(counts) for name, counts in compiled.operators.items()},
        "simulated": dataclasses.asdict(found) | ({"error_of_effect": found.error / effect} if effect else {}),
        "qnn": compiled.sdk,
    }


def share(artifact: Artifact, plan: ContextPlan) -> dict[str, Any]:
    """One binary for both graphs, and what the simulator says of it."""
    shared = dataclasses.replace(plan, share_weights=True)
    compiled = compile_contexts(artifact.path, artifact.path, shared)
    sizes = binaries(artifact.path)
    try:
        simulated_logits(artifact.path, shared, [0])  # it fails in the library, or takes its process with it
        said = "loads it"
    except BackendError as error:
        said = str(error)
    return {"context_bytes": sizes, "compile_seconds": {n: round(s, 1) for n, s in compiled.seconds.items()}, "simulator": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--cache-tokens", type=int, default=128)
    options = parser.parse_args()
    base = load_base(str(options.base))
    prompt = min(golden_prompts(base)(options.cache_tokens)[0], key=len)[:12]
    plan = ContextPlan(options.prompt_tokens, options.cache_tokens, SOC_MODEL, HTP_ARCH, False, tuple(prompt))
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        adapter, lora = load_checkpoint(options.adapter, base), random_lora(base, options.lora_rank, root / "lora-adapter")
        for arm in ("base", *ARMS):
            (root / arm).mkdir()
        first = write_arm(ARMS["fused"], base, adapter, plan.cache_tokens, root / "fused")
        captured = capture(base, "qnn", "fp16").model
        run_passes(captured, lowering("qnn", plan.cache_tokens))
        write_model(captured, root / "base")
        bare = Artifact(root / "base", dataclasses.replace(first.manifest, blocks=[], ledger=[], changes=[]))
        rows["base"] = measure(bare, plan, None)
        for arm, level in ARMS.items():
            checkpoint = lora if arm == "lora" else adapter
            artifact = first if arm == "fused" else write_arm(level, base, checkpoint, plan.cache_tokens, root / arm)
            rows[arm] = measure(artifact, plan, PortableDecoder(bare))
        rows["fused"]["shared"] = share(first, plan)
    facts = {"onnxruntime-qnn": installed_version(), "soc_model": plan.soc_model, "htp_arch": plan.htp_arch, "precision": "fp16"}
    shapes = {"prompt_tokens": plan.prompt_tokens, "cache_tokens": plan.cache_tokens, "simulated_tokens": [len(prompt), 2]}
    model = {"base": options.base.name, "adapter": str(options.adapter), "lora_rank": options.lora_rank}
    write_result("qnn", facts | shapes | model | {"arms": rows})


if __name__ == "__main__":
    main()
