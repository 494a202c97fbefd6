"""Crops of feature maps, as STiCA draws them: views of a clip without another pass of its tower."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vatt_jax.models.pooling import adaptive_means
from vatt_jax.rng import Rng


@dataclasses.dataclass(frozen=True)
class Crop:
    """A window of a map at a random place.

    Attributes:
        axis: 'space', a square of it at all times, or 'time', all of space for a while.
        size: its side, or its length, in places of the map.
        name: of its draw. Views draw apart from one another, and so do crops of one view.
    """

    axis: str
    size: int
    name: str


def draw_offsets(rng: Rng, length: int, size: int, published: bool = False) -> Int[Array, 'B 1']:
    """Where the window of each clip begins along an axis.

    Args:
        rng: of the crop.
        length: of the axis.
        size: of the window, at most the length.
        published: leave out the last place, as the authors' code does (its upper bound is
            exclusive): a window of all but one place is then always the first one.
    """
    num_places = length - size + 1
    if published:
        num_places = max(1, num_places - 1)
    return (rng.bits((1,)) % num_places).astype(jnp.int32)


def crop_moments(
    feature_map: Float[Array, 'B T H W D'],
    crops: tuple[Crop, ...],
    num_moments: int,
    rng: Rng,
    published: bool = False,
) -> Float[Array, 'B N M D']:
    """The whole map and its crops, each averaged over space and to M moments.

    Args:
        feature_map: of a tower.
        crops: N - 1 of them; the whole map comes first.
        num_moments: M, to which time is pooled, whatever the length of a crop.
        rng: of these clips and this view.
        published: see `draw_offsets`.
    """
    x = feature_map.astype(jnp.float32)
    num_frames, height, width = x.shape[1:4]
    means = x.mean((2, 3))  # [B T D]
    whole = jnp.asarray(adaptive_means(num_frames, num_moments))
    moments = [jnp.einsum('mt,btd->bmd', whole, means)]
    for crop in crops:
        places = rng.at(crop.name)
        if crop.axis == 'time':
            offset = draw_offsets(places, num_frames, crop.size, published)
            frames = offset + jnp.arange(crop.size)  # [B size]
            cut = jnp.take_along_axis(means, frames[:, :, None], axis=1)  # [B size D]
            bins = jnp.asarray(adaptive_means(crop.size, num_moments))
            moments.append(jnp.einsum('mt,btd->bmd', bins, cut))
            continue
        rows = draw_offsets(places.at('rows'), height, crop.size, published)
        columns = draw_offsets(places.at('columns'), width, crop.size, published)
        # A mean over the window as a sum with weights: one product, whatever each clip has drawn.
        row_weights = _window(rows, height, crop.size)
        column_weights = _window(columns, width, crop.size)
        inside = jnp.einsum('bthwd,bh,bw->btd', x, row_weights, column_weights)
        moments.append(jnp.einsum('mt,btd->bmd', whole, inside))
    return jnp.stack(moments, axis=1)


def _window(offset: Int[Array, 'B 1'], length: int, size: int) -> Float[Array, 'B L']:
    """Weights that average `size` places of an axis from the offset on."""
    places = jnp.arange(length)
    is_inside = (places >= offset) & (places < offset + size)
    return is_inside.astype(jnp.float32) / size
