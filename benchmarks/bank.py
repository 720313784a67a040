"""What a bank costs: k adapters of rank r in one graph, side by side and stacked, beside the base, one adapter by itself, and LoRA.

    python benchmarks/bank.py --base models/smollm2

One run for each rank and number of rows: all arms interleaved in one process, each row with an adapter of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import random_adapter, write_result
from quantized import show, state_cache_shapes

from flora_export.artifact import DATA, MODEL, Artifact
from flora_export.bank import LAYOUTS
from flora_export.base_model import load_base
from flora_export.bench import BenchOptions, measure
from flora_export.methods import load_checkpoint
from flora_export.methods.bank import BankOptions
from flora_export.pipeline import BuildOptions, build
from flora_export.verify.build_arms import BASE, LORA, Built, build_arm

SINGLE, GENAI = "single", "genai-lora"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rows = [row for rank in options.rank for row in time_arms(rank, options)]
    what = (
        f"{options.base.name}, {options.precision}, ONNX Runtime on {options.threads} threads, arms interleaved in one process and loaded "
        "several times, medians; prompts and pasts of 128 tokens; single is one fused adapter by itself, lora an unmerged LoRA of the same "
        "rank on all projections, genai-lora that of ONNX Runtime GenAI's model builder; bytes are those of the weights' file"
    )
    write_result(f"bank{'' if options.precision == 'fp32' else '-' + options.precision}", {"what": what, "measurements": rows})


def time_arms(rank: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each metric, number of rows and arm, all timed in one run."""
    with tempfile.TemporaryDirectory() as name:
        work, base = Path(name), load_base(str(options.base))
        adapter = random_adapter(options.base, work / "adapter", rank)
        plain = BuildOptions(precision=options.precision, verify=False)
        single, _ = build(adapter, str(options.base), work / SINGLE, plain, show)
        checkpoint = load_checkpoint(adapter, base)
        built = {arm: build_arm(arm, single, base, checkpoint, work / arm) for arm in (BASE, LORA)}
        built[SINGLE] = Built(single, built[BASE].parameters)
        if options.precision == "fp32":
            built |= genai_lora(options.base, single, work, rank)
        for count in options.adapters:
            members = tuple((f"adapter-{index}", adapter) for index in range(count))
            for layout in LAYOUTS:
                arm = f"{layout}-{count}"
                if layout == "columns" and options.precision != "fp32":
                    continue  # a quantized base has stacks beside it
                bank = dataclasses.replace(plain, bank=BankOptions(members, layout))
                artifact, _ = build(adapter, str(options.base), work / arm, bank, show)
                built[arm] = Built(dataclasses.replace(artifact, slot=count - 1), 0)
        for batch in options.batch:
            timing = BenchOptions(threads=options.threads, rounds=options.rounds, batch=(batch,), new_tokens=8)
            for row in measure(built, None, timing, options.threads, base.vocabulary, show):
                yield {"rank": rank, "bytes": built[row["arm"]].bytes, **row}


def genai_lora(base: Path, artifact: Artifact, work: Path, rank: int) -> dict[str, Built]:
    """A LoRA as GenAI's own builder puts it beside the base; nothing where it does not know the model."""
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(work / "lora-adapter")
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-m",
        str(base),
        "-o",
        str(work / GENAI),
        "-p",
        "fp32",
        "-e",
        "cpu",
    ]
    command += ["-c", str(work / "cache"), "--extra_options", f"adapter_path={work / 'lora-adapter'}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode or not (work / GENAI / DATA).is_file():
        print(f"GenAI's builder refuses {base.name}: {ran.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return {}
    state_cache_shapes(work / GENAI / MODEL, artifact)
    return {GENAI: Built(Artifact(work / GENAI, dataclasses.replace(artifact.manifest, blocks=[], ledger=[])), 0)}


if __name__ == "__main__":
    main()
