"""What the contrastive losses share: their arguments, checked, masked and cast, and their mean.

Shapes must be those that are named: a mask of another one would be broadcast or cut up in silence.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vatt_jax.losses.blockwise import How

AnyArray = Array | np.ndarray
Embeddings = Float[AnyArray, 'B E']
# One embedding or K candidates for each clip: [B E] or [B K E].
Candidates = Float[AnyArray, 'B *K E']
Valid = Bool[AnyArray, ' B'] | None
# [B K]; of one embedding for each clip [B] or [B 1].
CandidateMask = Bool[AnyArray, 'B *mask'] | None
# A number, or a learnt scalar.
Scalar = float | Float[AnyArray, '']


class Prepared(NamedTuple):
    """Both sides of a loss, ready to be multiplied.

    Attributes:
        x: [B E], zeros where x_valid is False.
        y: [B K E], zeros where y_mask is False.
        x_valid: bool [B].
        y_mask: bool [B K]: candidates that are there, of clips that have the modality.
        valid: bool [B]: clips that count, with x and at least one candidate.
        taint: [], 0, or NaN where raw embeddings that count are not finite; None: unit vectors,
            which are NaN there themselves.
    """

    x: jax.Array
    y: jax.Array
    x_valid: jax.Array
    y_mask: jax.Array
    valid: jax.Array
    taint: jax.Array | None

    @property
    def keys(self):
        return self.y.reshape(-1, self.y.shape[-1])

    @property
    def key_valid(self):
        return self.y_mask.reshape(-1)

    @property
    def own(self):
        """Which clip each row and each key belongs to."""
        b, k = self.y_mask.shape
        return jnp.arange(b), jnp.arange(b * k) // k


def prepare(
    x: Embeddings,
    y: Candidates,
    x_valid: Valid,
    y_valid: Valid,
    y_mask: CandidateMask,
    normalise: bool,
    how: How,
    single: bool = False,
) -> Prepared:
    """Both sides as [B E] and [B K E], masked, normalised and cast.

    Args:
        single: the loss takes one candidate per clip.

    Raises:
        ValueError: the shapes do not fit.
    """
    if x.ndim != 2 or y.ndim not in (2, 3) or len(x) != len(y) or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f'expected x [B E] and y [B E] or [B K E], got x {x.shape} and y {y.shape}'
        )
    if not x.size or not y.size:
        raise ValueError(f'expected at least one clip, got x {x.shape} and y {y.shape}')
    candidates = y[:, None] if y.ndim == 2 else y
    num_clips, num_candidates = candidates.shape[:2]
    if single and num_candidates > 1:
        raise ValueError(
            f'expected one candidate per clip, got {num_candidates} (y {y.shape}); '
            'use asymmetric or symmetric'
        )
    x_mask = as_mask(x_valid, (num_clips,), 'x_valid')
    has_y = as_mask(y_valid, (num_clips,), 'y_valid')
    if y_mask is not None and num_candidates == 1 and jnp.ndim(y_mask) == 1:
        y_mask = jnp.asarray(y_mask)[:, None]
    candidate_mask = has_y[:, None] & as_mask(y_mask, (num_clips, num_candidates), 'y_mask')
    # Masked rows are cut out before anything is computed from them, so that not even 0 * NaN
    # reaches their gradient.
    rows = jnp.where(x_mask[:, None], wide(x), 0)
    keys = jnp.where(candidate_mask[..., None], wide(candidates), 0)
    taint = None
    if normalise:
        rows, keys = unit(rows), unit(keys)
    else:
        taint = find_taint(rows) + find_taint(keys)
    return Prepared(
        x=cast(rows, how),
        y=cast(keys, how),
        x_valid=x_mask,
        y_mask=candidate_mask,
        valid=x_mask & candidate_mask.any(-1),
        taint=taint,
    )


def as_mask(mask: AnyArray | None, shape: tuple[int, ...], name: str) -> Bool[Array, '...']:
    """Returns a mask as bool, whatever numbers it was given in; None: all True.

    Raises:
        ValueError: it has another shape.
    """
    if mask is None:
        return jnp.ones(shape, bool)
    check_shape(mask, shape, name)
    return jnp.asarray(mask).astype(bool)


def check_shape(array: AnyArray, shape: tuple[int, ...], name: str) -> None:
    """Raises ValueError where an array does not have the shape that the others ask for."""
    if jnp.shape(array) != shape:
        raise ValueError(f'{name}: expected shape {shape}, got {jnp.shape(array)}')


def check_temperature(temperature: Scalar) -> None:
    """Raises ValueError for a temperature that no score can be divided by."""
    # A traced or NaN temperature passes: its loss is NaN where it is wrong.
    if isinstance(temperature, (int, float)) and temperature <= 0:
        raise ValueError(f'temperature: expected a positive number, got {temperature}')


def find_taint(x: Float[Array, '...']) -> Float[Array, '']:
    """Returns 0, or NaN where x is not finite, for a loss to add.

    The exponential of a score of -inf is 0: it would be left out of a sum in silence.
    """
    return jax.lax.stop_gradient(jnp.sum(0 * x))


def unit(x: Float[Array, '*rows E']) -> Float[Array, '*rows E']:
    """x / |x| over the last axis, the squared norm floored at 1e-12 (official VATT)."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))


def mean_over_clips(
    loss: Float[Array, ' B'],
    p: Prepared,
    replicas: int,
    masks: tuple[Bool[Array, ' B'], ...] = (),
) -> Float[Array, '']:
    """Mean over valid clips.

    With replicas, over each replica's valid clips first and then over replicas, as the official
    code does on so many devices.

    Args:
        loss: of each clip.
        p: says which clips count.
        replicas: equal parts of the batch.
        masks: instead of by the number of valid clips, the sum of B clips is scaled by B / n for
            each mask, n clips of which hold, one factor times the other, and divided by B (official
            VATT where both modalities are masked; no mean, if clips lack different ones).
    """
    check_replicas(replicas, len(loss))
    rows = len(loss) // replicas

    def split(values: jax.Array) -> jax.Array:
        return values.reshape(replicas, -1)

    def count(mask: jax.Array) -> jax.Array:
        # A replica without a valid clip has loss 0, not 0/0.
        return jnp.maximum(split(mask).sum(-1), 1)

    # Selected, not multiplied: the loss of a clip that is not there may be NaN.
    total = split(jnp.where(p.valid, loss, 0)).sum(-1)  # [replicas]
    for mask in masks:
        total = total * (rows / count(mask))
    mean = jnp.mean(total / (rows if masks else count(p.valid)))
    return mean if p.taint is None else mean + p.taint


def check_replicas(replicas: int, num_clips: int) -> None:
    """Raises ValueError where a batch cannot be cut into so many equal parts."""
    if replicas < 1:
        raise ValueError(f'replicas: expected a positive number, got {replicas}')
    if num_clips % replicas:
        raise ValueError(f'replicas={replicas} does not divide the batch of {num_clips} clips')


def wide(x: AnyArray) -> jax.Array:
    """At least float32: what is normalised in less loses digits."""
    return jnp.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def cast(x: jax.Array, how: How) -> jax.Array:
    """In the dtype that scores are computed from (`how.dtype`); float64, of tests alone, stays."""
    return x if x.dtype == jnp.float64 else x.astype(how.dtype)
