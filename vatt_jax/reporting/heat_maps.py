"""Heat maps over the pictures that they are of, for the report: where is what is heard?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vatt_jax.detection.boxes import upsample
from vatt_jax.reporting import data_uris

# Of the hottest place, which covers so much of the picture.
HOT = np.array([255, 60, 0], np.float64)
COVER = 0.7


def heat_maps(title: str, artifacts: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of one evaluator of localisation.

    Args:
        title: of its part of the page.
        artifacts: of the evaluator `localisation`.
    """
    pictures = []
    shown = artifacts['heat_pictures'], artifacts['heat_pixels'], artifacts['heat_values']
    for picture, pixels, heat in zip(*shown, strict=True):
        pictures.append(
            {
                'picture': data_uris.jpeg(pixels),
                'covered': data_uris.jpeg(covered(pixels, heat)),
                'side': len(pixels),
                'boxes': _boxes(picture['true'], len(pixels), True)
                + _boxes(picture['found'], len(pixels), False),
                'iou': picture['iou'],
            }
        )
    return {'title': title, 'pictures': pictures}


def covered(
    pixels: UInt8[np.ndarray, 'S S 3'], heat: Float[np.ndarray, 'h w']
) -> UInt8[np.ndarray, 'S S 3']:
    """A picture under its heat map: nothing at the map's minimum, most at its maximum."""
    side = len(pixels)
    large = upsample(heat.astype(np.float64), side, side)
    # 1e-6 for a map of one value.
    share = (large - large.min()) / max(1e-6, float(large.max() - large.min()))
    cover = COVER * share[..., None]
    return np.round((1 - cover) * pixels + cover * HOT).astype(np.uint8)


def _boxes(boxes: Sequence[Sequence[float]], side: int, is_true: bool) -> list[dict[str, Any]]:
    """Boxes in pixels. boxes: y0 x0 y1 x1 as shares of the picture."""
    drawn = []
    for y0, x0, y1, x1 in boxes:
        drawn.append(
            {
                'x': round(x0 * side, 1),
                'y': round(y0 * side, 1),
                'width': round((x1 - x0) * side, 1),
                'height': round((y1 - y0) * side, 1),
                'is_true': is_true,
            }
        )
    return drawn
