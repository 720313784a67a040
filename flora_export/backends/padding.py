"""Prompts of different lengths as one batch, padded on the side that an artifact declares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


def pad_prompts(prompts: Sequence[Sequence[int]], *, right: bool) -> tuple[Ids, Ids]:
    """(token ids, attention mask), each [batch, longest prompt]; padding is token 0."""
    lengths = np.array([len(prompt) for prompt in prompts])
    mask = padding_mask(lengths, int(lengths.max()), right=right)
    ids = np.zeros(mask.shape, np.int64)
    ids[mask == 1] = np.concatenate([np.asarray(prompt, np.int64) for prompt in prompts])
    return ids, mask


def padding_mask(lengths: Ids, width: int, *, right: bool) -> Ids:
    """The attention mask [batch, width] of rows with so many tokens."""
    columns = np.arange(width)[None]
    mask = columns < lengths[:, None] if right else columns >= width - lengths[:, None]
    return mask.astype(np.int64)


def positions_of(mask: Ids) -> Ids:
    """The position of each token in its own row; padding has that of the token before it, or 0."""
    return np.clip(np.cumsum(mask, axis=1) - 1, 0, None)
