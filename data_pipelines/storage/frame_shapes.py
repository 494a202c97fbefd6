"""The shapes of a split's frames: whether a batch can hold them without cutting."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

_AT_ONCE = 1 << 20  # records that are looked at together

Shapes = set[tuple[int, int]]


def frame_shapes(
    frames: Int[np.ndarray, ' M'], height: Int[np.ndarray, ' M'], width: Int[np.ndarray, ' M']
) -> Shapes:
    """All (height, width) of the frames of M records.

    Args:
      frames: of each record, 0 without pictures.
      height: of its frames, in pixels.
      width: of its frames, in pixels.
    """
    shapes: Shapes = set()
    # In blocks, since the columns of a large index are read from disk.
    for begin in range(0, len(frames), _AT_ONCE):
        block = slice(begin, begin + _AT_ONCE)
        # Records of sound alone have size (0, 0), which is no shape to unify.
        has_frames = frames[block] > 0
        heights = height[block][has_frames].astype(np.int64)
        widths = width[block][has_frames].astype(np.int64)
        # As one number: sorting numbers takes a tenth of the time that sorting pairs takes.
        for shape in np.unique(heights << 32 | widths).tolist():
            shapes.add((shape >> 32, shape & 0xFFFFFFFF))
    return shapes
