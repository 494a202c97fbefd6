"""Losses of detectors, element by element: whoever calls them decides what counts, and how much.

Boxes are corners (x0, y0, x1, y1) in any one unit, computed in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

# Areas are divided by no less than this, so that empty boxes have no NaN.
LEAST_AREA = 1e-12


def sigmoid_focal_loss(
    logits: Float[Array, '*shape'],
    targets: Shaped[Array, '*shape'],
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Array, '*shape']:
    """Binary cross entropies in which what is easy counts less (Lin et al., 2017, RetinaNet).

    -alpha (1 - p)^gamma log p where the target is 1, -(1 - alpha) p^gamma log(1 - p) where it
    is 0, with p = sigmoid(logit).

    Args:
        logits: any shape.
        targets: 0 or 1.
        alpha: weight of the ones; 1 - alpha is that of the zeros.
        gamma: 0 for weighted cross entropies.
    """
    logits = logits.astype(jnp.float32)
    is_one = targets > 0
    # Of the right answer, be it 1 or 0: one formula for both.
    towards_target = jnp.where(is_one, logits, -logits)
    weight = jnp.where(is_one, alpha, 1 - alpha)
    cross_entropy = jax.nn.softplus(-towards_target)
    return weight * jax.nn.sigmoid(-towards_target) ** gamma * cross_entropy


def area(boxes: Float[Array, '*shape 4']) -> Float[Array, '*shape']:
    """Width times height, 0 of boxes whose corners are swapped."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def intersection_over_union(
    a: Float[Array, '*left 4'], b: Float[Array, '*right 4']
) -> Float[Array, '...']:
    """IoU of boxes, by NumPy's rules of broadcasting; 0 where both are empty."""
    intersection, union = _overlap(a, b)
    return intersection / jnp.maximum(union, LEAST_AREA)


def generalised_iou(
    a: Float[Array, '*shape 4'], b: Float[Array, '*shape 4']
) -> Float[Array, '...']:
    """GIoU (Rezatofighi et al., 2019), in (-1, 1]: IoU less the unused share of the hull.

    Unlike IoU it has a gradient where boxes do not meet.
    """
    intersection, union = _overlap(a, b)
    low = jnp.minimum(a[..., :2], b[..., :2])
    high = jnp.maximum(a[..., 2:], b[..., 2:])
    hull = area(jnp.concatenate([low, high], axis=-1))
    iou = intersection / jnp.maximum(union, LEAST_AREA)
    return iou - (hull - union) / jnp.maximum(hull, LEAST_AREA)


def _overlap(
    a: Float[Array, '*left 4'], b: Float[Array, '*right 4']
) -> tuple[Float[Array, '...'], Float[Array, '...']]:
    """Areas of the intersection and of the union."""
    low = jnp.maximum(a[..., :2], b[..., :2])
    high = jnp.minimum(a[..., 2:], b[..., 2:])
    intersection = area(jnp.concatenate([low, high], axis=-1))
    return intersection, area(a) + area(b) - intersection
