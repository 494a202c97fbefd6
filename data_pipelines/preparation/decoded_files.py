"""One media file -> one staged file: the slow half of `prepare`.

This module is imported by worker processes, so it imports little.

A staged file has these parts, one behind the other:

    8 bytes     length of the header, little-endian
    header      JSON
    frames      JPEG each, or one H.264 packet each; the header has their lengths
    flows       of each frame, JPEG each, where optical flow is stored; likewise
    audio       PCM samples, int16 little-endian

It appears whole or not at all, and its name tells file and settings apart. Whatever is found of an
interrupted run can therefore be trusted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import UInt8

from data_pipelines import media
from vatt_jax.inputs import optical_flow

# Part of every key, so raising it makes the next run decode everything again.
_VERSION = 1  # of the staged format and of how media are decoded


@dataclasses.dataclass(frozen=True)
class Settings:
    """How media files are decoded and stored.

    Attributes:
        fps: stored frames per second.
        size: short side of stored frames, in pixels.
        rate: stored audio samples per second.
        quality: of JPEG, 1 to 100.
        min_seconds: shorter files are skipped.
        crf: quality of H.264, which then takes the place of JPEG; 0 for JPEG.
        flow: method of optical flow, '' for none.
        resize: entry of `media.RESIZES`, of image files.
    """

    fps: float
    size: int
    rate: int
    quality: int
    min_seconds: float
    crf: int = 0
    flow: str = ''
    resize: str = media.RESIZES[0]

    def words(self) -> list[Any]:
        """The values of all fields that decide what comes out, for keys of files and runs."""
        *values, crf, flow, resize = dataclasses.astuple(self)
        # Without what is usual: keys from before there was a choice remain valid.
        if crf:
            values.append(crf)
        if flow:
            values += ['flow', flow, optical_flow.BOUND]
        if resize != media.RESIZES[0]:
            values += ['resize', resize]
        return values


# slots: there may be many at once.
@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """A media file, or the part of it that becomes a record.

    Attributes:
        id: path below the folder, with forward slashes; of a part, followed by its seconds.
        path: where the file is, or the tar archive that it is in.
        bytes: its size.
        modified: time of its last change (of the archive's, if it is in one), in nanoseconds.
        part: (start, end) in seconds.
        offset: byte of the archive at which it begins; 0 of a file of its own.
    """

    id: str
    path: str
    bytes: int
    modified: int
    part: tuple[float, float] = media.WHOLE
    offset: int = 0

    def key(self, settings: Settings) -> str:
        """A hash of everything that the staged file depends on; it is the name of that file."""
        # Size and time of change stand for the contents: hashing a large collection would take as
        # long as reading it. `path` is left out, so that the folder may move.
        hashed = [_VERSION, self.id, self.bytes, self.modified, *settings.words()]
        # Nothing for a whole file: keys from before files could have parts remain valid.
        if self.part != media.WHOLE:
            hashed += self.part
        if self.offset:
            hashed += ['offset', self.offset]
        # 32 hexadecimal digits are 128 bits: enough against collisions among billions of files.
        return hashlib.sha256(json.dumps(hashed).encode()).hexdigest()[:32]


def staged_path(staging: pathlib.Path, file: File, settings: Settings) -> pathlib.Path:
    """Path of the staged file."""
    key = file.key(settings)
    # Two characters make 256 folders: file systems are slow where one holds a million files.
    return staging / 'files' / key[:2] / key


def stage_file(file: File, settings: Settings, target: str) -> None:
    """Decode a media file into a staged file.

    A file that cannot be used raises nothing; its staged file holds the reason.

    Args:
        file: the media file.
        settings: how it is decoded.
        target: path of the staged file.
    """
    try:
        header, payload = _decode(file, settings)
    except Exception as error:  # whatever one file does to a decoder, the others go on
        if isinstance(error, media.MediaError):
            reason = error.reason
        else:
            reason = f'{type(error).__name__}: {error}'
        header, payload = {'id': file.id, 'skipped': reason}, [b'']
    write(target, header, payload)


def _decode(file: File, settings: Settings) -> tuple[dict[str, Any], list[bytes]]:
    """Header, and the encoded frames followed by flows and PCM bytes. Raises MediaError."""
    # Filled in as decoding goes on (`pictures` runs while the frames are encoded): size and lengths
    # are known only then.
    header: dict[str, Any] = {'id': file.id, 'height': 0, 'width': 0, 'samples': 0, 'lengths': []}
    decoded = _open(file, settings)
    flows = _FlowEncoder(settings) if settings.flow else None

    def pictures() -> Iterator[UInt8[np.ndarray, 'H W 3']]:
        # Frames are encoded as they are decoded: a long video would not fit into memory.
        for picture in decoded.frames or ():
            height, width = picture.shape[:2]
            if settings.crf:
                # H.264 leaves out an odd last row or column.
                height, width = height // 2 * 2, width // 2 * 2
            header['height'], header['width'] = height, width
            if flows:
                flows.add(picture)
            yield picture

    # Files are decoded side by side: OpenCV's threads would be too many.
    with optical_flow.one_thread() if flows else contextlib.nullcontext():
        if settings.crf:
            frames = media.encode_h264(pictures(), settings.fps, settings.crf)
        else:
            frames = _encode_jpegs(pictures(), settings.quality)

    audio = decoded.audio
    if frames:
        # After the frames were read: only then is their number known.
        audio = media.fit_audio(audio, len(frames), settings.fps, settings.rate)
    header['samples'] = 0 if audio is None else len(audio)
    # Pictures are the clock; sound alone is as long as its samples.
    if frames:
        header['duration'] = len(frames) / settings.fps
    else:
        header['duration'] = header['samples'] / settings.rate
    if not header['duration']:
        raise media.MediaError('corrupt: nothing could be decoded')
    if header['duration'] < settings.min_seconds:
        raise media.MediaError(f'too short: {header["duration"]:.2f} s')

    _check_unchanged(file)
    header['lengths'] = [len(frame) for frame in frames]
    stored_flows: list[bytes] = []
    if flows:
        stored_flows = flows.finish()
        header['flow_lengths'] = [len(flow) for flow in stored_flows]
    # Little-endian on every machine; the header says nothing of byte order.
    pcm = b'' if audio is None else audio.astype('<i2').tobytes()
    return header, [*frames, *stored_flows, pcm]


def _open(file: File, settings: Settings) -> media.Media:
    """The pictures and sound of a file, or the picture of a member of an archive."""
    if not file.offset:
        return media.read(
            file.path,
            settings.fps,
            settings.size,
            settings.rate,
            part=file.part,
            resize=settings.resize,
        )
    with open(file.path, 'rb') as stream:
        stream.seek(file.offset)
        content = stream.read(file.bytes)
    if len(content) < file.bytes:
        raise media.MediaError('truncated: the archive ends within it')
    source = io.BytesIO(content)
    return media.read_image(source, settings.fps, settings.size, resize=settings.resize)


def _check_unchanged(file: File) -> None:
    """Raise MediaError for a file that is another one now than when the folder was listed.

    A copy or a download that still goes on would count as whole.
    """
    status = os.stat(file.path)
    # Of a member of an archive, the size of the archive is not noted.
    size = file.bytes if file.offset else status.st_size
    # 0 where nobody noted the time.
    if file.modified and (size, status.st_mtime_ns) != (file.bytes, file.modified):
        raise media.MediaError(
            'changed: it was written to meanwhile; prepare again when it is whole'
        )


def _encode_jpegs(pictures: Iterable[UInt8[np.ndarray, 'H W 3']], quality: int) -> list[bytes]:
    encoded: list[bytes] = []
    last = None
    for picture in pictures:
        # One that stays on display is the same array each time: a still picture with minutes of
        # sound is encoded once.
        if picture is not last:
            jpeg = media.encode_jpeg(picture, quality)
            last = picture
        encoded.append(jpeg)
    return encoded


class _FlowEncoder:
    """Encodes the optical flow between the pictures of a file, as they come."""

    def __init__(self, settings: Settings):
        self._flows = optical_flow.Flows(settings.flow)
        self._is_h264 = bool(settings.crf)
        self._quality = settings.quality
        self._encoded: list[bytes] = []
        self._last: np.ndarray | None = None
        self._still = b''

    def add(self, picture: UInt8[np.ndarray, 'H W 3']) -> None:
        """The next picture."""
        if picture is self._last:
            # One that stays on display: nothing moves, which is encoded once.
            if not self._still:
                self._still = self._encode(optical_flow.still(*self._size(picture)))
            self._encoded.append(self._still)
            return
        self._last = picture
        height, width = self._size(picture)
        flow = self._flows.next(picture[:height, :width])
        if flow is not None:
            self._encoded.append(self._encode(flow))

    def finish(self) -> list[bytes]:
        """The flow of each picture; the last one has that of the picture before it."""
        if self._last is None:
            return []
        if not self._encoded:
            return [self._encode(optical_flow.still(*self._size(self._last)))]
        return [*self._encoded, self._encoded[-1]]

    def _size(self, picture: UInt8[np.ndarray, 'H W 3']) -> tuple[int, int]:
        """Height and width of the stored frame."""
        height, width = picture.shape[:2]
        # H.264 leaves out an odd last row or column.
        return (height // 2 * 2, width // 2 * 2) if self._is_h264 else (height, width)

    def _encode(self, flow: UInt8[np.ndarray, 'H W 2']) -> bytes:
        return media.encode_jpeg(optical_flow.to_planes(flow), self._quality)


def write(target: str, header: dict[str, Any], parts: list[bytes]) -> None:
    """Write a staged file, whole or not at all."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    header_bytes = json.dumps(header).encode()
    # The process number keeps apart two workers that try the same file.
    temporary = f'{target}.{os.getpid()}'
    with open(temporary, 'wb') as stream:
        stream.write(len(header_bytes).to_bytes(8, 'little') + header_bytes)
        stream.writelines(parts)
    # Atomic, as both are in one folder: readers see the whole file or none.
    os.replace(temporary, target)


def header(path: pathlib.Path) -> dict[str, Any]:
    """Header of a staged file: what was decoded, or {'id', 'skipped': reason}."""
    with open(path, 'rb') as stream:
        return _read_header(stream)


class Content(NamedTuple):
    """What a staged file holds: encoded frames, their encoded flows if any, and PCM bytes."""

    frames: list[bytes]
    flows: list[bytes]
    pcm: bytes


def content(path: pathlib.Path) -> Content:
    """Contents of a staged file."""
    with open(path, 'rb') as stream:
        header = _read_header(stream)
        frames = [stream.read(length) for length in header['lengths']]
        flows = [stream.read(length) for length in header.get('flow_lengths', ())]
        # The rest is audio, so its length is not stored twice.
        return Content(frames, flows, stream.read())


def _read_header(stream: BinaryIO) -> dict[str, Any]:
    length = int.from_bytes(stream.read(8), 'little')
    return json.loads(stream.read(length))


def write_crashed(file: File, target: str) -> None:
    """Write a staged file that says that decoding ended the process that did it."""
    write(target, {'id': file.id, 'skipped': 'corrupt: it crashes the decoder'}, [])
