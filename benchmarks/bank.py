"""What a bank costs: k adapters of rank r in one graph, side by side and stacked, beside the base, one adapter by itself, and LoRA.

    python benchmarks/bank.py --base models/smollm2

One run for each rank and number of rows: all arms interleaved in one process, each row with an adapter of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import random_adapter, summary, write_result
from quantized import show, state_cache_shapes
from serve import Server
from serve import measure as measure_server

from flora_export.artifact import DATA, MODEL, Artifact, open_artifact, seal
from flora_export.backends.onnxruntime import Decoder
from flora_export.backends.triton.config import Serving
from flora_export.bank import LAYOUTS
from flora_export.base_model import BaseModel, load_base
from flora_export.bench import BenchOptions, measure
from flora_export.methods import load_checkpoint
from flora_export.methods.bank import BankOptions
from flora_export.pipeline import BuildOptions, build
from flora_export.publish import publish
from flora_export.runtime import Session
from flora_export.stacks import read_stacks
from flora_export.verify.build_arms import BASE, LORA, Built, build_arm, random_lora
from flora_export.verify.golden import recorded_prompts, write_golden

SINGLE, GENAI = "single", "genai-lora"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--server", type=Path, help="a tritonserver, to measure that alone: 16 adapters, mixed, and one")
    parser.add_argument("--lora", action="store_true", help="measure banks of LoRAs alone")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.server is not None:
        what = "rank 8, fp32, generate streamed over gRPC to 8 clients, 32 tokens each, greedy; both servers started twice, in turn"
        write_result("bank_served", {"what": what, "served": list(serve_mixed(options))})
        return
    if options.lora:
        what = f"{options.base.name}, banks of LoRAs of rank {options.rank[0]} on all projections, in columns; as in bank.json"
        write_result("bank_lora", {"what": what, "measurements": list(time_loras(options.rank[0], options))})
        return
    rows = [row for rank in options.rank for row in time_arms(rank, options)]
    what = (
        f"{options.base.name}, {options.precision}, ONNX Runtime on {options.threads} threads, arms interleaved in one process and loaded "
        "several times, medians; prompts and pasts of 128 tokens; single is one fused adapter by itself, lora an unmerged LoRA of the same "
        "rank on all projections, genai-lora that of ONNX Runtime GenAI's model builder; bytes are those of the weights' file"
    )
    name = "bank" if options.precision == "fp32" else f"bank-{options.precision}"
    write_result(name, {"what": what, "measurements": rows, "swap": time_swaps(options)})


def time_arms(rank: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each metric, number of rows and arm, all timed in one run."""
    with tempfile.TemporaryDirectory() as name:
        work, base = Path(name), load_base(str(options.base))
        single, built = single_arms(rank, base, work, (BASE, LORA), options)
        built[SINGLE] = Built(single, built[BASE].parameters)
        if options.precision == "fp32":
            built |= genai_lora(options.base, single, work, rank)
        for count in options.adapters:
            for layout in LAYOUTS:
                if layout == "columns" and options.precision != "fp32":
                    continue  # a quantized base has stacks beside it
                arm = f"{layout}-{count}"
                built[arm] = bank_arm(work / "adapter", count, layout, work / arm, options)
        yield from timed(built, base, rank, options)


def single_arms(
    rank: int, base: BaseModel, work: Path, arms: Sequence[str], options: argparse.Namespace
) -> tuple[Artifact, dict[str, Built]]:
    """A random adapter of `work / "adapter"` by itself, and arms of `bench` beside it."""
    adapter = random_adapter(options.base, work / "adapter", rank)
    single, _ = build(adapter, str(options.base), work / SINGLE, BuildOptions(precision=options.precision, verify=False), show)
    checkpoint = load_checkpoint(adapter, base)
    return single, {arm: build_arm(arm, single, base, checkpoint, work / arm) for arm in arms}


def bank_arm(adapter: Path, count: int, layout: str | None, out: Path, options: argparse.Namespace) -> Built:
    """A bank that holds an adapter so many times, its last answering."""
    bank = BankOptions(tuple((f"adapter-{index}", adapter) for index in range(count)), layout)
    settings = BuildOptions(precision=options.precision, verify=False, bank=bank)
    artifact, _ = build(adapter, str(options.base), out, settings, show)
    return Built(dataclasses.replace(artifact, slot=count - 1), 0)


def timed(built: dict[str, Built], base: BaseModel, rank: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for batch in options.batch:
        timing = BenchOptions(threads=options.threads, rounds=options.rounds, batch=(batch,), new_tokens=8)
        for row in measure(built, None, timing, options.threads, base.vocabulary, show):
            yield {"rank": rank, "bytes": built[row["arm"]].bytes, **row}


def time_loras(rank: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same for banks of LoRAs, A fused forward and B beside, and one LoRA by itself, its A fused forward too or not."""
    with tempfile.TemporaryDirectory() as name:
        work, base = Path(name), load_base(str(options.base))
        _, built = single_arms(rank, base, work, (BASE, LORA, "lora-forward"), options)
        random_lora(base, rank, work / "own")
        for count in options.adapters:
            built[f"lora-bank-{count}"] = bank_arm(work / "own", count, None, work / f"bank-{count}", options)
        yield from timed(built, base, rank, options)


def time_swaps(options: argparse.Namespace, count: int = 16, swaps: int = 40) -> dict[str, Any]:
    """Seconds of a swap in a loaded bank, of a load, and of a decode step before and after, beside a session that reads the file."""
    with tempfile.TemporaryDirectory() as name:
        work, rank = Path(name), options.rank[0]
        pair = [random_adapter(options.base, work / f"adapter-{seed}", rank, seed) for seed in (0, 1)]
        members = tuple((f"adapter-{index}", pair[0]) for index in range(count))
        bank = BuildOptions(precision=options.precision, verify=False, bank=BankOptions(members, "stack", count + 1))
        artifact, _ = build(pair[0], str(options.base), work / "out", bank, show)
        started = time.perf_counter()
        session = Session(artifact.path, threads=options.threads)
        loaded = time.perf_counter() - started
        plain = Decoder(artifact, threads=options.threads)
        plain.choice.choose(0)
        steps = {"file": lambda: _step(plain), "before": lambda: _session_step(session)}
        before = _interleaved(steps)
        seconds = []
        for index in range(swaps):
            started = time.perf_counter()
            session.swap("adapter-0", pair[(index + 1) % 2])
            seconds.append(time.perf_counter() - started)
        after = _interleaved({"file": steps["file"], "after": steps["before"]})
        return {
            "adapters": count,
            "rank": rank,
            "load_seconds": loaded,
            "swap_seconds": summary(seconds),
            "decode_ratio_to_file_before": before,
            "decode_ratio_to_file_after": after,
            "stack_bytes": sum(stack.tensor.nbytes for stack in read_stacks(artifact)),
            "model_bytes": (artifact.path / DATA).stat().st_size,
        }


def _step(decoder: Decoder) -> float:
    decoder.start([list(range(1, 65))])
    started = time.perf_counter()
    for token in range(8):
        decoder.step([token])
    return time.perf_counter() - started


def _session_step(session: Session) -> float:
    with session.request(["adapter-0"]) as decoder:
        return _step(decoder)


def _interleaved(calls: dict[str, Callable[[], float]], rounds: int = 30) -> float:
    """The median of the ratios of the second's times to the first's, measured in turn."""
    first, second = calls.values()
    first(), second()
    return statistics.median(ratio for _ in range(rounds) for ratio in [second() / first()])


def serve_mixed(options: argparse.Namespace, count: int = 16, clients: int = 8, requests: int = 48) -> Iterator[dict[str, Any]]:
    """Triton: tokens per second of `generate`, requests of all adapters mixed, beside an artifact of one adapter; each server twice."""
    with tempfile.TemporaryDirectory() as name:
        work, rank = Path(name), options.rank[0]
        adapter = random_adapter(options.base, work / "adapter", rank)
        members = tuple((f"adapter-{index}", adapter) for index in range(count))
        plain = BuildOptions(allow_vacuous=True, precision=options.precision)
        single, _ = build(adapter, str(options.base), work / "single", plain, show)
        bank = dataclasses.replace(plain, bank=BankOptions(members, "stack"), verify=False)
        artifact, _ = build(adapter, str(options.base), work / "bank", bank, show)
        borrow_golden(single, artifact)
        for arm, own, names in ((SINGLE, single, ()), ("bank", artifact, tuple(n for n, _ in members))) * 2:
            repo = work / f"repo-{arm}"
            if not repo.exists():
                publish(open_artifact(own.path), repo, Serving(concurrent=clients), show)
            server = Server(options.server, repo, log=work / "log")
            try:
                server.wait()
                yield {"arm": arm, "adapters": len(names) or 1, **measure_server(server.grpc, clients, requests, 32, names)}
            finally:
                server.stop()


def borrow_golden(single: Artifact, bank: Artifact) -> None:
    """The golden vectors of an adapter that is also a bank's first: to verify sixteen times the same one would prove no more."""
    write_golden([dataclasses.replace(each, slot=0) for each in recorded_prompts(single)], bank.path)
    seal(bank.path, dataclasses.replace(open_artifact(bank.path).manifest, verified=True))


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
