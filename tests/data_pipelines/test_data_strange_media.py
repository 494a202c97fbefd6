"""Media of strangers that open well and were read wrongly, and files that are no media at all."""

import fractions
import io
import os
import struct

import av
import numpy as np
import pytest
from clocks import FPS, RATE, audio_time, clock, piece_middles, video_time, write_wav
from PIL import Image

from data_pipelines import file_signs, media, media_clock

SECONDS = 1.6


def read(path, size=64):
    """(frames [T H W 3] or None, audio [S] or None), fitted to each other."""
    content = media.read(path, FPS, size, RATE)
    if content.frames is None:
        return None, content.audio
    frames = np.stack(list(content.frames))
    return frames, media.fit_audio(content.audio, len(frames), FPS, RATE)


def reason(path):
    """Why a file cannot be used."""
    with pytest.raises(media.MediaError) as error:
        read(path)
    return error.value.reason


# ---- Clocks that restart.

# Container -> (video codec, audio codec, sound samples per second).
JOINED = {
    'mpegts': ('mpeg2video', 'mp2', 48000),
    'mpeg': ('mpeg2video', 'mp2', 48000),
    'matroska': ('mjpeg', 'pcm_s16le', RATE),
}


def write_part(container):
    """Bytes of a clock in a container."""
    video_codec, audio_codec, rate = JOINED[container]
    frames, audio = clock(SECONDS, rate=rate, fps=25)
    stream = io.BytesIO()
    with av.open(stream, 'w', format=container) as file:
        video = file.add_stream(video_codec, rate=25)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = 'yuvj420p' if video_codec == 'mjpeg' else 'yuv420p'
        sound = file.add_stream(audio_codec, rate=rate, layout='mono')
        for i in range(len(frames)):
            picture = av.VideoFrame.from_ndarray(frames[i], format='rgb24')
            picture.pts = i
            picture.time_base = fractions.Fraction(1, 25)
            file.mux(video.encode(picture))
            samples = audio[i * rate // 25 : (i + 1) * rate // 25]
            piece = av.AudioFrame.from_ndarray(samples[None], format='s16', layout='mono')
            piece.sample_rate = rate
            piece.pts = i * rate // 25
            file.mux(sound.encode(piece))
        file.mux(video.encode())
        file.mux(sound.encode())
    return stream.getvalue()


@pytest.mark.parametrize('container', JOINED)
def test_the_parts_of_a_joined_file_follow_each_other(tmp_path, container):
    part = write_part(container)
    (tmp_path / 'a').write_bytes(part + part)
    frames, audio = read(tmp_path / 'a')
    assert abs(len(frames) - 2 * SECONDS * FPS) <= 2
    # The second part tells the same times again, in pictures and in sound.
    seen = video_time(frames)
    begin = int(np.argmin(seen[8:])) + 8
    assert abs(begin / FPS - SECONDS) < 0.21
    heard = audio_time(audio)
    middles = piece_middles(len(heard))
    for t in (0.4, 0.8, 1.2):
        for start in (0.0, begin / FPS):
            picture = np.interp(start + t, np.arange(len(frames)) / FPS, seen)
            sound = np.interp(start + t, middles, heard)
            assert abs(picture - sound) < 0.15


def test_blocks_of_joined_sound(tmp_path):
    part = write_part('matroska')
    (tmp_path / 'a').write_bytes(part + part)
    num_samples = sum(len(block) for block in media.stream_audio(tmp_path / 'a', RATE))
    assert abs(num_samples / RATE - 2 * SECONDS) < 0.1


@pytest.mark.parametrize('container', ['mpegts', 'mpeg'])
def test_a_joined_file_does_not_say_how_long_it_is(tmp_path, container):
    part = write_part(container)
    (tmp_path / 'one').write_bytes(part)
    (tmp_path / 'two').write_bytes(part + part)
    for kind in ('video', 'audio'):
        assert abs(media.duration(tmp_path / 'one', kind) - SECONDS) < 0.2
        # FFmpeg says the same, which would leave out the second half.
        assert media.duration(tmp_path / 'two', kind) is None


class Packet:
    """A packet of a track, with times in milliseconds."""

    time_base = fractions.Fraction(1, 1000)

    def __init__(self, track, dts, duration=40):
        self.stream = type('Track', (), {'index': track})
        self.dts = self.pts = dts
        self.duration = duration


def corrected(stamps):
    """Time stamps (track, milliseconds) -> milliseconds on a clock that does not restart."""
    clock_of_file = media_clock._Clock()
    packets = [Packet(*stamp) for stamp in stamps]
    for packet in packets:
        clock_of_file.advance(packet)
    return [packet.dts for packet in packets]


def test_both_tracks_restart_together():
    first = [(0, 0), (1, 0), (0, 4000), (1, 3000)]
    # The sound of the first part ends a second early, and that of the second begins late.
    second = [(0, 0), (1, 500)]
    assert corrected(first + second)[-2:] == [4040, 4540]
    # A sender that goes on from another time: of the second part, the sound comes first.
    assert corrected([*first, (1, 1000), (0, 1100)])[-2:] == [4040, 4140]


def test_a_damaged_time_stamp_is_no_restart():
    stamps = [(0, 0), (0, 40), (0, 3_600_000), (0, 120), (0, 160)]
    assert corrected(stamps) == [stamp for _, stamp in stamps]
    # Pictures that are stored in another order than shown go back by less than a second.
    stamps = [(0, 0), (0, 160), (0, 80), (0, 40), (0, 120)]
    assert corrected(stamps) == [stamp for _, stamp in stamps]


def test_pictures_without_a_time_of_decoding_say_nothing_of_the_clock():
    # A slide show whose pictures look ahead: shown at 0, 210, 70 and 140 s.
    clock_of_file = media_clock._Clock()
    for stamp in (0, 210_000, 70_000, 140_000):
        packet = Packet(0, None)
        packet.pts = stamp
        clock_of_file.advance(packet)
        assert packet.pts == stamp


# ---- Channels.


def write_stereo(path, left, right):
    with av.open(str(path), 'w', format='wav') as file:
        stream = file.add_stream('pcm_s16le', rate=RATE, layout='stereo')
        samples = np.stack([left, right], axis=1).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(samples, format='s16', layout='stereo')
        frame.sample_rate = RATE
        file.mux(stream.encode(frame))
        file.mux(stream.encode())


def test_channels_that_cancel_out_are_heard(tmp_path):
    _, audio = clock(3.0)
    write_stereo(tmp_path / 'opposite.wav', audio, -audio)
    np.testing.assert_array_equal(read(tmp_path / 'opposite.wav')[1], audio)
    blocks = list(media.stream_audio(tmp_path / 'opposite.wav', RATE))
    np.testing.assert_array_equal(np.concatenate(blocks), audio)
    # A part of it as well.
    part = media.read(tmp_path / 'opposite.wav', FPS, 64, RATE, part=(1.0, 1.5)).audio
    np.testing.assert_array_equal(part, audio[RATE : RATE * 3 // 2])


def test_other_channels_are_mixed(tmp_path):
    _, audio = clock(3.0)
    write_stereo(tmp_path / 'left.wav', audio, np.zeros_like(audio))
    np.testing.assert_allclose(read(tmp_path / 'left.wav')[1], audio / 2, atol=1)
    # Faint on both sides: nothing cancels out.
    write_stereo(tmp_path / 'faint.wav', audio // 100, audio // 100)
    np.testing.assert_allclose(read(tmp_path / 'faint.wav')[1], audio // 100, atol=1)
    write_stereo(tmp_path / 'silent.wav', 0 * audio, 0 * audio)
    assert not read(tmp_path / 'silent.wav')[1].any()


# ---- Pictures.


def quarters(height=64, width=96):
    """A picture with a colour in each corner."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize('name', ['a.tif', 'a.tiff', 'a.bmp', 'a.avif', 'a.png'])
def test_pictures_with_a_note_of_their_camera(tmp_path, name):
    exif = Image.Exif()
    exif[0x010F] = 'a camera'
    quarters().save(tmp_path / name, exif=exif)
    frames, audio = read(tmp_path / name)
    assert audio is None
    assert abs(frames[0].astype(int) - np.asarray(quarters())).mean() < 5


@pytest.mark.parametrize('degrees', [0, 90, 180, 270])
def test_the_angle_turns_pictures_as_the_matrix_does(degrees):
    picture = np.asarray(quarters())
    # As FFmpeg has it, the angle is counterclockwise.
    expected = np.rot90(picture, degrees // 90)
    turned = media._Orientation._of_angle(degrees).apply(picture)
    np.testing.assert_array_equal(turned, expected)


def test_side_data_that_the_library_does_not_know(tmp_path, monkeypatch):
    """Motion JPEG of a camera: every frame brings its EXIF."""
    exif = Image.Exif()
    exif[0x010F] = 'a camera'
    jpeg = io.BytesIO()
    quarters().save(jpeg, 'JPEG', exif=exif)
    with av.open(str(tmp_path / 'a.avi'), 'w') as file:
        stream = file.add_stream('mjpeg', rate=FPS)
        stream.height, stream.width, stream.pix_fmt = 64, 96, 'yuvj420p'
        for i in range(FPS):
            packet = av.Packet(jpeg.getvalue())
            packet.stream = stream
            packet.pts = packet.dts = i
            packet.time_base = fractions.Fraction(1, FPS)
            file.mux(packet)
    frames, _ = read(tmp_path / 'a.avi')
    assert frames.shape == (FPS, 64, 96, 3)


def test_floats_have_no_known_range(tmp_path):
    Image.fromarray(np.ones((64, 64), np.float32)).save(tmp_path / 'a.tif')
    assert reason(tmp_path / 'a.tif').startswith('unknown range: pixels are floats')


def box(kind, *contents):
    body = b''.join(contents)
    return struct.pack('>I', 8 + len(body)) + kind + body


def full_box(kind, *contents, version=0):
    return box(kind, struct.pack('>I', version << 24), *contents)


def content_of(data, *path):
    """Content of a box within boxes."""
    for kind in path:
        position = 0
        while data[position + 4 : position + 8] != kind:
            position += int.from_bytes(data[position : position + 4], 'big')
        end = position + int.from_bytes(data[position : position + 4], 'big')
        # `meta` has a version before its content.
        data = data[position + (12 if kind == b'meta' else 8) : end]
    return data


def write_tiles(path, colors, side=64):
    """A picture of square tiles, as phones write them (ISO/IEC 23008-12: an item of type grid)."""
    tiles = []
    for color in colors:
        stream = io.BytesIO()
        Image.new('RGB', (side, side), color).save(stream, 'AVIF')
        tiles.append(stream.getvalue())
    samples = [content_of(tile, b'mdat') for tile in tiles]
    width = side * len(tiles)
    # Version and flags; rows and columns, less one; size of the whole.
    grid = struct.pack('>BBBBHH', 0, 0, 0, len(tiles) - 1, width, side)
    ids = range(2, len(tiles) + 2)
    infos = [full_box(b'infe', struct.pack('>HH', 1, 0), b'grid\0', version=2)]
    infos += [full_box(b'infe', struct.pack('>HH', i, 0), b'av01\0', version=2) for i in ids]
    numbers = b''.join(struct.pack('>H', i) for i in ids)
    properties = box(
        b'ipco',
        full_box(b'ispe', struct.pack('>II', width, side)),
        full_box(b'ispe', struct.pack('>II', side, side)),
        box(b'av1C', content_of(tiles[0], b'meta', b'iprp', b'ipco', b'av1C')),
    )
    uses = [struct.pack('>HBB', 1, 1, 1)] + [struct.pack('>HBBB', i, 2, 2, 0x83) for i in ids]
    kind = box(b'ftyp', b'avif\0\0\0\0avifmif1')

    def meta(offset):
        places = []
        for number, data in zip((1, *ids), (grid, *samples)):
            places.append(struct.pack('>HHHII', number, 0, 1, offset, len(data)))
            offset += len(data)
        return full_box(
            b'meta',
            full_box(b'hdlr', b'\0\0\0\0pict', bytes(13)),
            full_box(b'pitm', struct.pack('>H', 1)),
            full_box(b'iloc', struct.pack('>BBH', 0x44, 0, len(places)), *places),
            full_box(b'iinf', struct.pack('>H', len(infos)), *infos),
            full_box(b'iref', box(b'dimg', struct.pack('>HH', 1, len(tiles)), numbers)),
            box(b'iprp', properties, full_box(b'ipma', struct.pack('>I', len(uses)), *uses)),
        )

    offset = len(kind) + len(meta(0)) + 8
    path.write_bytes(kind + meta(offset) + box(b'mdat', grid, *samples))


def test_one_tile_is_not_taken_for_the_picture(tmp_path):
    write_tiles(tmp_path / 'a.heic', ['red', 'blue'])
    assert reason(tmp_path / 'a.heic').startswith('made of tiles, as phones save HEIC')
    # What reads tiles reads this one.
    write_tiles(tmp_path / 'a.avif', ['red', 'blue'])
    frames, _ = read(tmp_path / 'a.avif')
    assert frames.shape[1:] == (64, 128, 3)
    assert frames[0, 32, 16].argmax() == 0
    assert frames[0, 32, 112].argmax() == 2


# ---- What is no media file.

NOT_MEDIA = {
    'empty: it has no bytes': b'',
    'empty: it begins with zeros': bytes(4000),
    'a web page': b'\r\n<!DOCTYPE html><html><title>Log in</title>',
    'a pointer of Git LFS': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n',
    'an archive': b'PK\x03\x04' + bytes(100),
    'a playlist': b'#EXTM3U\n#EXT-X-VERSION:3\n',
    'truncated: its index (moov) is missing': box(b'ftyp', b'isom\0\0\0\0')
    + box(b'mdat', bytes(9)),
    'corrupt': b'nothing that anybody knows' * 9,
}


@pytest.mark.parametrize('name', ['a.mp4', 'a.wav', 'a.jpg'])
@pytest.mark.parametrize('expected, content', NOT_MEDIA.items(), ids=NOT_MEDIA.keys())
def test_what_is_no_media_file_is_named(tmp_path, name, expected, content):
    (tmp_path / name).write_bytes(content)
    assert reason(tmp_path / name).startswith(expected)


def test_an_index_that_is_cut_off(tmp_path):
    frames, audio = clock(2.0)
    media.write_mp4(tmp_path / 'a.mp4', frames, FPS, audio, RATE)
    content = (tmp_path / 'a.mp4').read_bytes()
    assert not file_signs.has_cut_index(tmp_path / 'a.mp4')
    # The index stands in front here; behind the samples, the end of a file cuts it.
    begin = content.index(b'moov') - 4
    end = begin + int.from_bytes(content[begin : begin + 4], 'big')
    index = content[begin:end]
    tracks = index.index(b'trak', index.index(b'trak') + 4)
    cut = content[:begin] + content[end:] + index[: tracks - 4]
    (tmp_path / 'cut.mp4').write_bytes(cut)
    assert reason(tmp_path / 'cut.mp4') == 'truncated: its index (moov) is cut off'


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'a.mp4')
    assert reason(tmp_path / 'a.mp4') == 'a pipe or a device: expected a media file'
    with pytest.raises(media.MediaError, match='a pipe'):
        media.duration(tmp_path / 'a.mp4', 'video')
    os.mkfifo(tmp_path / 'a.jpg')
    assert reason(tmp_path / 'a.jpg').startswith('a pipe')
    assert reason('/dev/null').startswith('a pipe or a device')


def test_media_under_another_name(tmp_path):
    _, audio = clock(2.0)
    write_wav(tmp_path / 'a.mp4', audio)
    assert read(tmp_path / 'a.mp4')[0] is None
