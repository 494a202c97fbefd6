"""Which samples of a record belong to a window."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from jaxtyping import Int16, Int64, Shaped


def first_samples(start: np.ndarray, samples: np.ndarray, rate: int) -> Int64[np.ndarray, ' B']:
    """The sample at `start` [B] seconds, the moment of the clip's first frame.

    Inside records of `samples` [B].
    """
    nearest = np.floor(np.asarray(start) * rate + 0.5).astype(np.int64)
    return nearest % np.maximum(samples, 1)  # a record without sound has 0


def seconds(first: int, count: int, total: int, rate: int) -> Collection[int]:
    """Which seconds of a record hold a window; cyclically, as `window` reads them.

    Args:
      first: first sample of the window.
      count: samples of the window.
      total: samples of the record.
      rate: samples per second.
    """
    if first + count <= total:
        # Pieces are of a second; a window that begins within one touches one more.
        return range(first // rate, (first + count - 1) // rate + 1)
    until_end = range(first // rate, (total - 1) // rate + 1)
    # What is left is read from the beginning, but never beyond `first`, where it began.
    last_from_begin = min(first, first + count - total) - 1
    from_begin = range(0, last_from_begin // rate + 1)
    return set(until_end) | set(from_begin)


def window(
    pieces: Mapping[int, np.ndarray], first: int, count: int, total: int, rate: int
) -> Shaped[np.ndarray, ' S']:
    """`count` samples from `first` on.

    A record that ends earlier repeats cyclically, as its frames do.

    Args:
      pieces: second -> its samples [rate], for all of `seconds`.
      first: first sample of the window.
      count: samples of the window.
      total: samples of the record.
      rate: samples per second.
    """
    if first + count <= total:
        begin = (first // rate) * rate  # of the first piece
        run = np.concatenate([pieces[s] for s in seconds(first, count, total, rate)])
        return run[first - begin : first - begin + count]
    cyclic = (first + np.arange(count)) % total
    # Seconds that were not read stay 0; `cyclic` does not touch them.
    record = np.zeros(total, next(iter(pieces.values())).dtype)
    for second, piece in pieces.items():
        record[second * rate : second * rate + len(piece)] = piece
    return record[cyclic]


def to_int16(x: Shaped[np.ndarray, ' S']) -> Int16[np.ndarray, ' S']:
    """float32 in [-1, 1] -> int16, clipped; int16 as it is."""
    if x.dtype == np.int16:
        return x
    # 32767 on both sides, so that 0 stays 0; -32768 is never used.
    return np.rint(np.clip(x, -1, 1) * np.float32(32767)).astype(np.int16)
