"""Ranks, multi-label scores and intervals."""

from __future__ import annotations

import numpy as np

from vatt_jax.config import ConfigError


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


def bootstrap(
    values: np.ndarray, statistic=np.mean, seed: int = 0, rounds: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval of a statistic of `values` [N] over resampled examples."""
    rng = np.random.default_rng(seed)
    draws = statistic(
        np.asarray(values)[rng.integers(0, len(values), (rounds, len(values)))], axis=1
    )
    return float(np.percentile(draws, 2.5)), float(np.percentile(draws, 97.5))


def average_precision(
    scores: np.ndarray, targets: np.ndarray, weight: np.ndarray | None = None
) -> np.ndarray:
    """float64 [P]: of each class, the mean over its examples of the precision among all that score at least as much; NaN for a class without
    any. scores, targets [N P]; weight [N]: how often each example counts (None: once)."""
    weight = np.ones(len(scores)) if weight is None else weight
    order = np.argsort(-scores, 0, kind='stable')
    sorted_scores = np.take_along_axis(scores, order, 0)
    counts = weight[order]
    hits = counts * np.take_along_axis(targets > 0, order, 0)
    precision = np.cumsum(hits, 0) / np.maximum(np.cumsum(counts, 0), 1e-300)
    # ties share the precision at the last of them
    ends = np.vstack([sorted_scores[1:] != sorted_scores[:-1], np.ones((1, scores.shape[1]), bool)])
    last = np.where(ends, np.arange(len(scores))[:, None], len(scores))
    last = np.minimum.accumulate(last[::-1], 0)[::-1]
    with np.errstate(invalid='ignore'):
        return (hits * np.take_along_axis(precision, last, 0)).sum(0) / hits.sum(0)


def multi_label(
    scores: np.ndarray, targets: np.ndarray, seed: int = 0, rounds: int = 200
) -> tuple[dict[str, float], dict[str, object]]:
    """(scalars, artifacts): mAP, AUC and d' of scores [N P] (any monotone ones) against targets [N P] > 0: means over the classes that have both
    examples and others (VATT, AudioSet). d' = sqrt(2) times the normal quantile of the class's AUC, which is kept half a pair of clips
    away from 0 and 1, where d' would be infinite.
    """
    from scipy.stats import norm, rankdata

    own = (targets > 0).sum(0)
    use = (own > 0) & (own < len(targets))
    if not use.any():
        raise ConfigError(
            f'none of {targets.shape[1]} classes has both examples and others among {len(targets)} clips; a larger split is wanted'
        )
    scores, targets, own = scores[:, use].astype(np.float64), targets[:, use] > 0, own[use]
    pairs = own * (len(targets) - own)
    auc = ((rankdata(scores, axis=0) * targets).sum(0) - own * (own + 1) / 2) / pairs
    d_prime = np.sqrt(2) * norm.ppf(np.clip(auc, 0.5 / pairs, 1 - 0.5 / pairs))
    rng = np.random.default_rng(seed)
    draws = [
        np.nanmean(
            average_precision(
                scores,
                targets,
                rng.multinomial(len(scores), np.full(len(scores), 1 / len(scores))).astype(float),
            )
        )
        for _ in range(rounds)
    ]
    precision = average_precision(scores, targets)
    artifacts = {
        'mAP/interval': tuple(float(np.percentile(draws, p)) for p in (2.5, 97.5)),
        'mAP/chance': float((own / len(targets)).mean()),
        'average_precision': precision,
        'auc': auc,
        'classes_scored': int(use.sum()),
    }
    return {
        'mAP': float(precision.mean()),
        'AUC': float(auc.mean()),
        'd_prime': float(d_prime.mean()),
    }, artifacts
