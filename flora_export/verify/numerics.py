"""Numeric parity of an artifact with PyTorch: what is measured of one run, and how it is judged.

Truth is eager PyTorch in fp64 (exact.py). The artifact and eager PyTorch in the artifact's own precision are both measured against it, and
the artifact passes by how much worse than eager it is: what eager is off by is the noise floor, and errors are judged in multiples of it.

Two things are compared: the base model alone, and the adapter's own effect, logits(adapter) - logits(base). An artifact that has lost its
adapter is close to the truth in its logits, since the adapter changes little; its effect is zero, and that is noticed. The artifact's base
model is the artifact itself with each B silenced.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tolerance:
    """What is allowed: a multiple of the noise floor, below a ceiling; or three times the floor, where eager itself comes near that.

    `logits` is the ceiling of the largest error, relative to the largest logit or to 1; `effect` that of the relative error of the
    adapter's effect, ||Δ - Δ'|| / ||Δ||. `epsilon` is the precision's rounding unit; a floor below 4 of it, of the largest logit, is
    luck.
    """

    multiple: float
    logits: float
    effect: float
    epsilon: float


# How far, of the largest logit, eager PyTorch in fp32 may be from the truth. Wider apart, one of the two is wrong, or the model amplifies
# rounding so much that no artifact of it can be judged. 1e-3 was seen of right ones, at position 25,637, where fp32 turns by 1e-3 too far.
DOUBT = 2e-2

# The multiple leaves room for other kernels and another order of summation: right artifacts were seen at 1 to 4 floors. In fp32 the floor
# alone decides, and an adapter scaled by 2 % is far outside it; in bf16 a strong adapter, whose effect saturates, can hide as much.
TOLERANCES = {
    "fp32": Tolerance(10.0, 1e-4, 0.01, 2.0**-23),
    "fp16": Tolerance(10.0, 1e-2, 0.03, 2.0**-10),
    "bf16": Tolerance(10.0, 5e-2, 0.045, 2.0**-7),
    # As they run, with activations rounded to int8: each kernel rounds a little otherwise, and after some layers no two agree on more than
    # how far they are from the truth. The graph itself is held to the tolerance of what it computes in, its activations not rounded.
    "int8": Tolerance(3.0, 0.15, 0.5, 2.0**-9),
    "int4": Tolerance(3.0, 0.15, 0.5, 2.0**-9),
}


@dataclass
class Expected:
    """The truth for one prompt: its greedy tokens, and logits [positions, vocabulary] of prompt and tokens, adapted and base."""

    name: str
    prompt: list[int]
    tokens: list[int]
    adapted: Logits
    base: Logits
    floor_logits: float | None = None  # largest error of eager in the artifact's precision; None: not measured
    floor_effect: float | None = None  # relative error of its effect
    eager: Logits | None = None  # adapted, by eager PyTorch in fp32; None: not asked

    def first(self, steps: int) -> Expected:
        """The same with no more than so many of its tokens."""
        end = len(self.prompt) + steps
        eager = None if self.eager is None else self.eager[:end]
        return replace(self, tokens=self.tokens[:steps], adapted=self.adapted[:end], base=self.base[:end], eager=eager)


@dataclass(frozen=True)
class Case:
    """What one run of one prompt showed, against the truth. Errors of logits are the largest over positions and vocabulary."""

    name: str
    batch: int
    past: list[int]  # past lengths of its first and last call
    base_error: float
    logits_error: float
    eager_error: float | None  # what eager PyTorch in fp32 is off by
    from_eager: float | None  # how far the artifact is from eager PyTorch in fp32
    mean_error: float
    relative_error: float  # ||error|| / ||logits||
    kl_mean: float  # KL divergence of next-token distributions, nats, truth from artifact
    kl_max: float
    top1_agreement: float  # share of positions where both prefer the same token
    largest_logit: float
    largest_effect: float  # max |Δ|, of the truth
    effect_error: float  # ||Δ artifact - Δ|| / ||Δ||
    effect_scale: float  # how strong the artifact's effect is along the true one
    floor_logits: float | None  # what eager in the artifact's precision is off by
    floor_effect: float | None
    other_token: int | None  # the first step of the greedy continuation at which the artifact prefers another token
    margin: float  # by which the truth prefers its own there
    error_per_step: list[float]  # largest error at the prompt's last position and at each step after it


@dataclass
class Numerics:
    """The verdict on numerics: `causes` is empty where the artifact passes."""

    precision: str
    tolerance: Tolerance
    prompts: str
    steps: int
    cases: list[Case] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    quick: bool = False  # the prompts were run together alone, not each by itself as well

    def allowed_logits(self, case: Case) -> float:
        """The largest logit error that this case may show."""
        largest = max(1.0, case.largest_logit)
        if case.floor_logits is None:
            return self.tolerance.logits * largest
        floor = max(case.floor_logits, 4 * self.tolerance.epsilon * largest)
        return min(max(self.tolerance.logits * largest, 3 * floor), self.tolerance.multiple * floor)

    def tie(self, case: Case) -> float:
        """Two tokens this close are a tie: 4 noise floors, since each of the two logits is off by one or two."""
        return 4 * max(case.floor_logits or 0.0, 4 * self.tolerance.epsilon * max(1.0, case.largest_logit))

    def allowed_effect(self, case: Case) -> float:
        """The largest relative error of the effect that this case may show."""
        if case.floor_effect is None:
            return self.tolerance.effect
        floor = max(case.floor_effect, 4 * self.tolerance.epsilon * max(1.0, case.largest_logit) / max(case.largest_effect, 1e-30))
        return min(max(self.tolerance.effect, 3 * floor), self.tolerance.multiple * floor)


def measure(expected: Expected, got: Logits, got_base: Logits, name: str, batch: int, past: int = 0) -> Case:
    """Compare one row. All logits are [positions, vocabulary], the last `len(expected.tokens)` of them of cached steps."""
    effect, got_effect = difference(expected.adapted, expected.base), difference(got, got_base)
    norm = float(np.linalg.norm(effect))
    error = np.abs(got - expected.adapted)
    kl = divergence(expected.adapted, got)
    first = len(expected.prompt) - 1
    off = float(np.linalg.norm(got_effect - effect))
    other, margin = _first_other_token(expected.adapted[first:], got[first:])
    return Case(
        name=name,
        batch=batch,
        past=[past, past + len(got) - 1],
        base_error=float(np.abs(got_base - expected.base).max()),
        logits_error=float(error.max()),
        eager_error=None if expected.eager is None else float(np.abs(expected.eager - expected.adapted).max()),
        from_eager=None if expected.eager is None else float(np.abs(got - expected.eager).max()),
        mean_error=float(error.mean()),
        relative_error=float(np.linalg.norm(error) / np.linalg.norm(expected.adapted)),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1_agreement=float((expected.adapted.argmax(-1) == got.argmax(-1)).mean()),
        largest_logit=float(np.abs(expected.adapted).max()),
        largest_effect=float(np.abs(effect).max()),
        effect_error=off / norm if norm else float("inf") if off else 0.0,
        effect_scale=float((got_effect * effect).sum() / norm**2) if norm else 0.0,
        floor_logits=expected.floor_logits,
        floor_effect=expected.floor_effect,
        other_token=other,
        margin=margin,
        error_per_step=error[first:].max(axis=-1).tolist(),
    )


def difference(adapted: Logits, base: Logits) -> npt.NDArray[np.float64]:
    """The adapter's effect on the logits."""
    return adapted.astype(np.float64) - base


def divergence(expected: Logits, got: Logits) -> npt.NDArray[np.float64]:
    """KL(truth || artifact) of the next-token distributions, per position, in nats."""
    p, q = _log_softmax(expected), _log_softmax(got)
    result: npt.NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=-1)
    return result


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _first_other_token(expected: Logits, got: Logits) -> tuple[int | None, float]:
    """The first position where the two prefer other tokens, and by how much the truth prefers its own."""
    ours, theirs = expected.argmax(-1), got.argmax(-1)
    differ = np.flatnonzero(ours != theirs)
    if not len(differ):
        return None, 0.0
    step = int(differ[0])
    return step, float(expected[step, ours[step]] - expected[step, theirs[step]])


def judge(result: Numerics, *, allow_vacuous: bool) -> list[str]:
    """Name each cause of failure once, the deepest first: no truth, a wrong base model, a missing adapter, a wrong one."""
    shaky = max(result.cases, key=lambda case: _finite((case.eager_error or 0.0) / max(1.0, case.largest_logit)))
    if not (shaky.eager_error or 0.0) <= DOUBT * max(1.0, shaky.largest_logit):
        return [
            f"no truth: eager PyTorch in fp32 and in fp64 differ by {shaky.eager_error:.3g} in {shaky.name}, at logits of "
            f"{shaky.largest_logit:.3g}, so neither can be called right. The model amplifies rounding errors, or transformers computes "
            "it otherwise in fp64."
        ]
    worst = max(result.cases, key=lambda case: _finite(case.base_error / result.allowed_logits(case)))
    if not worst.base_error <= result.allowed_logits(worst):
        return [
            f"wrong base: without the adapter, logits are off by {worst.base_error:.3g} in {worst.name} "
            f"(allowed {result.allowed_logits(worst):.3g}{_floor(worst.floor_logits, result)}). The ledger says whether its weights are in "
            "place; where they are, the captured graph computes something else than the model."
        ]
    ceiling = result.tolerance.effect
    visible = [case for case in result.cases if (case.floor_effect or 0.0) <= ceiling]
    strongest = max(visible or result.cases, key=lambda case: case.largest_effect)
    if strongest.largest_effect <= result.allowed_logits(strongest):
        if allow_vacuous:
            return _judge_logits(result)
        return [
            f"vacuous: the adapter's own effect on the logits ({strongest.largest_effect:.3g}) is within the tolerance, "
            "so nothing is proved. Is it trained? Pass --allow-vacuous to accept it."
        ]
    if not visible:
        cause = (
            f"vacuous in {result.precision}: eager itself is off by {strongest.floor_effect:.1%} of the adapter's effect in it, "
            f"more than the {ceiling:.1%} that are allowed, so nothing is proved. Build with --precision fp32, or pass --allow-vacuous."
        )
        return _judge_logits(result) if allow_vacuous else [cause]
    causes = []
    worst = max(visible, key=lambda case: _finite(case.effect_error / result.allowed_effect(case)))
    if not worst.effect_error <= result.allowed_effect(worst):
        if abs(worst.effect_scale) < 0.01 and np.isfinite(worst.effect_error):
            causes.append(
                f"missing adapter: the artifact shows {worst.effect_scale:.1%} of the adapter's effect in {worst.name}; "
                "its B is zero or not there"
            )
        else:
            causes.append(
                f"wrong adapter: its effect is off by {worst.effect_error:.2%} in {worst.name} "
                f"(allowed {result.allowed_effect(worst):.2%}); along the true effect it is {worst.effect_scale:.3f} times as strong"
            )
    return causes + _judge_logits(result)


def _judge_logits(result: Numerics) -> list[str]:
    causes = []
    worst = max(result.cases, key=lambda case: _finite(case.logits_error / result.allowed_logits(case)))
    if not worst.logits_error <= result.allowed_logits(worst):
        causes.append(f"logits are off by {worst.logits_error:.3g} in {worst.name} (allowed {result.allowed_logits(worst):.3g})")
    for case in result.cases:
        if case.other_token is not None and not case.margin <= result.tie(case):
            causes.append(
                f"greedy decoding of {case.name} diverges from PyTorch at token {case.other_token}, "
                f"which PyTorch prefers by {case.margin:.3g} (a tie is at most {result.tie(case):.3g})"
            )
    return causes


def _floor(floor: float | None, result: Numerics) -> str:
    return "" if floor is None else f"; eager PyTorch in {result.precision} is off by {floor:.3g} there itself"


def _finite(value: float) -> float:
    """NaN counts as the worst."""
    return float("inf") if np.isnan(value) else value
