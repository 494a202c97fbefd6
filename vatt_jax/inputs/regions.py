"""Regions of pictures, and the words beside them, as ViLBERT and UNITER read them.

A region is the feature vector that a detector has of a box, and where the box is. Grid cells or
patches are regions too: their boxes are the cells. Pictures have different numbers of regions;
here they are padded to one, with a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

AnyArray = Array | np.ndarray

# Numbers that say where a box is: x0 y0 x1 y1 as shares of the picture, and
FORMS = {
    5: 'its share of the area (ViLBERT)',
    7: 'its width, height and share of the area (UNITER)',
}
# Box of a region that is the whole picture.
WHOLE = (0.0, 0.0, 1.0, 1.0)


@flax.struct.dataclass
class Words:
    """Sentences.

    Attributes:
        ids: int32 [B L], numbers of the words, [CLS] first.
        mask: bool [B L], words that are no padding.
        types: int32 [B L], segment of each word; None: 0.
    """

    # Any: JAX rebuilds this tree with other things than arrays as leaves.
    ids: Any
    mask: Any
    types: Any = None


@flax.struct.dataclass
class Regions:
    """Regions of pictures.

    Attributes:
        features: [B N F].
        boxes: [B N 5] or [B N 7], see `box_numbers`.
        mask: bool [B N], regions that are no padding.
        is_hidden: bool [B N], regions whose feature was replaced by zeros; None: none.
        types: int32 [B N], segment of each region (UNITER); None: 1.
    """

    features: Any
    boxes: Any
    mask: Any
    is_hidden: Any = None
    types: Any = None


def box_numbers(corners: Float[AnyArray, '*shape 4'], form: int) -> Float[Array, '*shape F']:
    """What the models are told of where a box is.

    Args:
        corners: x0 y0 x1 y1, as shares of the picture's width and height.
        form: how many numbers, entry of FORMS.

    Raises:
        ValueError: there is no such form.
    """
    if form not in FORMS:
        known = ', '.join(f'{count}: {what}' for count, what in FORMS.items())
        raise ValueError(f'form: expected one of {known}; got {form}')
    corners = jnp.asarray(corners)
    sides = corners[..., 2:] - corners[..., :2]
    area = sides[..., :1] * sides[..., 1:]
    if form == 5:
        return jnp.concatenate([corners, area], -1)
    return jnp.concatenate([corners, sides, area], -1)


def pad(
    features: Sequence[Float[np.ndarray, '_ F']],
    corners: Sequence[Float[np.ndarray, '_ 4']],
    length: int,
    form: int,
) -> Regions:
    """Pictures with different numbers of regions as one batch.

    Args:
        features: of each picture, its best regions first; those beyond `length` are cut off.
        corners: of each picture, x0 y0 x1 y1 as shares of it.
        length: N.
        form: see `box_numbers`.

    Returns:
        Regions of NumPy arrays, zeros at padding.

    Raises:
        ValueError: a picture has another number of features than of boxes.
    """
    width = features[0].shape[-1]
    padded = np.zeros((len(features), length, width), np.float32)
    boxes = np.zeros((len(features), length, form), np.float32)
    mask = np.zeros((len(features), length), bool)
    for row, (vectors, places) in enumerate(zip(features, corners, strict=True)):
        if len(vectors) != len(places):
            raise ValueError(
                f'picture {row}: expected as many boxes as features, got {len(places)} boxes and '
                f'{len(vectors)} features'
            )
        count = min(len(vectors), length)
        padded[row, :count] = vectors[:count]
        boxes[row, :count] = box_numbers(places[:count], form)
        mask[row, :count] = True
    return Regions(padded, boxes, mask)


def add_global(regions: Regions, is_covered: Bool[AnyArray, 'B N'] | None = None) -> Regions:
    """Put a region of the whole picture before all others (ViLBERT).

    Its feature is the sum of the others, divided by how many of them are not covered by a masked
    one: what was hidden is missing in the sum, so what overlaps it does not count either.

    Args:
        regions: of [B N].
        is_covered: see `masking.covered_regions`; None: none.

    Returns:
        Regions of [B 1+N], the first of which is never hidden.
    """
    mask = jnp.asarray(regions.mask)
    features = jnp.where(mask[..., None], regions.features, 0)
    counts = mask if is_covered is None else mask & ~jnp.asarray(is_covered)
    # Where all are covered the released code divides by 1.
    count = jnp.maximum(jnp.sum(counts, -1), 1)[:, None]
    mean = jnp.sum(features, 1) / count
    whole = box_numbers(np.array(WHOLE, np.float32), regions.boxes.shape[-1])
    whole = jnp.broadcast_to(whole, (len(mask), 1, whole.shape[-1]))
    is_hidden = regions.is_hidden
    if is_hidden is not None:
        is_hidden = jnp.pad(is_hidden, ((0, 0), (1, 0)))
    types = regions.types
    if types is not None:
        # The same segment as the first region's.
        types = jnp.concatenate([types[:, :1], types], 1)
    return Regions(
        features=jnp.concatenate([mean[:, None], features], 1),
        boxes=jnp.concatenate([whole, jnp.asarray(regions.boxes)], 1),
        mask=jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True),
        is_hidden=is_hidden,
        types=types,
    )
