"""Ranks, multi-label scores and intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from vatt_jax.config import ConfigError

RESAMPLED_AT_ONCE = 1 << 22  # examples that a bootstrap holds, over all rounds


def softmax(x: Float[np.ndarray, '... P']) -> Float[np.ndarray, '... P']:
    """Softmax over the last axis."""
    # The maximum cancels; without it large logits overflow.
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def sigmoid(x: Float[np.ndarray, ' ...']) -> Float[np.ndarray, ' ...']:
    """Logistic function, as a hyperbolic tangent so that nothing overflows."""
    # 1 / (1 + exp(-x)) = (1 + tanh(x / 2)) / 2
    return 0.5 * (1 + np.tanh(0.5 * x))


def compare_with_own(
    similarity: Shaped[np.ndarray, 'Q M'], is_own: Bool[np.ndarray, 'Q M']
) -> tuple[Int[np.ndarray, ' Q'], Int[np.ndarray, ' Q'], Int[np.ndarray, ' Q']]:
    """Compare the best of several right answers with all wrong ones.

    What is not a number counts against its query, so a broken model never ranks first.

    Args:
      similarity: of queries and gallery.
      is_own: the right answers of each query, at least one.

    Returns:
      Wrong answers that score higher, wrong ones that score as much, and right ones that score as
      much (at least 1), int64 [Q] each.
    """
    is_usable = is_own & ~np.isnan(similarity)
    best = np.where(is_usable, similarity, -np.inf).max(1, keepdims=True)  # [Q 1]
    # Every comparison with NaN is false, so a wrong answer that is NaN counts as better.
    better = (~is_own & ~(similarity <= best)).sum(1)
    is_tie = similarity == best
    return better, (~is_own & is_tie).sum(1), np.maximum((is_own & is_tie).sum(1), 1)


def ranks_of_best(
    better: Int[np.ndarray, ' Q'], equal: Int[np.ndarray, ' Q'], tied: Int[np.ndarray, ' Q']
) -> Float[np.ndarray, ' Q']:
    """0-based rank of the best right answer, over all orders of what scores as much.

    Args:
      better: as of `compare_with_own`.
      equal: likewise.
      tied: likewise.
    """
    # The first of t among e + t in random order has e / (t + 1) others before it on average.
    return better + equal / (tied + 1)


def hits_of_best(
    better: Int[np.ndarray, ' Q'],
    equal: Int[np.ndarray, ' Q'],
    tied: Int[np.ndarray, ' Q'],
    k: int,
) -> Float[np.ndarray, ' Q']:
    """Probability that a right answer is among the first k, over all orders of what ties.

    Args:
      better: as of `compare_with_own`.
      equal: likewise.
      tied: likewise.
      k: number of answers looked at.
    """
    # All places that the ties leave are taken by wrong answers: drawn without replacement.
    all_wrong = np.ones(len(better))
    for i in range(k):
        share = np.maximum(equal - i, 0) / np.maximum(equal + tied - i, 1)
        all_wrong = np.where(better + i < k, all_wrong * share, all_wrong)
    return 1 - all_wrong


def bootstrap_groups(
    values: Shaped[np.ndarray, ' Q'],
    groups: Int[np.ndarray, ' Q'],
    statistic: Callable[..., Any] = np.mean,
    seed: int = 0,
    rounds: int = 1000,
) -> tuple[float, float]:
    """As `bootstrap`, resampling groups of values that belong together.

    Captions of one clip are not independent: resampled one by one, they would make the interval too
    narrow.

    Args:
      values: one for each query.
      groups: the group of each, counted from 0 without gaps and in ascending order.
      statistic: takes the values of a round.
      seed: of the resampling.
      rounds: number of resamplings.

    Returns:
      (low, high).
    """
    counts = np.bincount(groups)
    place = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((len(counts), counts.max()), np.nan)  # a row a group, filled up with NaN
    table[groups, place] = values
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(rounds):
        drawn = table[rng.integers(0, len(counts), len(counts))]
        draws.append(statistic(drawn[~np.isnan(drawn)]))
    return float(np.percentile(draws, 2.5)), float(np.percentile(draws, 97.5))


def bootstrap(
    values: Any, statistic: Callable[..., Any] = np.mean, seed: int = 0, rounds: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval of a statistic over resampled examples.

    Args:
      values: [N], one for each example.
      statistic: takes [rounds N] and axis=1.
      seed: of the resampling.
      rounds: number of resamplings.

    Returns:
      (low, high).
    """
    rng = np.random.default_rng(seed)
    values = np.asarray(values)
    # Some rounds at a time, which draws the same numbers: a thousand rounds of a million examples
    # are 8 GB.
    at_once = max(1, RESAMPLED_AT_ONCE // len(values))
    draws = []
    for begin in range(0, rounds, at_once):
        num_rounds = min(at_once, rounds - begin)
        # With replacement; [rounds N].
        rows = rng.integers(0, len(values), (num_rounds, len(values)))
        draws.append(statistic(values[rows], axis=1))
    all_draws = np.concatenate(draws)  # [rounds]
    return float(np.percentile(all_draws, 2.5)), float(np.percentile(all_draws, 97.5))


def average_precision(
    scores: Shaped[np.ndarray, 'N P'],
    targets: Shaped[np.ndarray, 'N P'],
    weight: Shaped[np.ndarray, ' N'] | None = None,
) -> Float[np.ndarray, ' P']:
    """Average precision of each class.

    It is the mean over the class's examples of the precision among all that score at least as much.

    Args:
      scores: any monotone ones.
      targets: above 0 for the examples of the class.
      weight: how often each example counts; None: once.

    Returns:
      float64 [P]; NaN for a class without any example.
    """
    if weight is None:
        weight = np.ones(len(scores))
    order = np.argsort(-scores, 0, kind='stable')  # [N P]
    sorted_scores = np.take_along_axis(scores, order, 0)
    counts = weight[order]
    positives = counts * np.take_along_axis(targets > 0, order, 0)
    num_ranked = np.cumsum(counts, 0)
    # Rows of weight 0 may come first: 0 / 1e-300 is 0, where 0 / 0 would be NaN.
    precision = np.cumsum(positives, 0) / np.maximum(num_ranked, 1e-300)  # [N P]

    # Ties share the precision at the last of them: `last` is the smallest end at or after a row.
    num_examples, num_classes = scores.shape
    differs_from_next = sorted_scores[1:] != sorted_scores[:-1]
    is_end = np.vstack([differs_from_next, np.ones((1, num_classes), bool)])
    last = np.where(is_end, np.arange(num_examples)[:, None], num_examples)
    # A running minimum from below: `num_examples` stands for no end.
    last = np.minimum.accumulate(last[::-1], 0)[::-1]
    tied_precision = np.take_along_axis(precision, last, 0)
    with np.errstate(invalid='ignore'):  # 0 / 0 for a class without examples
        return (positives * tied_precision).sum(0) / positives.sum(0)


def multi_label(
    scores: Shaped[np.ndarray, 'N P'],
    targets: Shaped[np.ndarray, 'N P'],
    seed: int = 0,
    rounds: int = 200,
) -> tuple[dict[str, float], dict[str, Any]]:
    """mAP, AUC and d': means over the classes that have both examples and others.

    These are the scores of VATT on AudioSet. d' is sqrt(2) times the normal quantile of the class's
    AUC, which is held half a pair of clips away from 0 and 1, where d' would be infinite.

    Args:
      scores: any monotone ones.
      targets: above 0 for the examples of a class.
      seed: of the bootstrap over clips.
      rounds: its resamplings.

    Returns:
      (scalars, artifacts).
    """
    from scipy.stats import norm, rankdata

    num_clips = len(targets)
    num_positive = (targets > 0).sum(0)  # [P]
    is_scored = (num_positive > 0) & (num_positive < num_clips)
    if not is_scored.any():
        raise ConfigError(
            f'config.evals: expected a class with both examples and others, got none of '
            f'{targets.shape[1]} classes among {num_clips} clips. Take a larger split.'
        )
    # Neither AP nor AUC is defined for the other classes.
    scores = scores[:, is_scored].astype(np.float64)
    targets = targets[:, is_scored] > 0
    num_positive = num_positive[is_scored]

    # Mann-Whitney: AUC = (Σ ranks of examples - n (n + 1) / 2) / (n (N - n)), n examples of N.
    num_pairs = num_positive * (num_clips - num_positive)
    # `rankdata` counts from 1 and gives ties their mean rank: a tied pair counts one half.
    rank_sums = (rankdata(scores, axis=0) * targets).sum(0)
    auc = (rank_sums - num_positive * (num_positive + 1) / 2) / num_pairs
    half_pair = 0.5 / num_pairs
    d_prime = np.sqrt(2) * norm.ppf(np.clip(auc, half_pair, 1 - half_pair))

    precision = average_precision(scores, targets)
    rng = np.random.default_rng(seed)
    uniform = np.full(num_clips, 1 / num_clips)
    # Fewer rounds than in `bootstrap`, as each ranks all classes again. Multinomial counts are a
    # draw with replacement.
    draws = []
    for _ in range(rounds):
        weight = rng.multinomial(num_clips, uniform).astype(float)
        # A class that loses all its examples in a draw is NaN there.
        draws.append(np.nanmean(average_precision(scores, targets, weight)))
    low, high = float(np.percentile(draws, 2.5)), float(np.percentile(draws, 97.5))

    scalars = {
        'mAP': float(precision.mean()),
        'AUC': float(auc.mean()),
        'd_prime': float(d_prime.mean()),
    }
    artifacts = {
        'mAP/interval': (low, high),
        'mAP/chance': float((num_positive / num_clips).mean()),
        'average_precision': precision,
        'auc': auc,
        'classes_scored': int(is_scored.sum()),
    }
    return scalars, artifacts
