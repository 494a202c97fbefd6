"""Which sentences of a record belong to a window, and their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vatt_jax.inputs.tokenizer import Tokenizer


def candidates(begin: np.ndarray, end: np.ndarray, start: float, window: float, k: int) -> range:
    """The k sentences nearest in time to a window: contiguous neighbours, as in the official data.

    begin, end: seconds [n] of the record's sentences, sorted by begin. The run is placed around the sentence nearest to the
    window (gap in time, then distance of centres, then order) and moved inside the list; shorter lists give all they have.
    """
    n = len(begin)
    if n <= k:
        return range(n)
    gap = np.maximum(np.maximum(begin - (start + window), start - end), 0.0)
    centre = np.abs((begin + end) / 2 - (start + window / 2))
    nearest = int(np.lexsort((np.arange(n), centre, gap))[0])
    first = min(max(nearest - (k - 1) // 2, 0), n - k)
    return range(first, first + k)


def encode(
    tokenizer: Tokenizer, sentences: Sequence[Sequence[str]], k: int, words: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sentences of each row -> (data int32 [B k words], mask bool [B k]); a sentence without any word is masked."""
    data = np.zeros((len(sentences), k, words), np.int32)
    places = [(b, j) for b, row in enumerate(sentences) for j in range(min(k, len(row)))]
    if places:
        b, j = np.array(places).T
        data[b, j] = tokenizer.encode([sentences[x][y] for x, y in places], words)
    return data, (data != 0).any(-1)
