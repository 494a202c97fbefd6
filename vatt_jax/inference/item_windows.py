"""Clips, sounds and pictures of users (arrays or files), cut into windows as towers take them."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int16, UInt8

from vatt_jax.config import ConfigError
from vatt_jax.inference import arrays, media_files, sounds
from vatt_jax.inference.arrays import FILES
from vatt_jax.inference.read_ahead import read_ahead
from vatt_jax.inference.requests import Request
from vatt_jax.inputs import optical_flow

# Files that are decoded side by side, where the machine has the cores.
MOST_FILES = 4


@dataclasses.dataclass(frozen=True)
class Piece:
    """One window of an item, as the encoder takes it.

    Attributes:
        start: seconds from the item's beginning.
        data: modality -> array.
        error: why there is nothing.
    """

    start: float
    data: Mapping[str, np.ndarray]
    error: str = ''


class ItemReader:
    """Cuts items into windows.

    Args:
        inputs: modality -> its description in `config.model.inputs`.
        tell: warns once for each key.
        flow: `method` of the optical flow that the model was trained on, and `size`, the short side
            in pixels of the frames between which it was computed; None: dis, and the input's own.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        tell: Callable[[str, str], None],
        flow: Mapping[str, Any] | None = None,
    ):
        self.inputs, self._tell = inputs, tell
        if 'flow' in inputs:
            self._flow = flow or {'method': 'dis', 'size': inputs['flow']['size']}

    def pieces(
        self, name: str, item: Any, request: Request, where: str, takes_sound: bool
    ) -> Iterator[Piece]:
        """Windows of one item. Called in a thread of its own where files are read."""
        reader: Callable[..., Iterator[Piece]]
        if name == 'video':
            reader = functools.partial(self._video_pieces, takes_sound=takes_sound)
        elif name == 'flow':
            reader = self._flow_pieces
        elif name == 'audio':
            reader = self._audio_pieces
        else:
            reader = self._image_pieces
        try:
            yield from reader(item, request, where)
        except ConfigError as error:
            if request.on_error == 'raise':
                raise
            yield Piece(0.0, {}, str(error))

    def _video_pieces(
        self, item: Any, request: Request, where: str, takes_sound: bool
    ) -> Iterator[Piece]:
        audio = self.inputs['audio'] if takes_sound else None
        for window in _windows(item, request, where, self.inputs['video'], audio):
            data: dict[str, np.ndarray] = {'video': self._clip(window.frames or [])}
            if window.samples is not None and len(window.samples):
                data['audio'] = self._sound_window(window.samples)
            yield Piece(window.start, data)

    def _flow_pieces(self, item: Any, request: Request, where: str) -> Iterator[Piece]:
        spec = self.inputs['flow']
        # The last flow of a window is the motion until the frame behind it.
        frames = {**spec, 'size': self._flow['size'], 'frames': spec['frames'] + 1}
        for window in _windows(item, request, where, frames):
            yield Piece(window.start, {'flow': self._flow_window(window.frames or [])})

    def _flow_window(
        self, frames: list[UInt8[np.ndarray, '_ _ 3']]
    ) -> UInt8[np.ndarray, 'T S S 2']:
        """The flow between frames as the tower takes it: of the central square, as in passes."""
        height, width = frames[0].shape[:2]
        side = self._flow['size']
        # As `prepare` stores them, so that displacements are in the same pixels.
        scale = side / min(height, width)
        height, width = round(height * scale), round(width * scale)
        stored = [arrays.resized(frame, height, width) for frame in frames]
        flow = optical_flow.of_frames(stored, self._flow['method'])
        top, left = (height - side) // 2, (width - side) // 2
        squares = flow[:, top : top + side, left : left + side]
        return arrays.fill_window(squares, self.inputs['flow']['frames'])

    def _clip(self, frames: list[UInt8[np.ndarray, '_ _ 3']]) -> UInt8[np.ndarray, 'T H W 3']:
        """Frames of a window as the tower takes them."""
        height, width = frames[0].shape[:2]
        size = self.inputs['video']['size']
        # What is larger or smaller goes in at twice the size of the model: the device does the
        # rest, as in training.
        side = size if min(height, width) == size else 2 * size
        squares = []
        for frame in frames:
            if frame.shape[:2] != (height, width):
                # The resolution changes in the middle.
                frame = arrays.resized(frame, height, width)
            if self.inputs['video'].get('resize') == 'bicubic':
                # As these models are published; the device leaves what has its size as it is.
                frame = arrays.short_side_square(frame, size)
            elif (height, width) != (size, size):
                frame = arrays.central_square(frame, side)
            squares.append(frame)
        return arrays.fill_window(np.stack(squares), self.inputs['video']['frames'])

    def _image_pieces(self, item: Any, request: Request, where: str) -> Iterator[Piece]:
        if isinstance(item, FILES):
            pixels = media_files.read_picture(item, where, self.inputs['video']['size'])
        else:
            raw = arrays.picture(item, where)
            pixels = arrays.to_uint8(raw, arrays.pixel_scale([raw], where))
        yield Piece(0.0, {'image': self._clip([pixels])})

    def _audio_pieces(self, item: Any, request: Request, where: str) -> Iterator[Piece]:
        spec = self.inputs['audio']
        if isinstance(item, FILES):
            # Decoded at the model's rate.
            for window in media_files.sound_windows(
                item, where, spec, request.windows, request.stride
            ):
                if window.samples is not None:
                    yield Piece(window.start, {'audio': self._sound_window(window.samples)})
            return
        samples = sounds.samples(item, where, self._tell)
        if request.rate is not None:
            samples = sounds.resampled(samples, request.rate, spec['rate'], where)
        for begin in arrays.window_begins(
            len(samples), spec['samples'], spec['rate'], request.windows, request.stride
        ):
            window_samples = self._sound_window(samples[begin : begin + spec['samples']])
            yield Piece(begin / spec['rate'], {'audio': window_samples})

    def _sound_window(self, samples: Int16[np.ndarray, ' S']) -> Int16[np.ndarray, ' S2']:
        return arrays.fill_window(samples, self.inputs['audio']['samples'])


def _windows(
    item: Any,
    request: Request,
    where: str,
    spec: Mapping[str, Any],
    audio: Mapping[str, Any] | None = None,
) -> Iterator[media_files.Window]:
    """Windows of frames of a clip or file.

    Args:
        item: the clip or file.
        request: which windows.
        where: of the call and argument, for messages.
        spec: `frames` of a window, `fps`, and the `size` of those of files.
        audio: `config.model.inputs.audio` where the sound of a file is read too.
    """
    if isinstance(item, FILES):
        yield from media_files.video_windows(
            item, where, spec, audio, request.windows, request.stride
        )
        return
    clip = arrays.frames(item, where)
    scale = arrays.pixel_scale([clip], where)
    for begin in arrays.window_begins(
        len(clip), spec['frames'], spec['fps'], request.windows, request.stride
    ):
        frames = arrays.to_uint8(clip[begin : begin + spec['frames']], scale)
        yield media_files.Window(begin / spec['fps'], list(frames), None)


def in_turn(
    readers: Sequence[Callable[[], Iterator[Piece]]], has_files: bool
) -> Iterator[tuple[int, Piece]]:
    """(number of the reader, piece) of all readers, one after the other."""
    if has_files:
        files = min(MOST_FILES, os.cpu_count() or 1)
        yield from read_ahead(readers, files)
        return
    for number, reader in enumerate(readers):
        for piece in reader():
            yield number, piece
