"""Which samples of a record belong to a window."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def first_samples(start: np.ndarray, samples: np.ndarray, rate: int) -> np.ndarray:
    """int64 [B]: the sample at `start` [B] seconds, the moment of the clip's first frame, inside records of `samples` [B]."""
    return np.floor(np.asarray(start) * rate + 0.5).astype(np.int64) % np.maximum(samples, 1)


def seconds(first: int, count: int, total: int, rate: int) -> range | set[int]:
    """Which seconds of a record of `total` samples hold those from `first` on; cyclically, as `window` reads them."""
    if first + count <= total:
        return range(first // rate, (first + count - 1) // rate + 1)
    around = set(range(first // rate, (total - 1) // rate + 1)) | set(
        range(0, (min(first, first + count - total) - 1) // rate + 1)
    )
    return around


def window(
    pieces: Mapping[int, np.ndarray], first: int, count: int, total: int, rate: int
) -> np.ndarray:
    """[count] samples from `first` on; a record that ends earlier repeats cyclically, as its frames do. pieces: second -> samples [rate]."""
    if first + count <= total:
        begin = first // rate
        run = np.concatenate([pieces[s] for s in seconds(first, count, total, rate)])
        return run[first - begin * rate : first - begin * rate + count]
    at = (first + np.arange(count)) % total
    whole = np.zeros(total, next(iter(pieces.values())).dtype)
    for s, piece in pieces.items():
        whole[s * rate : s * rate + len(piece)] = piece
    return whole[at]


def to_int16(x: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1] -> int16, clipped; int16 as it is."""
    return (
        x
        if x.dtype == np.int16
        else np.rint(np.clip(x, -1, 1) * np.float32(32767)).astype(np.int16)
    )
