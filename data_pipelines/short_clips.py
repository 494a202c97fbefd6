"""Stretches of media files as browsers play them: H.264 and AAC; WAV for sound alone."""

from __future__ import annotations

import io
import itertools
import os
import pathlib
import tempfile
import wave

import av
import numpy as np
from jaxtyping import Int16

from data_pipelines import file_signs, media

# Containers that browsers play, by FFmpeg's names for how they are read.
_CONTAINERS = (
    'mov,mp4,m4a,3gp,3g2,mj2',
    'matroska,webm',
    'wav',
    'flac',
    'ogg',
    'mp3',
)
_CODECS = (
    'h264',
    'vp8',
    'vp9',
    'av1',
    'aac',
    'mp3',
    'mp3float',
    'opus',
    'vorbis',
    'flac',
    'pcm_s16le',
    'pcm_u8',
)
# Of what is made here: enough to see and hear what was found.
FPS = 25.0
SHORT_SIDE = 360
RATE = 44100
# Of a longer stretch the beginning: its frames are held in memory.
MOST_SECONDS = 30.0
# A file is read whole that is hardly longer than the stretch.
_MARGIN = 3.0


def plays_in_browsers(path: str | os.PathLike) -> bool:
    """Whether container and codecs of a file are among those that browsers play.

    Raises:
        MediaError: the file does not open.
    """
    if file_signs.is_playlist(path):
        return False
    try:
        with av.open(f'file:{os.fspath(path)}') as container:
            if container.format.name not in _CONTAINERS:
                return False
            streams = [*container.streams.video, *container.streams.audio]
            return all(_codec_name(stream) in _CODECS for stream in streams)
    except (av.error.FFmpegError, OSError, UnicodeError) as error:
        raise media.MediaError(f'corrupt: {error}') from None


def has_pictures(path: str | os.PathLike) -> bool:
    """Whether a file has pictures, beside or instead of sound.

    Raises:
        MediaError: the file has neither, or cannot be read.
    """
    return media.read(path, 1.0, 8, rate=0).frames is not None


def _codec_name(stream: av.stream.Stream) -> str:
    # Without a decoder there is no codec context.
    return stream.codec_context.name if stream.codec_context is not None else ''


def short_clip(path: str | os.PathLike, start: float, end: float) -> tuple[str, bytes]:
    """A stretch of a file, at most MOST_SECONDS of it, as a file of its own.

    Args:
        path: the file.
        start: seconds.
        end: seconds.

    Returns:
        (MIME type, content).

    Raises:
        MediaError: the file cannot be read.
    """
    end = min(end, start + MOST_SECONDS)
    length = media.duration(path, 'video')
    is_long = length is not None and length > end - start + _MARGIN
    part = (start, end) if is_long else media.WHOLE
    found = media.read(path, FPS, SHORT_SIDE, RATE, part=part)
    skipped = 0.0 if is_long else start
    sound = None
    if found.audio is not None:
        sound = found.audio[round(skipped * RATE) : round((skipped + end - start) * RATE)]
    if found.frames is None:
        return 'audio/wav', _wav(np.zeros(0, np.int16) if sound is None else sound)
    first = round(skipped * FPS)
    last = first + max(1, round((end - start) * FPS))
    frames = np.stack(list(itertools.islice(found.frames, first, last)))
    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    with tempfile.TemporaryDirectory() as folder:
        made = pathlib.Path(folder) / 'clip.mp4'
        media.write_mp4(made, frames[:, :height, :width], FPS, sound, RATE, crf=26)
        return 'video/mp4', made.read_bytes()


def _wav(samples: Int16[np.ndarray, ' S']) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, 'wb') as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.astype('<i2').tobytes())
    return stream.getvalue()
