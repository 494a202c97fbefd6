"""Contrast of pictures, position by position, with sounds: the score is the best position's.

    s(i, j) = max over positions u of <x_iu, y_j> / temperature

x_i are the P positions of a picture's feature map, y_j is one vector of a sound (Afouras et al.
2022). The loss is the symmetric InfoNCE of the global batch. Its B·B·P products are never held:
they are made block by block, once in the forward and once in the backward pass, so that memory is
linear in the batch. `dense` is the same as one would write it on a blackboard.

Inside `jax.set_mesh` pictures stay where they are and sounds, which are P times smaller, are
gathered (blockwise.py).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from vatt_jax.losses.arguments import (
    AnyArray,
    Scalar,
    Valid,
    as_mask,
    cast,
    check_temperature,
    unit,
    wide,
)
from vatt_jax.losses.blockwise import (
    AUTO,
    How,
    Layout,
    choose_layout,
    gather_keys,
    on_devices,
    pad_rows,
    rows_per_device,
    split_blocks,
)
from vatt_jax.losses.similarity import NEVER

# Products of one block, over all its pairs and positions: 16 MiB in float32.
BLOCK_PRODUCTS = 4 * 2**20

# Letters of shapes: m pictures and n sounds (of the global batch, or of one device inside the
# loops); t pictures and u sounds of one block; P positions; E embedding width.


class Side(NamedTuple):
    """Pictures [m P E] or sounds [n E], and which of them are there."""

    data: jax.Array
    valid: jax.Array


class Term(NamedTuple):
    """A direction's share of the derivative: exp(score - log_sum_exp) * cotangent, of each row."""

    log_sum_exp: jax.Array
    cotangent: jax.Array


class ExpSum(NamedTuple):
    """Sums of exponentials that cannot overflow: total = sum of exp(score - top)."""

    top: jax.Array
    total: jax.Array


def max_over_positions(
    x: Float[AnyArray, 'B *grid E'],
    y: Float[AnyArray, 'B E'],
    *,
    x_valid: Valid = None,
    y_valid: Valid = None,
    temperature: Scalar = 0.07,
    normalise: bool = True,
    how: How = AUTO,
) -> Float[Array, '']:
    """InfoNCE both ways between pictures and their sounds, averaged over the two directions.

    Where several positions are equally good, they share the gradient.

    Args:
        x: maps of the pictures, over any grid.
        y: vectors of their sounds.
        x_valid: bool [B]: which clips have a picture. A clip counts where it has both; what is not
            there gets exactly zero gradient.
        y_valid: bool [B]: which clips have a sound.
        temperature: number, or a float32 [] where it is learnt.
        normalise: every position and every sound is put on the unit sphere first.
        how: `block` and `dtype` are used; sounds are always gathered.

    Returns:
        float32 [], the mean over valid clips of the global batch.

    Raises:
        ValueError: the shapes do not fit, or the temperature is no positive number.
    """
    pictures, sounds = _prepare(x, y, x_valid, y_valid, temperature, normalise, how)
    rows, columns = log_sum_exp(pictures, sounds, how)
    return _mean(rows, columns, pictures, sounds)


def dense(
    x: Float[AnyArray, 'B *grid E'],
    y: Float[AnyArray, 'B E'],
    *,
    x_valid: Valid = None,
    y_valid: Valid = None,
    temperature: Scalar = 0.07,
    normalise: bool = True,
    how: How = AUTO,
) -> Float[Array, '']:
    """The definition of `max_over_positions`, with all products in memory."""
    pictures, sounds = _prepare(x, y, x_valid, y_valid, temperature, normalise, how)
    scores = _scores(pictures, sounds)  # [B B]
    rows, columns = jax.nn.logsumexp(scores, 1), jax.nn.logsumexp(scores, 0)
    return _mean(rows, columns, pictures, sounds)


def _prepare(
    x: AnyArray,
    y: AnyArray,
    x_valid: Valid,
    y_valid: Valid,
    temperature: Scalar,
    normalise: bool,
    how: How,
) -> tuple[Side, Side]:
    """Both sides, masked, normalised and cast; the temperature goes into the sounds.

    Raises:
        ValueError: see `max_over_positions`.
    """
    if x.ndim < 3 or y.ndim != 2 or len(x) != len(y) or x.shape[-1] != y.shape[-1] or not x.size:
        raise ValueError(
            f'expected maps x [B *grid E] and vectors y [B E], got x {x.shape} and y {y.shape}'
        )
    check_temperature(temperature)
    is_picture = as_mask(x_valid, (len(x),), 'x_valid')
    is_sound = as_mask(y_valid, (len(y),), 'y_valid')
    # Before anything is computed from them: not even 0 · NaN may reach a gradient.
    pictures = wide(x).reshape(len(x), -1, x.shape[-1])
    pictures = jnp.where(is_picture[:, None, None], pictures, 0)
    sounds = jnp.where(is_sound[:, None], wide(y), 0)
    if normalise:
        pictures, sounds = unit(pictures), unit(sounds)
    sounds = sounds * (1 / temperature)
    return Side(cast(pictures, how), is_picture), Side(cast(sounds, how), is_sound)


def _mean(
    rows: Float[Array, ' B'], columns: Float[Array, ' B'], pictures: Side, sounds: Side
) -> Float[Array, '']:
    accumulate = rows.dtype
    products = jnp.einsum(
        'bpe,be->bp',
        pictures.data,
        sounds.data,
        precision='highest',
        preferred_element_type=accumulate,
    )
    own = products.max(1)  # [B]
    is_pair = pictures.valid & sounds.valid
    loss = (rows + columns) / 2 - own
    return jnp.sum(jnp.where(is_pair, loss, 0)) / jnp.maximum(is_pair.sum(), 1)


# ---- The two sums, and their derivative by hand.


def log_sum_exp(
    pictures: Side, sounds: Side, how: How = AUTO
) -> tuple[Float[Array, ' m'], Float[Array, ' n']]:
    """Log-sum-exps of the scores of every picture with all sounds, and of every sound.

    What is not valid counts for nothing, and its own sum means nothing.

    Args:
        pictures: [m P E].
        sounds: [n E], over the temperature.
        how: see `max_over_positions`.

    Returns:
        At least in float32.
    """
    (m, num_positions, _), n = pictures.data.shape, len(sounds.data)
    # As many pictures as sounds.
    side = max(1, math.isqrt(BLOCK_PRODUCTS // num_positions))
    layout = choose_layout(m, n, 0, How('gather', how.block or side))
    pictures = _pad(pictures, layout.devices)
    sounds = _pad(sounds, layout.devices)
    rows, columns = _sums(layout, pictures, sounds)
    return rows[:m], columns[:n]


def _pad(side: Side, devices: int) -> Side:
    """Rows that count for nothing, up to equal shares of all devices."""
    total = devices * rows_per_device(len(side.data), devices)
    return Side(*(pad_rows(array, total) for array in side))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(layout: Layout, pictures: Side, sounds: Side) -> tuple[jax.Array, jax.Array]:
    return _sums_forward(layout, pictures, sounds)[0]


def _sums_forward(layout: Layout, pictures: Side, sounds: Side) -> Any:
    rows = PartitionSpec(layout.axes)
    forward = on_devices(_forward, None, layout, (rows, rows), (rows, PartitionSpec()))
    sums = forward(pictures, sounds)
    return sums, (pictures, sounds, sums)


def _sums_backward(layout: Layout, residuals: Any, cotangents: Any) -> tuple[Side, Side]:
    pictures, sounds, sums = residuals
    row_term, column_term = map(Term, sums, cotangents)
    rows = PartitionSpec(layout.axes)
    in_specs = (rows, rows, rows, PartitionSpec())
    backward = on_devices(_backward, None, layout, in_specs, (rows, rows))
    dx, dy = backward(pictures, sounds, row_term, column_term)
    # None as a cotangent means zero: masks have no derivative.
    return Side(dx, None), Side(dy, None)  # type: ignore[arg-type]


_sums.defvjp(_sums_forward, _sums_backward)


# ---- Below: on one device's share.


def _scores(pictures: Side, sounds: Side) -> Float[Array, 't u']:
    """The scores of one block; NEVER where one of the two is not there."""
    accumulate = jnp.promote_types(pictures.data.dtype, jnp.float32)
    products = jnp.einsum(
        'tpe,ue->tpu',
        pictures.data,
        sounds.data,
        precision='highest',
        preferred_element_type=accumulate,
    )
    return jnp.where(pictures.valid[:, None] & sounds.valid, products.max(1), NEVER)


def _forward(
    task: None, layout: Layout, pictures: Side, sounds: Side
) -> tuple[Float[Array, ' m'], Float[Array, ' n']]:
    """The sums of this device's pictures, and those of all sounds."""
    sounds = gather_keys(layout, sounds)
    m, n = len(pictures.data), len(sounds.data)
    picture_blocks = split_blocks(pictures, layout.tile[0])  # [blocks t …]
    sound_blocks = split_blocks(sounds, layout.tile[1])  # [blocks u …]
    dtype = jnp.promote_types(pictures.data.dtype, jnp.float32)

    def visit_sounds(rows: ExpSum, sound_block: Side) -> tuple[ExpSum, ExpSum]:
        def visit_pictures(columns: ExpSum, block: tuple[Side, ExpSum]) -> tuple[ExpSum, ExpSum]:
            picture_block, row = block
            s = _scores(picture_block, sound_block)
            return _add(columns, s, 0), _add(row, s, 1)

        columns = _nothing(sound_block.valid.shape, dtype)
        columns, rows = jax.lax.scan(visit_pictures, columns, (picture_blocks, rows))
        return rows, columns

    rows = _nothing(picture_blocks.valid.shape, dtype)
    rows, columns = jax.lax.scan(visit_sounds, rows, sound_blocks)
    if layout.axes:
        # Totals can be added once they refer to the same top.
        top = jax.lax.pmax(columns.top, layout.axes)
        total = jax.lax.psum(columns.total * jnp.exp(columns.top - top), layout.axes)
        columns = ExpSum(top, total)
    return _log(rows).reshape(-1)[:m], _log(columns).reshape(-1)[:n]


def _nothing(shape: tuple[int, ...], dtype: Any) -> ExpSum:
    return ExpSum(jnp.full(shape, NEVER, dtype), jnp.zeros(shape, dtype))


def _add(sums: ExpSum, scores: Float[Array, 't u'], axis: int) -> ExpSum:
    """The sums with those of one more block, over one of its axes."""
    top = jnp.maximum(sums.top, scores.max(axis))
    terms = jnp.exp(scores - jnp.expand_dims(top, axis))
    return ExpSum(top, sums.total * jnp.exp(sums.top - top) + terms.sum(axis))


def _log(sums: ExpSum) -> jax.Array:
    # Padding alone: nothing was added. Its sum means nothing, but is finite.
    return sums.top + jnp.log(jnp.maximum(sums.total, 1e-30))


def _backward(
    task: None,
    layout: Layout,
    pictures: Side,
    sounds: Side,
    row_term: Term,
    column_term: Term,
) -> tuple[Float[Array, 'm P E'], Float[Array, 'n E']]:
    """The gradients of this device's pictures, and of its own sounds."""
    sounds = gather_keys(layout, sounds)
    m, n = len(pictures.data), len(sounds.data)
    tile = layout.tile
    picture_blocks, row_terms = split_blocks((pictures, row_term), tile[0])
    sound_blocks, column_terms = split_blocks((sounds, column_term), tile[1])
    dtype = row_term.cotangent.dtype

    def visit_sounds(dx: jax.Array, block: tuple[Side, Term]) -> tuple[jax.Array, jax.Array]:
        sound_block, columns = block

        def visit_pictures(
            dy: jax.Array, block: tuple[Side, Term, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            picture_block, rows, dx = block
            more_dx, more_dy = _block_gradients(picture_block, sound_block, rows, columns)
            return dy + more_dy, dx + more_dx

        dy = jnp.zeros(sound_block.data.shape, dtype)
        dy, dx = jax.lax.scan(visit_pictures, dy, (picture_blocks, row_terms, dx))
        return dx, dy

    dx = jnp.zeros(picture_blocks.data.shape, dtype)
    dx, dy = jax.lax.scan(visit_sounds, dx, (sound_blocks, column_terms))
    dx = dx.reshape(-1, *pictures.data.shape[1:])[:m]
    dy = dy.reshape(-1, sounds.data.shape[-1])[:n]
    if layout.axes:
        dy = jax.lax.psum_scatter(dy, layout.axes, tiled=True)
    return dx.astype(pictures.data.dtype), dy.astype(sounds.data.dtype)


def _block_gradients(
    pictures: Side, sounds: Side, rows: Term, columns: Term
) -> tuple[Float[Array, 't P E'], Float[Array, 'u E']]:
    """What the scores of one block add to the gradients; products are made again."""

    def scores_of(x: jax.Array, y: jax.Array) -> jax.Array:
        return _scores(Side(x, pictures.valid), Side(y, sounds.valid))

    # JAX's own derivative of the maximum shares it among equally good positions.
    s, pull = jax.vjp(scores_of, pictures.data, sounds.data)
    by_row = jnp.exp(s - rows.log_sum_exp[:, None]) * rows.cotangent[:, None]
    by_column = jnp.exp(s - columns.log_sum_exp) * columns.cotangent
    return pull(by_row + by_column)
