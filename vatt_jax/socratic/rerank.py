"""Retrieval re-ranked by what a language model says of the sound (Zeng et al. 2022, MSR-VTT).

In the published run a video seeks its captions: the first 100 by the cosine of mean frame and
caption are ordered anew by the product of that and the cosine of caption and summary.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from vatt_jax.config import ConfigError, choose

KEPT = 100
# How two cosines become one score.
# product: as published. It takes both to be positive, as those of CLIP and of sentence encoders
#     mostly are.
# standard: their sum, each less its mean over the kept candidates and over its deviation, so that
#     neither outweighs the other by its spread.
COMBINATIONS = ('product', 'standard')


def rerank(
    base: Float[np.ndarray, 'Q N'],
    second: Float[np.ndarray, '...'],
    has_second: Bool[np.ndarray, ' Q'] | None = None,
    keep: int = KEPT,
    combination: str = 'product',
) -> Float[np.ndarray, 'Q N']:
    """Scores of Q queries and N candidates after re-ranking.

    Args:
        base: cosines that the ranking begins with.
        second: cosines with the summaries, [Q N].
        has_second: the queries that are ranked anew; the others keep their base scores. None: all.
        keep: number of the first candidates that are ordered anew. The others stay behind them, in
            their order.
        combination: entry of COMBINATIONS.

    Raises:
        ConfigError: shapes differ, or an argument is out of its range.
    """
    base, second = np.asarray(base, float), np.asarray(second, float)
    if base.shape != second.shape:
        raise ConfigError(
            f'rerank: expected base and second of one shape, got {base.shape} and {second.shape}'
        )
    choose(combination, COMBINATIONS, 'rerank(combination=…)')
    if keep < 1:
        raise ConfigError(f'rerank(keep={keep}): expected a positive number')
    scores = base.copy()
    for row in range(len(base)):
        if has_second is not None and not has_second[row]:
            continue
        kept = np.argsort(-base[row], kind='stable')[:keep]
        if combination == 'product':
            anew = base[row, kept] * second[row, kept]
        else:
            anew = _standard(base[row, kept]) + _standard(second[row, kept])
        scores[row] = base[row] - base[row].max() + anew.min() - 1
        scores[row, kept] = anew
    return scores


def _standard(x: Float[np.ndarray, ' N']) -> Float[np.ndarray, ' N']:
    return (x - x.mean()) / max(float(x.std()), 1e-12)


def best_of_groups(scores: Float[np.ndarray, 'Q M'], sizes: list[int]) -> Float[np.ndarray, 'Q N']:
    """The highest score of each video's captions, as MSR-VTT's twenty are joined.

    Args:
        scores: of captions, those of one video beside one another.
        sizes: number of captions of each video.

    Raises:
        ConfigError: a video has none, or they are not as many as the columns.
    """
    if sum(sizes) != scores.shape[1] or min(sizes, default=0) < 1:
        raise ConfigError(
            f'best_of_groups: expected sizes above 0 that add up to {scores.shape[1]} captions, '
            f'got {sum(sizes)} in {len(sizes)} groups'
        )
    begins = np.cumsum([0, *sizes[:-1]])
    return np.maximum.reduceat(scores, begins, axis=1)
