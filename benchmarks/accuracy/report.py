"""The table and the plot: accuracy and latency of every method, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.analysis import paired, pareto, score_matrix, summary
from benchmarks.accuracy.experiment import best_rates, validation_losses
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.tasks import TASKS

RIVAL = "lora"


def summarise(result: Mapping[str, Any]) -> dict[str, Any]:
    """For each method: its score on each task, beside LoRA's on the same examples, and its decode step as a ratio to the base's."""
    methods = {}
    for method in result["preset"]["methods"]:
        scores = {task: _scores(result, method, task) for task in TASKS}
        rows = {task: summary(matrix) for task, matrix in scores.items()}
        entry: dict[str, Any] = {
            "label": METHODS[method].label,
            "trainable": result["trainable"].get(method),
            "tasks": rows,
            "mean": round(float(np.mean([row["mean"] for row in rows.values()])), 4),
            "tpot": _tpot(result, method),
        }
        if RIVAL in result["preset"]["methods"] and METHODS[method].trains and method != RIVAL:
            entry["against_lora"] = {task: paired(scores[task], _scores(result, RIVAL, task)) for task in TASKS}
        methods[method] = entry
    return {"methods": methods, "pareto": pareto(_points(methods))}


def _scores(result: Mapping[str, Any], method: str, task: str) -> Any:
    return score_matrix([run for run in result["runs"] if (run["fit"]["method"], run["fit"]["task"]) == (method, task)])


def _tpot(result: Mapping[str, Any], method: str) -> dict[str, list[float]]:
    """Deployment -> [ratio to the base's decode step, low, high of its 95 % interval]. Merged is the base's graph, so its ratio is 1."""
    deployments: dict[str, list[float]] = {}
    arm = METHODS[method].unmerged
    measured = result["latency"].get(method) or next(iter(result["latency"].values()), None)
    if arm and measured is not None:
        row = next(m for m in measured["measurements"] if (m["metric"], m["arm"]) == ("tpot", arm))
        deployments["fused" if METHODS[method].fuses else "unmerged"] = [row["ratio_to_base"], *row["ratio_interval"]]
    if METHODS[method].merges:
        deployments["merged" if METHODS[method].config else "alone"] = [1.0, 1.0, 1.0]
    return deployments


def _points(methods: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Method and deployment -> (ratio of the decode step, mean score)."""
    return {f"{entry['label']}, {how}": (ratio[0], entry["mean"]) for entry in methods.values() for how, ratio in entry["tpot"].items()}


def markdown(summary: Mapping[str, Any]) -> str:
    """A method a row: its scores, mean and standard deviation over seeds, and what a decode step costs."""
    names = [f"{task.family} ({task.metric})" for task in TASKS.values()]
    lines = [
        "| method | trainable | " + " | ".join(names) + " | mean | decode step on the CPU, ratio to base |",
        "| --- " * (len(names) + 4) + "|",
    ]
    for entry in summary["methods"].values():
        cells = [entry["label"], f"{entry['trainable'] / 1e6:.2f} M" if entry["trainable"] else "-"]
        for row in entry["tasks"].values():
            spread = f" ± {row['sd_over_seeds']:.3f}" if row["sd_over_seeds"] is not None else ""
            cells.append(f"{row['mean']:.3f}{spread}")
        cells.append(f"{entry['mean']:.3f}")
        cells.append(", ".join(f"{how} {ratio[0]:.3f}" for how, ratio in entry["tpot"].items()) or "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sweep_table(result: Mapping[str, Any]) -> str:
    """A method a row: the loss on validation at the best rate of each task; with several seeds their mean, and the farthest from it."""
    losses, rates = validation_losses(result["sweep"]), best_rates(result["sweep"])
    lines = ["| method | " + " | ".join(TASKS) + " |", "| --- " * (len(TASKS) + 1) + "|"]
    for method in result["preset"]["methods"]:
        cells = []
        for task in TASKS:
            rate = rates[(method, task)]
            found = losses[(method, task)][rate]
            mean = float(np.mean(found))
            spread = f" ± {max(abs(loss - mean) for loss in found):.3f}" if len(found) > 1 else ""
            cells.append(f"{mean:.3f}{spread} (rate {rate:g})")
        lines.append(f"| {METHODS[method].label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """Mean score against the ratio of the decode step, with the Pareto front, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    points = _points(summary["methods"])
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for name, (cost, score) in points.items():
        ours = name.startswith("FFBA")
        axes.plot(cost, score, "o" if ours else "s", color="tab:green" if ours else "tab:gray")
        axes.annotate(name, (cost, score), textcoords="offset points", xytext=(6, 4), fontsize=8)
    front = [points[name] for name in summary["pareto"]]
    axes.plot(*zip(*front, strict=True), drawstyle="steps-post", color="tab:green", linewidth=1, alpha=0.6, label="Pareto front")
    axes.set_xlabel("decode step (TPOT) in ONNX Runtime on the CPU, ratio to the base model's")
    axes.set_ylabel("mean score of the three tasks, on test examples")
    axes.margins(x=0.3, y=0.15)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
