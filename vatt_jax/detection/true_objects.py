"""True objects of a record at a moment: where they are, what they are, whether they are heard.

Records hold them as `ground_truth` (JSON): `boxes` [frame][object] y0 x0 y1 x1 as shares of the
frame, zeros of what is not there, `sounds` [frame][object], `kinds` [frame][object], the names of
their classes, and `fps` of these frames. The playground writes all of these (docs/playground.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float


@dataclasses.dataclass(frozen=True)
class Objects:
    """What a picture shows.

    Attributes:
        boxes: y0 x0 y1 x1, as shares of the frame.
        sounds: whether each is heard.
        kinds: name of the class of each; none where the data do not tell.
    """

    boxes: Float[np.ndarray, 'N 4']
    sounds: Bool[np.ndarray, ' N']
    kinds: tuple[str, ...]

    def heard(self) -> Objects:
        """Those that are heard."""
        kinds = tuple(kind for kind, is_heard in zip(self.kinds, self.sounds) if is_heard)
        return Objects(self.boxes[self.sounds], self.sounds[self.sounds], kinds)


def objects_at(truth: Mapping[str, Any], start: float, seconds: float) -> Objects:
    """The objects in the frame at `start`, and which of them are in the sound from there on.

    Nothing is found where another scene begins before the middle of the sound.

    Args:
        truth: see above.
        start: of the picture and of its sound, in seconds.
        seconds: of sound.
    """
    last = len(truth['boxes']) - 1
    frame = min(round(start * truth['fps']), last)
    # `sounds` is of the moments around a frame, so that of the middle of the sound counts.
    middle = min(round((start + seconds / 2) * truth['fps']), last)
    boxes, sounds = truth['boxes'][frame], truth['sounds'][middle]
    kinds = truth['kinds'][frame] if 'kinds' in truth else []
    if len(boxes) != len(sounds):
        boxes, sounds, kinds = [], [], []
    shown = [number for number, box in enumerate(boxes) if any(box)]
    return Objects(
        np.array([boxes[number] for number in shown], float).reshape(-1, 4),
        np.array([sounds[number] for number in shown], bool),
        tuple(kinds[number] for number in shown) if kinds else (),
    )


def inside(
    boxes: Float[np.ndarray, 'N 4'], crop: Float[np.ndarray, ' 4']
) -> Float[np.ndarray, 'N 4']:
    """Boxes of the frame as shares of a crop of it, cut off at its edges."""
    low, size = np.tile(crop[:2], 2), np.tile(crop[2:] - crop[:2], 2)
    return np.clip((boxes - low) / size, 0, 1)
