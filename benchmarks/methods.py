"""Every kind of adapter on a real model: each is trained for a few steps, built, verified, and timed beside its base.

    python benchmarks/methods.py --base models/smollm2

A method more is a row more in METHODS. The README's table is made of benchmarks/results/methods.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from common import write_result
from transformers import AutoModelForCausalLM, AutoTokenizer

from flora_export.bench import BenchOptions, bench
from flora_export.errors import FloraExportError
from flora_export.ffba import FFBAConfig
from flora_export.pipeline import BuildOptions, build

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "01_train_ffba"))
from problems import problems
from train import collate, encode

DOWN = "down_proj"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": LINEAR}

# name -> (its configuration, learning rate)
METHODS: dict[str, tuple[Callable[[], peft.PeftConfig], float]] = {
    "FFBA": (lambda: FFBAConfig(r=8, task_type="CAUSAL_LM"), 1e-3),
    "LoRA": (lambda: peft.LoraConfig(r=8, lora_alpha=16, **ALL), 1e-3),
    "LoRA, --no-merge": (lambda: peft.LoraConfig(r=8, lora_alpha=16, **ALL), 1e-3),
    "rsLoRA": (lambda: peft.LoraConfig(r=8, lora_alpha=16, use_rslora=True, **ALL), 1e-3),
    "DoRA": (lambda: peft.LoraConfig(r=8, lora_alpha=16, use_dora=True, **ALL), 1e-3),
    "DeLoRA": (lambda: peft.DeloraConfig(r=8, delora_lambda=15.0, **ALL), 1e-3),
    "AdaLoRA": (lambda: peft.AdaLoraConfig(init_r=8, target_r=8, lora_alpha=16, total_step=1000, **ALL), 1e-2),
    "IA3": (lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", DOWN], feedforward_modules=[DOWN]), 1e-2),
    "LoHa": (lambda: peft.LoHaConfig(r=8, alpha=16, **ALL), 1e-2),
    "LoKr": (lambda: peft.LoKrConfig(r=8, alpha=16, **ALL), 1e-2),
    "OFT": (lambda: peft.OFTConfig(r=0, oft_block_size=32, **ALL), 1e-3),
    "VeRA": (lambda: peft.VeraConfig(r=64, task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"]), 1e-2),
    "MiSS": (lambda: peft.MissConfig(r=8, **ALL), 1e-3),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=45)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rows = [one(name, options) for name in options.only]
    what = (
        f"{options.base.name}, each method trained for {options.steps} steps of {options.batch} word problems, built for ONNX Runtime in "
        "fp32 and verified; floors are the largest error of the adapter's effect, in multiples of what eager PyTorch in fp32 is off by; "
        "ratio is of a decode step after 128 tokens to the base model's, arms interleaved"
    )
    write_result("methods", {"what": what, "steps": options.steps, "methods": rows})


def one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train, build, verify and time one method."""
    print(f"--- {name}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as work:
        adapter, out = Path(work) / "adapter", Path(work) / "out"
        trainable, losses = train(name, adapter, options)
        try:
            artifact, report = build(adapter, str(options.base), out, BuildOptions(merge="no-merge" not in name), quiet)
        except FloraExportError as error:
            return {"method": name, "trainable": trainable, "losses": losses, "error": str(error)}
        assert report.numerics is not None
        timed = bench(out, str(options.base), BenchOptions(arms=("base", "fused"), rounds=options.rounds, threads=options.threads), quiet)
        step = next(m for m in timed["measurements"] if (m["metric"], m["arm"]) == ("tpot", "fused"))
        manifest = artifact.manifest
        cases = [case for case in report.numerics.cases if case.floor_effect]
        return {
            "method": name,
            "trainable": trainable,
            "losses": losses,
            "branches": len(manifest.blocks),
            "changed_weights": len(manifest.changes),
            "how": sorted({record.fusion for record in manifest.blocks} | {change.what for change in manifest.changes}),
            "effect": max(case.largest_effect for case in report.numerics.cases),
            "effect_floors": max(case.effect_error / float(case.floor_effect or 1) for case in cases),
            "decode_ratio": step["ratio_to_base"],
            "decode_interval": step["ratio_interval"],
            "bytes_ratio": timed["bytes_ratio_to_base"]["fused"],
        }


def train(name: str, adapter: Path, options: argparse.Namespace) -> tuple[int, list[float]]:
    """Save an adapter that was trained for a few steps. Returns how many numbers it trained, and the first loss and the last."""
    make, rate = METHODS[name]
    transformers.set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32), make())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    rows = [encode(tokenizer, problem) for problem in problems(options.steps * options.batch, test=False, seed=0)]
    losses = []
    for step in range(options.steps):
        loss = model(**collate(rows[step * options.batch : (step + 1) * options.batch])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    model.save_pretrained(adapter)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), [losses[0], losses[-1]]


def quiet(what: str, done: int, of: int) -> None:
    """A progress callback that says nothing."""


if __name__ == "__main__":
    main()
