"""Which runs an artifact is verified on.

Each prompt alone and a single token: prefill at past length 0, then cached steps at every past length after it. All prompts as one ragged
batch, padded on the side that the artifact declares. And a few steps near the end of the context, on a random KV cache: both sides read the
same keys and values, so no long prefill is needed. A quick verification leaves out the prompts by themselves, and most steps of the single
token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flora_export.backends import Runner
from flora_export.verify.numerics import TOLERANCES, Expected, Logits, Numerics, difference, judge, measure

STEPS = 16  # cached decode steps per prompt
QUICK_STEPS = 2  # after the single token, where verification is quick: the batch has them all
SINGLE = "single token"
LIMIT_STEPS = 3  # near the end of the context
LIMIT_BYTES = 512 * 2**20  # of a random KV cache in fp32, or a quarter of the weights; a longer context is tested as far as this goes

Half = npt.NDArray[np.float16]
Cache = list[tuple[Half, Half]]  # keys and values per layer, each [batch, KV heads, past, head size]
Run = tuple[Expected, Cache | None]  # and the cache before it
Progress = Callable[[int, int], None]  # (done, of)


class Eager(Protocol):
    """Eager PyTorch, in fp32 or in the artifact's precision, and the truth: the same in fp64."""

    def logits(self, rows: Sequence[Sequence[int]], *, adapter: bool = True, cache: Cache | None = None) -> list[Logits]: ...
    def exact_logits(self, rows: Sequence[Sequence[int]], *, adapter: bool = True, cache: Cache | None = None) -> list[Logits]: ...
    def greedy(self, prompts: Sequence[Sequence[int]], steps: int) -> list[list[int]]: ...


def expect(eager: Eager, prompts: list[list[int]], progress: Progress) -> list[Expected]:
    """The truth for the prompts, and for the first token of the first one alone."""
    named = [(f"prompt {index}", prompt) for index, prompt in enumerate(prompts)] + [(SINGLE, prompts[0][:1])]
    tokens, adapted = _true_continuations(eager, [prompt for _, prompt in named], progress)
    base = eager.exact_logits([prompt + after for (_, prompt), after in zip(named, tokens, strict=True)], adapter=False)
    return [
        Expected(name, prompt, after, true, true_base)
        for (name, prompt), after, true, true_base in zip(named, tokens, adapted, base, strict=True)
    ]


def _true_continuations(eager: Eager, prompts: list[list[int]], progress: Progress) -> tuple[list[list[int]], list[Logits]]:
    """The tokens that greedy decoding takes, and the true logits [positions, vocabulary] of prompt and tokens.

    Eager in fp32 proposes the tokens, and the truth has the last word: fp32 can prefer either of two tokens that are nearly tied.
    """
    tokens = eager.greedy(prompts, STEPS)
    progress(len(prompts), len(prompts))
    while True:
        adapted = eager.exact_logits([prompt + after for prompt, after in zip(prompts, tokens, strict=True)])
        wrong = 0
        for row, (prompt, after, logits) in enumerate(zip(prompts, tokens, adapted, strict=True)):
            preferred = logits[len(prompt) - 1 : -1].argmax(-1)
            step = next((step for step, token in enumerate(after) if token != preferred[step]), None)
            if step is not None:
                kept = [*after[:step], int(preferred[step])]
                tokens[row] = kept + (eager.greedy([prompt + kept], STEPS - len(kept))[0] if len(kept) < STEPS else [])
                wrong += 1
        if not wrong:
            return tokens, adapted


def expect_near_limit(
    eager: Eager, shapes: Sequence[tuple[int, int]], context: int, tokens: list[int], budget: int
) -> tuple[Expected, Cache]:
    """The truth for a few tokens that end one before the end of the context, after a random cache.

    Args:
        shapes: (KV heads, head size) of each layer.
        budget: bytes that the cache may have, where that is more than LIMIT_BYTES.
    """
    per_token = sum(2 * heads * size * 4 for heads, size in shapes)
    past = min(context, max(LIMIT_BYTES, budget) // per_token) - len(tokens) - 1
    rng = np.random.default_rng(0)

    def draw(heads: int, size: int) -> Half:
        return rng.standard_normal((1, heads, past, size), dtype=np.float32).astype(np.float16)

    cache = [(draw(heads, size), draw(heads, size)) for heads, size in shapes]
    (adapted,), (base,) = (eager.exact_logits([tokens], adapter=adapter, cache=cache) for adapter in (True, False))
    return Expected("near the context's end", tokens[:1], tokens[1:], adapted, base), cache


def ask_eager(eager: Eager, runs: Sequence[Run]) -> None:
    """Note what eager PyTorch, in fp32, answers."""
    for (item, _), logits in zip(runs, _answers(eager, runs, adapter=True), strict=True):
        item.eager = logits


def measure_floors(eager: Eager, runs: Sequence[Run], precision: str) -> None:
    """Note what eager PyTorch, which is in the artifact's precision by now, is off by: the noise floor."""
    asked = precision == "fp32" and all(item.eager is not None for item, _ in runs)
    answers = [item.eager for item, _ in runs] if asked else _answers(eager, runs, adapter=True)
    for (item, _), adapted, base in zip(runs, answers, _answers(eager, runs, adapter=False), strict=True):
        assert adapted is not None
        effect = difference(item.adapted, item.base)
        norm = float(np.linalg.norm(effect))
        item.floor_logits = float(max(np.abs(adapted - item.adapted).max(), np.abs(base - item.base).max()))
        item.floor_effect = float(np.linalg.norm(difference(adapted, base) - effect)) / norm if norm else 0.0


def _answers(eager: Eager, runs: Sequence[Run], *, adapter: bool) -> list[Logits]:
    """Eager's logits [positions, vocabulary] of each run; those without a cache run together."""
    rows = [item.prompt + item.tokens for item, cache in runs if cache is None]
    together = iter(eager.logits(rows, adapter=adapter) if rows else [])
    return [
        next(together) if cache is None else eager.logits([item.prompt + item.tokens], adapter=adapter, cache=cache)[0]
        for item, cache in runs
    ]


def compare(
    expected: Sequence[Expected],
    near_limit: tuple[Expected, Cache],
    with_adapter: Runner,
    without_adapter: Runner,
    *,
    precision: str,
    source: str,
    allow_vacuous: bool,
    quick: bool,
    progress: Progress,
) -> Numerics:
    """Run the artifact through all cases, or the quick part of them, and judge."""
    result = Numerics(precision, TOLERANCES[precision], source, STEPS, quick=quick)
    most = min(with_adapter.limits.batch, without_adapter.limits.batch)
    batch = [item for item in expected if item.name.startswith("prompt")][:most]
    alone = list(expected)
    if quick and len(batch) > 1:
        alone = [item.first(QUICK_STEPS) if item.name == SINGLE else item for item in expected if item not in batch]
    runs = [[item] for item in alone] + ([batch] if len(batch) > 1 else [])
    for index, rows in enumerate(runs):
        prompts, forced = [item.prompt for item in rows], [item.tokens for item in rows]
        got, got_base = (run_forced(runner, prompts, forced) for runner in (with_adapter, without_adapter))
        for row, item in enumerate(rows):
            name = item.name if len(rows) == 1 else f"ragged batch, row {row}"
            result.cases.append(measure(item, got[row], got_base[row], name, len(rows)))
        progress(index + 1, len(runs) + 1)
    item, cache = near_limit
    got, got_base = ([_after(runner, cache, item.prompt + item.tokens)] for runner in (with_adapter, without_adapter))
    result.cases.append(measure(item, got[0], got_base[0], item.name, 1, cache[0][0].shape[2]))
    progress(len(runs) + 1, len(runs) + 1)
    result.causes = judge(result, allow_vacuous=allow_vacuous)
    return result


def run_forced(runner: Runner, prompts: list[list[int]], forced: list[list[int]]) -> list[Logits]:
    """Logits [prompt + steps, vocabulary] of each row, when each step is fed the given token.

    Fed with the true greedy tokens, a runner that prefers the same token at every place decodes the same text by itself.
    """
    rows = [[row] for row in runner.start(prompts)]
    for step in range(len(forced[0])):
        logits = runner.step([tokens[step] for tokens in forced])
        for row, values in zip(rows, logits, strict=True):
            row.append(values[None])
    return [np.concatenate(row) for row in rows]


def _after(runner: Runner, cache: Cache, tokens: list[int]) -> Logits:
    """Logits [tokens, vocabulary] of tokens fed one by one after a cache."""
    runner.resume(cache)
    logits = np.concatenate([runner.step([token]) for token in tokens])
    runner.resume([(keys[:, :, :0], values[:, :, :0]) for keys, values in cache])  # lets go of it before the other runner has its own
    return logits
