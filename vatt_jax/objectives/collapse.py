"""Whether features still tell clips apart: what objectives without negatives have to watch."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def spread(features: Float[Array, 'B D'], valid: Bool[Array, ' B']) -> Float[Array, '']:
    """Standard deviation over the clips of a batch, averaged over features.

    0 is collapse: all clips have one feature.

    Args:
        features: of each clip.
        valid: clips that count.
    """
    features = features.astype(jnp.float32)
    rows = valid[:, None]
    count = jnp.maximum(valid.sum(), 1)
    mean = jnp.where(rows, features, 0).sum(0) / count  # [D]
    squares = jnp.square(features - mean)  # [B D]
    deviation = jnp.sqrt(jnp.where(rows, squares, 0).sum(0) / count)  # [D]
    return deviation.mean()
