"""Ranks and intervals."""
from __future__ import annotations

import numpy as np


def ranks(similarity: np.ndarray) -> np.ndarray:
    """float64 [N]: 0-based rank of the diagonal in each row of [N N], ties sharing their places: half of the others that score
    exactly as much count as better. A constant matrix thus gives (N-1)/2, chance."""
    own = np.diagonal(similarity)[:, None]
    return (similarity > own).sum(1) + 0.5 * ((similarity == own).sum(1) - 1)


def bootstrap(values: np.ndarray, statistic=np.mean, seed: int = 0, rounds: int = 1000) -> tuple[float, float]:
    """95 % percentile interval of a statistic of `values` [N] over resampled examples."""
    rng = np.random.default_rng(seed)
    draws = statistic(np.asarray(values)[rng.integers(0, len(values), (rounds, len(values)))], axis=1)
    return float(np.percentile(draws, 2.5)), float(np.percentile(draws, 97.5))
