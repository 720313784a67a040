"""Arithmetic of merged weights, in fp64: the same bits on every machine.

A matrix product of a library sums in an order that depends on the processor and the number of threads, and a sum over an axis on its
vector instructions. Here every number is made by single additions and multiplications, element by element, in an order that the shapes
alone decide.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flora_export.change import Doubles

CHUNK = 2**15  # numbers that are worked on at a time: what fits into a core's cache


def low_rank(weight: Doubles, b: Doubles, a: Doubles, scale: float) -> Doubles:
    """W + Σ_k (s B[:, k]) A[k, :], the sum over k first, in the order of k. W: [out, in], B: [out, r], A: [r, in]."""
    scaled = b * scale
    result = np.empty_like(weight)
    rows = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), rows):
        some = scaled[start : start + rows]
        total = np.zeros((len(some), weight.shape[1]))
        product = np.empty_like(total)
        for k in range(len(a)):
            np.multiply(some[:, k, None], a[k], out=product)
            total += product
        result[start : start + rows] = weight[start : start + rows] + total
    return result


def low_ranks(scales: Sequence[float], weight: Doubles, sources: Sequence[Doubles]) -> Doubles:
    """W + Σ s B A, pair by pair in order. `sources` are A, B, A, B, ..., with a scale for each pair."""
    for scale, a, b in zip(scales, sources[::2], sources[1::2], strict=True):
        weight = low_rank(weight, b, a, scale)
    return weight


def row_norms(matrix: Doubles) -> Doubles:
    """‖row‖ of each row, [out]: squares are added in pairs, halves of a row at a time."""
    squares = matrix * matrix
    while squares.shape[1] > 1:
        half = squares.shape[1] // 2
        paired = squares[:, :half] + squares[:, half : 2 * half]
        if squares.shape[1] % 2:
            paired[:, 0] += squares[:, -1]
        squares = paired
    norms: Doubles = np.sqrt(squares[:, 0])
    return norms
