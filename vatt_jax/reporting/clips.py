"""Clips of an evaluation as small films with sound, within a budget of bytes."""

from __future__ import annotations

import dataclasses
import fractions
import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int16, UInt8
from PIL import Image

from vatt_jax.reporting import data_uris

# Of evaluations that were written before the speeds were stored.
DEFAULT_FPS = 8.0
# Smaller frames are enlarged without smoothing: a browser would blur them, and film codecs store
# colour at half the resolution.
SMALLEST_SIDE = 96
# Samples a second that AAC knows, without those that nobody hears.
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


class Rung(NamedTuple):
    """One way to store a clip; those that come later are smaller.

    Attributes:
        side: largest side of the picture, in pixels.
        quality: of the still, JPEG's from 1 to 95.
        crf: H.264's quality of the film, lower is better; None: a still alone.
        bit_rate: of the sound; 0: none.
    """

    side: int
    quality: int
    crf: int | None
    bit_rate: int


LADDER = (
    Rung(192, 75, 26, 64_000),
    Rung(160, 70, 30, 48_000),
    Rung(128, 60, 34, 32_000),
    Rung(96, 50, 38, 24_000),
    Rung(96, 50, 40, 0),
    Rung(96, 50, None, 0),
    Rung(48, 40, None, 0),
)


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip as the page stores it.

    Attributes:
        still: data URI of its middle frame.
        width: of the still.
        height: of the still.
        film: data URI of what plays: a film, or a sound alone; '' where nothing does.
        rung: how it is stored.
    """

    still: str
    width: int
    height: int
    film: str
    rung: Rung

    @property
    def size(self) -> int:
        """Bytes in the page."""
        return len(self.still) + len(self.film)


@dataclasses.dataclass(frozen=True)
class Source:
    """The clips that one file of an evaluation stores, read one at a time.

    Attributes:
        path: gallery.npz or clusters.npz.
        document: the JSON document in it.
        indices: of the clips that have frames.
    """

    path: pathlib.Path
    document: Mapping[str, Any]
    indices: tuple[str, ...]

    def clips(self) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
        """(index, frames uint8 [T H W 3], sound int16 [S] or None) of each clip."""
        # Arrays are read when they are asked for: all frames together may be gigabytes.
        with np.load(self.path) as arrays:
            for index in self.indices:
                sound = arrays.get(f'audio/{index}')
                yield index, arrays[f'frames/{index}'], sound

    @property
    def fps(self) -> float:
        return float(self.document.get('fps') or DEFAULT_FPS)

    @property
    def rate(self) -> int:
        return int(self.document.get('rate') or 0)


def open_source(path: pathlib.Path) -> Source | None:
    """The clips of a file that evals/gallery.py wrote; None where it wrote none.

    Raises:
        DAMAGE: of finished_run.py, where it is damaged.
    """
    if not path.exists():
        return None
    with np.load(path) as arrays:
        # Each array is read once here, so that damage shows before anything is drawn.
        for name in arrays.files:
            arrays[name]
        # JSON inside the npz, as a string array of no dimensions: no pickle is needed to read it.
        document = json.loads(str(arrays['entries']))
        prefix = 'frames/'
        indices = [name.removeprefix(prefix) for name in arrays.files if name.startswith(prefix)]
    return Source(path, document, tuple(indices))


def encode_all(sources: Mapping[str, Source], budget: int) -> dict[str, Clip]:
    """Every clip of every source, all together within a number of bytes.

    Each clip gets an equal share of what is left, so a clip that needs little leaves the more to
    the next ones. A clip that fits in no form is left out.

    Args:
        sources: name -> clips.
        budget: bytes of all data URIs together.

    Returns:
        'name-index' -> clip.
    """
    remaining_clips = sum(len(source.indices) for source in sources.values())
    encoded: dict[str, Clip] = {}
    first_rung = 0
    for name, source in sources.items():
        for index, frames, sound in source.clips():
            share = max(0, budget) // remaining_clips
            ladder = LADDER[first_rung:]
            clip = encode(frames, source.fps, sound, source.rate, share, ladder)
            remaining_clips -= 1
            if clip is None:
                continue
            encoded[f'{name}-{index}'] = clip
            budget -= clip.size
            # Clips of one evaluation are alike: one rung above is tried again, not all of them.
            first_rung = max(0, LADDER.index(clip.rung) - 1)
    return encoded


def encode(
    frames: UInt8[np.ndarray, 'T H W 3'],
    fps: float,
    sound: Int16[np.ndarray, ' S'] | None,
    rate: int,
    budget: int,
    ladder: Sequence[Rung] = LADDER,
) -> Clip | None:
    """A clip on the first rung of the ladder on which it is small enough; None: on none.

    Args:
        frames: what is seen.
        fps: frames a second.
        sound: what is heard, if anything.
        rate: its samples a second.
        budget: bytes of its data URIs together.
        ladder: the ways to store it, best first.
    """
    if not rate:
        sound = None
    for rung in ladder:
        picture = _resized(frames[len(frames) // 2], rung.side)
        height, width, _ = picture.shape
        still = data_uris.jpeg(picture, rung.quality)
        # A film takes long to encode: not where even the still is too large.
        if len(still) > budget:
            continue
        film = ''
        if rung.crf is not None:
            film = _film(frames, fps, sound if rung.bit_rate else None, rate, rung)
        clip = Clip(still, width, height, film, rung)
        if clip.size <= budget:
            return clip
    return None


def _resized(frame: UInt8[np.ndarray, 'H W 3'], side: int) -> UInt8[np.ndarray, 'H2 W2 3']:
    """The frame with a largest side of at most `side`, and even sides, as H.264 asks for."""
    height, width, _ = frame.shape
    largest = max(height, width)
    scale = min(1.0, side / largest)
    method = Image.Resampling.LANCZOS
    if largest < min(side, SMALLEST_SIDE):
        # Whole multiples, so that every pixel stays a square.
        scale = max(1, side // largest)
        method = Image.Resampling.NEAREST
    even_width = max(2, round(width * scale / 2) * 2)
    even_height = max(2, round(height * scale / 2) * 2)
    return np.asarray(Image.fromarray(frame).resize((even_width, even_height), method))


def _film(
    frames: UInt8[np.ndarray, 'T H W 3'],
    fps: float,
    sound: Int16[np.ndarray, ' S'] | None,
    rate: int,
    rung: Rung,
) -> str:
    """Data URI of an mp4 file; of the sound alone without PyAV, '' if there is none either."""
    if not can_encode_films():
        return '' if sound is None else data_uris.wav(sound, rate)
    import av

    file = io.BytesIO()
    with av.open(file, 'w', format='mp4') as container:
        # Both streams before the first packet: the file's header names them.
        speed = fractions.Fraction(fps).limit_denominator(1000)
        picture = container.add_stream('libx264', rate=speed)
        picture.height, picture.width, _ = _resized(frames[0], rung.side).shape
        # What every browser decodes.
        picture.pix_fmt = 'yuv420p'
        picture.options = {'crf': str(rung.crf), 'preset': 'veryfast'}
        track = None
        if sound is not None:
            # AAC knows only some rates: the next higher one keeps all that is heard.
            track_rate = next((known for known in AAC_RATES if known >= rate), AAC_RATES[-1])
            track = container.add_stream('aac', rate=track_rate, layout='mono')
            track.bit_rate = rung.bit_rate
        for frame in frames:
            shown = av.VideoFrame.from_ndarray(_resized(frame, rung.side), format='rgb24')
            container.mux(picture.encode(shown))
        container.mux(picture.encode())
        if track is not None and sound is not None:
            heard = av.AudioFrame.from_ndarray(sound[None], format='s16', layout='mono')
            heard.sample_rate = rate
            resampler = av.AudioResampler('fltp', 'mono', track.rate)
            # None: what the resampler still holds.
            for part in (*resampler.resample(heard), *resampler.resample(None)):
                container.mux(track.encode(part))
            container.mux(track.encode())
    return data_uris.uri('video/mp4', file.getvalue())


def can_encode_films() -> bool:
    """Whether PyAV and its encoders are installed (the extra `video`)."""
    try:
        import av
    except ImportError:
        return False
    try:
        for name in ('libx264', 'aac'):
            av.codec.Codec(name, 'w')
    except ValueError:
        # av.codec.UnknownCodecError: built against an FFmpeg without them.
        return False
    return True
