"""BLEU (Papineni et al. 2002) of a corpus of captions, as released for COCO."""

from __future__ import annotations

import math
from collections import Counter

from vatt_jax.evals.captioning.ngrams import (
    Captions,
    NGram,
    References,
    count_ngrams,
    split_captions,
)

# Added to every numerator and denominator by the released code, so that nothing is divided by zero.
# A corpus without any common 4-gram therefore has a BLEU-4 that is tiny, not 0.
TINY = 1e-15
SMALL = 1e-9


def bleu(candidates: Captions, references: References, order: int = 4) -> list[float]:
    """BLEU-1 to BLEU-`order` of the corpus.

        BLEU-n = brevity penalty · (p_1 · … · p_n)^(1/n)

    p_k is the share of all candidates' k-grams that occur in a reference of their picture, each as
    often at most as in the one that has it most often. The penalty is exp(1 - r / c) where the
    candidates have fewer words (c) than references (r), of which the one closest in length counts
    for each picture, the shorter of two.

    Args:
        candidates: a caption for each picture; words with white space between.
        references: the captions of each.
        order: longest run of words.

    Raises:
        ValueError: see `split_captions`.
    """
    matched = [0] * order
    counted = [0] * order
    candidate_length = reference_length = 0
    for candidate, of_picture in split_captions(candidates, references):
        candidate_length += len(candidate)
        reference_length += closest_length(len(candidate), [len(words) for words in of_picture])
        for n in range(1, order + 1):
            known = _most_often(of_picture, n)
            found = count_ngrams(candidate, n)
            # & takes the smaller of two counts.
            matched[n - 1] += (found & known).total()
            counted[n - 1] += found.total()
    ratio = (candidate_length + TINY) / (reference_length + SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0

    scores = []
    product = 1.0
    for n in range(1, order + 1):
        product *= (matched[n - 1] + TINY) / (counted[n - 1] + SMALL)
        scores.append(penalty * product ** (1 / n))
    return scores


def closest_length(length: int, reference_lengths: list[int]) -> int:
    """The length closest to a candidate's; of two as close, the shorter one."""
    return min(reference_lengths, key=lambda other: (abs(other - length), other))


def _most_often(of_picture: list[list[str]], n: int) -> Counter[NGram]:
    """The largest count of each n-gram in any one reference."""
    known: Counter[NGram] = Counter()
    for words in of_picture:
        known |= count_ngrams(words, n)
    return known
