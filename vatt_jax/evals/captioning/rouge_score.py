"""ROUGE-L (Lin and Och 2004): the longest common subsequence of words, as released for COCO."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from vatt_jax.evals.captioning.ngrams import Captions, References, split_captions

# How much more recall weighs than precision.
BETA = 1.2


def rouge_l(
    candidates: Captions, references: References, beta: float = BETA
) -> Float64[np.ndarray, ' M']:
    """ROUGE-L of each picture; that of a corpus is their mean.

        (1 + β²) P R / (R + β² P)

    P is the length of the longest common subsequence over that of the candidate, R over that of the
    reference; each is the best over the references, not always of the same one.

    Args:
        candidates: a caption for each picture; words with white space between.
        references: the captions of each.
        beta: weight of recall.

    Raises:
        ValueError: see `split_captions`.
    """
    scores = []
    for candidate, of_picture in split_captions(candidates, references):
        precision = recall = 0.0
        for reference in of_picture:
            common = common_length(candidate, reference)
            # An empty caption has nothing in common with any other.
            precision = max(precision, common / max(len(candidate), 1))
            recall = max(recall, common / max(len(reference), 1))
        weight = beta**2
        denominator = recall + weight * precision
        score = (1 + weight) * precision * recall / denominator if denominator else 0.0
        scores.append(score)
    return np.array(scores)


def common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    # best[j]: of what has been read of a, and the first j words of b.
    best = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = best[j]
            best[j] = diagonal + 1 if word == other else max(above, best[j - 1])
            diagonal = above
    return best[-1]
