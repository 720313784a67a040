"""The comparison: a learning rate for each method and task from the sweep, then every seed, then latency."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.accuracy.latency import latency
from benchmarks.accuracy.methods import METHODS, budget_of, fitted
from benchmarks.accuracy.presets import Preset
from benchmarks.accuracy.runs import Run, loss, run_all
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.training import Fit


def experiment(preset: Preset, methods: Sequence[str], base: Path, work: Path) -> dict[str, Any]:
    """Train and judge; what is in `work` from an earlier call is not done again."""
    budget = budget_of(base, preset.rank)
    cells = [(method, task) for method in methods for task in TASKS]
    trained = [cell for cell in cells if METHODS[cell[0]].trains]

    def fit(method: str, task: str, rate: float, seed: int) -> Fit:
        return Fit(method, task, rate, seed, preset.steps, preset.batch[task], budget)

    sweep = run_all(
        [
            Run(fit(*cell, rate, seed), validation=preset.validation[cell[1]])
            for seed in preset.sweep_seeds
            for cell in trained
            for rate in preset.learning_rates
        ],
        base,
        work,
        preset.workers,
        preset.threads,
    )
    rates = best_rates(sweep)
    result = {
        "preset": asdict(preset) | {"methods": list(methods)},
        "budget": budget,
        "trainable": {record["fit"]["method"]: record["trainable"] for record in sweep},
        "sweep": sweep,
        "learning_rates": {f"{method} {task}": rate * METHODS[method].rate for (method, task), rate in rates.items()},
    }
    if not preset.test:
        return result
    finals = [
        Run(fit(*cell, rates.get(cell, 0.0), seed), preset.validation[cell[1]], preset.test[cell[1]])
        for cell in cells
        for seed in (preset.seeds if cell in rates else preset.seeds[:1])  # the base is the same for every seed
    ]
    runs = run_all(finals, base, work, preset.workers, preset.threads)
    fused = {method: fitted(METHODS[method], base, budget)[0] for method in methods if METHODS[method].fuses}
    threads = min(os.cpu_count() or 1, preset.workers * preset.threads)
    return result | {"runs": runs, "latency": latency(fused, base, work, preset.rounds, threads)}


def best_rates(sweep: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """The learning rate of each method and task with the lowest loss on validation, the mean over the sweep's seeds."""
    rates: dict[tuple[str, str], float] = {}
    for cell, losses in validation_losses(sweep).items():
        rates[cell] = min(losses, key=lambda rate: fmean(losses[rate]))
    return rates


def validation_losses(sweep: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[float, list[float]]]:
    """(method, task) -> learning rate -> the loss on validation for each seed."""
    losses: dict[tuple[str, str], dict[float, list[float]]] = {}
    for record in sweep:
        fit = record["fit"]
        losses.setdefault((fit["method"], fit["task"]), {}).setdefault(fit["learning_rate"], []).append(loss(record))
    return losses
