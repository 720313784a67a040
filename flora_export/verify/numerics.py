"""Numeric parity of an artifact with eager PyTorch, on what matters: the base model alone, and the adapter's own effect.

The effect is logits(adapter) - logits(base). An artifact that has lost its adapter is close to eager in its logits, since the adapter
changes little; its effect is zero, and that is noticed. The artifact's base model is the artifact itself with each B silenced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]

STEPS = 16  # cached decode steps per prompt


class Truth(Protocol):
    """Eager PyTorch."""

    def logits(self, tokens: list[int], *, adapter: bool = True) -> Logits: ...
    def greedy(self, prompt: list[int], steps: int) -> list[int]: ...


class Runner(Protocol):
    """An artifact in its runtime."""

    def start(self, prompts: list[list[int]]) -> list[Logits]: ...
    def step(self, tokens: list[int]) -> Logits: ...


@dataclass(frozen=True)
class Tolerance:
    """What is allowed.

    `logits`: the largest error, relative to the largest logit or to 1. `effect`: the relative error of the adapter's effect,
    ||Δ - Δ'|| / ||Δ||.
    """

    logits: float
    effect: float


# fp32: rounding of another summation order, measured at 1e-6 to 1e-5. fp16 has 11 bits and bf16 8, through every layer; the effect is a
# difference of two such runs. None allows an adapter that is wrong by 5 %.
TOLERANCES = {"fp32": Tolerance(1e-4, 0.01), "fp16": Tolerance(1e-2, 0.03), "bf16": Tolerance(5e-2, 0.045)}


@dataclass(frozen=True)
class Case:
    """What one run of one prompt showed. Errors are the largest over all positions and the vocabulary."""

    name: str
    prompt_tokens: int
    base_error: float
    logits_error: float
    largest_logit: float
    largest_effect: float  # max |Δ| of eager
    effect_error: float  # ||Δ artifact - Δ eager|| / ||Δ eager||
    effect_scale: float  # the factor that best maps eager's effect onto the artifact's
    first_divergent_token: int | None  # of the greedy continuation, where it is no tie


@dataclass
class Numerics:
    """The verdict on numerics: `causes` is empty where the artifact passes."""

    precision: str
    tolerance: Tolerance
    prompts: str
    steps: int
    cases: list[Case] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)


def compare(
    truth: Truth,
    with_adapter: Runner,
    without_adapter: Runner,
    prompts: list[list[int]],
    *,
    precision: str,
    source: str,
    allow_vacuous: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Numerics:
    """Run each prompt alone, and the first two as a ragged batch, through prefill and cached steps, and judge."""
    result = Numerics(precision, TOLERANCES[precision], source, STEPS)
    expected = []
    for index, prompt in enumerate(prompts):
        tokens = truth.greedy(prompt, STEPS)
        sequence = prompt + tokens
        expected.append((tokens, truth.logits(sequence), truth.logits(sequence, adapter=False)))
        if progress is not None:
            progress(index + 1, 2 * len(prompts) + 1)
    runs = [(f"prompt {index}", [index]) for index in range(len(prompts))] + [("ragged batch", [0, 1])]
    for index, (name, rows) in enumerate(runs):
        forced = [expected[row][0] for row in rows]
        got = run_forced(with_adapter, [prompts[row] for row in rows], forced)
        got_base = run_forced(without_adapter, [prompts[row] for row in rows], forced)
        for position, row in enumerate(rows):
            label = name if len(rows) == 1 else f"{name}, row {position}"
            _, adapted, base = expected[row]
            result.cases.append(_measure(label, len(prompts[row]), adapted, base, got[position], got_base[position]))
        if progress is not None:
            progress(len(prompts) + index + 1, 2 * len(prompts) + 1)
    result.causes = judge(result, allow_vacuous=allow_vacuous)
    return result


def run_forced(runner: Runner, prompts: list[list[int]], forced: list[list[int]]) -> list[Logits]:
    """Logits [prompt + steps, vocabulary] of each row, when each step is fed the given token.

    Fed with eager's greedy tokens, a runner that prefers the same token at every place decodes the same text by itself.
    """
    rows = [[row] for row in runner.start(prompts)]
    for step in range(len(forced[0])):
        logits = runner.step([tokens[step] for tokens in forced])
        for row, values in zip(rows, logits, strict=True):
            row.append(values[None])
    return [np.concatenate(row) for row in rows]


def _measure(name: str, prompt_tokens: int, adapted: Logits, base: Logits, got: Logits, got_base: Logits) -> Case:
    """All arrays [positions, vocabulary]."""
    effect, got_effect = (adapted - base).astype(np.float64), (got - got_base).astype(np.float64)
    norm = float(np.linalg.norm(effect))
    error = float(np.linalg.norm(got_effect - effect))
    return Case(
        name=name,
        prompt_tokens=prompt_tokens,
        base_error=float(np.abs(got_base - base).max()),
        logits_error=float(np.abs(got - adapted).max()),
        largest_logit=float(np.abs(adapted).max()),
        largest_effect=float(np.abs(effect).max()),
        effect_error=error / norm if norm else float("inf") if error else 0.0,
        effect_scale=float((got_effect * effect).sum() / norm**2) if norm else 0.0,
        first_divergent_token=_first_divergence(adapted[prompt_tokens - 1 :], got[prompt_tokens - 1 :]),
    )


def _first_divergence(adapted: Logits, got: Logits) -> int | None:
    """The first place where the two prefer other tokens, and eager's preference is larger than twice the error there: else it is a tie."""
    for step, (expected, actual) in enumerate(zip(adapted, got, strict=True)):
        best, other = int(expected.argmax()), int(actual.argmax())
        if best != other and expected[best] - expected[other] > 2 * np.abs(expected - actual).max():
            return step
    return None


def judge(result: Numerics, *, allow_vacuous: bool) -> list[str]:
    """Name each cause of failure once, the deepest first: a wrong base model, then a missing adapter, then a wrong one."""
    causes = []
    tolerance = result.tolerance

    def limit(case: Case) -> float:
        return tolerance.logits * max(1.0, case.largest_logit)

    worst = max(result.cases, key=lambda case: _nan_last(case.base_error / limit(case)))
    if not worst.base_error <= limit(worst):
        causes.append(
            f"wrong base: without the adapter, logits are off by {worst.base_error:.3g} in {worst.name} (allowed {limit(worst):.3g}). "
            "The captured base model itself is wrong, or its weights are damaged."
        )
        return causes
    largest_effect = max(case.largest_effect for case in result.cases)
    if largest_effect <= min(limit(case) for case in result.cases) and not allow_vacuous:
        causes.append(
            f"vacuous: the adapter's own effect on the logits ({largest_effect:.3g}) is within the tolerance, so nothing is proved. "
            "Is it trained? Pass --allow-vacuous to accept it."
        )
        return causes
    if largest_effect > 0:
        worst = max(result.cases, key=lambda case: _nan_last(case.effect_error))
        if not worst.effect_error <= tolerance.effect:
            if abs(worst.effect_scale) < 0.01 and np.isfinite(worst.effect_error):
                causes.append(
                    f"missing adapter: the artifact shows {worst.effect_scale:.1%} of the adapter's effect in {worst.name}; "
                    "its B is zero or not there"
                )
            else:
                causes.append(
                    f"wrong adapter: its effect is off by {worst.effect_error:.1%} in {worst.name} (allowed {tolerance.effect:.1%}); "
                    f"along eager's effect it is {worst.effect_scale:.3f} times as strong"
                )
    worst = max(result.cases, key=lambda case: _nan_last(case.logits_error / limit(case)))
    if not worst.logits_error <= limit(worst):
        causes.append(f"logits are off by {worst.logits_error:.3g} in {worst.name} (allowed {limit(worst):.3g})")
    for case in result.cases:
        if case.first_divergent_token is not None:
            causes.append(f"greedy decoding of {case.name} diverges from eager at token {case.first_divergent_token}")
    return causes


def _nan_last(value: float) -> float:
    """NaN counts as the worst."""
    return float("inf") if np.isnan(value) else value
