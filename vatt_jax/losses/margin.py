"""The contrastive margin loss on pairs of embeddings (Hadsell, Chopra and LeCun 2006).

Pairs that belong together are drawn to one point, others are pushed apart up to a distance. AVTS
(Korbar et al. 2018) learns from it whether sound and picture are in sync.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vatt_jax.losses.arguments import AnyArray, check_shape, wide


def distance(x: Float[AnyArray, '*pairs E'], y: Float[AnyArray, '*pairs E']) -> Float[Array, '...']:
    """Euclidean distance of each pair, in at least float32, with gradient 0 where it is 0.

    Args:
      x: first embeddings [... E].
      y: second embeddings [... E], of the same shape.

    Returns:
      [...].
    """
    squared = _squared_distance(x, y)
    # The root has an infinite derivative at 0. The inner select keeps it out of the branch that is
    # taken nowhere, since 0 times infinity is NaN.
    is_zero = squared == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squared)))


def contrastive_margin(
    x: Float[AnyArray, '*pairs E'],
    y: Float[AnyArray, '*pairs E'],
    is_match: Bool[AnyArray, '*pairs'],
    *,
    margin: float = 0.99,
    valid: Bool[AnyArray, '*pairs'] | None = None,
) -> Float[Array, '']:
    """Mean over pairs of d² where they match and max(0, margin - d)² elsewhere, d their distance.

    Embeddings are compared as they are, not scaled to length 1.

    Args:
      x: first embeddings [... E].
      y: second embeddings [... E].
      is_match: whether the two of a pair belong together [...].
      margin: distance beyond which other pairs cost nothing.
      valid: pairs that count [...]; None: all. With none that counts the loss is 0.

    Returns:
      float32 [].

    Raises:
      ValueError: the shapes do not fit, or the margin is not positive.
    """
    if jnp.shape(x) != jnp.shape(y):
        raise ValueError(
            f'expected x and y of one shape [... E], got x {jnp.shape(x)} and y {jnp.shape(y)}'
        )
    pairs = jnp.shape(x)[:-1]
    check_shape(is_match, pairs, 'is_match')
    if valid is None:
        valid = jnp.ones(pairs, bool)
    check_shape(valid, pairs, 'valid')
    if not margin > 0:
        raise ValueError(f'margin: expected a positive number, got {margin}')

    # Masked pairs are cut out before anything is computed from them, so that not even NaN reaches
    # their gradient.
    x = jnp.where(valid[..., None], x, 0)
    y = jnp.where(valid[..., None], y, 0)
    squared_distance = _squared_distance(x, y)
    squared_gap = jnp.maximum(margin - distance(x, y), 0) ** 2
    loss = jnp.where(is_match, squared_distance, squared_gap)
    return jnp.sum(jnp.where(valid, loss, 0)) / jnp.maximum(jnp.sum(valid), 1)


def _squared_distance(x: AnyArray, y: AnyArray) -> jax.Array:
    difference = wide(x) - wide(y)
    return jnp.sum(difference * difference, -1)
