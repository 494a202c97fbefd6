"""Pooling of maps to a given size, whatever theirs: PyTorch's adaptive pooling."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def adaptive_bins(length: int, parts: int) -> list[tuple[int, int]]:
    """The (first, last + 1) elements of each of `parts` bins over an axis.

    Bins overlap where `parts` does not divide the length; they repeat elements where there are more
    of them than elements.
    """
    return [
        (part * length // parts, math.ceil((part + 1) * length / parts)) for part in range(parts)
    ]


def adaptive_max(x: Float[Array, '...'], axis: int, parts: int) -> Float[Array, '...']:
    """The largest element of each bin along an axis, whose new length is `parts`."""
    bins = adaptive_bins(x.shape[axis], parts)
    maxima = [jax.lax.slice_in_dim(x, *ends, axis=axis).max(axis) for ends in bins]
    return jnp.stack(maxima, axis)


def adaptive_means(length: int, parts: int) -> Float[np.ndarray, 'parts length']:
    """The matrix that takes an axis to the means of its bins."""
    weights = np.zeros((parts, length), np.float32)
    for part, (first, end) in enumerate(adaptive_bins(length, parts)):
        weights[part, first:end] = 1 / (end - first)
    return weights


def max_to_width(x: Float[Array, 'B *grid D'], width: int) -> Float[Array, 'B F']:
    """The map of a stage as a vector of at most `width` numbers (AVID's linear probe).

    The maximum over all of time and over S × S bins of space, S the largest number with S²·D ≤
    `width`, and at most the map's own size. Of a spectrogram's map the two axes are those of space.

    Args:
        x: a map [B T H W D] or [B H W D].
        width: of the vector, about. One that holds more channels than this has one bin.
    """
    channels = x.shape[-1]
    num_bins = max(1, math.isqrt(width // channels))
    first_of_space = x.ndim - 3
    if first_of_space > 1:
        x = x.max(tuple(range(1, first_of_space)), keepdims=True)
    for axis in (first_of_space, first_of_space + 1):
        x = adaptive_max(x, axis, min(num_bins, x.shape[axis]))
    return x.reshape(len(x), -1)
