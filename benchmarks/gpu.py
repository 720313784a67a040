"""Parity and latency on one CUDA GPU, in one call: eager PyTorch, torch.compile with CUDA graphs, and ONNX Runtime where it can run.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json

Random weights of Llama-3.2-1B and 3B shape; arms base, LoRA unmerged, FFBA unfused, FFBA fused (`fused_torch.py`). Parity comes first.
The arms of a cell (`gpu_arms.py`) are timed round by round, in an order that changes; ratios to base are taken round by round, within a
mode. `timing` is "latency" (the GPU is idle when the call begins, so the host's share counts) or "device" (compiled arms: another
kernel keeps the GPU busy while the host launches the graph). Clocks are read, never set.

Everything found is written after every arm and cell: a run that is killed loses nothing. What fails, or does not fit into `--seconds`,
stands in the file with its reason. Exit code 1: a parity check failed, or none could be made.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # the package need not be installed

import gpu_arms
from common import environment
from fused_torch import ARMS, make_arm
from gpu_arms import DTYPES, ORT_LEVELS, SHAPES, Cell, Parity, Step

WARM_UP = 4  # calls; under CUDA graphs the first compiles and the second records
LEAST_ROUNDS = 10
COMPILE_SECONDS = 1.0  # a layer and arm: a guess, until one was seen
BUILD_SECONDS = 40.0  # an artifact for ONNX Runtime


class Report:
    """The result file, written anew after everything that is added to it."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.began, self.seconds = path, time.monotonic(), float(settings["seconds"])
        self.compile_seconds = COMPILE_SECONDS
        self.content: dict[str, Any] = {
            "command": "python " + " ".join(sys.argv),
            "complete": False,
            "settings": settings,
            "environment": environment() | {"cuda": torch.version.cuda, "gpu": gpu_state()},
            "parity": [],
            "weight_bytes": [],
            "measurements": [],
            "not_measured": [],
        }
        self.write()

    def left(self) -> float:
        """Seconds until the run should end."""
        return self.seconds - (time.monotonic() - self.began)

    def fits(self, needed: float, reserve: float, **where: Any) -> bool:
        """Whether there is time for something, `reserve` being what others must have; if not, that is recorded."""
        if self.left() - needed >= reserve:
            return True
        self.add(
            "not_measured", **where, reason=f"needs {needed:.0f} s, but {self.left() - reserve:.0f} s of its share of --seconds are left"
        )
        return False

    def add(self, section: str, **entry: Any) -> None:
        self.content[section].append(entry)
        print(section, *(f"{v:.4g}" if isinstance(v, float) else v for v in entry.values()), file=sys.stderr, flush=True)
        self.write()

    def add_parity(self, parity: Parity, **where: Any) -> None:
        self.add("parity", **where, **asdict(parity), passed=parity.passed)

    def write(self) -> None:
        self.content["seconds"] = round(time.monotonic() - self.began, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.content, indent=1, default=str) + "\n")
        os.replace(part, self.path)

    @contextmanager
    def degrade(self, section: str = "not_measured", **where: Any) -> Iterator[None]:
        """An exception inside is recorded, and the run goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            failed = {"passed": False} if section == "parity" else {}
            self.add(section, **where, error=f"{type(error).__name__}: {error}"[:600], **failed)
            gc.collect()
            if torch.cuda.is_initialized():
                try:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                except RuntimeError as broken:  # it is, at every call from now on
                    raise SystemExit(f"the CUDA context is broken: {broken}") from broken

    def exit_code(self) -> int:
        checks = self.content["parity"]
        return 0 if checks and all(check["passed"] for check in checks) else 1


def gpu_state() -> dict[str, str]:
    """Name, driver, memory and clocks as nvidia-smi reads them; empty where there is none."""
    fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(fields.split(","), (value.strip() for value in line.split(",")), strict=False))


def interleaved(
    report: Report, where: dict[str, Any], steps: dict[str, Step], options: argparse.Namespace, head_start: bool
) -> dict[str, list[float]]:
    """Milliseconds by arm, round by round, each round in another order. An arm that fails leaves."""
    times: dict[str, list[float]] = {arm: [] for arm in steps}
    rng = random.Random(0)
    gc.collect()
    gc.disable()
    began = time.monotonic()
    for done in range(options.rounds):
        if done >= LEAST_ROUNDS and time.monotonic() - began > options.cell_seconds:
            break
        for arm in rng.sample(list(times), len(times)):
            with report.degrade(arm=arm, **where):
                times[arm].append(steps[arm].milliseconds(head_start))
        times = {arm: values for arm, values in times.items() if len(values) > done}
    gc.enable()
    return times


def statistics(values: list[float], base: list[float] | None) -> dict[str, Any]:
    """Median and p90 in milliseconds; median of the round-by-round ratio to base, with its bootstrap 95 % interval."""
    found: dict[str, Any] = {"median_ms": float(np.median(values)), "p90_ms": float(np.quantile(values, 0.9)), "samples": len(values)}
    if base is None:
        return found | {"ratio_to_base": None, "ratio_interval": None}
    ratios = np.array(values) / np.array(base)
    medians = np.median(np.random.default_rng(0).choice(ratios, size=(2000, len(ratios))), axis=1)
    interval = [float(np.quantile(medians, q)) for q in (0.025, 0.975)]
    return found | {"ratio_to_base": float(np.median(ratios)), "ratio_interval": interval}


def measure(report: Report, cell: Cell, mode: str, steps: dict[str, Step], options: argparse.Namespace, reserve: float) -> None:
    """Warm the arms up, compare their outputs, and time them. `reserve` are the seconds that must be left for others."""
    where = asdict(cell) | {"mode": mode}
    compiled_on_gpu = mode == "compiled" and options.device == "cuda"
    expected = report.compile_seconds * SHAPES[cell.shape]["num_hidden_layers"] if compiled_on_gpu else 0.0
    ready: dict[str, Step] = {}
    outputs: dict[str, Tensor] = {}
    extra: dict[str, dict[str, Any]] = {}
    for done, (arm, step) in enumerate(steps.items()):
        if not report.fits(expected * (len(steps) - done), reserve, arm=arm, **where):
            continue
        with report.degrade(arm=arm, **where):
            began, skips = time.monotonic(), gpu_arms.graph_skips()
            for _ in range(WARM_UP):
                step.prepare()
                output = step.call()
            if output is not None:
                outputs[arm] = output.float().clone()
            extra[arm] = {"warm_up_seconds": round(time.monotonic() - began, 2)}
            if compiled_on_gpu:
                extra[arm]["cuda_graphs"] = gpu_arms.graph_skips() == skips
                expected = time.monotonic() - began
                report.compile_seconds = expected / SHAPES[cell.shape]["num_hidden_layers"]
            ready[arm] = step
    parity = gpu_arms.compare_outputs(outputs, cell.dtype)
    if parity is not None:
        report.add_parity(parity, **where)
    for timing in ("latency", "device") if compiled_on_gpu else ("latency",):
        times = interleaved(report, where, ready, options, timing == "device")
        clocks = {key: value for key, value in gpu_state().items() if key.startswith(("clocks", "power"))}
        for arm, values in times.items():
            report.add("measurements", **where, arm=arm, timing=timing, **statistics(values, times.get("base")), **extra[arm], **clocks)


def run_torch(
    report: Report, base: nn.Module, where: dict[str, str], cells: Sequence[Cell], options: argparse.Namespace, reserve: float
) -> None:
    arms: dict[str, nn.Module] = {}
    for arm in ARMS:
        with report.degrade(arm=arm, **where):
            arms[arm] = make_arm(arm, base, options.rank)
            report.add("weight_bytes", arm=arm, **where, bytes=gpu_arms.weight_bytes(arms[arm]))
    for cell in cells:
        with report.degrade(arm="all", **asdict(cell), mode="eager"):
            measure(report, cell, "eager", gpu_arms.torch_steps(arms, cell, base.config, options.device), options, reserve)
    if not options.compile:
        report.add("not_measured", arm="all", **where, mode="compiled", reason="--no-compile")
    for cell in sorted(cells if options.compile else (), key=functools.partial(compile_rank, options)):
        with report.degrade(arm="all", **asdict(cell), mode="compiled"):
            torch.compiler.reset()  # the last cell's graphs: their memory, and their places in Dynamo's caches
            gc.collect()
            compiled = {arm: torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False) for arm, model in arms.items()}
            measure(report, cell, "compiled", gpu_arms.torch_steps(compiled, cell, base.config, options.device), options, reserve)
    torch.compiler.reset()


def compile_rank(options: argparse.Namespace, cell: Cell) -> tuple[int, str]:
    """Compiling takes most of the time, so the cells that say most come first: the smallest, then the largest; decode before prefill."""
    sizes = options.past if cell.metric == "decode" else options.prompt
    corners = [(min(sizes), min(options.batch)), (max(sizes), max(options.batch))]
    at = (cell.tokens, cell.batch)
    return corners.index(at) if at in corners else len(corners), cell.metric


def run_onnxruntime(
    report: Report, base: nn.Module, where: dict[str, str], cells: Sequence[Cell], options: argparse.Namespace, reserve: float
) -> None:
    reason = gpu_arms.why_no_onnxruntime(options.device)
    if reason is not None:
        for arm in ORT_LEVELS:
            report.add("not_measured", arm=arm, **where, mode="onnxruntime", reason=reason)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        gpu_arms.save_sources(base, options.rank, work)
        decoders: dict[str, Any] = {}
        outputs: dict[str, Tensor] = {}
        for arm in ORT_LEVELS:
            if not report.fits(BUILD_SECONDS, reserve, arm=arm, **where, mode="onnxruntime"):
                continue
            with report.degrade(arm=arm, **where, mode="onnxruntime"):
                decoders[arm] = gpu_arms.make_decoder(arm, work, options.device, where["dtype"])
                outputs[arm] = torch.from_numpy(decoders[arm].start([list(range(3, 27))])[0])
        parity = gpu_arms.compare_outputs(outputs, where["dtype"])
        if parity is not None:
            report.add_parity(parity, **where, mode="onnxruntime")
        for cell in cells:
            with report.degrade(arm="all", **asdict(cell), mode="onnxruntime"):
                steps = {arm: gpu_arms.ort_step(decoder, cell, options.device) for arm, decoder in decoders.items()}
                measure(report, cell, "onnxruntime", steps, options, reserve)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    def among(known: Collection[str]) -> Callable[[str], list[str]]:
        def names(text: str) -> list[str]:
            if unknown := [name for name in text.split(",") if name not in known]:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown; there are {', '.join(known)}")
            return text.split(",")

        return names

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shapes", type=among(SHAPES), default=["llama-3.2-1b", "llama-3.2-3b"], help=", ".join(SHAPES))
    parser.add_argument("--dtypes", type=among(DTYPES), default=["bf16", "fp16"], help=", ".join(DTYPES))
    parser.add_argument("--tiny", dest="shapes", action="store_const", const=["tiny"], help="a shape for tests")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--past", type=numbers, default=[128, 2048], help="tokens before a decode step")
    parser.add_argument("--prompt", type=numbers, default=[128, 2048], help="tokens of a prefill")
    parser.add_argument("--batch", type=numbers, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=100, help="at most")
    parser.add_argument("--cell-seconds", type=float, default=3.0, help=f"of timing a cell; at least {LEAST_ROUNDS} rounds")
    parser.add_argument("--seconds", type=float, default=540.0, help="of the whole run; shared out to the shapes and dtypes")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    report = Report(options.output, vars(options))
    models = list(product(options.dtypes, options.shapes))
    for index, (dtype, shape) in enumerate(models):
        where = {"shape": shape, "dtype": dtype}
        reserve = report.left() * (1 - 1 / (len(models) - index))
        cells = [Cell(shape, dtype, "decode", *size) for size in product(options.past, options.batch)]
        cells += [Cell(shape, dtype, "prefill", *size) for size in product(options.prompt, options.batch)]
        with report.degrade("parity", **where):
            for parity in gpu_arms.check_two_layers(shape, dtype, options.rank, options.device):
                report.add_parity(parity, **where)
        with report.degrade(arm="all", **where):
            base = gpu_arms.make_base(shape, DTYPES[dtype], options.device)
            run_torch(report, base, where, cells, options, reserve)
            run_onnxruntime(report, base, where, cells, options, reserve)
        gc.collect()
    report.content["complete"] = True
    report.write()
    return report.exit_code()


if __name__ == "__main__":
    sys.exit(main())
