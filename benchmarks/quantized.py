"""What a rank-32 adapter costs on int4 and int8 bases: fused, beside its hosts, and as LoRA, beside the LoRA of GenAI's own builder.

    python benchmarks/quantized.py --base models/smollm2 --base models/gemma3-270m

Besides: bytes, build time and peak memory of each form; what quantization costs the example's adapter; and its exact answers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from common import random_adapter, write_result

from flora_export.artifact import DATA, MODEL, Artifact, open_artifact
from flora_export.base_model import load_base
from flora_export.bench import BenchOptions, measure
from flora_export.generate import generate
from flora_export.methods import load_checkpoint
from flora_export.pipeline import BuildOptions, build
from flora_export.verify.build_arms import Built, build_arm

EXAMPLE = Path(__file__).parent.parent / "examples" / "01_train_ffba"
OURS = ("base", "unfused", "fused", "lora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, action="append", required=True)
    parser.add_argument("--precision", nargs="+", default=["int4", "int8"])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=90)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapter", type=Path, default=EXAMPLE / "adapter", help="a trained one of the first base, for what it costs")
    parser.add_argument(
        "--trained-on-int4", nargs=2, type=Path, metavar=("ADAPTER", "BASE"), help="one that was trained on a quantized base"
    )
    parser.add_argument("--held-out", type=int, default=100, help="problems for the exact answers; 0 skips them")
    options = parser.parse_args()
    latency = [row for base in options.base for precision in options.precision for row in time_arms(base, precision, options)]
    prices = list(price_forms(options))
    write_result("quantized", {"what": what(options), "latency": latency, "forms": prices})


def what(options: argparse.Namespace) -> str:
    return (
        f"rank {options.rank}, blocks of 32, ONNX Runtime on {options.threads} threads, arms interleaved in one process and loaded several "
        "times, medians; base is the quantized base model alone, unfused and lora stand beside it in fp32, genai and genai-lora are what "
        "ONNX Runtime GenAI's model builder makes of the same base and of a LoRA of the same rank, both int4 of block 32"
    )


def time_arms(path: Path, precision: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each metric and arm, all timed in one run."""
    with tempfile.TemporaryDirectory() as name:
        work, base = Path(name), load_base(str(path))
        adapter = random_adapter(path, work / "adapter", options.rank)
        artifact, _ = build(adapter, str(path), work / "out", BuildOptions(precision=precision, verify=False), show)
        checkpoint = load_checkpoint(adapter, base)
        built = {arm: build_arm(arm, artifact, base, checkpoint, work / arm) for arm in OURS}
        if precision == "int4":
            built |= genai_arms(path, artifact, work, options.rank)
        rows = measure(built, None, BenchOptions(threads=options.threads, rounds=options.rounds), options.threads, base.vocabulary, show)
        for row in rows:
            yield {"base": path.name, "precision": precision, "bytes": built[row["arm"]].bytes, **row}


def genai_arms(path: Path, artifact: Artifact, work: Path, rank: int) -> dict[str, Built]:
    """GenAI's own int4 base, and its LoRA beside it; nothing where its builder does not know the model."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(work / "lora-adapter")
    made = {}
    for arm, extra in (("genai", []), ("genai-lora", [f"adapter_path={work / 'lora-adapter'}"])):
        command = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-m",
            str(path),
            "-o",
            str(work / arm),
            "-p",
            "int4",
            "-e",
            "cpu",
        ]
        command += ["-c", str(work / "cache"), "--extra_options", "int4_block_size=32", "int4_accuracy_level=4", *extra]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            print(f"{arm}: GenAI's builder refuses {path.name}: {ran.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return {}
        state_cache_shapes(work / arm / MODEL, artifact)
        made[arm] = Built(Artifact(work / arm, replace(artifact.manifest, blocks=[], ledger=[])), 0)
    return made


def state_cache_shapes(model: Path, artifact: Artifact) -> None:
    """GenAI's builder leaves the head size of the cache's inputs open, which a benchmark has to know."""
    shapes = {tensor.name: tensor.shape for tensor in artifact.manifest.inputs}
    graph = ir.load(model)
    for value in graph.graph.inputs:
        if value.name in shapes and value.name.startswith("past_key_values."):
            value.shape = ir.Shape(shapes[value.name])
    ir.save(graph, model)


def price_forms(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What each form of the trained adapter is: bytes, build, memory, what it has lost, and how many answers are exact."""
    base = options.base[0]
    forms = [("fp32", options.adapter, base, []), *((p, options.adapter, base, []) for p in options.precision)]
    forms.append(("int4, adapter in int8 beside", options.adapter, base, ["--adapter-precision", "int8"]))
    if options.trained_on_int4:
        adapter, quantized = options.trained_on_int4
        forms.append(("int4, trained on the int4 base", adapter, quantized, []))
    for form, adapter, own, extra in forms:
        with tempfile.TemporaryDirectory() as name:
            out = Path(name) / "out"
            command = [
                str(Path(sys.executable).with_name("flora-export")),
                "build",
                str(adapter),
                "--base",
                str(own),
                "--backend",
                "onnxruntime",
            ]
            command += ["--precision", form.partition(",")[0], "--output", str(out), *extra]
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds, report = time.perf_counter() - start, json.loads((out / "report.json").read_text())
            yield {
                "form": form,
                "bytes": (out / DATA).stat().st_size,
                "verified_build_seconds": seconds,
                "unverified_build": unverified(command, Path(name)),
                "price": report["price"],
                "exact_answers": exact(out, options.held_out) if options.held_out else None,
            }


def unverified(command: list[str], work: Path) -> dict[str, float]:
    """Seconds and peak memory of the build alone, in a process of its own."""
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)"
    )
    script += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    index = command.index("--output") + 1
    command = [*command[:index], str(work / "again"), *command[index + 1 :], "--no-verify"]
    start = time.perf_counter()
    ran = subprocess.run([sys.executable, "-c", script, *command], check=True, capture_output=True, text=True)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
    return {"seconds": time.perf_counter() - start, "peak_bytes": int(ran.stdout) * unit}


def exact(out: Path, count: int, batch: int = 10) -> float:
    """Share of held-out problems that the artifact answers right, decoding greedily."""
    sys.path.insert(0, str(EXAMPLE))
    from problems import problems, result_of

    held_out, artifact, right = problems(count, test=True, seed=1), open_artifact(out), 0
    for start in range(0, count, batch):
        some = held_out[start : start + batch]
        answers = generate(artifact, [problem.question for problem in some], max_new_tokens=64, runtime="decoder")
        right += sum(result_of(answer.text) == problem.result for answer, problem in zip(answers, some, strict=True))
    return right / count


def show(what: str, done: int, of: int) -> None:
    """Progress, on stderr."""
    print(f"\r{what} ... {done}/{of}   ", end="\n" if done == of else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
