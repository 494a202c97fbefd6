"""What a detector is told of a picture: boxes and classes found by sound, or true ones.

True boxes or true classes in the place of one of both say which of the two costs how much
(docs/detection.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vatt_jax.detection.boxes import box_iou, find_boxes, upsample
from vatt_jax.detection.true_objects import Objects

# What is true: nothing; the class of each found box; the boxes of what is heard; boxes and classes
# of all objects, silent ones too.
TRUE = ('', 'classes', 'boxes', 'all')


@dataclasses.dataclass(frozen=True)
class Label:
    """A box with its class.

    Attributes:
        box: y0 x0 y1 x1, as shares of the picture.
        category: number of its cluster or class, from 0 on.
        fields: what is written beside: `score` of a found box, `sounds` of a true one.
    """

    box: Float[np.ndarray, ' 4']
    category: int
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rules:
    """How boxes are found.

    Attributes:
        beta: of the threshold β · maximum + (1 - β) · mean.
        most: boxes of a picture; 1 is the paper's.
        score: boxes whose highest cosine is lower are left out.
    """

    beta: float = 0.5
    most: int = 1
    score: float = -1.0


def found_labels(
    heat: Float[np.ndarray, 'h w'], cluster: int, height: int, width: int, rules: Rules
) -> list[Label]:
    """Boxes of a heat map, all of the picture's cluster.

    Args:
        heat: the map.
        cluster: of the picture and its sound.
        height: of the picture, in pixels, to which boxes are exact.
        width: of the picture.
        rules: how they are found.
    """
    large = upsample(heat.astype(np.float64), height, width)
    found = find_boxes(large, rules.beta, rules.most)
    labels = []
    for box, score in zip(found.boxes, found.scores.tolist()):
        if score >= rules.score:
            labels.append(Label(box, cluster, {'score': round(score, 6)}))
    return labels


def with_true_classes(
    labels: Sequence[Label], heard: Objects, class_names: Sequence[str]
) -> list[Label]:
    """Each box with the class of the heard object that it overlaps most, of equal ones the first.

    Args:
        labels: found boxes.
        heard: true objects; without any there are no labels.
        class_names: of the categories.
    """
    if not heard.kinds:
        return []
    labelled = []
    for label in labels:
        overlaps = box_iou(label.box[None], heard.boxes)[0]
        kind = heard.kinds[int(overlaps.argmax())]
        labelled.append(dataclasses.replace(label, category=class_names.index(kind)))
    return labelled


def true_labels(objects: Objects, categories: Sequence[int]) -> list[Label]:
    """True boxes.

    Args:
        objects: what is there.
        categories: of each of them.
    """
    labels = []
    for box, is_heard, category in zip(objects.boxes, objects.sounds, categories, strict=True):
        labels.append(Label(box, category, {'sounds': bool(is_heard)}))
    return labels
