"""How many captions the segments of a split have, counted without a Python object a segment."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64

from data_pipelines.storage.columns import Strings, ranges

# Pairs of a segment and a sentence that are compared at a time, about: some 100 bytes each.
_PAIRS = 1 << 18
_SEGMENTS = 1 << 16


def max_captions(
    sentence_offset: Int64[np.ndarray, ' M_plus_1'],
    sentence_times: tuple[Float32[np.ndarray, ' N'], Float32[np.ndarray, ' N']],
    sentence_text: Strings,
    segment_record: Int32[np.ndarray, ' G'],
    segment_times: tuple[Float32[np.ndarray, ' G'], Float32[np.ndarray, ' G']],
    segment_caption: Strings,
) -> int:
    """The largest `len(index.captions_of(segment))` of all segments, from the columns of `Index`.

    Args:
      sentence_offset: first sentence of each record, and their number N.
      sentence_times: starts and ends of the sentences, in seconds.
      sentence_text: of each sentence [N].
      segment_record: the record of each segment.
      segment_times: likewise of the segments.
      segment_caption: of each segment [G], '' without.
    """
    # Most datasets have none.
    if not len(segment_caption.data):
        return 0
    most = 1
    for segments in _blocks(sentence_offset, segment_record):
        lengths = np.diff(segment_caption.offsets[segments[0] : segments[-1] + 2])
        segments = segments[lengths > 0]
        # A pair is a segment of the block and a sentence of its record.
        pair_offsets, sentences = ranges(sentence_offset, segment_record[segments])
        owners = np.repeat(np.arange(len(segments)), np.diff(pair_offsets))
        is_alike = np.ones(len(sentences), bool)
        for of_segment, of_sentence in zip(segment_times, sentence_times):
            is_alike &= of_sentence[sentences] == of_segment[segments[owners]]
        sentences, owners = sentences[is_alike], owners[is_alike]
        is_caption = _equal_texts(sentence_text, sentences, segment_caption, segments[owners])
        # Sentences of its stretch count where one of them is the segment's caption.
        num_alike = np.bincount(owners, minlength=len(segments))
        has_caption = np.bincount(owners[is_caption], minlength=len(segments)) > 0
        most = max(most, int(num_alike[has_caption].max(initial=0)))
    return most


def _blocks(
    sentence_offset: Int64[np.ndarray, ' M_plus_1'], segment_record: Int32[np.ndarray, ' G']
) -> Iterator[Int64[np.ndarray, ' g']]:
    """Numbers of all segments, in runs of about `_PAIRS` pairs and at most `_SEGMENTS` segments."""
    for begin in range(0, len(segment_record), _SEGMENTS):
        records = segment_record[begin : begin + _SEGMENTS]
        num_sentences = sentence_offset[records + 1] - sentence_offset[records]
        # One more, so that segments without sentences fill a run too.
        num_pairs = np.cumsum(num_sentences + 1)
        cuts = np.flatnonzero(np.diff(num_pairs // _PAIRS)) + 1
        yield from np.split(np.arange(begin, begin + len(records)), cuts)


def _equal_texts(
    texts: Strings, rows: Int[np.ndarray, ' n'], others: Strings, other_rows: Int[np.ndarray, ' n']
) -> Bool[np.ndarray, ' n']:
    """Which texts[rows[i]] == others[other_rows[i]]."""
    lengths = texts.offsets[rows + 1] - texts.offsets[rows]
    other_lengths = others.offsets[other_rows + 1] - others.offsets[other_rows]
    is_equal = lengths == other_lengths
    pairs = np.flatnonzero(is_equal)
    _, characters = ranges(texts.offsets, rows[pairs])
    _, other_characters = ranges(others.offsets, other_rows[pairs])
    differs = texts.data[characters] != others.data[other_characters]
    owners = np.repeat(pairs, lengths[pairs])
    is_equal[owners[differs]] = False
    return is_equal
