"""The next token: the most likely one, or one drawn as a request sets it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, temperature: float, top_k: int, top_p: float, seed: int) -> None:
        """Temperature 0 takes the most likely; else top_k (0: all), then top_p, of the probabilities at that temperature. Seed -1: any."""
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._random = np.random.default_rng(seed if seed >= 0 else None)

    def choose(self, logits: npt.NDArray[np.float32]) -> int:
        """A token, by logits [vocabulary]."""
        if self.temperature == 0:
            return int(np.argmax(logits))
        tokens = np.arange(len(logits))
        scaled = logits.astype(np.float64)
        if 0 < self.top_k < len(logits):
            tokens = np.sort(np.argpartition(-scaled, self.top_k - 1)[: self.top_k])
            scaled = scaled[tokens]
        weights = np.exp((scaled - scaled.max()) / self.temperature)
        if self.top_p < 1:  # the fewest tokens that have that much together; those below have less than the rest even together
            likely = weights >= (1 - self.top_p) * weights.sum() / len(weights)
            tokens, total, weights = tokens[likely], weights.sum(), weights[likely]
            order = np.argsort(-weights, kind="stable")
            most = int(np.searchsorted(np.cumsum(weights[order]), self.top_p * total)) + 1
            tokens, weights = tokens[order[:most]], weights[order[:most]]
        sums = np.cumsum(weights)
        place = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
        return int(tokens[min(place, len(tokens) - 1)])
