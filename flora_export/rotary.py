"""Rotary tables, exact: what a configuration says, computed with high precision and rounded once.

Position p turns pair j of a head by the angle p · f_j (RoFormer, arXiv 2104.09864); a table holds a · cos and a · sin of these angles,
[positions, pairs]. Which frequencies f_j and which factor a, the configuration's rope type says, as transformers reads it.

Every entry is correctly rounded, so its bits depend on the configuration alone: not on a processor's vector instructions, whose cosine
and power differ in the last bit from one to the next, nor on the library that has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import ml_dtypes
import mpmath
import numpy as np
import numpy.typing as npt

from flora_export.errors import CheckpointError

Real: TypeAlias = Any  # a number of mpmath's, which is untyped
Doubles = npt.NDArray[np.float64]
Frequencies = tuple[list[Real], Real]  # f_j by pair, a

DIGITS = 40
CHUNK = 8192  # positions computed at a time


def rotary_tables(config: Any, kind: str, shape: Sequence[int], dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The cosine and the sine table of a model, each of the given shape [positions, pairs] and dtype (float32, float16, bfloat16).

    Args:
        config: the model's configuration, as transformers reads it.
        kind: the kind of layer that the tables are for, such as "full_attention"; it matters where each kind has its own parameters.
        shape: the context by half the rotary part of a head; longrope has the short table's positions before the long table's.

    Raises:
        CheckpointError: the rope type is unknown or incomplete, or the configuration makes tables of another shape.
    """
    context = int(config.max_position_embeddings)
    with mpmath.workdps(DIGITS):
        try:
            parts = _parts(config, kind, context)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"rope_parameters of {kind}: {type(error).__name__}: {error}, in {_parameters(config, kind)}") from error
        made = (sum(count for count, _ in parts), len(parts[0][1][0]))
        if made != tuple(shape):
            raise CheckpointError(f"rotary tables are {list(shape)} in the captured graph, but the configuration makes {list(made)}")
        halves = [[_table(frequencies, count, dtype, *functions) for count, frequencies in parts] for functions in (_COS, _SIN)]
    cos, sin = (np.concatenate(half) for half in halves)
    return cos, sin


def longrope_context(config: Any) -> int:
    """The original context of longrope, beyond which the second part of its tables holds; 0 where they have one part."""
    parameters = _parameters(config, "full_attention")
    original = int(parameters.get("original_max_position_embeddings") or 0) if parameters.get("rope_type") == "longrope" else 0
    return original if original < config.max_position_embeddings else 0


_Function = tuple[Callable[[Doubles], Doubles], Callable[[Real], Real]]  # in fp64, and with high precision
_COS: _Function = (np.cos, mpmath.cos)
_SIN: _Function = (np.sin, mpmath.sin)


def _table(
    frequencies: Frequencies, count: int, dtype: np.dtype[Any], quick: Callable[[Doubles], Doubles], exact: Callable[[Real], Real]
) -> npt.NDArray[Any]:
    """a · function(p · f), [count, pairs]: in fp64 where its error cannot change the rounded number, with high precision elsewhere."""
    turns, scale = frequencies
    in_double, factor = np.array([float(f) for f in turns]), float(scale)
    table = np.empty((count, len(turns)), dtype)
    for start in range(0, count, CHUNK):
        angles = np.arange(start, min(start + CHUNK, count), dtype=np.float64)[:, None] * in_double
        values = factor * quick(angles)
        doubt = factor * (1 + angles) * 2.0**-50  # frequency and product are each within half an ulp, the function within four
        low, high = round_once(values - doubt, dtype), round_once(values + doubt, dtype)
        for position, pair in np.argwhere(low != high):
            value = scale * exact((start + int(position)) * turns[pair])
            low[position, pair] = round_once(np.array(float(value)), dtype)
        table[start : start + len(low)] = low
    return table


def round_once(values: Doubles, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """fp64 -> dtype, to nearest. bfloat16 by way of fp32 rounded to odd, since rounding to nearest twice can err."""
    if dtype != ml_dtypes.bfloat16:
        return values.astype(dtype)
    near = values.astype(np.float32)
    inward = np.where(np.abs(near) > np.abs(values), np.nextafter(near, np.float32(0)), near).astype(np.float32)
    odd = inward.view(np.uint32) | (inward != values)
    rounded: npt.NDArray[Any] = odd.view(np.float32).astype(dtype)
    return rounded


def _parameters(config: Any, kind: str) -> Mapping[str, Any]:
    """The rope parameters of one kind of layer; most models have one set for all."""
    parameters = getattr(config, "rope_parameters", None) or {}
    own = parameters.get(kind)
    return own if isinstance(own, Mapping) else parameters


def _parts(config: Any, kind: str, context: int) -> list[tuple[int, Frequencies]]:
    """(positions, frequencies) of the tables that stand one below the other: one, or longrope's short and long."""
    parameters = _parameters(config, kind)
    rope = parameters["rope_type"]
    head = (
        getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    size = int(head * parameters.get("partial_rotary_factor", 1.0))
    if rope == "longrope":
        return _longrope(parameters, size, context)
    if rope not in ROPE_TYPES:
        raise ValueError(f"rope type {rope!r} is unknown; it must be one of {', '.join([*ROPE_TYPES, 'longrope'])}")
    return [(context, ROPE_TYPES[rope](parameters, int(head), size, context))]


def _default(parameters: Mapping[str, Any], head: int, size: int, context: int) -> Frequencies:
    """θ^(-2j / size). Also dynamic NTK's within the context that the model states, which is all that is exported."""
    base = mpmath.mpf(parameters["rope_theta"])
    return [base ** (mpmath.mpf(-2 * pair) / size) for pair in range((size + 1) // 2)], mpmath.mpf(1)


def _linear(parameters: Mapping[str, Any], head: int, size: int, context: int) -> Frequencies:
    """Position interpolation (arXiv 2306.15595)."""
    turns, scale = _default(parameters, head, size, context)
    return [f / mpmath.mpf(parameters["factor"]) for f in turns], scale


def _proportional(parameters: Mapping[str, Any], head: int, size: int, context: int) -> Frequencies:
    """Frequencies of the whole head, of which only the first `partial_rotary_factor` turn."""
    turns, scale = _default(parameters, head, head, context)
    moving = int(parameters.get("partial_rotary_factor", 1.0) * head // 2)
    return [f / mpmath.mpf(parameters.get("factor", 1.0)) if pair < moving else mpmath.mpf(0) for pair, f in enumerate(turns)], scale


def _llama3(parameters: Mapping[str, Any], head: int, size: int, context: int) -> Frequencies:
    """Llama 3.1: long waves are slowed by `factor`, short ones are kept, those between are blended."""
    turns, scale = _default(parameters, head, size, context)
    factor, low, high = (mpmath.mpf(parameters[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = mpmath.mpf(parameters["original_max_position_embeddings"])

    def slowed(f: Real) -> Real:
        waves = original * f / (2 * mpmath.pi)  # how many fit into the original context
        share = min(max((waves - low) / (high - low), mpmath.mpf(0)), mpmath.mpf(1))
        return (1 - share) * f / factor + share * f

    return [slowed(f) for f in turns], scale


def _yarn(parameters: Mapping[str, Any], head: int, size: int, context: int) -> Frequencies:
    """YaRN (arXiv 2309.00071): a ramp over the pairs, from frequencies that are kept to frequencies divided by `factor`."""
    turns, _ = _default(parameters, head, size, context)
    original = mpmath.mpf(parameters["original_max_position_embeddings"])
    factor = mpmath.mpf(parameters["factor"] or context / original)
    base = mpmath.mpf(parameters["rope_theta"])

    def pair_of(rotations: float) -> Real:
        return size * mpmath.log(original / (mpmath.mpf(rotations) * 2 * mpmath.pi)) / (2 * mpmath.log(base))

    low, high = pair_of(parameters.get("beta_fast") or 32), pair_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = mpmath.floor(low), mpmath.ceil(high)
    low, high = max(low, mpmath.mpf(0)), min(high, mpmath.mpf(size - 1))
    if low == high:
        high += mpmath.mpf("0.001")

    def slowed(pair: int, f: Real) -> Real:
        ramp = min(max((pair - low) / (high - low), mpmath.mpf(0)), mpmath.mpf(1))
        return f / factor * ramp + f * (1 - ramp)

    def strength(weight: float) -> Real:
        return mpmath.mpf(1) if factor <= 1 else mpmath.mpf("0.1") * mpmath.mpf(weight) * mpmath.log(factor) + 1

    attention, weight, weight_all = (parameters.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is None:
        attention = strength(weight) / strength(weight_all) if weight and weight_all else strength(1)
    return [slowed(pair, f) for pair, f in enumerate(turns)], mpmath.mpf(attention)


def _longrope(parameters: Mapping[str, Any], size: int, context: int) -> list[tuple[int, Frequencies]]:
    """LongRoPE (arXiv 2402.13753): each frequency has a divisor of its own, one for contexts up to the original, one for longer ones."""
    original = int(parameters["original_max_position_embeddings"])
    turns, _ = _default(parameters, size, size, context)
    factor = mpmath.mpf(parameters.get("factor") or mpmath.mpf(context) / original)
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = 1 if factor <= 1 else mpmath.sqrt(1 + mpmath.log(factor) / mpmath.log(original))

    def divided(key: str) -> Frequencies:
        return [f / mpmath.mpf(divisor) for f, divisor in zip(turns, parameters[key], strict=True)], mpmath.mpf(attention)

    short = divided("short_factor")
    return [(context, short)] if original == context else [(original, short), (context, divided("long_factor"))]


ROPE_TYPES: dict[str, Callable[[Mapping[str, Any], int, int, int], Frequencies]] = {
    "default": _default,
    "dynamic": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "proportional": _proportional,
}
