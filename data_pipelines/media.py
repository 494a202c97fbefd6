"""Media files <-> arrays, through PyAV: frames at a fixed rate with mono audio, and single images.

Frames and audio share one clock, which starts at the first picture (or at the first sound of a file
without pictures). Everything is positioned by its time stamp: a variable frame rate, a late audio
track or a hole in it do not move audio against pictures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fractions
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Int16, Integer, Shaped, UInt8
from PIL import Image, ImageOps

# Containers of video, then of sound alone. What is really inside decides: see `_track`.
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
# (start, end) in seconds of a part that is all of the file.
WHOLE = (0.0, float('inf'))
# Frames from one keyframe to the next in records that store video.
GOP = 10

# Share of packets that may fail to decode before a file counts as corrupt.
_MAX_BAD_SHARE = 0.05
# Seconds between the end of one piece of audio and the next from which on they are placed apart.
_MIN_HOLE = 0.05
# A frame is shown up to this many seconds early: containers round time stamps to milliseconds or
# worse.
_TIME_TOLERANCE = 5e-4

# Decoders print every concealed error of a web video; what matters is raised.
av.logging.set_level(av.logging.PANIC)


class MediaError(ValueError):
    """A file that cannot be used.

    Attributes:
        reason: a short clause for lists, such as 'corrupt: …' or 'too short: …'.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass
class Media:
    """Contents of a media file.

    Attributes:
        frames: iterator of RGB frames at the rate that was asked for; None without a video track.
        audio: mono, or None. Beside frames it still has to be cut or filled to their length, which
            is known when they have been read (`fit_audio`).
    """

    frames: Iterator[UInt8[np.ndarray, 'H W 3']] | None
    audio: Int16[np.ndarray, ' S'] | None


# ---- Reading.


def read(
    path: str | os.PathLike,
    fps: float,
    size: int,
    rate: int,
    longest: float = 4 * 3600.0,
    part: tuple[float, float] = WHOLE,
) -> Media:
    """Open a media file. An image is a video of one frame.

    Args:
        path: the file.
        fps: frames per second that come out, whatever the file's own rate.
        size: short side of the frames, in pixels.
        rate: audio samples per second; 0 leaves the sound out.
        longest: seconds above which time stamps are taken for corrupt.
        part: (start, end) in seconds that are read. A file that is as long as the part (to a
            second), or that ends before it, is read whole: it was cut out before.

    Raises:
        MediaError: here for files that do not open, and while frames are read for pictures that do
            not decode.
    """
    if os.fspath(path).lower().endswith(IMAGES):
        return Media(iter([_image(path, size)]), None)
    try:
        with av.open(os.fspath(path)) as container:
            # Opened briefly to look at the tracks, so that a file with neither is reported as
            # such.
            has_video = _track(container, 'video') is not None
            has_audio = _track(container, 'audio') is not None
            if not has_video and not has_audio:
                raise MediaError('no video and no audio track')
            if part != WHOLE and not _contains_part(container, part):
                part = WHOLE
            # The clock of frames and audio: a container may begin at any time stamp.
            zero = _first_time(container) if has_video else None
        # The file is opened again by each of the two: they read it from front to back.
        audio = _audio(path, rate, zero, longest, part) if has_audio and rate else None
    except (av.error.FFmpegError, OSError, EOFError, UnicodeDecodeError) as error:
        raise MediaError(f'corrupt: {_message(error)}') from None
    if zero is not None:
        # Frames stay an iterator, since an hour of them does not fit into memory; its audio does.
        return Media(_frames(path, fps, size, zero, longest, part), audio)
    if audio is None and rate:
        raise MediaError('corrupt: no sound could be decoded')
    return Media(None, audio)


def fit_audio(
    audio: Int16[np.ndarray, ' S'] | None, frames: int, fps: float, rate: int
) -> Int16[np.ndarray, ' S2'] | None:
    """Cut audio, or fill it with silence, to the length of pictures, so that both end together.

    Args:
        audio: as of `read`.
        frames: number of pictures.
        fps: their rate.
        rate: audio samples per second.
    """
    if audio is None:
        return None
    # Rounded once for the whole length; rounding samples per frame would add up.
    samples = round(frames / fps * rate)
    return np.pad(audio[:samples], (0, max(0, samples - len(audio))))


def _image(path: str | os.PathLike, size: int) -> UInt8[np.ndarray, 'H W 3']:
    """An image file, upright, with short side `size`."""
    try:
        with Image.open(path) as file:
            # A JPEG is decoded at an eighth, quarter or half of its size if that is enough.
            file.draft('RGB', (size, size))
            # Cameras store the sensor's orientation and note the rotation in EXIF.
            image = ImageOps.exif_transpose(file).convert('RGB')
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f'corrupt: {_message(error)}') from None
    scale = size / min(image.size)
    width, height = image.size
    # At least `size`: rounding must not make the short side a pixel too short.
    new_size = (max(size, round(width * scale)), max(size, round(height * scale)))
    # The average of the pixels that fall into one, which does not alias.
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    return np.asarray(image.resize(new_size, method))


def _track(container: Any, kind: str) -> Any:
    """The first track of a kind, None without; the cover picture of a music file is none."""
    for stream in getattr(container.streams, kind):
        # FFmpeg presents cover art as a video stream of one frame.
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    return None


def _contains_part(container: Any, part: tuple[float, float]) -> bool:
    """Whether a file is longer than the part and reaches to its end, both to a second."""
    start, end = part
    # PyAV: durations of a container are in units of 1 / av.time_base seconds (microseconds), those
    # of a stream in units of its own time_base.
    duration = (container.duration or 0) / av.time_base
    return end - 1 <= duration and duration > end - start + 1


def _first_time(container: Any) -> float:
    """Time stamp of the first picture, in seconds."""
    stream = _track(container, 'video')
    # Some containers do not state it: then one picture has to be decoded.
    if stream.start_time is not None:
        return float(stream.start_time * stream.time_base)
    stream.codec_context.thread_count = 1
    for frame in _decode(container, stream):
        return _time_stamp(frame, default=0.0)
    raise MediaError('corrupt: no picture could be decoded')


def _time_stamp(frame: Any, default: float) -> float:
    """Seconds of the file's own clock."""
    if frame.pts is None:
        return default
    return float(frame.pts * frame.time_base)


def _decode(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the decoded frames of one stream.

    Raises:
        MediaError: when too many packets do not decode.
    """
    num_good = 0
    num_bad = 0
    try:
        # The last packet is empty; decoding it flushes the frames that the decoder still holds.
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                num_bad += 1
                continue
            num_good += 1
            for frame in frames:
                # Decoders conceal errors: a damaged picture comes out, with a mark.
                num_bad += bool(getattr(frame, 'is_corrupt', False))
                yield frame
    except av.error.FFmpegError as error:
        raise MediaError(f'corrupt: {_message(error)}') from None
    num_packets = num_good + num_bad
    # Known only at the end. A reader that stops earlier, as for a part, never gets here.
    if num_bad > _MAX_BAD_SHARE * num_packets:
        raise MediaError(f'corrupt: {num_bad} of {num_packets} packets do not decode')


def _seek(container: Any, seconds: float) -> None:
    """Go to a point from which everything at `seconds` of the file's own clock and later decodes.

    Containers that cannot seek are read from the beginning.
    """
    if seconds > 1:
        with contextlib.suppress(av.error.FFmpegError):
            # Without a stream, PyAV seeks in microseconds, to a keyframe at or before that time.
            # One second to spare, as keyframes and sound need not be aligned.
            container.seek(int((seconds - 1) * av.time_base))


def _message(error: BaseException) -> str:
    return str(getattr(error, 'strerror', None) or error).split('\n')[0]


# ---- Pictures.


class _Picture:
    """A decoded picture that becomes an array when it is first asked for.

    Of a video with more frames per second than are asked for, most pictures never are.
    """

    def __init__(self, frame: Any):
        self._frame = frame
        self._rgb: np.ndarray | None = None

    def rgb(
        self, size: int, pixel_aspect: float, reformatter: VideoReformatter
    ) -> UInt8[np.ndarray, 'H W 3']:
        """As `_rgb`; the same array each time."""
        if self._rgb is None:
            self._rgb = _rgb(self._frame, size, pixel_aspect, reformatter)
        return self._rgb


def _frames(
    path: str | os.PathLike,
    fps: float,
    size: int,
    zero: float,
    longest: float,
    part: tuple[float, float],
) -> Iterator[UInt8[np.ndarray, 'H W 3']]:
    """Yield the picture on display at 0, 1/fps, 2/fps, … of the part, until its last one ends.

    Args:
        path: the file.
        fps: frames per second that come out.
        size: short side, in pixels.
        zero: time stamp of the first picture, at which the clock starts.
        longest: seconds above which time stamps are taken for corrupt.
        part: (start, end) in seconds.
    """
    start = part[0]
    length = part[1] - part[0]
    try:
        container = av.open(os.fspath(path))
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(f'corrupt: {_message(error)}') from None
    with container:
        stream: Any = _track(container, 'video')
        # Files are decoded side by side; threads inside each would only compete.
        stream.codec_context.thread_count = 1
        # Seconds for which a picture is shown, where the file does not say it.
        usual_duration = 1.0 / float(stream.average_rate) if stream.average_rate else 1.0 / fps
        # 0 where the container states no duration for each stream, as Matroska: the check for
        # truncated files below has nothing to compare with there.
        declared = float(stream.duration * stream.time_base) if stream.duration else 0.0
        # Width / height of a stored pixel; DV and DVD material is not square.
        pixel_aspect = float(stream.sample_aspect_ratio or 1)
        reformatter = VideoReformatter()  # one for all frames: it caches the tables of the scaler
        _seek(container, zero + start if start else 0.0)

        num_sent = 0
        shown: _Picture | None = None  # on display
        shown_time = -1.0  # since when, on the clock of the file
        end = 0.0  # until when
        for frame in _decode(container, stream):
            # A picture without a time stamp follows the last one.
            time = shown_time + usual_duration
            if frame.pts is not None:
                time = _time_stamp(frame, default=0.0) - zero
            if time <= shown_time:  # clocks that stand still or run backwards: play on
                time = shown_time + usual_duration if shown_time >= 0 else 0.0
            # A damaged time stamp would otherwise repeat one picture for hours.
            is_jump = shown is not None and time - shown_time > max(60.0, declared)
            if time - start > longest or is_jump:
                raise MediaError(f'corrupt: time stamps jump to {time:.0f} s')
            # The picture on display stays there until this one replaces it.
            # Pictures before `start` come along, because decoding begins at a keyframe; they send
            # nothing, as the right side is negative then.
            while shown is not None and num_sent / fps < time - start - _TIME_TOLERANCE:
                yield shown.rgb(size, pixel_aspect, reformatter)
                num_sent += 1
                if num_sent >= length * fps - 1e-3:  # float products may miss a whole number
                    return
            shown = _Picture(frame)
            shown_time = time
            duration = float(frame.duration * frame.time_base) if frame.duration else usual_duration
            end = time + duration

        # Declared durations are often a little too long, so a fifth and a second are allowed.
        if end < 0.8 * declared - 1.0:
            raise MediaError(f'truncated: {end:.1f} of {declared:.1f} s can be decoded')
        if start and end <= start:
            raise MediaError(
                f'truncated: the clip begins at {start:.1f} s and {end:.1f} s can be decoded'
            )
        if shown is not None:
            # A video has one frame at least, however short it is.
            # The last picture has no successor to end it: it is on display for its own duration.
            num_frames = max(1, round(min(end - start, length) * fps))
            for _ in range(num_sent, num_frames):
                yield shown.rgb(size, pixel_aspect, reformatter)


def _rgb(
    frame: av.VideoFrame, size: int, pixel_aspect: float, reformatter: VideoReformatter
) -> UInt8[np.ndarray, 'H W 3']:
    """A decoded picture with square pixels, upright, with short side `size`.

    Args:
        frame: the picture.
        size: short side, in pixels.
        pixel_aspect: width / height of a stored pixel.
        reformatter: converts and scales.
    """
    # In square pixels.
    stored_width = frame.width * pixel_aspect
    scale = size / min(stored_width, frame.height)
    width = max(size, round(stored_width * scale))
    height = max(size, round(frame.height * scale))
    # One thread: for small pictures, handing the rows to others takes several times as long as
    # scaling them.
    picture = reformatter.reformat(
        frame,
        width,
        height,
        'rgb24',
        # Averages when it shrinks, which does not alias.
        interpolation='AREA' if scale < 1 else 'BILINEAR',
        threads=1,
    ).to_ndarray()
    # Phones store what the sensor saw, with a rotation. Both FFmpeg and np.rot90 count
    # counterclockwise; the short side stays the short side.
    quarter_turns = round(frame.rotation / 90) % 4
    if not quarter_turns:
        return picture
    return np.ascontiguousarray(np.rot90(picture, quarter_turns))


# ---- Audio.


def _audio(
    path: str | os.PathLike,
    rate: int,
    zero: float | None,
    longest: float,
    part: tuple[float, float],
) -> Int16[np.ndarray, ' S'] | None:
    """The mono audio of the part, holes filled with silence; None if nothing can be decoded.

    Args:
        path: the file.
        rate: samples per second that come out.
        zero: time stamp from which the part is counted; None for that of the first sound.
        longest: seconds above which time stamps are taken for corrupt.
        part: (start, end) in seconds.
    """
    start, end = part
    with av.open(os.fspath(path)) as container:
        stream: Any = _track(container, 'audio')
        stream.codec_context.thread_count = 1
        if part != WHOLE:
            if zero is None:
                has_start = stream.start_time is not None
                zero = float(stream.start_time * stream.time_base) if has_start else 0.0
            # From here on, `zero` is the time stamp of the first sample of the part.
            zero += start
            _seek(container, zero)
        # Decoding may stop there; a bit too much is cut off below.
        last_time = float('inf') if zero is None else zero + end - start
        pieces = _audio_pieces(container, stream, rate, last_time)
    if not pieces:
        return None

    first_time, first_pcm = pieces[0]
    if zero is None:
        zero = first_time
    if part == WHOLE and len(pieces) == 1 and first_time == zero:
        return first_pcm  # the usual file: nothing to move

    # In samples; negative for sound that begins before the first picture.
    positions = [round((time - zero) * rate) for time, _ in pieces]
    # Pieces may overlap where a clock jumps back; the later one overwrites.
    total = max(position + len(pcm) for position, (_, pcm) in zip(positions, pieces))
    # Before the allocation: one damaged time stamp would ask for terabytes.
    if total > longest * rate:
        raise MediaError(f'corrupt: sound runs to {total / rate:.0f} s')
    audio = np.zeros(max(total, 0), np.int16)
    for position, (_, pcm) in zip(positions, pieces):
        # What sounds before the part begins is left out.
        pcm = pcm[max(0, -position) :]
        position = max(0, position)
        audio[position : position + len(pcm)] = pcm
    if part == WHOLE:
        return audio
    return audio[: round((end - start) * rate)]


def _audio_pieces(
    container: Any, stream: Any, rate: int, last_time: float
) -> list[tuple[float, Int16[np.ndarray, ' S']]]:
    """Decode audio up to `last_time`, in pieces without a hole: (time stamp, mono samples)."""
    times: list[float] = []
    chunks: list[list[np.ndarray]] = []  # of each piece
    resampler = None
    stream_format = None
    expected_time = 0.0  # when the next frame is due
    for frame in _decode(container, stream):
        time = _time_stamp(frame, default=expected_time)
        if time > last_time:
            break
        # A resampler serves one format, and knows nothing of holes: a new one for each piece.
        frame_format = (frame.sample_rate, frame.layout.name, frame.format.name)
        is_hole = abs(time - expected_time) > _MIN_HOLE
        if resampler is None or frame_format != stream_format or is_hole:
            if resampler is not None:
                chunks[-1].extend(_resample(resampler, None))  # what it still holds
            resampler = av.AudioResampler(format='s16', layout='mono', rate=rate)
            stream_format = frame_format
            times.append(time)
            chunks.append([])
            expected_time = time
        chunks[-1].extend(_resample(resampler, frame))
        # By counting samples: stamps rounded to milliseconds do not jitter it, and a clock that
        # slowly drifts away by more than _MIN_HOLE starts a new piece there, which realigns it.
        expected_time = expected_time + frame.samples / frame.sample_rate
    if resampler is not None:
        chunks[-1].extend(_resample(resampler, None))
    return [(time, np.concatenate(parts)) for time, parts in zip(times, chunks) if parts]


def _resample(resampler: av.AudioResampler, frame: Any) -> list[np.ndarray]:
    """Mono samples of one frame; those that the resampler still holds with None."""
    return [resampled.to_ndarray()[0] for resampled in resampler.resample(frame)]


def stream_audio(
    path: str | os.PathLike, rate: int, longest: float = 4 * 3600.0
) -> Iterator[Int16[np.ndarray, ' S']]:
    """Yield the mono sound of a file in short blocks without gaps, in constant memory.

    The blocks begin at the first picture, as `read` has it, or at the first sound of a file without
    pictures. Holes are filled with silence. Nothing is yielded without a sound track.

    Args:
        path: the file.
        rate: samples per second that come out.
        longest: seconds above which time stamps are taken for corrupt.

    Raises:
        MediaError: for sound that does not decode.
    """
    try:
        with av.open(os.fspath(path)) as container:
            has_video = _track(container, 'video') is not None
            zero = _first_time(container) if has_video else None
        # Opened again: finding the first picture may have decoded a part.
        with av.open(os.fspath(path)) as container:
            stream: Any = _track(container, 'audio')
            if stream is None:
                return
            stream.codec_context.thread_count = 1
            yield from _place_blocks(_audio_blocks(container, stream, rate), rate, zero, longest)
    except (av.error.FFmpegError, OSError, EOFError, UnicodeDecodeError) as error:
        raise MediaError(f'corrupt: {_message(error)}') from None


def _audio_blocks(
    container: Any, stream: Any, rate: int
) -> Iterator[tuple[float | None, Int16[np.ndarray, ' S']]]:
    """Yield (time stamp, mono samples); no time stamp where the last block simply goes on."""
    resampler = None
    stream_format = None
    piece_time: float | None = None
    expected_time = 0.0
    for frame in _decode(container, stream):
        time = _time_stamp(frame, default=expected_time)
        frame_format = (frame.sample_rate, frame.layout.name, frame.format.name)
        is_hole = abs(time - expected_time) > _MIN_HOLE
        if resampler is None or frame_format != stream_format or is_hole:
            if resampler is not None:
                for samples in _resample(resampler, None):
                    yield piece_time, samples
                    piece_time = None
            resampler = av.AudioResampler(format='s16', layout='mono', rate=rate)
            stream_format = frame_format
            piece_time = time
            expected_time = time
        for samples in _resample(resampler, frame):
            yield piece_time, samples
            piece_time = None
        expected_time += frame.samples / frame.sample_rate
    if resampler is not None:
        for samples in _resample(resampler, None):
            yield piece_time, samples
            piece_time = None


def _place_blocks(
    blocks: Iterable[tuple[float | None, Int16[np.ndarray, ' S']]],
    rate: int,
    zero: float | None,
    longest: float,
) -> Iterator[Int16[np.ndarray, ' S']]:
    """Yield blocks at their places on the clock that begins at `zero`, holes as silence."""
    num_sent = 0
    position = 0
    for time, samples in blocks:
        if time is not None:
            if zero is None:
                zero = time
            position = round((time - zero) * rate)
        if position + len(samples) > longest * rate:
            raise MediaError(f'corrupt: sound runs to {position / rate:.0f} s')
        while num_sent < position:
            # A second at a time: a hole may be hours long.
            silence = np.zeros(min(rate, position - num_sent), np.int16)
            yield silence
            num_sent += len(silence)
        # What sounds before the clock begins, or was sent already, is left out.
        rest = samples[max(0, num_sent - position) :]
        position += len(samples)
        if len(rest):
            yield rest
            num_sent += len(rest)


# ---- Writing.


def encode_jpeg(frame: UInt8[np.ndarray, 'H W 3'], quality: int) -> bytes:
    """Encode a frame as JPEG, with chroma at half resolution."""
    stream = io.BytesIO()
    # subsampling=2 is 4:2:0.
    Image.fromarray(frame).save(stream, 'JPEG', quality=quality, subsampling=2)
    return stream.getvalue()


def write_mp4(
    path: str | os.PathLike,
    frames: UInt8[np.ndarray, 'T H W 3'],
    fps: float,
    audio: Shaped[np.ndarray, ' S'] | None = None,
    rate: int = 48000,
    crf: int = 18,
    preset: str = 'veryfast',
) -> None:
    """Write an mp4 file of H.264 and AAC. Equal input gives equal bytes.

    Args:
        path: the file.
        frames: RGB, H and W even.
        fps: frames per second.
        audio: mono samples in the range of int16; None for a file without audio.
        rate: audio samples per second.
        crf: quality of x264; lower is better.
        preset: of x264: how long it searches for a smaller file.

    Raises:
        ValueError: for frames that are not even-sized uint8 RGB.
    """
    frames = np.asarray(frames)
    is_rgb = frames.ndim == 4 and frames.shape[3] == 3 and frames.dtype == np.uint8
    if not is_rgb or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(
            f'write_mp4 frames: expected uint8 [T H W 3] with even H and W, got {frames.dtype} '
            f'{frames.shape}.'
        )
    # bitexact: no version and no date is written. faststart: the index stands in front.
    container_options = {'fflags': '+bitexact', 'movflags': '+faststart'}
    with av.open(os.fspath(path), 'w', format='mp4', options=container_options) as container:
        # NTSC rates have the denominator 1001: the float 30000 / 1001 becomes that fraction again.
        video: Any = container.add_stream(
            'libx264', rate=fractions.Fraction(fps).limit_denominator(1001)
        )
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = 'yuv420p'
        # One thread: with more, rate control depends on their timing. No B-frames: small files that
        # decode fast.
        video.codec_context.thread_count = 1
        video.options = {
            'crf': str(crf),
            'preset': preset,
            'bf': '0',
            'threads': '1',
            'flags': '+bitexact',
        }
        # Both streams are added before the first packet is written: the header lists them.
        sound: Any = None
        if audio is not None:
            sound = container.add_stream(
                'aac', rate=rate, layout='mono', options={'flags': '+bitexact'}
            )
            # More than about 6 bits a sample the encoder searches for and does not find.
            sound.bit_rate = min(5 * rate, 96000)

        for picture in frames:
            container.mux(video.encode(_video_frame(picture)))
        # Without a frame: flushes what the encoder still holds.
        container.mux(video.encode())
        if audio is not None:
            # One long frame; PyAV cuts it into the 1024 samples that AAC takes.
            samples = np.asarray(audio, np.int16)
            audio_frame = av.AudioFrame.from_ndarray(samples[None], format='s16', layout='mono')
            audio_frame.sample_rate = rate
            audio_frame.pts = 0
            container.mux(sound.encode(audio_frame))
            container.mux(sound.encode())


def _video_frame(picture: UInt8[np.ndarray, 'H W 3']) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format='rgb24')


# ---- Video in records.


def encode_h264(
    frames: Iterable[UInt8[np.ndarray, 'H W 3']], fps: float, crf: int = 23, gop: int = GOP
) -> list[bytes]:
    """Encode frames so that any of them can be decoded from a few packets.

    The stream is tuned for fast decoding: no frames that look ahead, no deblocking. A frame needs
    only the packets since the last keyframe.

    Args:
        frames: of one size; an odd last row or column is left out.
        fps: frames per second.
        crf: quality of x264; lower is better.
        gop: frames from one keyframe to the next.

    Returns:
        One packet a frame.
    """
    codec: Any = None
    packets: list[bytes] = []
    for frame in frames:
        height = frame.shape[0] // 2 * 2
        width = frame.shape[1] // 2 * 2
        # At the first frame, because it tells the size.
        if codec is None:
            codec = _h264_encoder(height, width, fps, crf, gop)
        picture = _video_frame(frame[:height, :width])
        packets += [bytes(packet) for packet in codec.encode(picture)]
    if codec is not None:
        # The encoder looks ahead to control its rate, so the last packets come with the flush.
        packets += [bytes(packet) for packet in codec.encode()]
    return packets


def _h264_encoder(height: int, width: int, fps: float, crf: int, gop: int) -> Any:
    codec: Any = av.CodecContext.create('libx264', 'w')
    codec.height = height
    codec.width = width
    codec.pix_fmt = 'yuv420p'
    codec.framerate = fractions.Fraction(fps).limit_denominator(1001)
    codec.time_base = 1 / codec.framerate
    x264_params = [
        # A keyframe every `gop` frames and nowhere else.
        f'keyint={gop}:min-keyint={gop}:scenecut=0',
        'bframes=0',  # packets come in the order of display, one a frame
        # Each keyframe brings what a decoder has to know before it can begin there.
        'repeat-headers=1',
        'annexb=1',  # start codes, so packets can be joined as they are
        'threads=1',
    ]
    codec.options = {
        'crf': str(crf),
        'preset': 'medium',
        # Without CABAC, deblocking and weighted prediction.
        'tune': 'fastdecode',
        'threads': '1',
        'flags': '+bitexact',
        'x264-params': ':'.join(x264_params),
    }
    return codec


def decode_h264(
    packets: Sequence[bytes],
    shown: Sequence[int] | Integer[np.ndarray, ' T'],
    form: str = 'rgb24',
) -> UInt8[np.ndarray, 'T H W 3'] | UInt8[np.ndarray, 'T H W']:
    """Decode some pictures of packets that `encode_h264` made.

    Args:
        packets: in order; the first, and each after a gap, is a keyframe.
        shown: numbers of the pictures [T], in any order and as often as one likes.
        form: 'rgb24' or 'yuv420p'.

    Returns:
        uint8 [T H W 3]; with 'yuv420p' uint8 [T 3H/2 W], the planes Y, U, V below each other.

    Raises:
        MediaError: if any of the pictures does not decode.
    """
    codec: Any = av.CodecContext.create('h264', 'r')
    codec.thread_count = 1
    # A picture comes out with its packet, instead of some packets later.
    codec.flags |= av.codec.context.Flags.low_delay
    rows_of: dict[int, list[int]] = {}  # number of a picture -> its rows of the result
    for row, number in enumerate(shown):
        rows_of.setdefault(int(number), []).append(row)

    pictures: np.ndarray | None = None
    number = 0  # of the next picture; packets and pictures correspond, as there are no B-frames
    num_missing = len(rows_of)
    reformatter = VideoReformatter()  # one for all frames: it caches the tables of the scaler
    with contextlib.suppress(av.error.FFmpegError):  # pictures that are missing are counted below
        for packet in [*packets, None]:  # None: what the decoder still holds
            for picture in codec.decode(None if packet is None else av.Packet(packet)):
                rows = rows_of.get(number, [])
                number += 1
                if not rows:
                    continue
                if pictures is None:
                    pictures = _empty_pictures(len(shown), picture, form)
                # A picture that is shown several times is converted once.
                first, *others = rows
                if form == 'yuv420p':
                    _copy_planes(picture, pictures[first])
                else:
                    # One thread, as in `_rgb`; callers decode rows side by side.
                    converted = reformatter.reformat(picture, format=form, threads=1)
                    pictures[first] = converted.to_ndarray()
                for row in others:
                    pictures[row] = pictures[first]
                num_missing -= 1
    if num_missing or pictures is None:
        num_decoded = len(rows_of) - num_missing
        raise MediaError(f'corrupt: {num_decoded} of {len(rows_of)} frames decode')
    return pictures


def _empty_pictures(count: int, picture: av.VideoFrame, form: str) -> np.ndarray:
    if form == 'yuv420p':
        # 4:2:0: H rows of Y, then U and V with a quarter of the pixels each.
        return np.empty((count, picture.height * 3 // 2, picture.width), np.uint8)
    return np.empty((count, picture.height, picture.width, 3), np.uint8)


def _copy_planes(picture: av.VideoFrame, out: UInt8[np.ndarray, 'H W']) -> None:
    """Copy a yuv420p picture into `out` [3H/2 W], each colour plane as H/4 rows of W."""
    flat = out.reshape(-1)  # a view: `out` is contiguous
    begin = 0
    for plane in picture.planes:
        # Rows of a plane are padded to `line_size` bytes.
        buffer: Any = plane
        padded = np.frombuffer(buffer, np.uint8).reshape(-1, plane.line_size)
        num_pixels = plane.height * plane.width
        target = flat[begin : begin + num_pixels].reshape(plane.height, plane.width)
        target[:] = padded[: plane.height, : plane.width]
        begin += num_pixels
