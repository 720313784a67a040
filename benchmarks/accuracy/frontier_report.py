"""The frontier's table, plot and advice, from its runs and latencies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.accuracy.analysis import Scores, contrast, pareto, score_matrix, summary
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.runs import loss
from benchmarks.accuracy.tasks import TASKS

METRICS = {"tpot": "decode step", "ttft": "prefill"}
LABELS = {"ffba": "FFBA", "ffba-mlp": "FFBA beside MLPs alone", "lora": "LoRA on all projections"}
COLOURS = {"ffba": "tab:green", "ffba-mlp": "tab:olive", "lora": "tab:gray"}
SIGNIFICANT = 0.05
MARGIN = 0.02  # of a mean score of 0 to 1: a loss that the advice takes for nothing


def summarise(result: Mapping[str, Any]) -> dict[str, Any]:
    """Every arm's scores and costs; one FFBA against one LoRA, chosen by validation, anywhere and at LoRA's least latency; the advice."""
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for record in result["runs"]:
        runs.setdefault(_name(record), []).append(record)
    base = runs.pop("base 0")
    arms = {name: _arm(name, records, result["latency"]) for name, records in runs.items()}
    scores = {name: _scores(records) for name, records in runs.items()}
    return {
        "base": {record["fit"]["task"]: round(float(np.mean(record["scores"])), 4) for record in base},
        "arms": arms,
        "contrasts": _contrasts(arms, scores),
        "pareto": pareto({name: (arm["cost"]["fp32"]["tpot"][0], arm["mean"]) for name, arm in arms.items()}),
        "advice": advice(arms, scores),
    }


def _name(record: Mapping[str, Any]) -> str:
    return f"{record['fit']['method']} {record['fit']['rank']}"


def _scores(records: Sequence[Mapping[str, Any]]) -> list[Scores]:
    """A matrix [seeds, examples] for each task."""
    return [score_matrix([record for record in records if record["fit"]["task"] == task]) for task in TASKS]


def _arm(name: str, records: Sequence[Mapping[str, Any]], latency: Mapping[str, Any]) -> dict[str, Any]:
    method, _, rank = name.partition(" ")
    tasks = dict(zip(TASKS, map(summary, _scores(records)), strict=True))
    losses = [float(np.mean([loss(r) for r in records if r["fit"]["task"] == task])) for task in TASKS]
    cost = {
        precision: {
            metric: next([row["ratio_to_base"], *row["ratio_interval"]] for row in rows if (row["metric"], row["arm"]) == (metric, name))
            for metric in METRICS
        }
        for precision, rows in latency.items()
    }
    return {
        "label": f"{LABELS[method]}, r = {rank}",
        "method": method,
        "trainable": records[0]["trainable"],
        "tasks": tasks,
        "mean": round(float(np.mean([task["mean"] for task in tasks.values()])), 4),
        "sd_over_seeds": round(float(np.std(np.mean([task["seeds"] for task in tasks.values()], axis=0), ddof=1)), 4),
        "validation": round(geometric_mean(losses), 4),  # of the tasks' losses, so that none weighs more for its size
        "cost": cost,
    }


def _contrasts(arms: Mapping[str, Any], scores: Mapping[str, list[Scores]]) -> dict[str, Any]:
    """Chosen by validation alone, so that the test examples decide nothing but the outcome."""
    ffba, lora = ([name for name, arm in arms.items() if (arm["method"] == "lora") == other] for other in (False, True))
    cheapest = min(lora, key=lambda name: _decode(arms[name]))
    level = [name for name in ffba if _decode(arms[name]) <= _decode(arms[cheapest])] or [min(ffba, key=lambda name: _decode(arms[name]))]
    pairs = {"best of each": (_best(arms, ffba), _best(arms, lora)), "at the least latency of a LoRA": (_best(arms, level), cheapest)}
    found = {}
    for what, (ours, theirs) in pairs.items():
        tasks = {task: contrast([a], [b]) for task, a, b in zip(TASKS, scores[ours], scores[theirs], strict=True)}
        found[what] = {"ours": ours, "theirs": theirs, **contrast(scores[ours], scores[theirs]), "tasks": tasks}
        found[what]["said"] = sentence(found[what], arms)
    return found


def _decode(arm: Mapping[str, Any]) -> float:
    return float(arm["cost"]["fp32"]["tpot"][0])


def _best(arms: Mapping[str, Any], names: Sequence[str]) -> str:
    return min(names, key=lambda name: arms[name]["validation"])


def advice(arms: Mapping[str, Any], scores: Mapping[str, list[Scores]]) -> str:
    """What to take: the arm with the cheapest decode step of those measured to score no more than MARGIN below the best on validation.

    That nothing was seen is not enough: an arm whose interval reaches further down is named, with how far, but not recommended.
    """
    best = _best(arms, list(arms))
    by_cost = sorted(arms, key=lambda name: _decode(arms[name]))
    found = {name: contrast(scores[name], scores[best]) for name in by_cost}
    take = next(name for name in by_cost if name == best or found[name]["interval"][0] > -MARGIN)  # type: ignore[index]
    fp32, int4 = (_interval(arms[take]["cost"][precision]["tpot"]) for precision in ("fp32", "int4"))
    text = [
        f"To switch adapters at run time, take {arms[take]['label']}: a decode step of {fp32} times the base's in fp32, {int4} in int4, "
        f"and a mean score of {arms[take]['mean']:.3f}, "
        + ("the best on validation." if take == best else f"{_apart(found[take])} from {arms[best]['label']}, the best on validation.")
    ]
    if cheaper := by_cost[: by_cost.index(take)]:
        each = [f"{arms[name]['label']} at {_decode(arms[name]):.3f}, {_apart(found[name])}" for name in cheaper]
        text.append(f"Cheaper, but not shown to score within {MARGIN} of the best: {'; '.join(each)}.")
    merged = _best(arms, [name for name, arm in arms.items() if arm["method"] == "lora"])
    text.append(f"For one task alone, a LoRA that is merged costs nothing: {arms[merged]['label']} has {arms[merged]['mean']:.3f}.")
    return " ".join(text)


def _apart(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['difference']:+.3f} (95 % {low:+.3f} to {high:+.3f})"


def _interval(ratio: Sequence[float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*ratio)


def markdown(summary: Mapping[str, Any]) -> list[str]:
    """An arm a row: its scores, mean and standard deviation over seeds; what it costs, as ratios to the base with 95 % intervals."""
    costs = [f"{what}, {precision}" for precision in ("fp32", "int4") for what in METRICS.values()]
    heads = ["adapter", "trainable", *(f"{task.name} ({task.metric})" for task in TASKS.values()), "mean", *costs]
    rows = [["base model", "-", *(f"{score:.3f}" for score in summary["base"].values())]]
    rows[0] += [f"{float(np.mean(list(summary['base'].values()))):.3f}", *("1" for _ in costs)]
    for arm in summary["arms"].values():
        cells = [arm["label"], f"{arm['trainable'] / 1e6:.2f} M"]
        for task in arm["tasks"].values():
            cells.append(f"{task['mean']:.3f}" + (f" ± {task['sd_over_seeds']:.3f}" if task["sd_over_seeds"] is not None else ""))
        cells.append(f"{arm['mean']:.3f}")
        cells += [_interval(ratios[metric]) for ratios in arm["cost"].values() for metric in METRICS]
        rows.append(cells)
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]


def validation_table(runs: Sequence[Mapping[str, Any]], rival: str) -> list[str]:
    """An arm a row: its loss on validation, mean and standard deviation over seeds; all tasks together as a ratio to the rival's.

    The ratio is the geometric mean over tasks and seeds. Its interval and p are those of Student's t for its logarithm, a value for each
    seed: of other seeds they tell, not of other examples.
    """
    losses: dict[str, dict[str, dict[int, float]]] = {}
    for run in runs:
        losses.setdefault(_name(run), {}).setdefault(run["fit"]["task"], {})[run["fit"]["seed"]] = run["validation_loss"]
    lines = [f"| adapter | trainable | {' | '.join(TASKS)} | all, ratio to the first |", "| --- " * (len(TASKS) + 3) + "|"]
    trainable = {_name(run): run["trainable"] for run in runs}
    for name, tasks in losses.items():
        method, _, rank = name.partition(" ")
        cells = [f"{METHODS[method].label}, r = {rank}", f"{trainable[name] / 1e6:.2f} M"]
        cells += [f"{np.mean(list(seeds.values())):.3f} ± {np.std(list(seeds.values()), ddof=1):.3f}" for seeds in tasks.values()]
        logs = [
            np.mean([np.log(seeds[seed] / losses[rival][task][seed]) for task, seeds in tasks.items()]) for seed in losses[rival]["lexical"]
        ]
        test = "" if name == rival else _against_one(stats.ttest_1samp(logs, 0.0))
        lines.append(f"| {' | '.join(cells)} | {np.exp(np.mean(logs)):.3f}{test} |")
    return lines


def _against_one(test: Any) -> str:
    """What a t-test of a ratio's logarithm says of the ratio."""
    low, high = np.exp(test.confidence_interval())
    return f" (95 % {low:.3f} to {high:.3f}, p = {test.pvalue:.2g})"


def sentence(found: Mapping[str, Any], arms: Mapping[str, Any]) -> str:
    """One contrast, with what its test could have seen."""
    low, high = found["interval"]
    ours, theirs = (f"{arms[found[side]]['label']} ({arms[found[side]]['trainable'] / 1e6:.1f} M)" for side in ("ours", "theirs"))
    seen = "a difference" if found["p"] < SIGNIFICANT else "no difference that this test can see"
    tasks = ", ".join(f"{task} {each['difference']:+.3f}" for task, each in found["tasks"].items())
    return (
        f"{ours}, against {theirs}: {found['difference']:+.3f} in the mean score of these tasks ({tasks}), {seen} "
        f"(95 % interval {low:+.3f} to {high:+.3f}, p = {found['p']:.2g}; power: it finds a true difference of {found['detectable']:.3f} "
        "about 80 times in 100)"
    )


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """Mean score against the ratio of the decode step, a panel for each precision, ranks of one method joined; as SVG.

    Bars are the interval of the ratio and the standard deviation over seeds.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "frontier"
    import matplotlib.pyplot as plt

    arms = summary["arms"]
    precisions = list(next(iter(arms.values()))["cost"])
    figure, panels = plt.subplots(1, len(precisions), figsize=(6 * len(precisions), 4.5), sharey=True, layout="constrained", squeeze=False)
    for axes, precision in zip(panels[0], precisions, strict=True):
        for method in dict.fromkeys(arm["method"] for arm in arms.values()):
            of = {name: arm for name, arm in arms.items() if arm["method"] == method}
            costs, means = [arm["cost"][precision]["tpot"] for arm in of.values()], [arm["mean"] for arm in of.values()]
            ratios = [ratio for ratio, _, _ in costs]
            spread = [[ratio - low for ratio, low, _ in costs], [high - ratio for ratio, _, high in costs]]
            seeds = [arm["sd_over_seeds"] for arm in of.values()]
            label = f"{LABELS[method]}, {'unmerged' if METHODS[method].merges else 'fused'}"
            axes.errorbar(ratios, means, seeds, spread, "o-", color=COLOURS[method], label=label, linewidth=1, elinewidth=0.5)
            for name, ratio, mean in zip(of, ratios, means, strict=True):
                axes.annotate(f"r={name.partition(' ')[2]}", (ratio, mean), textcoords="offset points", xytext=(5, 4), fontsize=8)
            if METHODS[method].merges:
                axes.plot([1.0] * len(means), means, "x", color=COLOURS[method], label=f"{LABELS[method]}, merged: one task")
        axes.set_title(precision)
        axes.set_xlabel("decode step, ratio to the base model's")
    panels[0][0].set_ylabel("mean score of the three tasks, on test examples")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
