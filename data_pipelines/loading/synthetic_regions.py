"""Regions of the synthetic world's pictures, as a detector would have found them."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

from data_pipelines.errors import DataError
from data_pipelines.loading import order

# Share of a region's feature that is its class's own direction; the rest is noise.
CLASS_SHARE = 0.7
# Probability that the detector gives the class of a picture.
CONFIDENCE = 0.8


def make(
    kind: Int[np.ndarray, ' B'],
    index: Int[np.ndarray, ' B'],
    regions: int,
    width: int,
    classes: int,
) -> dict[str, Any]:
    """The entry `regions` of a batch: features, corners, mask, classes.

    A picture has between half of `regions` and all of them. Their features have a direction that
    the class of the record decides, and noise of the record's own.

    Args:
        kind: class of each record.
        index: number of each record.
        regions: N, the most of a picture.
        width: F, of a feature.
        classes: P, of the detector; the first one is the background.

    Raises:
        DataError: a number is not positive, or there is no class beside the background.
    """
    for name, value, least in (
        ('regions', regions, 1),
        ('width', width, 1),
        ('classes', classes, 2),
    ):
        if value < least:
            raise DataError(
                f'config.model.inputs.regions.{name}: expected at least {least}, got {value}'
            )
    draws = order.uniform(0, index, 'synthetic regions', 5 * regions + 1)  # [B 5N+1]
    places = draws[:, 1:].reshape(len(index), regions, 5)
    low = 0.6 * places[..., :2]
    corners = np.concatenate([low, low + 0.1 + 0.3 * places[..., 2:4]], axis=-1)
    count = np.ceil(regions * (0.5 + 0.5 * draws[:, 0]))  # [B]
    mask = np.arange(regions) < count[:, None]

    # A wave for each class, and one of a phase of its own for each region.
    column = np.arange(width) / width
    of_class = np.sin(2 * np.pi * np.outer(kind + 1, column))[:, None]  # [B 1 F]
    phase = 37 * places[..., 4:] + column
    noise = np.sin(2 * np.pi * phase * (1 + places[..., :1] * width / 4))
    features = CLASS_SHARE * of_class + (1 - CLASS_SHARE) * noise
    features = np.where(mask[..., None], features, 0).astype(np.float32)

    # One class for all regions of a picture, none of them the background.
    rest = (1 - CONFIDENCE) / (classes - 1)
    probabilities = np.full((len(index), regions, classes), rest, np.float32)
    own = 1 + kind % (classes - 1)
    probabilities[np.arange(len(index)), :, own] = CONFIDENCE
    return {
        'features': features,
        'corners': corners.astype(np.float32),
        'mask': mask,
        'classes': probabilities,
    }
