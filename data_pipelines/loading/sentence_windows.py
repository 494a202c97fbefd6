"""Which sentences of a record belong to a window, and their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

from vatt_jax.inputs.tokenizer import Tokenizer


def candidates(begin: np.ndarray, end: np.ndarray, start: float, window: float, k: int) -> range:
    """The k sentences nearest in time to a window: contiguous neighbours, as in the official data.

    The run is placed around the sentence nearest to the window (gap in time, then distance of
    centres, then order) and moved inside the list; shorter lists give all they have.

    Args:
      begin: of the record's sentences [n], in seconds, sorted.
      end: of the record's sentences [n], in seconds.
      start: of the window, in seconds.
      window: its length in seconds.
      k: sentences to choose.
    """
    num_sentences = len(begin)
    if num_sentences <= k:
        return range(num_sentences)
    # [n] seconds between sentence and window, 0 where they overlap.
    gap = np.maximum(np.maximum(begin - (start + window), start - end), 0.0)
    centre_distance = np.abs((begin + end) / 2 - (start + window / 2))
    # lexsort takes the most important key last.
    ranking = np.lexsort((np.arange(num_sentences), centre_distance, gap))
    nearest = int(ranking[0])
    # An even k takes one more behind the nearest sentence than before it.
    first = min(max(nearest - (k - 1) // 2, 0), num_sentences - k)
    return range(first, first + k)


def encode(
    tokenizer: Tokenizer, sentences: Sequence[Sequence[str]], k: int, words: int
) -> tuple[Int32[np.ndarray, 'B K L'], Bool[np.ndarray, 'B K']]:
    """Encode the sentences of each row.

    Args:
      tokenizer: of the data.
      sentences: of each row; those beyond the first k are left out.
      k: sentences of a row; rows of fewer are filled with 0.
      words: of a sentence.

    Returns:
      Word numbers, and a mask of the sentences that hold any word.
    """
    data = np.zeros((len(sentences), k, words), np.int32)
    rows, columns, texts = [], [], []
    for row, row_sentences in enumerate(sentences):
        for column, text in enumerate(row_sentences[:k]):
            rows.append(row)
            columns.append(column)
            texts.append(text)
    if texts:
        # All sentences of the batch at once: tokenizers are faster so.
        data[rows, columns] = tokenizer.encode(texts, words)
    return data, (data != 0).any(axis=-1)  # id 0 is padding
