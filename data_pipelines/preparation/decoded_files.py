"""One media file -> one staged file: the slow half of `prepare`, run in worker processes, so it imports little.

A staged file is a length (8 bytes), a JSON header and the frames (JPEG, or one H.264 packet each) and PCM samples behind it. It appears
whole or not at all, and its name tells file and settings apart, so whatever is found of an interrupted run can be trusted.
"""

from __future__ import annotations

import concurrent.futures as futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import threading
from typing import Any

from data_pipelines import media

_VERSION = 1  # of the staged format and of how media are decoded


@dataclasses.dataclass(frozen=True)
class Settings:
    """fps frames per second, pixels of the short side, sound samples per second, JPEG quality, seconds below which a file is
    skipped. crf: of H.264, which then takes the place of JPEG; 0: JPEG."""

    fps: float
    size: int
    rate: int
    quality: int
    min_seconds: float
    crf: int = 0

    def words(self) -> list[float]:
        """All that decides what comes out, as they were when JPEG was the only form."""
        return list(dataclasses.astuple(self))[: 6 if self.crf else 5]


@dataclasses.dataclass(frozen=True)
class File:
    """A media file, or the part of it that is wanted. id: its path below the folder, with forward slashes; of a part, with its seconds."""

    id: str
    path: str
    bytes: int
    modified: int
    part: tuple[float, float] = media.WHOLE

    def key(self, settings: Settings) -> str:
        words = [
            _VERSION,
            self.id,
            self.bytes,
            self.modified,
            *settings.words(),
            *(self.part if self.part != media.WHOLE else ()),
        ]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]


def place(staging: pathlib.Path, file: File, settings: Settings) -> pathlib.Path:
    key = file.key(settings)
    return staging / 'files' / key[:2] / key


def stage(file: File, settings: Settings, target: str) -> None:
    """Decodes `file` into `target`; a file that cannot be used leaves a header with the reason."""
    frames, header, pcm = (
        [],
        {'id': file.id, 'height': 0, 'width': 0, 'samples': 0, 'lengths': []},
        b'',
    )
    try:
        content = media.read(file.path, settings.fps, settings.size, settings.rate, part=file.part)

        def pictures():
            for picture in content.frames or ():
                header['height'], header['width'] = (
                    n // 2 * 2 if settings.crf else n for n in picture.shape[:2]
                )
                yield picture

        frames = (
            media.h264(pictures(), settings.fps, settings.crf)
            if settings.crf
            else [media.jpeg(picture, settings.quality) for picture in pictures()]
        )
        audio = (
            media.fit(content.audio, len(frames), settings.fps, settings.rate)
            if frames
            else content.audio
        )
        header['samples'] = 0 if audio is None else len(audio)
        header['duration'] = (
            len(frames) / settings.fps if frames else header['samples'] / settings.rate
        )
        if not header['duration']:
            raise media.MediaError('corrupt: nothing could be decoded')
        if header['duration'] < settings.min_seconds:
            raise media.MediaError(f'too short: {header["duration"]:.2f} s')
        pcm = b'' if audio is None else audio.astype('<i2').tobytes()
        header['lengths'] = [len(f) for f in frames]
    except Exception as e:  # whatever one file does to a decoder, the others go on
        reason = e.reason if isinstance(e, media.MediaError) else f'{type(e).__name__}: {e}'
        frames, pcm, header = [], b'', {'id': file.id, 'skipped': reason}
    write(target, header, [*frames, pcm])


def write(target: str, header: dict[str, Any], parts: list[bytes]) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    text = json.dumps(header).encode()
    with open(f'{target}.{os.getpid()}', 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        f.writelines(parts)
    os.replace(f'{target}.{os.getpid()}', target)


def header(path: pathlib.Path) -> dict[str, Any]:
    with open(path, 'rb') as f:
        return json.loads(f.read(int.from_bytes(f.read(8), 'little')))


def content(path: pathlib.Path) -> tuple[list[bytes], bytes]:
    """(JPEG frames, PCM bytes)."""
    with open(path, 'rb') as f:
        head = json.loads(f.read(int.from_bytes(f.read(8), 'little')))
        return [f.read(n) for n in head['lengths']], f.read()


def crashed(file: File, target: str) -> None:
    """Notes that decoding this file ended the process that did it."""
    write(target, {'id': file.id, 'skipped': 'corrupt: it crashes the decoder'}, [])


def pool(processes: int) -> futures.ProcessPoolExecutor:
    """Spawned, not forked: the parent may hold threads of JAX or TensorFlow."""
    return futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context('spawn'), die_with_parent
    )


def die_with_parent() -> None:
    """For worker processes: nobody reaps them when their parent is killed."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
