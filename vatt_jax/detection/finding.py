"""How many objects are found at all, whatever they are called: heard ones, silent ones, several.

Average precision mixes finding with naming. These numbers are of boxes alone, so that heat maps,
which know no classes, and detectors stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.optimize
from jaxtyping import Bool, Float

from vatt_jax.detection import coco

# IoU from which a detection shows a true box, and from which two detections show the same object.
OVERLAP = 0.5
# The class of everything.
ANY = 1

Results = Sequence[Mapping[str, Any]]


def without_classes(
    truth: coco.Document, results: Results
) -> tuple[coco.Document, list[dict[str, Any]]]:
    """Both with one class for everything; of detections that show the same object, the surest.

    Args:
        truth: true boxes.
        results: COCO's results.
    """
    annotations = [{**box, 'category_id': ANY} for box in truth['annotations']]
    categories = [{'id': ANY, 'name': 'any'}]
    kept: list[dict[str, Any]] = []
    for detections in _by_image(results).values():
        kept += [{**detections[number], 'category_id': ANY} for number in _distinct(detections)]
    return {**truth, 'annotations': annotations, 'categories': categories}, kept


def found_shares(truth: coco.Document, results: Results) -> dict[str, float]:
    """Shares of true boxes that a detection shows (IoU 0.5), crowds left out.

    A picture with n true boxes has n detections, the surest; each shows one box at most. So nobody
    gains by guessing often.

    Args:
        truth: true boxes; where these tell `sounds`, heard and silent ones are counted apart.
        results: COCO's results.

    Returns:
        `all`, `sounding` and `silent` where there are such boxes; `several`: the share of pictures
        with two or more true boxes in which all of these are found.
    """
    by_image = _by_image(without_classes(truth, results)[1])
    found: dict[str, list[bool]] = {}
    for image, own in zip(truth['images'], coco.by_image(truth), strict=True):
        own = [box for box in own if not box.get('iscrowd', 0)]
        is_found = _is_found(own, by_image.get(image['id'], [])[: len(own)])
        for box, was_found in zip(own, is_found.tolist()):
            found.setdefault('all', []).append(was_found)
            if 'sounds' in box:
                kind = 'sounding' if box['sounds'] else 'silent'
                found.setdefault(kind, []).append(was_found)
        if len(own) > 1:
            found.setdefault('several', []).append(bool(is_found.all()))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _by_image(results: Results) -> dict[Any, list[Mapping[str, Any]]]:
    """The detections of each picture, the surest first."""
    by_image: dict[Any, list[Mapping[str, Any]]] = {}
    for result in results:
        by_image.setdefault(result['image_id'], []).append(result)
    for detections in by_image.values():
        detections.sort(key=lambda detection: -detection['score'])
    return by_image


def _distinct(detections: Results) -> list[int]:
    """Numbers of those that no surer one shows already (greedy suppression)."""
    corners = _corners(detections)
    is_same = coco.overlaps(corners, corners) > OVERLAP
    kept: list[int] = []
    for number in range(len(detections)):
        if not is_same[number, kept].any():
            kept.append(number)
    return kept


def _is_found(own: Results, detections: Results) -> Bool[np.ndarray, ' N']:
    """Which true boxes are shown, each by a detection of its own."""
    is_found = np.zeros(len(own), bool)
    if own and detections:
        meets = coco.overlaps(_corners(own), _corners(detections)) >= OVERLAP
        rows, columns = scipy.optimize.linear_sum_assignment(meets, maximize=True)
        is_found[rows] = meets[rows, columns]
    return is_found


def _corners(boxes: Results) -> Float[np.ndarray, 'N 4']:
    return coco.to_corners(np.array([box['bbox'] for box in boxes], np.float64).reshape(-1, 4))
