"""Media files <-> arrays, through PyAV: frames at a fixed rate, mono sound beside them on one clock, and small mp4 files; single images.

The clock starts at the first picture (or the first sound of a file without pictures). Everything is placed by time stamps: a
variable frame rate, a late audio track or a hole in it do not move sound against pictures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fractions
import io
import os
from collections.abc import Iterable, Iterator, Sequence

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

SUFFIXES = (
    '.mp4',
    '.webm',
    '.mkv',
    '.avi',
    '.mov',
    '.m4v',
    '.mpg',
    '.flv',
    '.wav',
    '.flac',
    '.ogg',
    '.mp3',
    '.m4a',
    '.opus',
)
IMAGES = ('.jpeg', '.jpg', '.png', '.webp')
WHOLE = (0.0, float('inf'))
GOP = 10  # frames from one to the next that decodes alone, in records that store video
_BAD_SHARE = 0.05  # undecodable packets that are put up with
_HOLE = 0.05  # seconds between the end of one piece of sound and the next that count as a hole
av.logging.set_level(
    av.logging.PANIC
)  # decoders print every concealed error of a web video; what matters is raised


class MediaError(ValueError):
    """A file that cannot be used. `reason` is a short clause for lists: 'corrupt: …', 'too short: …'."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass
class Media:
    """frames: iterator of uint8 [H W 3] RGB at the asked fps (None without a video track). audio: int16 [S] mono or None; with
    frames it still has to be cut or filled to their length, which is known when they have been read (`fit`)."""

    frames: Iterator[np.ndarray] | None
    audio: np.ndarray | None


def read(
    path: str | os.PathLike,
    fps: float,
    size: int,
    rate: int,
    longest: float = 4 * 3600.0,
    part: tuple[float, float] = WHOLE,
) -> Media:
    """Opens a media file. `size`: pixels of the short side; `rate`: samples per second; part: seconds (start, end) that are wanted.

    An image is one frame. Of a file that is as long as the part (to a second), or ends before it, everything is read: then it was cut out
    before. Raises MediaError here for files that do not open, and while frames are read for pictures that do not decode.
    """
    if os.fspath(path).lower().endswith(IMAGES):
        return Media(iter([_image(path, size)]), None)
    try:
        with av.open(os.fspath(path)) as container:
            pictures, sounds = _track(container, 'video'), _track(container, 'audio')
            if pictures is None and sounds is None:
                raise MediaError('no video and no audio track')
            if (
                part != WHOLE
                and not part[1] - 1
                <= (container.duration or 0) / av.time_base
                > part[1] - part[0] + 1
            ):
                part = WHOLE
            zero = _first_time(container) if pictures is not None else None
        audio = _audio(path, rate, zero, longest, part) if sounds is not None else None
    except (av.error.FFmpegError, OSError, EOFError, UnicodeDecodeError) as e:
        raise MediaError(f'corrupt: {_say(e)}') from None
    if pictures is not None:
        return Media(_frames(path, fps, size, zero, longest, part), audio)
    if audio is None:
        raise MediaError('corrupt: no sound could be decoded')
    return Media(None, audio)


def _track(container: av.container.InputContainer, kind: str) -> av.stream.Stream | None:
    """The first track of a kind; the cover picture of a music file is none."""
    return next(
        (
            s
            for s in getattr(container.streams, kind)
            if not s.disposition & av.stream.Disposition.attached_pic
        ),
        None,
    )


def _image(path: str | os.PathLike, size: int) -> np.ndarray:
    """uint8 [H W 3], upright, short side `size`."""
    try:
        with Image.open(path) as image:
            image.draft(
                'RGB', (size, size)
            )  # a JPEG is decoded at an eighth, quarter or half of its size if that is enough
            image = ImageOps.exif_transpose(image).convert('RGB')
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise MediaError(f'corrupt: {_say(e)}') from None
    scale = size / min(image.size)
    shape = tuple(max(size, round(n * scale)) for n in image.size)
    return np.asarray(
        image.resize(shape, Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR)
    )


def fit(audio: np.ndarray | None, frames: int, fps: float, rate: int) -> np.ndarray | None:
    """Sound cut, or filled with silence, to the length of `frames` pictures, so that both end together."""
    if audio is None:
        return None
    samples = round(frames / fps * rate)
    return np.pad(audio[:samples], (0, max(0, samples - len(audio))))


def _say(error: BaseException) -> str:
    return str(getattr(error, 'strerror', None) or error).split('\n')[0]


def _first_time(container: av.container.InputContainer) -> float:
    """Seconds of the first picture."""
    stream = _track(container, 'video')
    if stream.start_time is not None:
        return float(stream.start_time * stream.time_base)
    stream.codec_context.thread_count = 1
    for frame in _decode(container, stream):
        return float(frame.pts * frame.time_base) if frame.pts is not None else 0.0
    raise MediaError('corrupt: no picture could be decoded')


def _decode(container, stream) -> Iterator[av.frame.Frame]:
    """Decoded frames of one stream. Raises MediaError when too many packets do not decode."""
    good = bad = 0
    try:
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                bad += 1
                continue
            good += 1
            for frame in frames:
                bad += bool(getattr(frame, 'is_corrupt', False))
                yield frame
    except av.error.FFmpegError as e:
        raise MediaError(f'corrupt: {_say(e)}') from None
    if bad > _BAD_SHARE * (good + bad):
        raise MediaError(f'corrupt: {bad} of {good + bad} packets do not decode')


def _seek(container: av.container.InputContainer, seconds: float) -> None:
    """To a point before `seconds` of the file's own clock, from which everything decodes; nowhere if the container cannot."""
    if seconds > 1:
        with contextlib.suppress(av.error.FFmpegError):
            container.seek(int((seconds - 1) * av.time_base))


def _frames(
    path, fps: float, size: int, zero: float, longest: float, part: tuple[float, float]
) -> Iterator[np.ndarray]:
    """The picture shown at 0, 1/fps, 2/fps, … of the part until the last one's end."""
    start, length = part[0], part[1] - part[0]
    try:
        container = av.open(os.fspath(path))
    except (av.error.FFmpegError, OSError) as e:
        raise MediaError(f'corrupt: {_say(e)}') from None
    with container:
        stream = _track(container, 'video')
        stream.codec_context.thread_count = (
            1  # files are decoded side by side; threads inside each would only compete
        )
        usual = 1.0 / float(stream.average_rate) if stream.average_rate else 1.0 / fps
        declared = float(stream.duration * stream.time_base) if stream.duration else 0.0
        square = float(stream.sample_aspect_ratio or 1)
        convert = VideoReformatter()  # kept: it caches the tables of the scaler
        _seek(container, zero + start if start else 0.0)
        sent, shown, seen = (
            0,
            None,
            -1.0,
        )  # pictures given out; the one on display; its time in the file
        end, over = 0.0, False
        for frame in _decode(container, stream):
            time = (
                float(frame.pts * frame.time_base) - zero if frame.pts is not None else seen + usual
            )
            if time <= seen:  # clocks that stand still or run backwards: play on
                time = seen + usual if seen >= 0 else 0.0
            if time - start > longest or shown is not None and time - seen > max(60.0, declared):
                raise MediaError(f'corrupt: time stamps jump to {time:.0f} s')
            # Half a millisecond of grace: containers round time stamps to milliseconds or worse.
            while shown is not None and not over and sent / fps < time - start - 5e-4:
                shown = (
                    shown if isinstance(shown, np.ndarray) else _rgb(shown, size, square, convert)
                )
                yield shown
                sent += 1
                over = sent >= length * fps - 1e-3
            if over:
                return
            shown, seen = frame, time
            end = time + (float(frame.duration * frame.time_base) if frame.duration else usual)
        if end < 0.8 * declared - 1.0:
            raise MediaError(f'truncated: {end:.1f} of {declared:.1f} s can be decoded')
        if start and end <= start:
            raise MediaError(
                f'truncated: the clip begins at {start:.1f} s and {end:.1f} s can be decoded'
            )
        if shown is not None:
            for _ in range(sent, max(1, round(min(end - start, length) * fps))):
                shown = (
                    shown if isinstance(shown, np.ndarray) else _rgb(shown, size, square, convert)
                )
                yield shown


def _rgb(frame: av.VideoFrame, size: int, square: float, convert: VideoReformatter) -> np.ndarray:
    """uint8 [H W 3], upright, short side `size`. square: width of a stored pixel / its height; the result has square ones."""
    width = frame.width * square
    scale = size / min(width, frame.height)
    w, h = max(size, round(width * scale)), max(size, round(frame.height * scale))
    # One thread: for small pictures, handing the rows to others takes several times as long as scaling them.
    picture = convert.reformat(
        frame, w, h, 'rgb24', interpolation='AREA' if scale < 1 else 'BILINEAR', threads=1
    ).to_ndarray()
    turn = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, turn)) if turn else picture


def _audio(
    path, rate: int, zero: float | None, longest: float, part: tuple[float, float]
) -> np.ndarray | None:
    """int16 [S] mono of the part, counted from second `zero` (None: from its own first sound), holes filled with silence; None if there is
    none."""
    pieces: list[tuple[float, list[np.ndarray]]] = []
    with av.open(os.fspath(path)) as container:
        stream = _track(container, 'audio')
        stream.codec_context.thread_count = 1
        if part != WHOLE:
            if zero is None:
                zero = (
                    float(stream.start_time * stream.time_base)
                    if stream.start_time is not None
                    else 0.0
                )
            zero += part[0]
            _seek(container, zero)
        resampler, due, layout = None, None, None
        for frame in _decode(container, stream):
            time = float(frame.pts * frame.time_base) if frame.pts is not None else due or 0.0
            if zero is not None and time > zero + part[1] - part[0]:
                break
            here = (frame.sample_rate, frame.layout.name, frame.format.name)
            if resampler is None or here != layout or abs(time - due) > _HOLE:
                if resampler is not None:
                    pieces[-1][1].extend(x.to_ndarray()[0] for x in resampler.resample(None))
                resampler, layout = av.AudioResampler(format='s16', layout='mono', rate=rate), here
                pieces.append((time, []))
                due = time
            pieces[-1][1].extend(x.to_ndarray()[0] for x in resampler.resample(frame))
            due = due + frame.samples / frame.sample_rate
        if resampler is not None:
            pieces[-1][1].extend(x.to_ndarray()[0] for x in resampler.resample(None))
    joined = [(time, np.concatenate(some)) for time, some in pieces if some]
    if not joined:
        return None
    zero = joined[0][0] if zero is None else zero
    if part == WHOLE and len(joined) == 1 and joined[0][0] == zero:
        return joined[0][1]
    places = [(round((time - zero) * rate), pcm) for time, pcm in joined]
    total = max(at + len(pcm) for at, pcm in places)
    if total > longest * rate:
        raise MediaError(f'corrupt: sound runs to {total / rate:.0f} s')
    out = np.zeros(max(total, 0), np.int16)
    for at, pcm in places:
        pcm, at = pcm[max(0, -at) :], max(0, at)
        out[at : at + len(pcm)] = pcm
    return out if part == WHOLE else out[: round((part[1] - part[0]) * rate)]


def jpeg(frame: np.ndarray, quality: int) -> bytes:
    """uint8 [H W 3] -> JPEG bytes, chroma at half resolution."""
    out = io.BytesIO()
    Image.fromarray(frame).save(out, 'JPEG', quality=quality, subsampling=2)
    return out.getvalue()


def write_mp4(
    path: str | os.PathLike,
    frames: np.ndarray,
    fps: float,
    audio: np.ndarray | None = None,
    rate: int = 48000,
    crf: int = 18,
    preset: str = 'veryfast',
) -> None:
    """uint8 [T H W 3] at fps (H, W even) and int16 [S] mono at `rate` -> H.264 + AAC. Equal input gives equal bytes.

    crf: quality of x264 (lower is better). Raises ValueError for frames that are not even-sized uint8 RGB.
    """
    frames = np.asarray(frames)
    if (
        frames.ndim != 4
        or frames.shape[3] != 3
        or frames.dtype != np.uint8
        or frames.shape[1] % 2
        or frames.shape[2] % 2
    ):
        raise ValueError(
            f'write_mp4 wants uint8 frames [T H W 3] with even H and W; got {frames.dtype} {frames.shape}'
        )
    with av.open(
        os.fspath(path),
        'w',
        format='mp4',
        options={'fflags': '+bitexact', 'movflags': '+faststart'},
    ) as container:
        video = container.add_stream(
            'libx264', rate=fractions.Fraction(fps).limit_denominator(1001)
        )
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = 'yuv420p'
        # One thread: with more, rate control depends on their timing. No B-frames: small files that decode fast.
        video.codec_context.thread_count = 1
        video.options = {
            'crf': str(crf),
            'preset': preset,
            'bf': '0',
            'threads': '1',
            'flags': '+bitexact',
        }
        sound = None
        if audio is not None:
            sound = container.add_stream(
                'aac', rate=rate, layout='mono', options={'flags': '+bitexact'}
            )
            sound.bit_rate = min(
                5 * rate, 96000
            )  # more than about 6 bits a sample the encoder searches for and does not find
        for picture in frames:
            container.mux(
                video.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format='rgb24')
                )
            )
        container.mux(video.encode())
        if sound is not None:
            whole = av.AudioFrame.from_ndarray(
                np.asarray(audio, np.int16)[None], format='s16', layout='mono'
            )
            whole.sample_rate, whole.pts = rate, 0
            container.mux(sound.encode(whole))
            container.mux(sound.encode())


def h264(frames: Iterable[np.ndarray], fps: float, crf: int = 23, gop: int = GOP) -> list[bytes]:
    """uint8 [H W 3] each -> one H.264 packet a frame, every `gop`-th of which begins anew; an odd last row or column is left out.

    Tuned for fast decoding: no frames that look ahead, no deblocking. Any frame needs only the packets since the last beginning.
    """
    codec, out = None, []
    for frame in frames:
        frame = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]
        if codec is None:
            codec = av.CodecContext.create('libx264', 'w')
            codec.height, codec.width, codec.pix_fmt = *frame.shape[:2], 'yuv420p'
            codec.framerate = fractions.Fraction(fps).limit_denominator(1001)
            codec.time_base = 1 / codec.framerate
            codec.options = {
                'crf': str(crf),
                'preset': 'medium',
                'tune': 'fastdecode',
                'threads': '1',
                'flags': '+bitexact',
                'x264-params': f'keyint={gop}:min-keyint={gop}:scenecut=0:bframes=0:repeat-headers=1:annexb=1:threads=1',
            }
        out += [
            bytes(p)
            for p in codec.encode(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format='rgb24')
            )
        ]
    return out + [bytes(p) for p in codec.encode()] if codec is not None else []


def decoded(packets: Sequence[bytes], shown: Sequence[int], form: str = 'rgb24') -> np.ndarray:
    """uint8 [n H W 3], or [n 3H/2 W] with form 'yuv420p' (planes Y, U, V below each other): pictures `shown` [n] (any order, again and again) of
    packets that `h264` made, the first of which, and each after a gap, decodes alone."""
    codec = av.CodecContext.create('h264', 'r')
    codec.thread_count = 1
    codec.flags |= av.codec.context.Flags.low_delay
    wanted: dict[int, list[int]] = {}
    for i, n in enumerate(shown):
        wanted.setdefault(int(n), []).append(i)
    out, number, missing = None, 0, len(wanted)
    convert = VideoReformatter()  # kept: it caches the tables of the scaler
    with contextlib.suppress(av.error.FFmpegError):  # the count tells
        for packet in [*packets, None]:
            for picture in codec.decode(None if packet is None else av.Packet(packet)):
                places = wanted.get(number, ())
                number += 1
                if not places:
                    continue
                if out is None:
                    shape = (
                        (picture.height * 3 // 2, picture.width)
                        if form == 'yuv420p'
                        else (picture.height, picture.width, 3)
                    )
                    out = np.empty((len(shown), *shape), np.uint8)
                if form == 'yuv420p':
                    _planes(picture, out[places[0]])
                else:
                    out[places[0]] = convert.reformat(picture, format=form, threads=1).to_ndarray()
                for again in places[1:]:
                    out[again] = out[places[0]]
                missing -= 1
    if missing or out is None:
        raise MediaError(f'corrupt: {len(wanted) - missing} of {len(wanted)} frames decode')
    return out


def _planes(picture: av.VideoFrame, out: np.ndarray) -> None:
    """Copies a yuv420p picture into out uint8 [3H/2 W], each colour plane as H/4 rows of W."""
    flat, at = out.reshape(-1), 0
    for plane in picture.planes:
        size = plane.height * plane.width
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[
            : plane.height, : plane.width
        ]
        flat[at : at + size].reshape(plane.height, plane.width)[:] = rows
        at += size
