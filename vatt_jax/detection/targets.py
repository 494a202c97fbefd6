"""Which box each place of the pyramid is to find, and the losses against it (FCOS).

Letters beside those of docs/glossary.md: L places of all levels, N boxes of a picture (padded).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from vatt_jax.detection.model import Places, Predictions
from vatt_jax.losses.detection import area, generalised_iou, sigmoid_focal_loss


@dataclasses.dataclass(frozen=True)
class Rules:
    """How places and boxes are matched.

    Attributes:
        radius: a place is positive this many cells about a box's centre, inside the box (centre
            sampling; FCOS: 1.5). Pseudo-boxes are surest in the middle.
        reach: a level finds boxes whose farthest side is up to so many of its cells away; the next
            coarser one up to twice that. The finest level has no lower and the coarsest no upper
            limit (FCOS: 8).
    """

    radius: float = 1.5
    reach: float = 4.0


@flax.struct.dataclass
class Targets:
    """What every place is to say.

    Attributes:
        classes: int32 [B L], -1 for background.
        boxes: [B L 4], of positive places.
        centreness: [B L], 1 in the middle of the box and 0 at its sides; of positive places.
        counted: bool [B L], the places that count at all.
    """

    classes: Any
    boxes: Any
    centreness: Any
    counted: Any


def assign(
    where: Places,
    boxes: Float[Array, 'B N 4'],
    classes: Int[Array, 'B N'],
    valid: Bool[Array, 'B N'],
    ignored: Bool[Array, 'B N'],
    rules: Rules,
) -> Targets:
    """The smallest box that each place belongs to.

    Args:
        where: the places.
        boxes: corners, in fractions of the picture.
        classes: of the boxes.
        valid: False for padding.
        ignored: boxes (crowds, cut off at the picture's edge) in which background is not sure:
            places inside of one that belong to no other box do not count.
        rules: see there.
    """
    distances = _distances(where, boxes)  # [B L N 4]
    is_inside = distances.min(axis=-1) > 0  # [B L N]
    eligible = is_inside & _is_central(where, boxes, rules) & _is_of_level(where, distances, rules)
    eligible &= (valid & ~ignored)[:, None]
    # Of several boxes the smallest one is the hardest to find otherwise; equal ones: the first.
    areas = jnp.where(eligible, area(boxes)[:, None], jnp.inf)
    chosen = areas.argmin(axis=-1)  # [B L]
    is_positive = eligible.any(axis=-1)

    chosen_boxes = jnp.take_along_axis(boxes, chosen[..., None], axis=1)
    chosen_classes = jnp.take_along_axis(classes, chosen, axis=1)
    chosen_distances = jnp.take_along_axis(distances, chosen[..., None, None], axis=2)[:, :, 0]
    is_unsure = (is_inside & (valid & ignored)[:, None]).any(axis=-1)
    return Targets(
        jnp.where(is_positive, chosen_classes, -1),
        chosen_boxes,
        jnp.where(is_positive, centreness(chosen_distances), 0),
        is_positive | ~is_unsure,
    )


def _distances(where: Places, boxes: Float[Array, 'B N 4']) -> Float[Array, 'B L N 4']:
    """From each place to the left, upper, right and lower side of each box; negative outside."""
    centre = where.centre[None, :, None]  # [1 L 1 2]
    low = centre - boxes[:, None, :, :2]
    high = boxes[:, None, :, 2:] - centre
    return jnp.concatenate([low, high], axis=-1)


def _is_central(where: Places, boxes: Float[Array, 'B N 4'], rules: Rules) -> Bool[Array, 'B L N']:
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2  # [B N 2]
    offset = jnp.abs(where.centre[None, :, None] - middle[:, None])  # [B L N 2]
    return (offset <= rules.radius * where.cell[:, None]).all(axis=-1)


def _is_of_level(
    where: Places, distances: Float[Array, 'B L N 4'], rules: Rules
) -> Bool[Array, 'B L N']:
    farthest = distances.max(axis=-1)
    cell = where.cell.max(axis=-1)  # [L]
    # A level begins where the next finer one ends.
    ends = [-np.inf]
    for level in range(where.level.max()):
        ends.append(rules.reach * cell[where.level == level][0])
    ends.append(np.inf)
    lower = np.asarray(ends)[where.level][:, None]
    upper = np.asarray(ends)[where.level + 1][:, None]
    return (farthest > lower) & (farthest <= upper)


def centreness(distances: Float[Array, '*shape 4']) -> Float[Array, '*shape']:
    """sqrt(min(l, r) / max(l, r) · min(t, b) / max(t, b)) of distances left, top, right, bottom."""
    near = jnp.minimum(distances[..., :2], distances[..., 2:])
    far = jnp.maximum(distances[..., :2], distances[..., 2:])
    ratio = jnp.maximum(near, 0) / jnp.maximum(far, 1e-12)
    product = ratio[..., 0] * ratio[..., 1]
    # Floored inside the root: its derivative at 0 is infinite.
    return jnp.sqrt(jnp.maximum(product, 1e-12))


def detection_loss(
    predictions: Predictions, targets: Targets, settings: Mapping[str, Any]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of focal, GIoU and centre-ness loss over the global batch.

    As in FCOS: classes and centre-ness over the number of positive places, boxes weighted by how
    central their places are.

    Args:
        predictions: of the heads.
        targets: of the same places.
        settings: 'alpha', 'gamma' of the focal loss; 'box_weight', 'centre_weight'.

    Returns:
        (float32 [], its parts and the number of positive places for each picture).
    """
    is_positive = targets.classes >= 0
    num_positive = jnp.maximum(is_positive.sum(), 1)
    num_classes = predictions.class_logits.shape[-1]
    # Of background, -1, all zeros.
    one_hot = jax.nn.one_hot(targets.classes, num_classes)
    focal = sigmoid_focal_loss(
        predictions.class_logits, one_hot, settings['alpha'], settings['gamma']
    )
    class_loss = jnp.sum(focal * targets.counted[..., None]) / num_positive

    weight = targets.centreness  # 0 for background
    # A select, for the boxes of background are anything.
    apart = jnp.where(is_positive, 1 - generalised_iou(predictions.boxes, targets.boxes), 0)
    box_loss = jnp.sum(weight * apart) / jnp.maximum(weight.sum(), 1e-6)

    cross_entropy = optax.sigmoid_binary_cross_entropy(
        predictions.centre_logits, targets.centreness
    )
    centre_loss = jnp.sum(jnp.where(is_positive, cross_entropy, 0)) / num_positive
    value = class_loss + settings['box_weight'] * box_loss + settings['centre_weight'] * centre_loss
    metrics = {
        'loss/class': class_loss,
        'loss/box': box_loss,
        'loss/centre': centre_loss,
        'positive_places': is_positive.sum() / len(targets.classes),
    }
    return value, metrics
