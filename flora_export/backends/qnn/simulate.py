"""The contexts in QNN's simulator of the HTP, on this machine: a short prompt and two steps, beside the portable graph.

    effect   the largest change that the adapter makes to a logit, in the portable graph: with it, and without
    error    the largest difference of a logit between contexts and portable graph

The contexts are right where the error is at most SHARE of the effect, and the same token is first at every position. Two tokens whose
logits in the portable graph are within TIE of the largest logit are equals. Both rules are ratios, far from what right and wrong contexts
have (`docs/edge.md`), so that no processor's rounding decides. Contexts without their adapter have an error that is the effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flora_export.backends import Runner
from flora_export.backends.qnn.apart import run_apart
from flora_export.backends.qnn.context import task_of
from flora_export.backends.qnn.plan import ContextPlan
from flora_export.errors import VerificationError
from flora_export.scratch import Scratch

STEPS = 2
SHARE = 0.1
TIE = 2.0**-6

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Simulated:
    """How far the contexts are from the portable graph, over all positions of prefill and decode."""

    error: float
    effect: float
    largest: float  # logit
    positions: int
    agreeing: int  # positions at which the same token, or its equal, is first

    @property
    def faults(self) -> list[str]:
        found = []
        if not self.error <= SHARE * self.effect:
            found.append(
                f"logits are off by {self.error:.3g}, but the adapter's own effect is {self.effect:.3g}, of which {SHARE:.0%} are allowed"
            )
        if self.agreeing != self.positions:
            found.append(f"another token is first at {self.positions - self.agreeing} of {self.positions} positions")
        return found

    def to_json(self) -> dict[str, Any]:
        """For the manifest, in powers of two: its bytes do not follow a processor's rounding."""
        return {
            "positions": self.positions,
            "agreeing": self.agreeing,
            "error_at_most": 2.0 ** math.ceil(math.log2(max(self.error, 2.0**-24))),
            "effect_at_least": 2.0 ** math.floor(math.log2(max(self.effect, 2.0**-24))),
        }


def portable_logits(runner: Runner, prompt: Sequence[int], tokens: Sequence[int] | None) -> tuple[Logits, list[int]]:
    """Logits [positions, vocabulary] of a prompt and STEPS tokens after it: those given, or the likeliest. Returns them with the tokens."""
    rows = [runner.start([list(prompt)])[0]]
    fed: list[int] = []
    for index in range(STEPS):
        fed.append(int(rows[-1][-1].argmax()) if tokens is None else tokens[index])
        rows.append(runner.step(fed[-1:]))
    return np.concatenate(rows).astype(np.float32), fed


def simulated_logits(directory: Path, plan: ContextPlan, tokens: Sequence[int]) -> Logits:
    """The same from the contexts of a directory, in the simulator. Raises BackendError where they do not run."""
    with Scratch("flora-export-simulated-") as name:
        file = Path(name) / "logits.npy"
        run_apart(task_of(directory, plan) | {"prompt": list(plan.prompt), "tokens": list(tokens), "logits": str(file)}, directory)
        logits: Logits = np.load(file)
    return logits


def compare(simulated: Logits, portable: Logits, effect: float) -> Simulated:
    """Contexts and the portable graph on the same tokens: each [positions, vocabulary]."""
    largest = float(np.abs(portable).max())
    finite = np.nan_to_num(simulated, nan=-np.inf)
    chosen = np.take_along_axis(portable, finite.argmax(-1)[:, None], -1)[:, 0]
    error = float(np.abs(simulated - portable).max())
    return Simulated(
        error if math.isfinite(error) else math.inf,
        effect,
        largest,
        len(portable),
        int((portable.max(-1) - chosen <= TIE * largest).sum()),
    )


def prove(directory: Path, plan: ContextPlan, adapted: Runner, base: Runner | float) -> Simulated:
    """Run the contexts of a directory in the simulator, beside the portable graph.

    Args:
        base: the portable graph without its adapter, or the adapter's effect where that is known.

    Raises:
        BackendError: they do not run.
        VerificationError: they are not what the portable graph is.
    """
    portable, tokens = portable_logits(adapted, plan.prompt, None)
    effect = base if isinstance(base, float) else float(np.abs(portable - portable_logits(base, plan.prompt, tokens)[0]).max())
    found = compare(simulated_logits(directory, plan, tokens), portable, effect)
    if found.faults:
        raise VerificationError(
            "\n".join(
                [
                    "FAILED: the contexts, run in QNN's simulator, are not what the portable graph is",
                    *found.faults,
                    "An adapter whose effect is near fp16's own rounding cannot be judged so: --no-simulate leaves this out",
                ]
            )
        )
    return found
