"""What the README and docs/method.md say of accuracy, from the files accuracy-*.json and frontier-*.json under benchmarks/results/."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parent / "results"
SIGNIFICANT = 0.05
BEST = "best of each"  # the contrast
ACCURACY = ("small", "small-base-lora-ffba-ffba-mlp", "ablation", "trials")


def method_section() -> str:
    """The measured section of docs/method.md: accuracy beside latency, what FFBA's defaults bring, and what was tried before."""
    small, more, ablation, trials = (json.loads((RESULTS / f"accuracy-{name}.json").read_text()) for name in ACCURACY)
    seeds = len(ablation["preset"]["sweep_seeds"])
    return "\n".join(
        [
            *small["table"],
            "",
            f"Mean and standard deviation over {len(small['preset']['seeds'])} seeds, {small['preset']['steps']} steps",
            "([accuracy-small.json](../benchmarks/results/accuracy-small.json)); merged, a LoRA or DoRA is the base's graph.",
            *against_lora(small),
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


def against_lora(accuracy: dict[str, Any]) -> list[str]:
    """Whether FFBA wins at one budget."""
    methods = accuracy["summary"]["methods"]
    ours, lora = methods["ffba"], methods["lora"]
    versus = ours["against_lora"]
    fused, unmerged = ours["tpot"]["fused"][0], lora["tpot"]["unmerged"][0]
    return [
        f"FFBA's mean is above LoRA's on {sum(row['difference'] > 0 for row in versus.values())} of {len(versus)} tasks;",
        f"differences with a p below {SIGNIFICANT}: {sum(row['p'] < SIGNIFICANT for row in versus.values())} of {len(versus)}.",
        "All of them, with 95 % intervals over test examples and p of a paired permutation test:",
        _by_task(versus),
        f"Its fused decode step takes {1 - fused / unmerged:.1%} less time than that of an unmerged LoRA of this budget;",
        f"the base's own, without any adapter, {1 - 1 / unmerged:.1%} less.",
    ]


def _by_task(versus: dict[str, dict[str, Any]]) -> str:
    """Each task's difference, with its interval and p."""
    intervals = {task: "{:+.3f} to {:+.3f}".format(*row["interval"]) for task, row in versus.items()}
    return "; ".join(f"{task} {row['difference']:+.3f} ({intervals[task]}, p {row['p']:.2g})" for task, row in versus.items()) + "."


def _frontier(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"frontier-{name}.json").read_text())
    return result


def frontier_section() -> str:
    """The measured section of docs/frontier.md: the table, the plot, the contrasts, and what was chosen for each arm."""
    result, tuning, confirmed, longer, placement = map(_frontier, ("small", "small-tuning", "confirm", "longer", "placement"))
    preset, summary = result["preset"], result["summary"]
    listed, cells = preset["rates"], [(name, task, rate) for name, tasks in tuning["chosen"].items() for task, (rate, _) in tasks.items()]
    tried = defaultdict(set)
    for fit in (each["fit"] for each in tuning["tried"]):
        tried[f"{fit['method']} {fit['rank']}", fit["task"]].add(fit["learning_rate"])
    ends = sum(rate in (min(tried[name, task]), max(tried[name, task])) for name, task, rate in cells)
    at_ends = f"in none of {len(cells)} cells is the best rate an end of what was tried"
    if ends:
        at_ends = f"in {ends} of {len(cells)} cells the best rate is an end of what was tried, so that one beyond it may be better still"
    factors = [factor for tasks in tuning["chosen"].values() for _, factor in tasks.values()]
    of_factors = sum(factor in (min(preset["scales"]), max(preset["scales"])) for factor in factors)
    beyond = ", and beyond them while that was better" if set().union(*tried.values()) - set(listed) else ""
    chosen = ["| adapter | " + " | ".join(preset["test"]) + " |", "| --- " * (len(preset["test"]) + 1) + "|"]
    for name, tasks in tuning["chosen"].items():
        row = [f"{rate:g}, {scale:g}" for rate, scale in tasks.values()]
        chosen.append(f"| {summary['arms'][name]['label']} | " + " | ".join(row) + " |")
    lines = [
        *result["table"],
        "",
        f"Mean and standard deviation over {len(preset['seeds'])} seeds, {preset['steps']} steps; costs are ratios to the base, medians",
        f"({result['environment']['cores']} cores; [frontier-small.json](../benchmarks/results/frontier-small.json)).",
        "",
        "![mean score against decode step](../benchmarks/results/frontier-small.svg)",
        "",
        f"**{summary['advice']}**",
        "",
        *(f"- {what[0].upper()}{what[1:]}: {found['said']}." for what, found in summary["contrasts"].items()),
        "",
        f"Learning rate and factor on alpha that validation chose (rates {', '.join(f'{rate:g}' for rate in listed)}{beyond};",
        f"{at_ends};",
        f"then factors {', '.join(f'{factor:g}' for factor in preset['scales'])} beside 1:",
        f"the best is the lowest or the highest of them in {of_factors} of {len(factors)} cells;",
        "[frontier-small-tuning.json](../benchmarks/results/frontier-small-tuning.json)):",
        "",
        *chosen,
    ]
    lines += [
        "",
        f"{_again(confirmed)} {sum(preset['test'].values())} of these examples are those of the table above",
        "([frontier-confirm.json](../benchmarks/results/frontier-confirm.json), tuned in the same way:",
        "[frontier-confirm-tuning.json](../benchmarks/results/frontier-confirm-tuning.json)).",
        f"By task: {_by_task(confirmed['summary']['contrasts'][BEST]['tasks'])}",
        "",
        *confirmed["table"],
        "",
        f"**{confirmed['summary']['advice']}**",
        "",
        _longer(longer, confirmed),
        "([frontier-longer.json](../benchmarks/results/frontier-longer.json),",
        "[frontier-longer-tuning.json](../benchmarks/results/frontier-longer-tuning.json)).",
        f"By task: {_by_task(longer['summary']['contrasts'][BEST]['tasks'])}",
        "",
        *longer["table"],
        "",
        f"Branches in other places: loss on validation, {len(placement['preset']['seeds'])} seeds",
        "([frontier-placement.json](../benchmarks/results/frontier-placement.json)):",
        "",
        *placement["table"],
    ]
    return "\n".join(lines)


def _again(confirmed: dict[str, Any]) -> str:
    """What came of the best FFBA and two LoRAs with seeds that had chosen nothing."""
    preset = confirmed["preset"]
    examples = sum(preset["test"].values())
    said = confirmed["summary"]["contrasts"][BEST]["said"]
    return f"That FFBA again, beside LoRAs up to its size, with {len(preset['seeds'])} other seeds and {examples:,} test examples: {said}."


def _longer(longer: dict[str, Any], confirmed: dict[str, Any]) -> str:
    """What came of the same two after more steps."""
    steps, before, seeds = longer["preset"]["steps"], confirmed["preset"]["steps"], len(longer["preset"]["seeds"])
    said = longer["summary"]["contrasts"][BEST]["said"]
    how = f"their rates chosen for that, {seeds} of these seeds, the same examples"
    return f"Those two after {steps} steps instead of {before}, {how}: {said}."


def frontier_paragraph() -> list[str]:
    """What the README says of accuracy, with its test."""
    result, confirmed, longer = map(_frontier, ("small", "confirm", "longer"))
    preset, found = result["preset"], result["summary"]["contrasts"]
    return [
        f"**Accuracy against latency**, {len(preset['arms'])} adapters, each tuned by itself on validation, {len(preset['seeds'])} seeds,",
        f"{preset['steps']} steps ([docs/frontier.md](docs/frontier.md): table, plot, how):",
        "",
        *(f"- {what[0].upper()}{what[1:]}: {each['said']}." for what, each in found.items()),
        f"- {_again(confirmed)}",
        f"- {_longer(longer, confirmed)}",
        f"- {confirmed['summary']['advice']}",
    ]


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
