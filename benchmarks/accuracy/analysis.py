"""From scores to a table: means and spreads over seeds, and paired tests on the same test examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Scores = npt.NDArray[np.float64]  # [seeds, examples]
RESAMPLES = 9999


def summary(scores: Scores) -> dict[str, Any]:
    """Mean over all; the mean of each seed, and their standard deviation where there are several."""
    seeds = scores.mean(axis=1)
    return {
        "mean": round(float(seeds.mean()), 4),
        "seeds": [round(float(seed), 4) for seed in seeds],
        "sd_over_seeds": round(float(seeds.std(ddof=1)), 4) if len(seeds) > 1 else None,
    }


def paired(ours: Scores, theirs: Scores) -> dict[str, float | list[float]]:
    """Ours minus theirs, example by example, each the mean over its seeds.

    Returns the mean difference, its 95 % interval (bootstrap over examples) and the two-sided p of a paired permutation test. They tell
    of other test examples, not of other seeds: the spread over seeds stands beside them.
    """
    difference = ours.mean(axis=0) - theirs.mean(axis=0)
    result: dict[str, float | list[float]] = {"difference": round(float(difference.mean()), 4)}
    if not difference.any():
        return result | {"interval": [0.0, 0.0], "p": 1.0}
    rng = np.random.default_rng(0)
    interval = stats.bootstrap((difference,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=rng).confidence_interval
    test = stats.permutation_test((difference,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=rng)
    return result | {"interval": [round(float(interval.low), 4), round(float(interval.high), 4)], "p": round(float(test.pvalue), 4)}


def contrast(ours: Sequence[Scores], theirs: Sequence[Scores]) -> dict[str, float | list[float]]:
    """Ours minus theirs, the mean over tasks; a matrix for each, with the same seeds and examples on both sides.

    Seeds and examples are both drawn at random, so the variance of a mean difference is (MS_seeds + MS_examples - MS_rest) / (S E), of
    a two-way layout without replication, with neither of the first two taken as less than MS_rest, for few seeds may look more alike than
    they are; degrees of freedom after Satterthwaite (1946). Returns the difference, its 95 % interval and two-sided p by Student's t, and
    the smallest true difference that such a test finds about 80 times in 100, by the same estimate of the variance.
    """
    parts = [_variance(a - b) for a, b in zip(ours, theirs, strict=True)]
    tasks = len(parts)
    difference = float(np.mean([a.mean() - b.mean() for a, b in zip(ours, theirs, strict=True)]))
    variance = sum(value for value, _ in parts) / tasks**2
    if variance == 0:
        return {"difference": round(difference, 4), "interval": [round(difference, 4)] * 2, "p": float(difference == 0), "detectable": 0.0}
    freedom = variance**2 / sum((value / tasks**2) ** 2 / free for value, free in parts if value)
    error = variance**0.5
    reach = float(stats.t.ppf(0.975, freedom))
    return {
        "difference": round(difference, 4),
        "interval": [round(difference - reach * error, 4), round(difference + reach * error, 4)],
        "p": round(float(2 * stats.t.sf(abs(difference) / error, freedom)), 4),
        "detectable": round((reach + float(stats.t.ppf(0.8, freedom))) * error, 4),
    }


def _variance(difference: Scores) -> tuple[float, float]:
    """The variance of a difference's mean over seeds and examples, both random, and its degrees of freedom."""
    seeds, examples = difference.shape
    crossed = max((seeds - 1) * (examples - 1), 1)
    rows, columns = difference.mean(axis=1), difference.mean(axis=0)
    rest = float(((difference - rows[:, None] - columns + difference.mean()) ** 2).sum()) / crossed
    of_seeds = max(examples * float(rows.var(ddof=1)), rest) if seeds > 1 else 0.0
    of_examples = max(seeds * float(columns.var(ddof=1)), rest)
    total = of_seeds + of_examples - rest
    if total == 0:
        return 0.0, 1.0
    spread = of_seeds**2 / max(seeds - 1, 1) + of_examples**2 / (examples - 1) + rest**2 / crossed
    return total / (seeds * examples), total**2 / spread


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points (cost, value) that no other point beats on one side without losing on the other, cheapest first."""
    front: list[str] = []
    for name, (_, value) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not front or value > points[front[-1]][1]:
            front.append(name)
    return front


def score_matrix(records: Sequence[Mapping[str, Any]]) -> Scores:
    """The scores of the runs of one method and task, a seed a row."""
    return np.array([record["scores"] for record in sorted(records, key=lambda record: record["fit"]["seed"])], dtype=np.float64)
