"""Which moments of a record a clip shows, and which part of the frame. All vectorised over rows, seconds and fractions."""

from __future__ import annotations

import numpy as np


def anywhere(
    duration: np.ndarray, window: float, step: np.ndarray | float, u: np.ndarray
) -> np.ndarray:
    """Starts [B] of windows of `window` seconds, uniform over the multiples of `step` seconds that leave the window inside
    its record of `duration` [B] seconds; u [B] in [0, 1)."""
    choices = np.floor(np.maximum(duration - window, 0.0) / step + 1e-6) + 1
    return np.floor(u * choices) * step


def centred(begin: np.ndarray, end: np.ndarray, duration: np.ndarray, window: float) -> np.ndarray:
    """Starts [B] of windows centred on the segments begin..end, moved inside the record where it has room."""
    return np.clip((begin + end - window) / 2, 0.0, np.maximum(duration - window, 0.0))


def spaced(
    begin: np.ndarray, end: np.ndarray, duration: np.ndarray, window: float, number: int, of: int
) -> np.ndarray:
    """Starts [B] of the `number`-th of `of` windows spaced linearly from the segments' first to their last window."""
    if of == 1:
        return centred(begin, end, duration, window)
    last = np.maximum(end - window, begin)
    start = begin + (last - begin) * (number / (of - 1))
    return np.clip(start, 0.0, np.maximum(duration - window, 0.0))


def shifted(start: np.ndarray, seconds: float, duration: np.ndarray, window: float) -> np.ndarray:
    """`start` moved by `seconds`; the other way where the record ends too early; cyclically where neither way fits."""
    room = np.maximum(duration - window, 0.0)
    forward, backward = start + seconds, start - seconds
    inside = lambda x: (x >= -1e-9) & (x <= room + 1e-9)
    around = np.mod(forward, np.maximum(duration, 1e-9))
    return np.maximum(
        np.where(inside(forward), forward, np.where(inside(backward), backward, around)), 0.0
    )


def frame_numbers(
    start: np.ndarray, frames: np.ndarray, stored_fps: np.ndarray | float, fps: float, count: int
) -> np.ndarray:
    """int32 [B, count]: stored frames nearest to start + t / fps. Records of fewer frames repeat cyclically (VATT)."""
    at = np.asarray(start)[:, None] + np.arange(count) / fps
    return (
        np.floor(at * np.reshape(stored_fps, (-1, 1)) + 0.5).astype(np.int64)
        % np.maximum(frames, 1)[:, None]
    ).astype(np.int32)


def snap(start: np.ndarray, step: np.ndarray | float) -> np.ndarray:
    """Starts down to multiples of `step`, the time between stored frames, so that the first frame and the first audio
    sample are of the same moment. Down, not to the nearest: the window must not leave the record."""
    return np.floor(start / step + 1e-6) * step


def random_boxes(
    u: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> np.ndarray:
    """float32 [B 4] (y0 x0 y1 x1, fractions): crops of `area` (share of the frame) and `aspect` (width / height in pixels,
    log-uniform), placed uniformly; u [B 4] in [0, 1). A side that would leave the frame is cut to it."""
    height, width = np.asarray(height, np.float64), np.asarray(width, np.float64)
    pixels = (area[0] + (area[1] - area[0]) * u[:, 0]) * height * width
    ratio = np.exp(np.log(aspect[0]) + (np.log(aspect[1]) - np.log(aspect[0])) * u[:, 1])
    h = np.minimum(np.sqrt(pixels / ratio) / height, 1.0)
    w = np.minimum(np.sqrt(pixels * ratio) / width, 1.0)
    y, x = (1 - h) * u[:, 2], (1 - w) * u[:, 3]
    return np.stack([y, x, y + h, x + w], 1).astype(np.float32)


def square_boxes(height: np.ndarray, width: np.ndarray, place: float = 0.5) -> np.ndarray:
    """float32 [B 4]: the largest square, `place` (0 to 1) of the way along the frame's longer side; the middle one is evaluation's crop."""
    height, width = np.asarray(height, np.float64), np.asarray(width, np.float64)
    side = np.minimum(height, width)
    h, w = side / np.maximum(height, 1), side / np.maximum(width, 1)
    y, x = (1 - h) * place, (1 - w) * place
    return np.stack([y, x, y + h, x + w], 1).astype(np.float32)
