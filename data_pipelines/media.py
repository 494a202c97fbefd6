"""Media files <-> arrays, through PyAV: frames at a fixed rate with mono audio, and single images.

Frames and audio share one clock, which starts at the first picture (or at the first sound of a file
without pictures). Everything is positioned by its time stamp: a variable frame rate, a late audio
track or a hole in it do not move audio against pictures. A picture is on display until the next
one; the last one, until the sound ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fractions
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int16, Integer, Shaped, UInt8

from data_pipelines import file_signs, media_clock
from vatt_jax import extras

with extras.needed('video', 'reading and writing media files'):
    import av
    from av.sidedata.sidedata import Type as SideDataType
    from av.video.reformatter import VideoReformatter
    from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

    from data_pipelines import deinterlacing

# Containers of video, then of sound alone. What is really inside decides: see `_track`.
SUFFIXES = (
    '.mp4',
    '.webm',
    '.mkv',
    '.avi',
    '.mov',
    '.m4v',
    '.mpg',
    '.mpeg',
    '.flv',
    '.wmv',
    '.asf',
    '.ogv',
    '.3gp',
    '.ts',
    '.mts',
    '.m2ts',
    '.vob',
    '.gif',
    '.3g2',
    '.divx',
    '.dv',
    '.f4v',
    '.m2t',
    '.m2v',
    '.mpe',
    '.mxf',
    '.ogm',
    '.qt',
    '.rm',
    '.rmvb',
    '.y4m',
    '.wav',
    '.flac',
    '.ogg',
    '.oga',
    '.mp3',
    '.m4a',
    '.mka',
    '.aac',
    '.opus',
    '.wma',
    '.aif',
    '.aiff',
    '.ac3',
    '.aifc',
    '.amr',
    '.ape',
    '.au',
    '.caf',
    '.m4b',
    '.mp2',
    '.spx',
    '.tta',
    '.w64',
    '.weba',
    '.wv',
)
IMAGES = (
    '.jpeg',
    '.jpg',
    '.png',
    '.webp',
    '.apng',
    '.avif',
    '.bmp',
    '.jfif',
    '.tif',
    '.tiff',
)
# How image files are scaled: by the average of the pixels that fall into one, from a JPEG decoded
# at a part of its size; or by Pillow's bicubic filter, as models of pictures are evaluated.
RESIZES = ('area', 'bicubic')
# Formats of Pillow whose further frames are an animation; of others they are thumbnails or pages.
_ANIMATED = ('WEBP', 'PNG', 'GIF', 'AVIF')
# (start, end) in seconds of a part that is all of the file.
WHOLE = (0.0, float('inf'))
# Frames from one keyframe to the next in records that store video.
GOP = 10

# Seconds above which time stamps are taken for corrupt.
_LONGEST = 4 * 3600.0
# Share of packets that may fail to decode before a file counts as corrupt.
_MAX_BAD_SHARE = 0.05
# Seconds between the end of one piece of audio and the next from which on they are placed apart.
_MIN_HOLE = 0.05
# Root mean square (of 32768) below which a mix is so faint that its channels may have cancelled
# out, and how many times as loud one of them has to be.
_FAINT = 330.0
_CANCELLED = 10.0
# Seconds of a stream that are listened to for it.
_LISTENING = 60.0
# Seconds of sound after the last picture that are padding of its encoder, not more to see.
_MAX_PADDING = 0.3
# Seconds for which a picture may stay, at least, before its successor's time stamp counts as
# damaged: in any file, and in one whose header states no length to compare with.
_MAX_STAY = 60.0
_MAX_STAY_WITHOUT_LENGTH = 600.0
# Sound beyond this many times the length of a container is placed by a damaged time stamp.
_MAX_EXCESS = 1.25
# Long side over short side above which a picture is no picture.
_MAX_ELONGATION = 32
# Containers whose header states the length of what was written, which tells of a file cut short
# (others state none, or one that FFmpeg estimates from the size of the file).
_STATED_LENGTH = ('matroska,webm', 'flv', 'asf', 'flac', 'mov,mp4,m4a,3gp,3g2,mj2')
# What the author of a file marks as not the main track of its kind.
_SIDE_TRACK = (
    av.stream.Disposition.attached_pic
    | av.stream.Disposition.timed_thumbnails
    | av.stream.Disposition.comment
    | av.stream.Disposition.visual_impaired
    | av.stream.Disposition.descriptions
)
# A part of a picture, which FFmpeg presents as a track.
_TILE = av.stream.Disposition.dependent
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
    longest: float = _LONGEST,
    part: tuple[float, float] = WHOLE,
    resize: str = 'area',
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
        resize: entry of RESIZES, of image files.

    Raises:
        MediaError: here for files that do not open, and while frames are read for pictures that do
            not decode.
    """
    if os.fsdecode(path).lower().endswith(IMAGES):
        return read_image(path, fps, size, longest, resize)
    try:
        with _open(path) as container:
            # Opened briefly to look at the tracks, so that a file with neither is reported as
            # such.
            _check_tracks(container, path)
            has_video = _track(container, 'video') is not None
            has_audio = _track(container, 'audio') is not None
            if part != WHOLE and not _contains_part(container, part):
                part = WHOLE
            # The clock of frames and audio: a container may begin at any time stamp.
            zero = _first_time(container) if has_video else None
            stated = _stated_length(container)
        # The file is opened again by each of the two: they read it from front to back.
        audio = _audio(path, rate, zero, longest, part) if has_audio and rate else None
    except (av.error.FFmpegError, OSError, EOFError, UnicodeDecodeError) as error:
        raise MediaError(_reason(error, path)) from None
    if zero is not None:
        sound_seconds = None
        if has_audio and rate:
            sound_seconds = 0.0 if audio is None else len(audio) / rate
        # Frames stay an iterator, since an hour of them does not fit into memory; its audio does.
        return Media(_frames(path, fps, size, zero, longest, part, sound_seconds), audio)
    if audio is None and rate:
        raise MediaError('corrupt: no sound could be decoded')
    if part == WHOLE and audio is not None:
        _check_length(len(audio) / rate, stated)
    return Media(None, audio)


def _check_tracks(container: Any, path: str | os.PathLike) -> None:
    """Raise MediaError for a file whose tracks are not what is in it, or that has none."""
    if container.format.name.startswith('mov,') and file_signs.has_cut_index(path):
        raise MediaError('truncated: its index (moov) is cut off')
    if any(stream.disposition & _TILE for stream in container.streams.video):
        # One of them would be taken for the whole.
        raise MediaError('made of tiles, as phones save HEIC: convert it to JPEG or PNG')
    if _track(container, 'video') is None and _track(container, 'audio') is None:
        raise MediaError(f'no video and no audio track{_undecodable(container)}')


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


def duration(path: str | os.PathLike, kind: str) -> float | None:
    """Seconds that a file says its track lasts; None where it does not say, or is an image.

    Args:
        path: the file.
        kind: 'video' or 'audio'; a file without such a track answers for all of it.

    Raises:
        MediaError: the file does not open.
    """
    if os.fsdecode(path).lower().endswith(IMAGES):
        return None
    try:
        with _open(path) as container:
            # The last picture stays until the sound ends, so that pictures last as long.
            kinds = ('video', 'audio') if kind == 'video' else (kind,)
            tracks = [_track(container, kind) for kind in kinds]
            tracks = [track for track in tracks if track is not None]
            lengths = []
            for track in tracks:
                if track.duration:
                    lengths.append(float(track.duration * track.time_base))
            if tracks and media_clock.restarts(container, tracks):
                return None
            return max(lengths, default=0.0) or _length(container) or None
    except (av.error.FFmpegError, OSError, EOFError, UnicodeDecodeError) as error:
        raise MediaError(_reason(error, path)) from None


def read_image(
    source: str | os.PathLike | io.BytesIO,
    fps: float,
    size: int,
    longest: float = _LONGEST,
    resize: str = 'area',
) -> Media:
    """An image as a video of one frame; an animated one, as a video.

    Args:
        source: an image file, or its bytes as a stream.
        fps: as of `read`.
        size: as of `read`.
        longest: as of `read`.
        resize: as of `read`.

    Raises:
        MediaError: it does not decode.
    """
    path = source if isinstance(source, str | os.PathLike) else ''
    if path:
        _check_is_no_pipe(path)
    try:
        # The type of the frames is left open: libraries have one class for each format.
        with Image.open(source) as file:
            is_animated = getattr(file, 'n_frames', 1) > 1 and file.format in _ANIMATED
            if not is_animated:
                return Media(iter([_image(file, size, resize)]), None)
            frames = _animation(file, fps, size, longest, resize)
    except UnidentifiedImageError as error:
        # Of a stream, the message has its address in memory.
        reason = _reason(error, path) if path else 'corrupt: no picture in a known format'
        raise MediaError(reason) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(_reason(error, path)) from None
    return Media(iter(frames), None)


def _animation(
    file: Image.Image, fps: float, size: int, longest: float, resize: str
) -> list[UInt8[np.ndarray, 'H W 3']]:
    """The picture of an animation on display at 0, 1/fps, 2/fps, …, until its last one ends."""
    frames: list[np.ndarray] = []
    end = 0.0  # of the picture, in seconds
    for picture in ImageSequence.Iterator(file):
        # In milliseconds; browsers take 100 where the file states none.
        end += (picture.info.get('duration') or 100.0) / 1000
        if end > longest:
            raise MediaError(f'corrupt: time stamps jump to {end:.0f} s')
        num_frames = max(1, round(end * fps))
        if num_frames > len(frames):
            frames += [_image(picture, size, resize)] * (num_frames - len(frames))
    return frames


def _image(image: Image.Image, size: int, resize: str) -> UInt8[np.ndarray, 'H W 3']:
    """An opened image, upright, with short side `size`."""
    if resize == 'area':
        # A JPEG is decoded at an eighth, quarter or half of its size if that is enough.
        image.draft('RGB', (size, size))
    # Cameras store the sensor's orientation and note the rotation in EXIF.
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('F'):
        raise MediaError('unknown range: pixels are floats; save it with 8 or 16 bits a colour')
    if image.mode.startswith('I'):
        # 16 bits of grey, which `convert` would cut off at 255.
        image = Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
    image = image.convert('RGB')
    width, height = image.size
    _check_elongation(width, height)
    scale = size / min(width, height)
    # At least `size`: rounding must not make the short side a pixel too short.
    new_size = (max(size, round(width * scale)), max(size, round(height * scale)))
    if resize == 'bicubic':
        method = Image.Resampling.BICUBIC
    else:
        # The average of the pixels that fall into one, which does not alias.
        method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    return np.asarray(image.resize(new_size, method))


def _check_elongation(width: float, height: float) -> None:
    """Refuse pictures that would take gigabytes at the short side that is stored."""
    if max(width, height) > _MAX_ELONGATION * min(width, height):
        raise MediaError(
            f'too narrow: pictures of {width:.0f}×{height:.0f} pixels; expected a long side of at '
            f'most {_MAX_ELONGATION} times the short one'
        )


def _check_is_no_pipe(path: str | os.PathLike) -> None:
    """Raise MediaError for a pipe: whoever opens it waits until somebody writes to it."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise MediaError('a pipe or a device: expected a media file')


def _open(path: str | os.PathLike) -> Any:
    """Open a container for reading."""
    name = os.fsdecode(path)
    _check_is_no_pipe(name)
    if '://' in name:
        return av.open(name)
    if file_signs.is_playlist(name):
        raise MediaError(file_signs.PLAYLIST)
    # FFmpeg takes what stands before a colon for a protocol, as in the name 'a:b.mp4'. What a file
    # names in the network is not fetched.
    container = av.open(f'file:{name}', container_options={'protocol_whitelist': 'file'})
    if container.format.name in file_signs.PLAYLIST_FORMATS:
        container.close()
        raise MediaError(file_signs.PLAYLIST)
    return container


def _track(container: Any, kind: str) -> Any:
    """The main track of a kind that can be decoded, None without.

    The cover picture of a music file is none, and a commentary comes last. Of several tracks, the
    one that the file marks as its default is taken, or the first.
    """
    tracks = []
    for stream in getattr(container.streams, kind):
        # FFmpeg presents cover art as a video stream of one frame.
        is_cover = stream.disposition & av.stream.Disposition.attached_pic
        # Without a decoder there is no codec context.
        if stream.codec_context is not None and not is_cover:
            tracks.append(stream)
    main_tracks = [stream for stream in tracks if not stream.disposition & _SIDE_TRACK]
    for stream in main_tracks:
        if stream.disposition & av.stream.Disposition.default:
            return stream
    candidates = main_tracks or tracks
    return candidates[0] if candidates else None


def _undecodable(container: Any) -> str:
    """What a message adds of tracks that are there and have no decoder."""
    kinds = {stream.type for stream in container.streams if stream.codec_context is None}
    kinds &= {'video', 'audio'}
    if not kinds:
        return ''
    return f' that can be decoded (FFmpeg knows no decoder for its {" and ".join(sorted(kinds))})'


def _contains_part(container: Any, part: tuple[float, float]) -> bool:
    """Whether a file is longer than the part and reaches to its end, both to a second."""
    start, end = part
    # PyAV: durations of a container are in units of 1 / av.time_base seconds (microseconds), those
    # of a stream in units of its own time_base.
    duration = (container.duration or 0) / av.time_base
    return end - 1 <= duration and duration > end - start + 1


def _stated_length(container: Any) -> float:
    """Seconds that the header of a container states for its longest track; 0 where none does."""
    if container.format.name not in _STATED_LENGTH:
        return 0.0
    return _length(container)


def _length(container: Any) -> float:
    """Seconds that a container states, or FFmpeg estimates, for its longest track; 0 without."""
    length = container.duration or 0
    # In Matroska it is the time stamp of the end, on a clock that may begin anywhere.
    if container.format.name == 'matroska,webm':
        length -= max(container.start_time or 0, 0)
    return length / av.time_base


def _declared_length(container: Any, stream: Any) -> float:
    """Seconds that a container declares for its video track; 0 where it does for none."""
    # FFmpeg corrects the length of AVI by what is there; the number of frames stays as written.
    if container.format.name == 'avi' and stream.average_rate:
        return float(stream.frames / stream.average_rate)
    return float((stream.duration or 0) * stream.time_base)


def _first_time(container: Any) -> float:
    """Time stamp of the first picture, in seconds."""
    stream = _track(container, 'video')
    stream.codec_context.thread_count = 1
    # Some containers do not state it: then one picture has to be decoded.
    if stream.start_time is None:
        for frame in _decode(container, stream):
            return _time_stamp(frame, default=0.0)
        raise MediaError('corrupt: no picture could be decoded')
    start = stream.start_time
    for packet in container.demux(stream):
        # Of a fragmented file, FFmpeg may take the beginning of the last fragment it looked at.
        if packet.pts is not None and not packet.is_discard:
            start = min(start, packet.pts)
        break
    return float(start * stream.time_base)


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
    # The main tracks play together.
    tracks = [_track(container, kind) for kind in ('video', 'audio')]
    others = [track for track in tracks if track is not None and track.index != stream.index]
    try:
        # The last packet is empty; decoding it flushes the frames that the decoder still holds.
        for packet in media_clock.packets(container, stream, others):
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
        raise MediaError(_reason(error)) from None
    num_packets = num_good + num_bad
    # Known only at the end. A reader that stops earlier, as for a part, never gets here.
    if num_bad > _MAX_BAD_SHARE * num_packets:
        raise MediaError(f'corrupt: {num_bad} of {num_packets} packets do not decode')


def _decode_from(
    path: str | os.PathLike, container: Any, stream: Any, seconds: float
) -> Iterator[Any]:
    """Yield the decoded frames of one stream from a point on, and some that lie before it.

    Containers that cannot seek are read from the beginning.

    Args:
        path: of the file.
        container: the file opened, nothing read yet.
        stream: of it.
        seconds: the point, on the clock of the file.
    """
    if seconds > 1:
        with contextlib.suppress(av.error.FFmpegError):
            # Without a stream, PyAV seeks in microseconds, to a keyframe at or before that time.
            # One second to spare, as keyframes and sound need not be aligned.
            container.seek(int((seconds - 1) * av.time_base))
    num_frames = 0
    for frame in _decode(container, stream):
        num_frames += 1
        yield frame
    # Where the only picture lies long before that point, containers without an index go past it.
    if seconds > 1 and not num_frames:
        # Opened anew: they do not find back either.
        with _open(path) as again:
            stream = _track(again, stream.type)
            stream.codec_context.thread_count = 1
            yield from _decode(again, stream)


def _reason(error: BaseException, path: str | os.PathLike = '') -> str:
    """Why a file cannot be used, of what was raised while it was opened.

    Args:
        error: what was raised.
        path: of a file that may be no media file at all; '' of one that opened.
    """
    if isinstance(error, MediaError):
        return error.reason
    # A file that cannot be reached says nothing of its contents.
    if isinstance(error, FileNotFoundError):
        return 'missing: no such file'
    if isinstance(error, IsADirectoryError):
        return 'a folder: expected a media file'
    if isinstance(error, PermissionError):
        return 'not readable: permission denied'
    explanation = file_signs.explain(path) if path else ''
    if explanation:
        return explanation
    message = str(getattr(error, 'strerror', None) or error).split('\n')[0]
    return f'corrupt: {message}'


# ---- Pictures.


class _Converter:
    """Decoded pictures -> arrays with square pixels, upright, all of the first one's shape.

    Args:
        size: short side, in pixels.
        pixel_aspect: width / height of a stored pixel.
    """

    def __init__(self, size: int, pixel_aspect: float):
        self._size = size
        self._pixel_aspect = pixel_aspect
        self._reformatter = VideoReformatter()  # one for all: it caches the tables of the scaler
        self._shape: tuple[int, int] | None = None  # height and width of the first picture

    def __call__(self, frame: av.VideoFrame) -> UInt8[np.ndarray, 'H W 3']:
        orientation = _Orientation.of(frame)
        height, width = self._stored_shape(frame, orientation)
        # One thread: for small pictures, handing the rows to others takes several times as long
        # as scaling them.
        picture = self._reformatter.reformat(
            frame,
            width,
            height,
            'rgb24',
            # Averages when it shrinks, which does not alias.
            interpolation='AREA' if height < frame.height else 'BILINEAR',
            threads=1,
        ).to_ndarray()
        return orientation.apply(picture)

    def _stored_shape(self, frame: av.VideoFrame, orientation: _Orientation) -> tuple[int, int]:
        """Height and width of the result before it is turned."""
        if self._shape is None:
            # In square pixels.
            stored_width = frame.width * self._pixel_aspect
            _check_elongation(stored_width, frame.height)
            scale = self._size / min(stored_width, frame.height)
            width = max(self._size, round(stored_width * scale))
            height = max(self._size, round(frame.height * scale))
            self._shape = (width, height) if orientation.is_transposed else (height, width)
        # A record has one shape, so pictures after a change of resolution get that of the first.
        height, width = self._shape
        return (width, height) if orientation.is_transposed else (height, width)


@dataclasses.dataclass(frozen=True)
class _Orientation:
    """How a stored picture is turned for display: phones store what the sensor saw.

    Attributes:
        is_transposed: whether rows become columns, which is done first.
        flips_rows: whether the picture is then turned upside down.
        flips_columns: whether it is then mirrored.
    """

    is_transposed: bool = False
    flips_rows: bool = False
    flips_columns: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame) -> _Orientation:
        # PyAV's types say that names are looked up; it takes the type as well.
        try:
            side_data: Any = frame.side_data
            buffer = side_data.get(SideDataType.DISPLAYMATRIX)
        except ValueError:
            # PyAV knows no name for some other side data, as for the EXIF of a camera.
            return cls._of_angle(frame.rotation)
        if buffer is None:
            return cls()
        # ISO/IEC 14496-12: (x, y) is displayed at (a x + c y, b x + d y), up to an offset. Of its
        # nine numbers, each row of the matrix has a third one for perspective.
        a, b, _, c, d = np.frombuffer(buffer, np.int32)[:5].tolist()
        # The nearest of the eight: other angles than right ones occur by mistake only.
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, flips_rows=b < 0, flips_columns=c < 0)
        return cls(False, flips_rows=d < 0, flips_columns=a < 0)

    @classmethod
    def _of_angle(cls, degrees: float) -> _Orientation:
        """Of a picture that is turned counterclockwise, to the nearest right angle."""
        quarters = round(degrees / 90) % 4
        return cls(
            quarters % 2 == 1, flips_rows=quarters in (1, 2), flips_columns=quarters in (2, 3)
        )

    def apply(self, picture: UInt8[np.ndarray, 'H W 3']) -> UInt8[np.ndarray, 'H2 W2 3']:
        """The picture as it is displayed."""
        if self.is_transposed:
            picture = picture.transpose(1, 0, 2)
        if self.flips_rows:
            picture = picture[::-1]
        if self.flips_columns:
            picture = picture[:, ::-1]
        return np.ascontiguousarray(picture)


class _Picture:
    """A decoded picture that becomes an array when it is first asked for.

    Of a video with more frames per second than are asked for, most pictures never are.
    """

    def __init__(self, frame: av.VideoFrame, converter: _Converter):
        self._frame = frame
        self._converter = converter
        self._rgb: np.ndarray | None = None

    def rgb(self) -> UInt8[np.ndarray, 'H W 3']:
        """RGB pixels; the same array each time."""
        if self._rgb is None:
            self._rgb = self._converter(self._frame)
        return self._rgb


def _frames(
    path: str | os.PathLike,
    fps: float,
    size: int,
    zero: float,
    longest: float,
    part: tuple[float, float],
    sound_seconds: float | None,
) -> Iterator[UInt8[np.ndarray, 'H W 3']]:
    """Yield the picture on display at 0, 1/fps, 2/fps, … of the part, until the file ends.

    Args:
        path: the file.
        fps: frames per second that come out.
        size: short side, in pixels.
        zero: time stamp of the first picture, at which the clock starts.
        longest: seconds above which time stamps are taken for corrupt.
        part: (start, end) in seconds.
        sound_seconds: length of the sound of the part; None without an audio track.
    """
    start = part[0]
    length = part[1] - part[0]
    # On the clock of the pictures.
    sound_end = start + (sound_seconds or 0.0)
    try:
        container = _open(path)
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(_reason(error)) from None
    with container:
        stream: Any = _track(container, 'video')
        # Files are decoded side by side; threads inside each would only compete.
        stream.codec_context.thread_count = 1
        # Seconds for which a picture is shown, where the file does not say it.
        usual_duration = 1.0 / float(stream.average_rate) if stream.average_rate else 1.0 / fps
        declared = _declared_length(container, stream)
        stated = _stated_length(container)
        max_stay = max(declared, stated, sound_end) or _MAX_STAY_WITHOUT_LENGTH
        max_stay = max(max_stay, _MAX_STAY)
        # DV and DVD material has pixels that are not square.
        converter = _Converter(size, float(stream.sample_aspect_ratio or 1))

        num_pictures = 0
        num_sent = 0
        shown: _Picture | None = None  # on display
        shown_time = -1.0  # since when, on the clock of the file
        end = 0.0  # until when
        decoded = _decode_from(path, container, stream, zero + start if start else 0.0)
        for frame in deinterlacing.deinterlaced(decoded):
            # A picture without a time stamp follows the last one.
            time = shown_time + usual_duration if shown is not None else 0.0
            if frame.pts is not None:
                time = _time_stamp(frame, default=0.0) - zero
            if time <= shown_time:  # clocks that stand still or run backwards: play on
                time = shown_time + usual_duration if shown_time >= 0 else 0.0
            # A damaged time stamp would otherwise repeat one picture for hours.
            is_jump = shown is not None and time - shown_time > max_stay
            if time - start > longest or is_jump:
                raise MediaError(f'corrupt: time stamps jump to {time:.0f} s')
            # The picture on display stays there until this one replaces it.
            # Pictures before `start` come along, because decoding begins at a keyframe; they send
            # nothing, as the right side is negative then.
            while shown is not None and num_sent / fps < time - start - _TIME_TOLERANCE:
                yield shown.rgb()
                num_sent += 1
                if num_sent >= length * fps - 1e-3:  # float products may miss a whole number
                    return
            shown = _Picture(frame, converter)
            shown_time = time
            num_pictures += 1
            duration = float(frame.duration * frame.time_base) if frame.duration else usual_duration
            end = time + duration

        has_all_sound = sound_seconds != 0.0
        _check_end(container, stream, zero, end, sound_end, has_all_sound, part[1])
        if stated:
            # A damaged time stamp in the sound would otherwise repeat the last picture for hours.
            sound_end = min(sound_end, _MAX_EXCESS * stated + 1.0)
        # The last picture has no successor to end it: it is on display for its own duration, and
        # on where the sound goes on. Music is uploaded as one picture with minutes of sound.
        if num_pictures == 1 or sound_end > end + _MAX_PADDING:
            end = max(end, sound_end)
        if start and end <= start:
            raise MediaError(
                f'truncated: the clip begins at {start:.1f} s and {end:.1f} s can be decoded'
            )
        if shown is not None:
            # A video has one frame at least, however short it is.
            num_frames = max(1, round(min(end - start, length) * fps))
            for _ in range(num_sent, num_frames):
                yield shown.rgb()


def _check_end(
    container: Any,
    stream: Any,
    zero: float,
    end: float,
    sound_end: float,
    has_all_sound: bool,
    part_end: float,
) -> None:
    """Raise MediaError if a file ends long before its header says.

    Args:
        container: the file.
        stream: its video track.
        zero: time stamp of the first picture.
        end: until when there are pictures, in seconds from the first one.
        sound_end: until when there is sound.
        has_all_sound: whether the sound, if the file has any, could be decoded.
        part_end: until when the sound was read, infinite for all of it.
    """
    declared = _declared_length(container, stream)
    found = end
    # Containers that do not count their frames have the longest track's duration in all tracks.
    if not stream.frames:
        found = max(end, sound_end)
        declared = min(declared, part_end)
    # Tracks of other kinds (subtitles) may be what the length of the container is.
    num_tracks = len(container.streams.video) + len(container.streams.audio)
    has_other_tracks = len(container.streams) > num_tracks
    # Matroska and FLV state a duration for no track, and one for the whole.
    if not declared and has_all_sound and not has_other_tracks:
        declared = min(_stated_length(container), part_end)
        # It counts from 0 on the clock of the file.
        found = max(end, sound_end) + max(zero, 0.0)
    _check_length(found, declared)


def _check_length(found: float, stated: float) -> None:
    """Raise MediaError if what could be decoded is much shorter than what a header states."""
    # Stated durations are often a little too long, so a fifth and a second are allowed.
    if found < 0.8 * stated - 1.0:
        raise MediaError(f'truncated: {found:.1f} of {stated:.1f} s can be decoded')


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
    with _open(path) as container:
        stream: Any = _track(container, 'audio')
        stream.codec_context.thread_count = 1
        begin = 0.0  # where decoding begins
        if part != WHOLE:
            if zero is None:
                has_start = stream.start_time is not None
                zero = float(stream.start_time * stream.time_base) if has_start else 0.0
            # From here on, `zero` is the time stamp of the first sample of the part.
            zero += start
            begin = zero
        # Decoding may stop there; a bit too much is cut off below.
        last_time = float('inf') if zero is None else zero + end - start
        pieces = _audio_pieces(_decode_from(path, container, stream, begin), rate, last_time)
        may_cancel = stream.codec_context.channels == 2 and _loudness(pieces) < _FAINT
    if may_cancel:
        pieces = _uncancelled(path, rate, begin, last_time, pieces)
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


def _uncancelled(
    path: str | os.PathLike,
    rate: int,
    begin: float,
    last_time: float,
    mixed: list[tuple[float, Int16[np.ndarray, ' S']]],
) -> list[tuple[float, Int16[np.ndarray, ' S']]]:
    """The left channel, where left and right are each other's negative; else what was mixed.

    Wired the wrong way round, a microphone gives such files; their mean is silence.

    Args:
        path: the file.
        rate: samples per second that come out.
        begin: where decoding begins, on the clock of the file.
        last_time: where it may stop.
        mixed: pieces of the mean of both channels.
    """
    with _open(path) as container:
        stream: Any = _track(container, 'audio')
        stream.codec_context.thread_count = 1
        frames = _decode_from(path, container, stream, begin)
        left = _audio_pieces(frames, rate, last_time, is_mixed=False)
    return left if _loudness(left) > _CANCELLED * _loudness(mixed) else mixed


def _loudness(pieces: list[tuple[float, Int16[np.ndarray, ' S']]]) -> float:
    """Root mean square of the samples of all pieces; 0 without any."""
    num_samples = sum(len(samples) for _, samples in pieces)
    if not num_samples:
        return 0.0
    energy = 0.0
    for _, samples in pieces:
        # As float32: the squares of an hour in float64 would take gigabytes.
        energy += float(np.sum(np.square(samples, dtype=np.float32), dtype=np.float64))
    return math.sqrt(energy / num_samples)


def _audio_pieces(
    frames: Iterator[Any], rate: int, last_time: float, is_mixed: bool = True
) -> list[tuple[float, Int16[np.ndarray, ' S']]]:
    """Resample audio up to `last_time`, in pieces without a hole.

    Args:
        frames: decoded.
        rate: samples per second that come out.
        last_time: on the clock of the file.
        is_mixed: whether all channels are mixed, or the first is taken.

    Returns:
        (time stamp, mono samples) of each piece.
    """
    times: list[float] = []
    chunks: list[list[np.ndarray]] = []  # of each piece
    resampler = None
    stream_format = None
    expected_time = 0.0  # when the next frame is due
    for frame in frames:
        time = _time_stamp(frame, default=expected_time)
        if time > last_time:
            break
        # A resampler serves one format, and knows nothing of holes: a new one for each piece.
        frame_format = (frame.sample_rate, frame.layout.name, frame.format.name)
        is_hole = abs(time - expected_time) > _MIN_HOLE
        if resampler is None or frame_format != stream_format or is_hole:
            if resampler is not None:
                chunks[-1].extend(_resample(resampler, None))  # what it still holds
            resampler = _resampler(frame, rate, is_mixed)
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


def _resampler(frame: Any, rate: int, is_mixed: bool) -> av.AudioResampler:
    """A resampler for frames like this one, whose first row of samples is wanted."""
    if is_mixed:
        return av.AudioResampler(format='s16', layout='mono', rate=rate)
    # Planar: one row for each channel.
    return av.AudioResampler(format='s16p', layout=frame.layout.name, rate=rate)


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
        with _open(path) as container:
            has_video = _track(container, 'video') is not None
            zero = _first_time(container) if has_video else None
        is_mixed = not _cancels_out(path, rate)
        # Opened again: finding the first picture may have decoded a part.
        with _open(path) as container:
            stream: Any = _track(container, 'audio')
            if stream is None:
                return
            stream.codec_context.thread_count = 1
            blocks = _audio_blocks(container, stream, rate, is_mixed)
            yield from _place_blocks(blocks, rate, zero, longest)
    except (av.error.FFmpegError, OSError, EOFError, UnicodeDecodeError) as error:
        raise MediaError(_reason(error, path)) from None


def _cancels_out(path: str | os.PathLike, rate: int) -> bool:
    """Whether the first minute is silence only because its two channels are mixed."""
    with _open(path) as container:
        stream: Any = _track(container, 'audio')
        if stream is None or stream.codec_context.channels != 2:
            return False
        start = float((stream.start_time or 0) * stream.time_base)
        last_time = start + _LISTENING
        stream.codec_context.thread_count = 1
        mixed = _audio_pieces(_decode(container, stream), rate, last_time)
    if _loudness(mixed) >= _FAINT:
        return False
    return _uncancelled(path, rate, 0.0, last_time, mixed) is not mixed


def _audio_blocks(
    container: Any, stream: Any, rate: int, is_mixed: bool
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
            resampler = _resampler(frame, rate, is_mixed)
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


def encode_jpeg(
    frame: UInt8[np.ndarray, 'H W 3'] | UInt8[np.ndarray, 'H W'], quality: int
) -> bytes:
    """Encode a frame, RGB or grey, as JPEG, with chroma at half resolution."""
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
