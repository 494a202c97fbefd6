"""Boxes out of heat maps, and how well boxes and heat maps find an object. NumPy and SciPy only.

Boxes are y0 x0 y1 x1 as shares of the picture.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float

# Thresholds of the success curve whose area is AUC: 0, 0.05 … 1.
SUCCESS_THRESHOLDS = np.linspace(0, 1, 21)


@dataclasses.dataclass(frozen=True)
class Found:
    """Boxes of one heat map.

    Attributes:
        boxes: of the components, the largest one first.
        scores: the highest value of each.
    """

    boxes: Float[np.ndarray, 'N 4']
    scores: Float[np.ndarray, ' N']


def upsample(
    heat: Float[np.ndarray, '*batch h w'], height: int, width: int
) -> Float[np.ndarray, '*batch H W']:
    """A heat map at another size, linear between the centres of its positions."""
    rows, columns = _weights(heat.shape[-2], height), _weights(heat.shape[-1], width)
    return rows @ heat @ columns.T


def _weights(size: int, wanted: int) -> Float[np.ndarray, 'wanted size']:
    """What each old position counts for each new one."""
    centres = np.clip((np.arange(wanted) + 0.5) * size / wanted - 0.5, 0, size - 1)
    low = np.floor(centres).astype(int)
    high = np.minimum(low + 1, size - 1)
    weights = np.zeros((wanted, size))
    weights[np.arange(wanted), low] += 1 - (centres - low)
    weights[np.arange(wanted), high] += centres - low
    return weights


def above_threshold(heat: Float[np.ndarray, 'H W'], beta: float) -> Bool[np.ndarray, 'H W']:
    """Where a map is above β · maximum + (1 - β) · mean, as in the paper.

    A map that is the same everywhere is above it nowhere.
    """
    return heat > beta * heat.max() + (1 - beta) * heat.mean()


def find_boxes(heat: Float[np.ndarray, 'H W'], beta: float = 0.5, most: int = 1) -> Found:
    """Tight boxes around the largest connected components above the threshold.

    Positions are connected along rows and columns. Of equally large components the one with the
    higher maximum comes first.

    Args:
        heat: a map, upsampled to what its boxes should be exact to.
        beta: 0: threshold at the mean; 1: at the maximum, above which there is nothing.
        most: boxes at most; 1 is the paper's.
    """
    labels, count = scipy.ndimage.label(above_threshold(heat, beta))
    numbers = np.arange(1, count + 1)
    scores = np.atleast_1d(scipy.ndimage.maximum(heat, labels, numbers)) if count else np.zeros(0)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    order = np.lexsort((-scores, -sizes))[:most]
    slices = scipy.ndimage.find_objects(labels)
    boxes = []
    for number in order:
        rows, columns = slices[number]
        boxes.append([rows.start, columns.start, rows.stop, columns.stop])
    height, width = heat.shape
    shares = np.array(boxes, float).reshape(-1, 4) / [height, width, height, width]
    return Found(shares, scores[order].astype(float))


# ---- How well something is found.


def box_iou(a: Float[np.ndarray, 'N 4'], b: Float[np.ndarray, 'M 4']) -> Float[np.ndarray, 'N M']:
    """Intersection over union of every box of one set with every box of the other."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    union = _area(a)[:, None] + _area(b)[None] - shared
    return shared / np.maximum(union, 1e-12)


def _area(boxes: Float[np.ndarray, 'N 4']) -> Float[np.ndarray, ' N']:
    return (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(-1)


def points_at(heat: Float[np.ndarray, 'H W'], boxes: Float[np.ndarray, 'N 4']) -> bool:
    """Whether the maximum of a map lies in any of the boxes (the pointing game)."""
    height, width = heat.shape
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    return bool(mask_of(boxes, height, width)[row, column])


def mask_of(boxes: Float[np.ndarray, 'N 4'], height: int, width: int) -> Bool[np.ndarray, 'H W']:
    """Pixels whose centre lies in any of the boxes."""
    y = ((np.arange(height) + 0.5) / height)[:, None]
    x = (np.arange(width) + 0.5) / width
    mask = np.zeros((height, width), bool)
    for y0, x0, y1, x1 in boxes:
        mask |= (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
    return mask


def consensus_iou(predicted: Bool[np.ndarray, 'H W'], true: Bool[np.ndarray, 'H W']) -> float:
    """cIoU of Senocak et al. (2018) with one annotation: shared pixels over those of either."""
    union = (predicted | true).sum()
    return float((predicted & true).sum() / union) if union else 0.0


def success_area(ious: Float[np.ndarray, ' N']) -> float:
    """AUC: area under the share of pictures whose IoU reaches a threshold, from 0 to 1."""
    shares = (ious[:, None] >= SUCCESS_THRESHOLDS).mean(0)
    return float(np.trapezoid(shares, SUCCESS_THRESHOLDS))
