"""Random records of the training set other than some given ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from vatt_jax.rng import Rng


def draw(
    rng: Rng, num_records: int | Int[Array, ''], count: int, excluded: Int[Array, 'B X']
) -> Int[Array, 'B {count}']:
    """Draw records for each clip, uniformly from those that are not excluded, with replacement.

    A draw depends on the place of `rng` and the clip's identity alone: not on the mesh, nor on the
    microbatch that holds the clip.

    Args:
      rng: random bits of the clips.
      num_records: records M of the training set, more than X, fewer than 2^31.
      count: draws K for each clip.
      excluded: for each clip the records that it must not get. Repetitions, and what is no record
        (-1), are of no effect.

    Returns:
      int32 [B K].
    """
    num_records = jnp.asarray(num_records).astype(jnp.uint32)
    ordered, num_excluded = _distinct(excluded, num_records)
    num_ranks = num_records - num_excluded  # [B]
    bits = rng.bits((count, 2))
    rank = scale(bits[..., 0], bits[..., 1], num_ranks[:, None])  # [B K]
    return record_of_rank(rank, ordered).astype(jnp.int32)


def record_of_rank(
    rank: UInt32[Array, 'B K'], excluded: UInt32[Array, 'B X']
) -> UInt32[Array, 'B K']:
    """The record that as many records that are not excluded come before.

    Args:
      rank: numbers of records that come before.
      excluded: in rising order, each once; the last ones may be beyond all records.
    """
    # j excluded ones come before excluded[j]. It comes before the record of a rank r exactly if
    # excluded[j] - j <= r.
    first_rank = excluded - jnp.arange(excluded.shape[1], dtype=jnp.uint32)  # [B X]
    num_before = jnp.sum(first_rank[:, None, :] <= rank[:, :, None], -1)  # [B K]
    return rank + num_before.astype(jnp.uint32)


def _distinct(
    excluded: Int[Array, 'B X'], num_records: UInt32[Array, '']
) -> tuple[UInt32[Array, 'B X'], UInt32[Array, ' B']]:
    """(the excluded records in order, each once, then numbers beyond all ranks; their number)."""
    # Negative numbers become large ones.
    ordered = jnp.sort(excluded.astype(jnp.uint32), -1)
    is_repeated = jnp.pad(ordered[:, 1:] == ordered[:, :-1], ((0, 0), (1, 0)))
    is_excluded = (ordered < num_records) & ~is_repeated
    # Far enough up that subtracting a place in the row leaves it beyond all records.
    beyond = jnp.uint32(0xFFFFFFFF)
    ordered = jnp.sort(jnp.where(is_excluded, ordered, beyond), -1)
    return ordered, jnp.sum(is_excluded, -1).astype(jnp.uint32)


def scale(
    high: UInt32[Array, '*shape'], low: UInt32[Array, '*shape'], bound: UInt32[Array, '...']
) -> UInt32[Array, '*shape']:
    """floor(x · bound / 2^64) of the 64-bit number x = high · 2^32 + low.

    For random bits it is uniform in 0 … bound - 1: no number is likelier than another by more than
    bound / 2^64, where the remainder of 32 bits would prefer some by bound / 2^32.
    """
    # x · bound = (high · bound) · 2^32 + low · bound; the words of it from 2^64 on are wanted.
    middle = high * bound  # the lower word of high · bound
    total = middle + _high_product(low, bound)
    carry = (total < middle).astype(jnp.uint32)
    return _high_product(high, bound) + carry


def _high_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """The upper 32 bits of the product of two uint32; 64-bit integers are off in JAX by default."""
    x_high, x_low = x >> 16, x & 0xFFFF
    y_high, y_low = y >> 16, y & 0xFFFF
    # x · y = x_high y_high 2^32 + (x_high y_low + x_low y_high) 2^16 + x_low y_low, in steps that
    # stay below 2^32.
    middle = x_high * y_low + ((x_low * y_low) >> 16)
    other = x_low * y_high + (middle & 0xFFFF)
    return x_high * y_high + (middle >> 16) + (other >> 16)
