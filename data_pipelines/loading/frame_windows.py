"""Which moments of a record a clip shows, and which part of the frame.

All functions are vectorised over rows; times are seconds, places fractions of the frame.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Int32, Num

_STEP_TOLERANCE = 1e-6  # of a step: a start that is a multiple but for rounding stays one
_TIME_TOLERANCE = 1e-9  # seconds


def _latest_start(duration: Num[np.ndarray, ' B'], window: float) -> np.ndarray:
    """The last start that leaves the window inside its record; 0 where the record is shorter."""
    return np.maximum(duration - window, 0.0)


def num_starts(
    duration: Num[np.ndarray, ' B'], window: float, step: np.ndarray | float
) -> np.ndarray:
    """How many multiples of `step` [B] leave the window inside its record; at least 1."""
    return np.floor(_latest_start(duration, window) / step + _STEP_TOLERANCE) + 1


def anywhere(
    duration: Num[np.ndarray, ' B'],
    window: float,
    step: np.ndarray | float,
    u: Float[np.ndarray, ' B'],
) -> Float[np.ndarray, ' B']:
    """Uniform starts, over the multiples of `step` that leave the window inside its record.

    Args:
      duration: of the records, in seconds.
      window: its length in seconds.
      step: seconds between stored frames, [B] or one for all.
      u: uniform numbers in [0, 1).
    """
    # u < 1: at most the latest start
    return np.floor(u * num_starts(duration, window, step)) * step


def interval(u: Float[np.ndarray, ' B'], power: float) -> Float[np.ndarray, ' B']:
    """Distances in [0, 1) of density (power + 1) (1 - t)^power, by the inverse of its integral.

    Args:
      u: uniform numbers in [0, 1).
      power: 0 is uniform, 1 falls linearly to 0 at distance 1, more falls faster.
    """
    # P(distance <= t) = 1 - (1 - t)^(power + 1)
    return 1 - (1 - u) ** (1 / (power + 1))


def pair(
    duration: Num[np.ndarray, ' B'],
    window: float,
    step: np.ndarray | float,
    u: Float[np.ndarray, 'B 3'],
    power: float,
) -> tuple[Float[np.ndarray, ' B'], Float[np.ndarray, ' B']]:
    """Starts of two windows whose distance has the density of `interval` (CVRL).

    The unit of distance is the range of starts. The earlier window is uniform where the later one
    has room, and either may be the first of the result. With power 1 this is the distribution of
    two independent starts that are uniform over the record.

    Args:
      duration: of the records, in seconds.
      window: its length in seconds.
      step: seconds between stored frames, [B] or one for all; starts are multiples of it.
      u: uniform numbers in [0, 1), for the distance, the earlier start and the order.
      power: see `interval`.
    """
    distance = interval(u[:, 0], power)
    earlier = (1 - distance) * u[:, 1]
    later = earlier + distance
    swapped = u[:, 2] < 0.5
    count = num_starts(duration, window, step)

    def on_steps(start: np.ndarray) -> np.ndarray:
        # A sum may round up to 1, which would be a step beyond the latest start.
        return np.minimum(np.floor(start * count), count - 1) * step

    first = np.where(swapped, later, earlier)
    second = np.where(swapped, earlier, later)
    return on_steps(first), on_steps(second)


def centred(begin: np.ndarray, end: np.ndarray, duration: np.ndarray, window: float) -> np.ndarray:
    """Starts [B] of windows centred on the segments, moved inside the record where it has room."""
    return np.clip((begin + end - window) / 2, 0.0, _latest_start(duration, window))


def spaced(
    begin: np.ndarray, end: np.ndarray, duration: np.ndarray, window: float, number: int, of: int
) -> np.ndarray:
    """Starts [B] of window `number` of `of`, spaced linearly over the segments begin..end."""
    # Without this the spacing below would divide by zero.
    if of == 1:
        return centred(begin, end, duration, window)
    # Segments shorter than the window have all windows at their beginning.
    last = np.maximum(end - window, begin)
    start = begin + (last - begin) * (number / (of - 1))
    return np.clip(start, 0.0, _latest_start(duration, window))


def shifted(start: np.ndarray, seconds: float, duration: np.ndarray, window: float) -> np.ndarray:
    """Starts [B] moved by `seconds`.

    The other way where the record ends too early; cyclically where neither way fits.
    """
    latest = _latest_start(duration, window)
    forward = start + seconds
    backward = start - seconds
    forward_fits = (forward >= -_TIME_TOLERANCE) & (forward <= latest + _TIME_TOLERANCE)
    backward_fits = (backward >= -_TIME_TOLERANCE) & (backward <= latest + _TIME_TOLERANCE)
    # np.where computes every branch for every row, hence the guard against a duration of 0.
    cyclic = np.mod(forward, np.maximum(duration, _TIME_TOLERANCE))
    moved = np.where(forward_fits, forward, np.where(backward_fits, backward, cyclic))
    return np.maximum(moved, 0.0)


def apart(
    start: np.ndarray,
    duration: np.ndarray,
    window: float,
    gap: float,
    step: np.ndarray | float,
    u: Float[np.ndarray, ' B'],
) -> Float[np.ndarray, ' B']:
    """Uniform starts of a second window with at least `gap` seconds between it and the first.

    Over the multiples of `step` that leave it inside its record, before the first and behind it.
    NaN where there is none.

    Args:
      start: of the first windows [B], in seconds.
      duration: of the records [B], in seconds.
      window: length of both windows, in seconds.
      gap: least time from the end of one window to the beginning of the other, in seconds.
      step: seconds between stored frames, [B] or one for all.
      u: uniform numbers in [0, 1).
    """
    # In steps. Windows before the first one begin at 0, 1, ... last_before; those behind it at
    # first_behind, ... last_behind.
    last_before = np.floor((start - window - gap) / step + _STEP_TOLERANCE)
    first_behind = np.ceil((start + window + gap) / step - _STEP_TOLERANCE)
    last_behind = np.floor((duration - window) / step + _STEP_TOLERANCE)
    num_before = np.maximum(last_before + 1, 0)
    num_behind = np.maximum(last_behind - first_behind + 1, 0)
    num_starts = num_before + num_behind
    chosen = np.floor(u * num_starts)
    is_before = chosen < num_before
    chosen = np.where(is_before, chosen, first_behind + chosen - num_before)
    return np.where(num_starts > 0, chosen * step, np.nan)


def frame_numbers(
    start: np.ndarray, frames: np.ndarray, stored_fps: np.ndarray | float, fps: float, count: int
) -> Int32[np.ndarray, 'B T']:
    """The stored frames nearest to start + t / fps.

    Windows that are longer than their record repeat it cyclically (VATT).

    Args:
      start: of the windows [B], in seconds.
      frames: that each record holds [B].
      stored_fps: frames per second of the records, [B] or one for all.
      fps: frames per second of the clip.
      count: T, frames of the clip.
    """
    times = np.asarray(start)[:, None] + np.arange(count) / fps  # [B T]
    positions = times * np.reshape(stored_fps, (-1, 1))  # in stored frames
    # Not np.rint, which rounds halves to even: up and down in turn.
    nearest = np.floor(positions + 0.5).astype(np.int64)
    num_frames = np.maximum(frames, 1)[:, None]  # [B 1]; a record without video has 0
    # The last half frame of a record rounds up to a frame that is not stored. Where the window ends
    # inside its record that is the last frame; where the record is repeated, its first.
    is_inside = positions[:, -1:] < num_frames - _STEP_TOLERANCE
    nearest = np.where(is_inside, np.minimum(nearest, num_frames - 1), nearest)
    return (nearest % num_frames).astype(np.int32)  # [B T]


def snap(start: np.ndarray, step: np.ndarray | float) -> np.ndarray:
    """Starts [B] down to multiples of `step`, the time between stored frames.

    The first frame and the first audio sample are then of the same moment. Down, not to the
    nearest: the window must not leave the record.
    """
    return np.floor(start / step + _STEP_TOLERANCE) * step


def random_boxes(
    u: Float[np.ndarray, 'B draws'],
    height: np.ndarray,
    width: np.ndarray,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Float32[np.ndarray, 'B 4']:
    """Random crops (y0, x0, y1, x1) as fractions of the frame, placed uniformly.

    A side that would leave the frame is cut to it.

    Args:
      u: uniform numbers in [0, 1); four are used, for area, aspect, y and x.
      height: of the frames [B], in pixels.
      width: of the frames [B], in pixels.
      area: least and greatest share of the frame, uniform.
      aspect: least and greatest width / height in pixels, log-uniform.
    """
    height = np.asarray(height, np.float64)
    width = np.asarray(width, np.float64)
    num_pixels = (area[0] + (area[1] - area[0]) * u[:, 0]) * height * width
    # Uniform in the logarithm: 1/2 to 1 is as likely as 1 to 2.
    log_aspect = np.log(aspect[0]) + (np.log(aspect[1]) - np.log(aspect[0])) * u[:, 1]
    ratio = np.exp(log_aspect)
    # h w = pixels and w / h = ratio, each as a fraction of its side of the frame.
    h = np.minimum(np.sqrt(num_pixels / ratio) / height, 1.0)
    w = np.minimum(np.sqrt(num_pixels * ratio) / width, 1.0)
    y = (1 - h) * u[:, 2]
    x = (1 - w) * u[:, 3]
    return np.stack([y, x, y + h, x + w], axis=1).astype(np.float32)


def square_boxes(
    height: np.ndarray, width: np.ndarray, place: float = 0.5
) -> Float32[np.ndarray, 'B 4']:
    """The largest square of each frame as (y0, x0, y1, x1), fractions of the frame.

    Args:
      height: of the frames [B], in pixels.
      width: of the frames [B], in pixels.
      place: how far along the longer side it lies, 0 to 1; the middle one is evaluation's crop.
    """
    height = np.asarray(height, np.float64)
    width = np.asarray(width, np.float64)
    side = np.minimum(height, width)  # pixels
    h = side / np.maximum(height, 1)
    w = side / np.maximum(width, 1)
    # One of h and w is 1, so the square moves along the other axis.
    y = (1 - h) * place
    x = (1 - w) * place
    return np.stack([y, x, y + h, x + w], axis=1).astype(np.float32)
