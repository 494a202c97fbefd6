"""Pictures of any shape in the square that the detector sees, and its boxes back in pixels."""

from __future__ import annotations

import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

# Of the square beside a picture: the middle of the range, whatever that is for the model.
GREY = 128


def in_square(picture: PIL.Image.Image, side: int) -> UInt8[np.ndarray, 'S S 3']:
    """A grey square with a picture in its upper left corner, as large as it fits.

    So one number, the picture's longer side, takes boxes from fractions of the square to pixels.
    """
    scale = side / max(picture.size)
    width = max(1, round(picture.width * scale))
    height = max(1, round(picture.height * scale))
    if picture.size != (width, height):
        picture = picture.resize((width, height), PIL.Image.Resampling.BILINEAR)
    square = np.full((side, side, 3), GREY, np.uint8)
    square[:height, :width] = np.asarray(picture)
    return square


def to_pixels(
    corners: Float[np.ndarray, '*n 4'], width: int, height: int
) -> Float[np.ndarray, '*n 4']:
    """Corners in fractions of the square -> pixels of a picture, cut off at its edge."""
    limit = np.array([width, height, width, height])
    return np.minimum(corners.astype(np.float64) * max(width, height), limit)
