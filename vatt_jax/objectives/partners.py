"""Who lends a clip what it is mismatched with: other clips of the batch, of other records."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vatt_jax.rng import Rng


def draw_partners(
    record: Int[Array, ' B'],
    valid: Bool[Array, ' B'],
    rng: Rng,
    likeness: Float[Array, 'B B'] | None = None,
    candidates: int = 1,
) -> tuple[Int[Array, ' B'], Bool[Array, ' B']]:
    """For each clip another one of another record that has a stream.

    The clips stand in a circle, in an order drawn for the batch, and each takes the next one that
    will do, or of the next few the one most like itself. Where all are of different records and
    have the stream, and the next one is taken, every clip is taken once.

    Args:
      record: of which each clip is.
      valid: which clips have the stream.
      rng: of the batch; all clips share the draw.
      likeness: of each clip and each other one; None: the next one is taken.
      candidates: how many of the next ones are looked at.

    Returns:
      (row of the other clip, whether there is one).
    """
    num_rows = len(valid)
    place = rng.permutation(num_rows, per_example=False)
    # How far behind clip i clip j stands: 0 for i itself.
    steps = (place[None] - place[:, None]) % num_rows
    will_do = (record[:, None] != record[None]) & valid[None]  # [B B]
    steps = jnp.where(will_do, steps, num_rows)
    has_partner = will_do.any(axis=1)
    if likeness is None:
        return jnp.argmin(steps, axis=1), has_partner
    last = jnp.sort(steps, axis=1)[:, min(candidates, num_rows) - 1]  # [B]
    is_candidate = will_do & (steps <= last[:, None])
    partner = jnp.argmax(jnp.where(is_candidate, likeness, -jnp.inf), axis=1)
    return partner, has_partner
