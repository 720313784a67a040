"""Latency: time arms in interleaved rounds, and judge an overhead with its confidence interval. Knows no runtime.

Every round times each arm once, in an order that changes from round to round, and ratios are taken round by round: a machine that
changes its speed changes both sides. An arm that is loaded again lies elsewhere in memory and may run faster or slower for good, so
the arms are loaded several times, and an interval covers both: how rounds differ, and how loads differ.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

BASE = "base"
RESAMPLES = 2000
PACKAGES = ("flora-export", "onnxruntime", "openvino", "mobius-onnx", "onnx-ir", "torch", "transformers", "peft", "numpy")

Samples = dict[str, dict[int, float]]  # arm -> round -> milliseconds


@dataclass(frozen=True)
class Call:
    """What is timed: `run`, given what `prepare` returns. The rest is not: `prepare` before it, and `settle` seconds of sleep after it.

    A slow arm may take part in every n-th round only, and in no warm-up.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any], object]
    every: int = 1
    settle: float = 0.0


@dataclass(frozen=True)
class Summary:
    """Milliseconds of one arm, and the median of its round-by-round ratios to `base` with its bootstrap 95 % interval."""

    median_ms: float
    p90_ms: float
    min_ms: float
    samples: int
    ratio_to_base: float | None
    ratio_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Judgement:
    verdict: Literal["pass", "fail", "inconclusive"]
    message: str


def interleaved(
    calls: Mapping[str, Call], rounds: int, warmup: int, progress: Callable[[int, int], None] | None = None, seed: int = 0
) -> Samples:
    """Time each arm once per round. The warm-up rounds are not kept."""
    samples: Samples = {arm: {} for arm in calls}
    order = list(calls)
    rng = random.Random(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_ in range(-warmup, rounds):
            rng.shuffle(order)
            for arm in order:
                call = calls[arm]
                if call.every > 1 and (round_ < 0 or round_ % call.every):
                    continue
                ready = call.prepare()
                started = time.perf_counter()
                result = call.run(ready)
                elapsed = time.perf_counter() - started
                del ready, result
                if round_ >= 0:
                    samples[arm][round_] = elapsed * 1000
                if call.settle:
                    time.sleep(call.settle)
            if progress is not None:
                progress(round_ + warmup + 1, rounds + warmup)
    finally:
        if collecting:
            gc.enable()
    return samples


def joined(loads: Sequence[Samples]) -> Samples:
    """The samples of several loads of the same arms, each of as many rounds, as if they were one."""
    rounds = max(round_ for values in loads[0].values() for round_ in values) + 1
    return {arm: {n * rounds + r: ms for n, load in enumerate(loads) for r, ms in load[arm].items()} for arm in loads[0]}


def summarise(samples: Samples, loads: int = 1) -> dict[str, Summary]:
    """The statistics of each arm, whose rounds were taken in so many loads. One without a round in common with `base` has no ratio."""
    rounds = max(round_ for values in samples.values() for round_ in values) + 1
    summaries = {}
    for arm, values in samples.items():
        milliseconds = np.array(list(values.values()))
        ratios: list[list[float]] = [[] for _ in range(loads)]
        for round_, ms in values.items():
            if round_ in samples.get(BASE, {}):
                ratios[round_ * loads // rounds].append(ms / samples[BASE][round_])
        known = any(ratios)
        summaries[arm] = Summary(
            median_ms=float(np.median(milliseconds)),
            p90_ms=float(np.quantile(milliseconds, 0.9)),
            min_ms=float(milliseconds.min()),
            samples=len(milliseconds),
            ratio_to_base=float(np.median(np.concatenate(ratios))) if known else None,
            ratio_interval=median_interval(ratios) if known else None,
        )
    return summaries


def median_interval(loads: Sequence[Sequence[float]], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the median by a two-stage bootstrap: loads are drawn, and then rounds of each (Davison and Hinkley 1997, section 3.8).

    All loads have as many values. Of one load with five or fewer it is their whole range.
    """
    values = np.array(loads)  # [loads, rounds]
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(values), (RESAMPLES, len(values), 1))
    medians = np.median(values[drawn, rng.integers(0, values.shape[1], (RESAMPLES, *values.shape))], axis=(1, 2))
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def judge_overhead(interval: tuple[float, float], budget: float) -> Judgement:
    """Judge the interval of a ratio against an overhead budget, 0.03 for 3 %: pass below it, fail above it, inconclusive across it."""
    low, high = interval
    seen = f"the overhead is {low - 1:.1%} to {high - 1:.1%} (95 % interval)"
    if high <= 1 + budget:
        return Judgement("pass", f"{seen}, within the budget of {budget:.1%}")
    if low > 1 + budget:
        return Judgement("fail", f"{seen}, above the budget of {budget:.1%}")
    return Judgement(
        "inconclusive",
        f"{seen}, which crosses the budget of {budget:.1%}: nothing is proved. Measure longer (--rounds), or on a quieter machine.",
    )


def environment() -> dict[str, Any]:
    """The machine and the versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "unknown")
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(), "versions": versions}


def to_text(result: Mapping[str, Any]) -> str:
    """The result of `flora-export bench` as tables: an arm a row; milliseconds (median), ratio to base and its interval."""
    lines = [result["what"]]
    new = result["settings"]["new_tokens"]
    titles = {"ttft": "TTFT, {} tokens", "tpot": "TPOT, {} past tokens", "total": f"total, {{}} + {new} tokens"}
    cells = {(m["metric"], m["tokens"], m["batch"], m["arm"]): m for m in result["measurements"]}
    series = list(dict.fromkeys(key[:3] for key in cells))
    for batch in result["settings"]["batch"]:
        columns = [key for key in series if key[2] == batch]
        for start in range(0, len(columns), 3):
            shown = columns[start : start + 3]
            lines += ["", f"{f'batch {batch}':<13}" + "".join(f"{titles[metric].format(tokens):<38}" for metric, tokens, _ in shown)]
            lines += [f"{arm:<13}" + "".join(f"{_cell(cells[*key, arm]):<38}" for key in shown) for arm in result["arms"]]
    lines += ["", f"{'':<13}{'bytes, ratio to base':<36}{'adapter parameters'}"]
    for arm in result["arms"]:
        ratio, rank = result["bytes_ratio_to_base"].get(arm), result["lora_rank"].get(arm)
        parameters = f"{result['adapter_parameters'][arm]:,}" + (f" (rank {rank})" if rank else "")
        lines.append(f"{arm:<13}{'' if ratio is None else f'{ratio:.3f}':<36}{parameters}")
    if (budget := result["budget"]) is not None:
        lines += ["", f"{budget['verdict'].upper()}: TPOT of fused, {budget['tokens']} past tokens: {budget['message']}"]
    return "\n".join(line.rstrip() for line in lines)


def _cell(measurement: Mapping[str, Any]) -> str:
    text = f"{measurement['median_ms']:8.2f} ms"
    if measurement["ratio_to_base"] is not None and measurement["arm"] != BASE:
        low, high = measurement["ratio_interval"]
        text += f"  {measurement['ratio_to_base']:.3f} [{low:.3f}, {high:.3f}]"
    return text
