"""What the README and docs/method.md say of accuracy, from the files accuracy-*.json and frontier-*.json under benchmarks/results/."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parent.parent
SIGNIFICANT = 0.05
ACCURACY = ("small", "small-base-lora-ffba-ffba-mlp", "ablation", "trials")


def method_section() -> str:
    """The measured section of docs/method.md: accuracy beside latency, what FFBA's defaults bring, and what was tried before."""
    small, more, ablation, trials = (json.loads((ROOT / f"benchmarks/results/accuracy-{name}.json").read_text()) for name in ACCURACY)
    seeds = len(ablation["preset"]["sweep_seeds"])
    return "\n".join(
        [
            *small["table"],
            "",
            f"Mean and standard deviation over {len(small['preset']['seeds'])} seeds, {small['preset']['steps']} steps",
            "([accuracy-small.json](../benchmarks/results/accuracy-small.json)); merged, a LoRA or DoRA is the base's graph.",
            "Learning rates chosen from " + ", ".join(f"{rate:g}" for rate in small["preset"]["learning_rates"]) + ":",
            ", ".join(f"{method} {rate:g}" for method, rate in small["learning_rates"].items()) + ".",
            "",
            "![mean score against decode step](../benchmarks/results/accuracy-small.svg)",
            "",
            "The same with FFBA beside MLPs alone, which `make accuracy` leaves out to stay under its 45 minutes",
            f"([accuracy-{ACCURACY[1]}.json](../benchmarks/results/accuracy-{ACCURACY[1]}.json), by `--methods lora,ffba,ffba-mlp`):",
            "",
            *more["table"],
            "",
            "What FFBA's defaults bring, and FFBA's other forms: loss on validation in nats per answer token, at the best rate of",
            ", ".join(f"{rate:g}" for rate in ablation["preset"]["learning_rates"]) + f", {seeds} seed{'s' if seeds > 1 else ''}",
            "([accuracy-ablation.json](../benchmarks/results/accuracy-ablation.json)):",
            "",
            *ablation["table"],
            "",
            "What was tried before the scales were chosen: loss on validation, mean over three seeds, at the best rate of those tried",
            "([accuracy-trials.json](../benchmarks/results/accuracy-trials.json), which has more that was tried with one seed):",
            "",
            *loss_rows(mean_losses(trials["scales"], seeds=3), ("arithmetic", "lexical", "dialogue")),
            "",
            "What was tried before that, with other scales: loss on validation at rate 2e-3, one seed, by a script that was not kept",
            "(the same file): leads, not results.",
            "",
            *loss_rows(losses_at(trials["trials"], rate=2e-3, seed=0), ("arithmetic", "lexical")),
        ]
    )


Losses = dict[tuple[str, str], float]  # of a method on a task


def mean_losses(trials: list[dict[str, Any]], seeds: int) -> Losses:
    """The mean over the seeds, at the best of the rates that were tried with so many."""
    by_rate: dict[tuple[str, str, float], list[float]] = {}
    for trial in trials:
        by_rate.setdefault((trial["method"], trial["task"], trial["learning_rate"]), []).append(trial["validation_loss"])
    means: Losses = {}
    for (method, task, _), losses in by_rate.items():
        if len(losses) == seeds:
            means[method, task] = min(mean(losses), means.get((method, task), math.inf))
    return means


def losses_at(trials: list[dict[str, Any]], rate: float, seed: int) -> Losses:
    return {(t["method"], t["task"]): t["validation_loss"] for t in trials if (t["learning_rate"], t["seed"]) == (rate, seed)}


def loss_rows(losses: Losses, tasks: Sequence[str]) -> list[str]:
    """A method a row, if it was tried on every task."""
    lines = ["| tried | " + " | ".join(tasks) + " |", "| --- " * (len(tasks) + 1) + "|"]
    for method in dict.fromkeys(method for method, _ in losses):
        if all((method, task) in losses for task in tasks):
            lines.append(f"| {method} | " + " | ".join(f"{losses[method, task]:.3f}" for task in tasks) + " |")
    return lines


def accuracy_paragraph(accuracy: dict[str, Any]) -> list[str]:
    """What leads to the table of accuracy beside latency: how it was made, and whether FFBA wins."""
    methods, preset = accuracy["summary"]["methods"], accuracy["preset"]
    ours, lora = methods["ffba"], methods["lora"]
    versus = {task: (row["difference"], *row["interval"], row["p"]) for task, row in ours["against_lora"].items()}
    fused, unmerged = ours["tpot"]["fused"][0], lora["tpot"]["unmerged"][0]
    return [
        "**Accuracy beside latency** at one budget of trainable parameters",
        f"([accuracy-small.json](benchmarks/results/accuracy-small.json), {len(preset['seeds'])} seeds, mean and standard deviation;",
        "[how, and what it means](docs/method.md)). Each method has",
        f"{preset['steps']} steps on short generated tasks, so it tells how fast a method learns from few examples, not where it ends.",
        f"FFBA's mean is above LoRA's on {sum(row[0] > 0 for row in versus.values())} of {len(versus)} tasks;",
        f"differences with a p below {SIGNIFICANT}: {sum(row[3] < SIGNIFICANT for row in versus.values())} of {len(versus)}.",
        "All of them, with 95 % intervals over test examples and p of a paired permutation test:",
        "; ".join(f"{task} {diff:+.3f} ({low:+.3f} to {high:+.3f}, p {p:.2g})" for task, (diff, low, high, p) in versus.items()) + ".",
        f"Its fused decode step takes {1 - fused / unmerged:.1%} less time than that of an unmerged LoRA of this budget;",
        f"the base's own, without any adapter, {1 - 1 / unmerged:.1%} less.",
    ]
