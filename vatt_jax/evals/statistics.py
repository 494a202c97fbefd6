"""Ranks and intervals."""
from __future__ import annotations

import numpy as np


def places(similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(better, equal) int64 [N]: how many of the others in each row of [N N] score higher than the diagonal, and how many exactly as
    much. What is not a number counts against its query, so a broken model never ranks first."""
    own = np.diagonal(similarity)[:, None]
    lost = np.isnan(own[:, 0])
    better = (~(similarity <= own)).sum(1) - lost
    return better, np.where(lost, 0, (similarity == own).sum(1) - 1)


def ranks(similarity: np.ndarray) -> np.ndarray:
    """float64 [N]: 0-based rank of the diagonal in each row, ties sharing their places: half of the others that score exactly as much
    count as better. A constant matrix thus gives (N-1)/2, chance."""
    better, equal = places(similarity)
    return better + 0.5 * equal


def hits(similarity: np.ndarray, k: int) -> np.ndarray:
    """float64 [N]: the share of the places the diagonal of each row may take, its ties in any order, that lie within the first k. A
    constant matrix gives k/N, chance."""
    better, equal = places(similarity)
    return np.clip((k - better) / (equal + 1), 0, 1)


def bootstrap(values: np.ndarray, statistic=np.mean, seed: int = 0, rounds: int = 1000) -> tuple[float, float]:
    """95 % percentile interval of a statistic of `values` [N] over resampled examples."""
    rng = np.random.default_rng(seed)
    draws = statistic(np.asarray(values)[rng.integers(0, len(values), (rounds, len(values)))], axis=1)
    return float(np.percentile(draws, 2.5)), float(np.percentile(draws, 97.5))
