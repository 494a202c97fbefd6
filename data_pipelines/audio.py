"""Which samples of a record belong to a window."""
from __future__ import annotations

import numpy as np


def first_samples(start: np.ndarray, samples: np.ndarray, rate: int) -> np.ndarray:
    """int64 [B]: the sample at `start` [B] seconds, the moment of the clip's first frame, inside records of `samples` [B]."""
    return np.floor(np.asarray(start) * rate + 0.5).astype(np.int64) % np.maximum(samples, 1)


def window(pcm: np.ndarray, first: int, count: int) -> np.ndarray:
    """int16 [count] from sample `first` on; a record that ends earlier repeats cyclically, as its frames do."""
    if first + count <= len(pcm):
        return pcm[first:first + count]
    return pcm[(first + np.arange(count)) % len(pcm)]
