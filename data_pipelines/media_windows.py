"""A media file as overlapping windows of time, read front to back in constant memory.

Pictures and sound share the clock of `media.read`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int16, UInt8

from data_pipelines import media

# Seconds of sound after the last picture that are no more than the padding of an encoder.
OVERHANG = 1.0


@dataclasses.dataclass(frozen=True)
class Window:
    """One stretch of time of a file.

    Attributes:
        start: seconds.
        end: seconds.
        frames: RGB at the rate that was asked for; None in a file without pictures.
        samples: mono sound; None where the file has none at this time.
    """

    start: float
    end: float
    frames: UInt8[np.ndarray, 'T H W 3'] | None
    samples: Int16[np.ndarray, ' S'] | None


def read_windows(
    path: str | os.PathLike,
    fps: float,
    size: int,
    rate: int,
    seconds: float,
    stride: float,
) -> Iterator[Window]:
    """Yield the windows of a file, which begin at 0, stride, 2 · stride, ….

    The last one is moved back to end with the file; a file shorter than a window is one window. The
    file is as long as its pictures, or as its sound where that goes on for a second or more: then
    the last picture stays. Sound that ends within a window is filled with silence.

    Args:
        path: the file.
        fps: frames per second that come out; 0 leaves the pictures out.
        size: short side of the frames, in pixels.
        rate: audio samples per second; 0 leaves the sound out.
        seconds: length of a window.
        stride: seconds from the start of one window to that of the next.

    Raises:
        MediaError: for a file that cannot be read, here or while windows are taken.
        ValueError: a window or a stride is not positive, or both rates are 0.
    """
    if seconds <= 0 or stride <= 0:
        raise ValueError(f'expected positive lengths, got seconds={seconds}, stride={stride}')
    if not fps and not rate:
        raise ValueError('expected fps or rate above 0, got neither')
    pictures = _Track(_frames(path, fps, size), fps)
    sound = _Track(_samples(path, rate), rate)
    start = 0.0
    previous_start = 0.0
    for number in itertools.count():
        start = number * stride
        length = _read_to(pictures, sound, start + seconds)
        is_whole = length >= start + seconds - _tolerance(fps, rate)
        if not is_whole:
            break
        yield _window(pictures, sound, start, start + seconds)
        previous_start = start
        # The last window may reach back to anywhere after the start of this one.
        pictures.forget(start)
        sound.forget(start)
    if length <= 0:
        raise media.MediaError(_nothing_found(fps, rate))
    covered = previous_start + seconds if start > 0 else 0.0
    if length > covered + _tolerance(fps, rate) and length > start:
        yield _window(pictures, sound, max(0.0, length - seconds), length)


def read_batches(
    path: str | os.PathLike,
    fps: float,
    size: int,
    rate: int,
    seconds: float,
    stride: float,
    count: int,
) -> Iterator[list[Window]]:
    """Yield the windows of a file, `count` at a time; arguments and errors as of `read_windows`."""
    windows = read_windows(path, fps, size, rate, seconds, stride)
    while batch := list(itertools.islice(windows, count)):
        yield batch


def _nothing_found(fps: float, rate: int) -> str:
    if not rate:
        return 'no pictures'
    if not fps:
        return 'no sound'
    return 'corrupt: neither a picture nor sound could be decoded'


def _read_to(pictures: _Track, sound: _Track, end: float) -> float:
    """Reads both as far as `end`, and returns the length of the file as far as it is read."""
    pictures.read_to(end)
    sound.read_to(max(end, pictures.seconds_read + OVERHANG))
    overhang = sound.seconds_read - pictures.seconds_read
    if pictures.is_empty or overhang >= OVERHANG:
        return sound.seconds_read
    return pictures.seconds_read


def _tolerance(fps: float, rate: int) -> float:
    """Seconds that are not worth a window of their own: a picture, or a hundredth."""
    return 1 / fps if fps else 0.01


def _frames(path: str | os.PathLike, fps: float, size: int) -> Iterator[np.ndarray]:
    """Blocks [1 H W 3]; none where the file has no pictures."""
    if not fps:
        return
    frames = media.read(path, fps, size, rate=0).frames
    shape = None
    for frame in frames or ():
        if shape is None:
            shape = frame.shape
        # The resolution of a stream may change on the way; its first one stays.
        if frame.shape != shape:
            frame = _fit(frame, shape[0], shape[1])
        yield frame[None]


def _fit(
    frame: UInt8[np.ndarray, 'H W 3'], height: int, width: int
) -> UInt8[np.ndarray, '{height} {width} 3']:
    """The middle of a frame at the given size, its border repeated where it is smaller."""
    rows = np.arange(height) + (frame.shape[0] - height) // 2
    columns = np.arange(width) + (frame.shape[1] - width) // 2
    rows = np.clip(rows, 0, frame.shape[0] - 1)
    columns = np.clip(columns, 0, frame.shape[1] - 1)
    return frame[rows][:, columns]


def _samples(path: str | os.PathLike, rate: int) -> Iterator[np.ndarray]:
    if rate:
        yield from media.stream_audio(path, rate)


class StreamBuffer:
    """The part of a stream that windows still need, read front to back.

    Args:
        blocks: rows in order: arrays along time, or lists of frames.
    """

    def __init__(self, blocks: Iterable[Any]):
        self._blocks = iter(blocks)
        self._held: list[Any] = []
        # Rows before the first one that is held.
        self._begin = 0
        # Rows before it are not held, also where they are yet to be read.
        self._first_wanted = 0
        self.num_read = 0

    def read_to(self, end: int) -> None:
        """Reads as many rows, or to the end of the stream."""
        while self.num_read < end:
            block = next(self._blocks, None)
            if block is None:
                return
            self._held.append(block)
            self.num_read += len(block)
            self.forget(self._first_wanted)

    def forget(self, first: int) -> None:
        """Drops what lies before this row, by blocks."""
        self._first_wanted = first
        while self._held and self._begin + len(self._held[0]) <= first:
            self._begin += len(self._held[0])
            del self._held[0]

    def pieces(self, first: int, count: int) -> list[Any]:
        """Parts of blocks that are `count` rows from `first` on, fewer at the end of the stream."""
        pieces = []
        begin = self._begin
        for block in self._held:
            piece = block[max(0, first - begin) : max(0, first + count - begin)]
            if len(piece):
                pieces.append(piece)
            begin += len(block)
        return pieces


class _Track:
    """One of the two streams of a file, by seconds.

    Args:
        blocks: arrays along time.
        rate: rows per second.
    """

    def __init__(self, blocks: Iterable[np.ndarray], rate: float):
        self._buffer = StreamBuffer(blocks)
        self.rate = rate

    @property
    def seconds_read(self) -> float:
        """Seconds from the beginning of the file to the last row read."""
        return self._buffer.num_read / self.rate if self.rate else 0.0

    @property
    def is_empty(self) -> bool:
        """Whether the stream has no row at all, as far as it was read."""
        return self._buffer.num_read == 0

    def read_to(self, seconds: float) -> None:
        """Reads as far as that time, or to the end."""
        self._buffer.read_to(math.ceil(seconds * self.rate))

    def forget(self, seconds: float) -> None:
        """Drops what lies before that time, all but the last row of the stream."""
        self._buffer.forget(min(int(seconds * self.rate), self._buffer.num_read - 1))

    def rows(self, start: float, end: float) -> np.ndarray:
        """Rows of a stretch of time, fewer where the stream ends; the last one after its end."""
        count = max(1, round((end - start) * self.rate))
        first = min(round(start * self.rate), self._buffer.num_read - 1)
        return np.concatenate(self._buffer.pieces(max(0, first), count))


def _window(pictures: _Track, sound: _Track, start: float, end: float) -> Window:
    frames = None
    if not pictures.is_empty:
        frames = pictures.rows(start, end)
        missing = max(1, round((end - start) * pictures.rate)) - len(frames)
        if missing > 0:
            frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    samples = None
    # A tenth of a second of sound at the beginning of a window is not heard as its sound.
    if not sound.is_empty and sound.seconds_read > start + 0.1 * (end - start):
        samples = sound.rows(start, end)
        missing = round((end - start) * sound.rate) - len(samples)
        samples = np.pad(samples, (0, max(0, missing)))
    return Window(start, end, frames, samples)
