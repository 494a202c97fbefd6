"""Windows of media files, read in constant memory however long a file is.

Beside search/, the only file of vatt_jax that reads media, and so imports data_pipelines; the
reader is an extra and imported when it is first used.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int16, UInt8

from vatt_jax.config import ConfigError
from vatt_jax.inference.arrays import window_begins

# A file up to this long is decoded whole: seeking in it would save nothing.
HELD_SECONDS = 20.0
# Of a longer one so much is read at a time; a new start costs the frames since a keyframe.
BLOCK_SECONDS = 30.0
# Of what is said to be a picture, ten seconds are looked at.
PICTURE_FRAMES = 250
# Characters of a path in messages.
LONGEST_SHOWN = 300


class MediaFileError(ConfigError):
    """A file that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of a file.

    Attributes:
        start: seconds from the beginning of the file.
        frames: at the rate that was asked for, fewer at the end of a short file; None of a sound.
        samples: mono; None without sound.
    """

    start: float
    frames: list[UInt8[np.ndarray, '_ _ 3']] | None
    samples: Int16[np.ndarray, ' S'] | None


def missing_files(paths: Iterable[Any], call: str, name: str) -> str:
    """What to say of paths that are no files; '' if all are."""
    paths = [os.fsdecode(path) for path in paths]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        shown = ', '.join(repr(path[:LONGEST_SHOWN]) for path in missing[:3])
        advice = _advice(missing[0])
        if len(paths) == 1:
            return f'{call}({name}={shown}): No such file{advice}'
        more = ', …' if len(missing) > 3 else ''
        return (
            f'{call}({name}=[…]): {len(missing)} of {len(paths)} files are not there: '
            f'{shown}{more}: No such file{advice}'
        )
    folders = [path for path in paths if os.path.isdir(path)]
    if folders:
        return (
            f'{call}({name}={folders[0]!r}): expected a media file, got a folder; pass a list of '
            'the files in it'
        )
    return ''


def _advice(path: str) -> str:
    if '://' in path:
        return '; addresses are not read, download it first'
    if any(mark in path for mark in '*?'):
        return '; patterns are not searched, pass sorted(glob.glob(…))'
    if path.startswith('~'):
        return '; pass os.path.expanduser(…)'
    if os.path.isabs(path):
        return ''
    return f' (looked for in {os.getcwd()})'


def video_windows(
    path: Any,
    where: str,
    video: Mapping[str, Any],
    audio: Mapping[str, Any] | None,
    windows: int | None = None,
    stride: float | None = None,
) -> Iterator[Window]:
    """Yield windows of a file with pictures.

    Args:
        path: of a video or picture.
        where: of the call and argument, for messages.
        video: `config.model.inputs.video`: `fps`, `size` and `frames` of a window.
        audio: `config.model.inputs.audio`: `rate` and `samples` of a window; None: sound is left
            out.
        windows: see `arrays.window_begins`.
        stride: see `arrays.window_begins`.

    Raises:
        MediaFileError: the file cannot be read, or has no pictures.
    """
    media = _reader()
    path = os.fsdecode(path)
    reading = _Reading(media, path, where, video, audio)
    try:
        yield from reading.windows(windows, stride)
    except (media.MediaError, OSError) as error:
        raise MediaFileError(f'{where}: {error}') from error


class _Reading:
    """How the windows of one file are found."""

    def __init__(
        self,
        media: Any,
        path: str,
        where: str,
        video: Mapping[str, Any],
        audio: Mapping[str, Any] | None,
    ):
        self.media, self.path, self.where = media, path, where
        self.fps, self.size, self.frames = float(video['fps']), video['size'], video['frames']
        self.takes_sound = audio is not None
        # Where sound is not taken, it still says how long a still picture lasts.
        self.rate = audio['rate'] if audio else 8000
        self.samples = audio['samples'] if audio else 0
        # Of one window: whichever stream is longer.
        self.span = max(self.frames / self.fps, self.samples / self.rate)

    def windows(self, windows: int | None, stride: float | None) -> Iterator[Window]:
        length = self.media.duration(self.path, 'video')
        if length is not None and length > max(HELD_SECONDS, self.span + 3):
            count = round(length * self.fps)
            begins = window_begins(count, self.frames, self.fps, windows, stride)
            yield from self._by_blocks(begins, length)
            return
        file = self._open()
        frames: list[np.ndarray] = []
        num_distinct = 0
        for frame in file.frames:
            # A picture that stays on display is one array.
            num_distinct += not frames or frames[-1] is not frame
            frames.append(frame)
            if num_distinct > 2 * HELD_SECONDS * self.fps + self.frames:
                break
        else:
            sound = self._fitted_sound(file.audio, len(frames))
            begins = window_begins(len(frames), self.frames, self.fps, windows, stride)
            for begin in begins:
                yield self._window(begin, frames[begin : begin + self.frames], sound, begin)
            return
        yield from self._without_length(windows, stride)

    def _open(self, **part: Any) -> Any:
        file = self.media.read(self.path, self.fps, self.size, self.rate, **part)
        if file.frames is None:
            raise MediaFileError(
                f'{self.where}: the file has no pictures; embed(audio=…) takes its sound'
            )
        return file

    def _fitted_sound(self, sound: np.ndarray | None, num_frames: int) -> np.ndarray | None:
        if not self.takes_sound:
            return None
        return self.media.fit_audio(sound, num_frames, self.fps, self.rate)

    def _window(
        self, begin: int, frames: list[np.ndarray], sound: np.ndarray | None, offset: int
    ) -> Window:
        """The window at frame `begin` of the file, which is frame `offset` of `sound`."""
        samples = None
        if sound is not None:
            first = round(offset / self.fps * self.rate)
            # A copy: a view would keep the sound of the whole file.
            samples = sound[first : first + self.samples].copy()
        return Window(begin / self.fps, frames, samples)

    def _by_blocks(self, begins: Sequence[int], length: float) -> Iterator[Window]:
        """Windows of a long file that states its length, a stretch of it at a time."""
        # The reader reads a file whole that is hardly longer than the part.
        seconds = min(BLOCK_SECONDS, length - self.span - 3)
        for block in blocks(begins, seconds * self.fps):
            start = block[0] / self.fps
            end = min(block[-1] / self.fps + self.span, length)
            file = self._open(part=(start, end))
            sound = file.audio if self.takes_sound else None
            if sound is not None:
                # Silence, where the pictures go on without it.
                missing = round((end - start) * self.rate) - len(sound)
                sound = np.pad(sound, (0, max(0, missing)))
            offsets = [begin - block[0] for begin in block]
            num_windows = 0
            for offset, frames in cut(file.frames, offsets, self.frames):
                num_windows += 1
                yield self._window(block[0] + offset, frames, sound, offset)
            if not num_windows:
                raise self.media.MediaError(
                    f'truncated: no picture at {start:.1f} of {length:.1f} s'
                )

    def _without_length(self, windows: int | None, stride: float | None) -> Iterator[Window]:
        """Windows of a long file that does not state its length: its frames are counted first."""
        count = sum(1 for _ in self._frames_alone())
        begins = window_begins(count, self.frames, self.fps, windows, stride)
        sounds: Iterator[np.ndarray] | None = None
        if self.takes_sound:
            firsts = [round(begin / self.fps * self.rate) for begin in begins]
            sounds = cut_samples(
                self.media.stream_audio(self.path, self.rate), firsts, self.samples
            )
        for begin, frames in cut(self._frames_alone(), begins, self.frames):
            samples = None if sounds is None else next(sounds, None)
            yield Window(begin / self.fps, frames, samples)

    def _frames_alone(self) -> Iterator[np.ndarray]:
        return self.media.read(self.path, self.fps, self.size, 0).frames


def blocks(begins: Sequence[int], longest: float) -> Iterator[list[int]]:
    """Split ascending begins so that those of a block are at most `longest` apart."""
    block: list[int] = []
    for begin in begins:
        if block and begin - block[0] > longest:
            yield block
            block = []
        block.append(begin)
    yield block


def cut(
    frames: Iterable[np.ndarray], begins: Sequence[int], length: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield (begin, its `length` frames), holding no others; the last ones may have fewer.

    Args:
        frames: of a file, in order.
        begins: ascending.
        length: of a window.
    """
    buffer = _buffer([frame] for frame in frames)
    for begin in begins:
        buffer.forget(begin)
        buffer.read_to(begin + length)
        window = list(itertools.chain.from_iterable(buffer.pieces(begin, length)))
        if window:
            yield begin, window


def cut_samples(
    stream: Iterator[np.ndarray], begins: Sequence[int], length: int
) -> Iterator[Int16[np.ndarray, ' S']]:
    """Yield `length` samples from each begin on, holding no others; fewer at the end.

    Args:
        stream: blocks of samples, in order.
        begins: ascending.
        length: of a window.
    """
    buffer = _buffer(stream)
    for begin in begins:
        buffer.forget(begin)
        buffer.read_to(begin + length)
        yield np.concatenate([np.zeros(0, np.int16), *buffer.pieces(begin, length)])


def _buffer(blocks: Iterable[Any]) -> Any:
    """What holds of a stream no more than windows need."""
    from data_pipelines import media_windows

    return media_windows.StreamBuffer(blocks)


def sound_windows(
    path: Any,
    where: str,
    audio: dict[str, Any],
    windows: int | None = None,
    stride: float | None = None,
) -> Iterator[Window]:
    """Yield windows of the sound of a file. Arguments and errors as of `video_windows`."""
    media = _reader()
    path = os.fsdecode(path)
    rate, num_samples = audio['rate'], audio['samples']
    span = num_samples / rate
    try:
        length = media.duration(path, 'audio')
        if length is None:
            yield from _sound_without_length(media, path, where, audio, windows, stride)
            return
        if length <= max(HELD_SECONDS, span + 3):
            sound = _sound(media, path, where, rate)
            for begin in window_begins(len(sound), num_samples, rate, windows, stride):
                yield Window(begin / rate, None, sound[begin : begin + num_samples])
            return
        begins = window_begins(round(length * rate), num_samples, rate, windows, stride)
        for block in blocks(begins, min(BLOCK_SECONDS, length - span - 3) * rate):
            end = min(block[-1] / rate + span, length)
            sound = _sound(media, path, where, rate, part=(block[0] / rate, end))
            for begin in block:
                samples = sound[begin - block[0] :][:num_samples]
                if len(samples):
                    yield Window(begin / rate, None, samples)
    except (media.MediaError, OSError) as error:
        raise MediaFileError(f'{where}: {error}') from error


def _sound_without_length(
    media: Any,
    path: str,
    where: str,
    audio: dict[str, Any],
    windows: int | None,
    stride: float | None,
) -> Iterator[Window]:
    """Windows of a file that does not state its length: its samples are counted first."""
    rate, num_samples = audio['rate'], audio['samples']
    count = sum(len(block) for block in media.stream_audio(path, rate))
    if not count:
        raise MediaFileError(f'{where}: the file has no sound')
    begins = window_begins(count, num_samples, rate, windows, stride)
    sounds = cut_samples(media.stream_audio(path, rate), begins, num_samples)
    for begin, samples in zip(begins, sounds):
        yield Window(begin / rate, None, samples)


def _sound(media: Any, path: str, where: str, rate: int, **part: Any) -> np.ndarray:
    # Pictures are not decoded any further than the reader needs.
    sound = media.read(path, 1.0, 8, rate, **part).audio
    if sound is None:
        raise MediaFileError(f'{where}: the file has no sound')
    return sound


def read_picture(path: Any, where: str, size: int) -> UInt8[np.ndarray, 'H W 3']:
    """The picture of a file, with short side `size`.

    Raises:
        MediaFileError: the file cannot be read, or is a video.
    """
    media = _reader()
    path = os.fsdecode(path)
    try:
        frames = media.read(path, 25.0, size, 8000).frames
        shown = [] if frames is None else list(itertools.islice(frames, PICTURE_FRAMES))
    except (media.MediaError, OSError) as error:
        raise MediaFileError(f'{where}: {error}') from error
    if not shown:
        raise MediaFileError(f'{where}: the file has no picture')
    # A picture that stays on display is one array.
    if any(frame is not shown[0] for frame in shown):
        raise MediaFileError(f'{where}: expected a picture, got a video; pass it as video=…')
    return shown[0]


def _reader() -> Any:
    """The reader of media files. It says itself which extra it needs, where that is missing."""
    from data_pipelines import media

    return media
