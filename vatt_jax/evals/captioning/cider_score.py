"""CIDEr and CIDEr-D (Vedantam, Zitnick and Parikh 2015), as released.

What captioning papers report as CIDEr, by the evaluation of COCO captions, is `cider_d`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from vatt_jax.evals.captioning.ngrams import (
    Captions,
    NGram,
    References,
    count_ngrams,
    split_captions,
)

# Longest run of words.
ORDER = 4
# Standard deviation, in words, of the penalty on a difference in length.
SIGMA = 6.0
# Both scores are multiplied by it.
SCALE = 10.0

# n-gram -> its count in a caption, times its inverse document frequency.
Vector = Mapping[NGram, float]


def cider(
    candidates: Captions, references: References, corpus: References | None = None
) -> Float64[np.ndarray, ' M']:
    """CIDEr of each picture, in [0, 10]; that of a set of pictures is their mean.

    Ten times the mean over n = 1 … 4 and over references of the cosine of candidate and reference,
    vectors of tf-idf weights of their n-grams. The paper compares stems of words; here, as in the
    authors' later code, words are compared as they are.

    Args:
        candidates: a caption for each picture; words with white space between.
        references: the captions of each.
        corpus: references that document frequencies are counted over, a picture's together being
            one document; None: `references`. Of a single picture all weights are log 1 = 0, and so
            is its score.

    Raises:
        ValueError: see `split_captions`.
    """
    return _score(candidates, references, corpus, clips=False, sigma=math.inf)


def cider_d(
    candidates: Captions,
    references: References,
    corpus: References | None = None,
    sigma: float = SIGMA,
) -> Float64[np.ndarray, ' M']:
    """CIDEr-D of each picture, in [0, 10]; that of a set of pictures is their mean.

    Against captions that are made to score high: weights of the candidate count up to those of the
    reference only, so that repeating a word does not pay, and a difference of d words costs the
    factor exp(-d² / 2σ²). Otherwise it is `cider`.

    Args:
        candidates: see `cider`.
        references: see `cider`.
        corpus: see `cider`.
        sigma: σ, in words.

    Raises:
        ValueError: see `split_captions`.
    """
    return _score(candidates, references, corpus, clips=True, sigma=sigma)


class DocumentFrequencies:
    """In how many documents each n-gram occurs; the captions of a picture are one document."""

    def __init__(self, corpus: Sequence[Sequence[Sequence[str]]]):
        """Counts.

        Args:
            corpus: words of the captions of each picture.
        """
        self.log_documents = math.log(len(corpus))
        self.frequencies: Counter[NGram] = Counter()
        for captions in corpus:
            in_document: set[NGram] = set()
            for words in captions:
                for n in range(1, ORDER + 1):
                    in_document.update(count_ngrams(words, n))
            self.frequencies.update(in_document)

    def weigh(self, words: Sequence[str], n: int) -> Vector:
        """The tf-idf weights of a caption's n-grams. One that no document has counts as if one had.

        The released code does not divide the counts by the caption's length: a cosine does not
        change, a clipped one does.
        """
        counts = count_ngrams(words, n)
        return {
            ngram: count * (self.log_documents - math.log(max(1, self.frequencies[ngram])))
            for ngram, count in counts.items()
        }


def _score(
    candidates: Captions,
    references: References,
    corpus: References | None,
    clips: bool,
    sigma: float,
) -> Float64[np.ndarray, ' M']:
    pictures = split_captions(candidates, references)
    documents = [of_picture for _, of_picture in pictures]
    if corpus is not None:
        documents = [[caption.split() for caption in captions] for captions in corpus]
    frequencies = DocumentFrequencies(documents)
    scores = []
    for candidate, of_picture in pictures:
        vectors = [frequencies.weigh(candidate, n) for n in range(1, ORDER + 1)]
        total = 0.0
        for reference in of_picture:
            penalty = math.exp(-((len(candidate) - len(reference)) ** 2) / (2 * sigma**2))
            for n, vector in enumerate(vectors, 1):
                total += penalty * _similarity(vector, frequencies.weigh(reference, n), clips)
        scores.append(SCALE * total / (ORDER * len(of_picture)))
    return np.array(scores)


def _similarity(candidate: Vector, reference: Vector, clips: bool) -> float:
    """Cosine of two vectors; 0 where one of them is 0."""
    product = 0.0
    for ngram in candidate.keys() & reference.keys():
        weight = candidate[ngram]
        if clips:
            weight = min(weight, reference[ngram])
        product += weight * reference[ngram]
    norms = _norm(candidate) * _norm(reference)
    return product / norms if norms else 0.0


def _norm(vector: Vector) -> float:
    return math.sqrt(sum(weight**2 for weight in vector.values()))
