"""Predictions -> detections: the best candidates, without those that show the same object.

All sizes are fixed, so that everything compiles once: what is left over has score 0 and class -1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vatt_jax.detection.model import Predictions
from vatt_jax.losses.detection import intersection_over_union


class Detections(NamedTuple):
    """Detections of each picture, surest first.

    Attributes:
        boxes: [B M 4], corners, in fractions of the picture.
        scores: [B M], 0 where there is none.
        classes: int32 [B M], -1 where there is none.
    """

    boxes: Float[Array, 'B M 4']
    scores: Float[Array, 'B M']
    classes: Int[Array, 'B M']


def suppress(
    boxes: Float[Array, 'C 4'],
    scores: Float[Array, ' C'],
    classes: Int[Array, ' C'],
    overlap: float,
) -> Bool[Array, ' C']:
    """Greedy non-maximum suppression within each class.

    Args:
        boxes: corners.
        scores: descending; those of 0 are no candidates.
        classes: of each.
        overlap: IoU above which the less sure of two boxes is dropped.

    Returns:
        The candidates that stay.
    """
    is_same_class = classes[:, None] == classes[None]
    overlaps = intersection_over_union(boxes[:, None], boxes[None]) > overlap
    suppresses = overlaps & is_same_class  # [C C]
    num_candidates = len(scores)
    later = jnp.arange(num_candidates)

    def visit(number: Array, kept: Array) -> Array:
        # One that was dropped drops nothing itself: that makes the order greedy.
        dropped = suppresses[number] & (later > number) & kept[number]
        return kept & ~dropped

    return jax.lax.fori_loop(0, num_candidates, visit, scores > 0)


def decode(
    predictions: Predictions, candidates: int, detections: int, overlap: float, min_score: float
) -> Detections:
    """The detections of a batch.

    Args:
        predictions: of all places.
        candidates: pairs of place and class that suppression looks at (C).
        detections: of a picture, at most (M).
        overlap: see `suppress`.
        min_score: lower ones are no detections.
    """
    # The geometric mean (FCOS, as released): a sure class at the edge of a box is not enough.
    class_scores = jax.nn.sigmoid(predictions.class_logits)
    centre_scores = jax.nn.sigmoid(predictions.centre_logits)
    scores = jnp.sqrt(class_scores * centre_scores[..., None])  # [B L P]

    def of_picture(scores: Array, boxes: Array) -> Detections:
        num_places, num_classes = scores.shape
        count = min(candidates, num_places * num_classes)
        best, index = jax.lax.top_k(scores.reshape(-1), count)
        best = jnp.where(best >= min_score, best, 0)
        classes = index % num_classes
        chosen = jnp.clip(boxes[index // num_classes], 0, 1)
        kept = suppress(chosen, best, classes, overlap)
        return _first(chosen, jnp.where(kept, best, 0), classes, detections)

    return jax.vmap(of_picture)(scores, predictions.boxes)


def _first(
    boxes: Float[Array, 'C 4'], scores: Float[Array, ' C'], classes: Int[Array, ' C'], count: int
) -> Detections:
    """The surest `count`, padded where there are fewer candidates."""
    missing = max(count - len(scores), 0)
    scores = jnp.pad(scores, (0, missing))
    boxes = jnp.pad(boxes, ((0, missing), (0, 0)))
    classes = jnp.pad(classes, (0, missing))
    best, index = jax.lax.top_k(scores, count)
    is_found = best > 0
    found_boxes = jnp.where(is_found[:, None], boxes[index], 0)
    found_classes = jnp.where(is_found, classes[index], -1).astype(jnp.int32)
    return Detections(found_boxes, best, found_classes)
