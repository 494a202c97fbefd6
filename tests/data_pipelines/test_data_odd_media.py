"""Media whose container says of time or orientation what frames alone do not, and odd files."""

import fractions
import os
import struct

import av
import chex
import numpy as np
import pytest
from clocks import FPS, RATE, brightness, clock, video_time, write_wav
from PIL import Image

from data_pipelines import media

# Container -> (video codec, audio codec), as the web has them.
CODECS = {
    'mp4': ('libx264', 'aac'),
    'webm': ('libvpx', 'libopus'),
    'matroska': ('libx264', 'aac'),
    'avi': ('mjpeg', 'pcm_s16le'),
    'mpegts': ('libx264', 'aac'),
    'flv': ('libx264', 'aac'),
}
SOUND_RATE = 48000
MILLISECONDS = fractions.Fraction(1, 1000)


def tone(seconds):
    """int16 [S] at SOUND_RATE."""
    times = np.arange(round(seconds * SOUND_RATE)) / SOUND_RATE
    return (8000 * np.sin(2 * np.pi * 500 * times)).astype(np.int16)


def write_media(path, container, pictures, sounds=(), rate=FPS, options=None):
    """A file of pictures [(seconds, uint8 [H W 3])] and of sound tracks, int16 [S] each."""
    video_codec, audio_codec = CODECS[container]
    with av.open(str(path), 'w', format=container, options=options or {}) as file:
        video = file.add_stream(video_codec, rate=rate)
        video.height, video.width = pictures[0][1].shape[:2]
        video.pix_fmt = 'yuvj420p' if video_codec == 'mjpeg' else 'yuv420p'
        # AVI counts frames.
        time_base = fractions.Fraction(1, FPS) if container == 'avi' else MILLISECONDS
        video.codec_context.time_base = time_base
        tracks = [file.add_stream(audio_codec, rate=SOUND_RATE, layout='mono') for _ in sounds]
        for seconds, picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
            frame.pts = round(seconds / time_base)
            frame.time_base = time_base
            file.mux(video.encode(frame))
        file.mux(video.encode())
        for track, samples in zip(tracks, sounds):
            frame = av.AudioFrame.from_ndarray(samples[None], format='s16', layout='mono')
            frame.sample_rate = SOUND_RATE
            frame.pts = 0
            file.mux(track.encode(frame))
            file.mux(track.encode())


def grays(times):
    """A picture for each time, whose brightness tells it."""
    pictures = []
    for time, gray in zip(times, brightness(np.asarray(times, float))):
        pictures.append((time, np.full((64, 96, 3), gray, np.uint8)))
    return pictures


def read(path, fps=FPS, size=64):
    """(frames [T H W 3] or None, audio [S] or None), fitted to each other."""
    content = media.read(path, fps, size, RATE)
    if content.frames is None:
        return None, content.audio
    frames = np.stack(list(content.frames))
    return frames, media.fit_audio(content.audio, len(frames), fps, RATE)


def reason(path):
    """Why a file cannot be used."""
    with pytest.raises(media.MediaError) as error:
        read(path)
    return error.value.reason


# ---- Time.


@pytest.mark.parametrize('container', CODECS)
def test_a_still_picture_is_held_as_long_as_its_sound(tmp_path, container):
    write_media(tmp_path / 'a', container, grays([0.0]), [tone(4.0)])
    frames, audio = read(tmp_path / 'a')
    assert abs(len(frames) - 4 * FPS) <= 1
    assert np.ptp(frames.astype(int), axis=0).max() == 0
    # All of it is sound, not silence.
    loudness = np.abs(audio[: len(audio) // 40 * 40].reshape(-1, 40)).max(1)
    assert loudness[4:-8].min() > 5000


@pytest.mark.parametrize('container', ['mp4', 'webm'])
def test_the_last_picture_is_held_where_the_sound_goes_on(tmp_path, container):
    write_media(tmp_path / 'a', container, grays(np.arange(10) / FPS), [tone(3.0)])
    frames, audio = read(tmp_path / 'a')
    assert abs(len(frames) - 3 * FPS) <= 1
    np.testing.assert_allclose(video_time(frames[:10]), np.arange(10) / FPS, atol=0.05)
    np.testing.assert_allclose(video_time(frames[10:]), 0.9, atol=0.05)
    assert len(audio) == round(len(frames) / FPS * RATE)


def test_pictures_that_go_on_after_the_sound_are_kept(tmp_path):
    write_media(tmp_path / 'a', 'mp4', grays(np.arange(30) / FPS), [tone(1.0)])
    frames, audio = read(tmp_path / 'a')
    chex.assert_shape(frames, (30, 64, 96, 3))
    chex.assert_shape(audio, (3 * RATE,))
    assert np.abs(audio[-RATE:]).max() == 0


@pytest.mark.parametrize('with_sound', [True, False])
@pytest.mark.parametrize('container', ['mp4', 'webm'])
def test_a_slide_stays_until_the_next(tmp_path, container, with_sound):
    sounds = [tone(210.0)] if with_sound else []
    rate = fractions.Fraction(1, 70)
    write_media(tmp_path / 'a', container, grays([0.0, 70.0, 140.0]), sounds, rate)
    frames, _ = read(tmp_path / 'a', fps=1)
    assert len(frames) >= 141
    gray = frames.astype(float).mean((1, 2, 3))
    for begin in (0, 70):
        assert np.ptp(gray[begin : begin + 70]) < 1
    if with_sound:
        assert abs(len(frames) - 210) <= 1


def test_a_damaged_time_stamp_is_still_noticed(tmp_path):
    # `live`: the header states no length that such a time could be within.
    write_media(tmp_path / 'a', 'webm', grays([0.0, 0.1, 700.0, 700.1]), options={'live': '1'})
    assert 'time stamps jump to 700 s' in reason(tmp_path / 'a')


def test_pictures_without_time_stamps_follow_each_other(tmp_path):
    encoder = av.CodecContext.create('libx264', 'w')
    encoder.height, encoder.width, encoder.pix_fmt = 64, 64, 'yuv420p'
    encoder.time_base = fractions.Fraction(1, 25)
    encoder.options = {'bf': '0'}
    frames, _ = clock(2.0, fps=25)
    packets = b''
    for picture in frames:
        encoded = encoder.encode(av.VideoFrame.from_ndarray(picture, format='rgb24'))
        packets += b''.join(bytes(packet) for packet in encoded)
    packets += b''.join(bytes(packet) for packet in encoder.encode())
    # A bare stream, without a container.
    (tmp_path / 'a.mp4').write_bytes(packets)
    got, _ = read(tmp_path / 'a.mp4')
    assert abs(len(got) - 20) <= 1
    np.testing.assert_allclose(video_time(got), np.arange(len(got)) / FPS, atol=0.07)


@pytest.mark.parametrize('container', ['mp4', 'matroska', 'webm', 'flv', 'avi'])
def test_a_file_cut_short_is_truncated(tmp_path, container):
    noise = np.random.default_rng(0).integers(0, 255, (60, 64, 96, 3)).astype(np.uint8)
    pictures = [(i / FPS, picture) for i, picture in enumerate(noise)]
    options = {'movflags': '+faststart'} if container == 'mp4' else {}
    write_media(tmp_path / 'a', container, pictures, options=options)
    assert len(read(tmp_path / 'a')[0]) == 60
    whole = (tmp_path / 'a').read_bytes()
    (tmp_path / 'cut').write_bytes(whole[: len(whole) // 2])
    assert reason(tmp_path / 'cut').startswith('truncated: ')


def test_pictures_that_begin_late_on_the_clock_of_the_file_are_not_truncated(tmp_path):
    times = 30.0 + np.arange(20) / FPS
    write_media(tmp_path / 'a', 'matroska', grays(times))
    assert len(read(tmp_path / 'a')[0]) == 20


@pytest.mark.parametrize('form', ['WEBP', 'PNG'])
def test_animations_are_videos(tmp_path, form):
    frames, _ = clock(2.0)
    first, *others = [Image.fromarray(frame) for frame in frames]
    path = tmp_path / f'a.{form.lower()}'
    first.save(path, form, save_all=True, append_images=others, duration=1000 // FPS)
    got, audio = read(path)
    chex.assert_shape(got, (20, 64, 64, 3))
    np.testing.assert_allclose(video_time(got), np.arange(20) / FPS, atol=0.05)
    assert audio is None


def test_gif(tmp_path):
    frames, _ = clock(2.0)
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(tmp_path / 'a.gif', save_all=True, append_images=others, duration=1000 // FPS)
    got, _ = read(tmp_path / 'a.gif')
    chex.assert_shape(got, (20, 64, 64, 3))
    np.testing.assert_allclose(video_time(got), np.arange(20) / FPS, atol=0.05)


# ---- Orientation and shape.

UNIT = 1 << 16
# (a, b, c, d) of the track's matrix -> what becomes of the picture [H W 3].
ORIENTATIONS = {
    'upright': ((UNIT, 0, 0, UNIT), lambda x: x),
    'clockwise': ((0, UNIT, -UNIT, 0), lambda x: np.rot90(x, -1)),
    'counterclockwise': ((0, -UNIT, UNIT, 0), lambda x: np.rot90(x, 1)),
    'upside down': ((-UNIT, 0, 0, -UNIT), lambda x: np.rot90(x, 2)),
    'mirrored': ((-UNIT, 0, 0, UNIT), np.fliplr),
    'mirrored upside down': ((UNIT, 0, 0, -UNIT), np.flipud),
    'transposed': ((0, UNIT, UNIT, 0), lambda x: x.transpose(1, 0, 2)),
    'transposed, upside down': (
        (0, -UNIT, -UNIT, 0),
        lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    ),
    'nothing': ((0, 0, 0, 0), lambda x: x),
}


@pytest.mark.parametrize('name', ORIENTATIONS)
def test_the_eight_orientations(tmp_path, name):
    (a, b, c, d), display = ORIENTATIONS[name]
    path = tmp_path / 'a.mp4'
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:32, :48, 0] = 255  # a red quarter and a green one: all eight differ
    picture[:32, 48:, 1] = 255
    media.write_mp4(path, np.stack([picture] * 10), FPS)
    content = bytearray(path.read_bytes())
    # In the track header, version and flags, times, ids, duration, reserved, layer, group and
    # volume come before the matrix.
    begin = content.index(b'tkhd') + 4 + 40
    matrix = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    content[begin : begin + 36] = struct.pack('>9i', *matrix)
    path.write_bytes(content)

    got, _ = read(path)
    expected = display(picture)
    chex.assert_shape(got, (10, *expected.shape))
    assert np.abs(got[0].astype(int) - expected).mean() < 25


def test_a_change_of_resolution_does_not_change_the_shape(tmp_path):
    (tmp_path / 'all.ts').write_bytes(b'')
    for number, (height, width) in enumerate([(64, 96), (192, 128)]):
        pictures = []
        for i in range(10):
            pictures.append((number + i / FPS, np.full((height, width, 3), 120, np.uint8)))
        write_media(tmp_path / 'part.ts', 'mpegts', pictures)
        with open(tmp_path / 'all.ts', 'ab') as file:
            file.write((tmp_path / 'part.ts').read_bytes())
    frames, _ = read(tmp_path / 'all.ts')
    assert len(frames) >= 15
    chex.assert_shape(frames, (len(frames), 64, 96, 3))


def test_pictures_of_one_line_are_refused(tmp_path):
    frames = np.zeros((20, 2, 200, 3), np.uint8)
    media.write_mp4(tmp_path / 'a.mp4', frames, FPS)
    assert reason(tmp_path / 'a.mp4') == (
        'too narrow: pictures of 200×2 pixels; expected a long side of at most 32 times the '
        'short one'
    )
    Image.fromarray(frames[0]).save(tmp_path / 'a.png')
    assert reason(tmp_path / 'a.png').startswith('too narrow')


# ---- Tracks.


def test_of_several_tracks_the_default_one_is_heard(tmp_path):
    silence = np.zeros(2 * SOUND_RATE, np.int16)
    write_media(tmp_path / 'a.mkv', 'matroska', grays(np.arange(20) / FPS), [silence, tone(2.0)])
    assert np.abs(read(tmp_path / 'a.mkv')[1]).max() < 100  # without marks, the first
    content = bytearray((tmp_path / 'a.mkv').read_bytes())
    # FlagDefault (0x88) of one byte: of the pictures, of the first and of the second sound.
    flags = [i for i in range(len(content) - 2) if content[i : i + 2] == b'\x88\x81']
    assert len(flags) >= 2 and all(content[i + 2] in (0, 1) for i in flags[:3]), flags
    for place, value in zip(flags[-2:], (0, 1)):
        content[place + 2] = value
    (tmp_path / 'a.mkv').write_bytes(content)
    assert np.abs(read(tmp_path / 'a.mkv')[1]).max() > 5000


def test_the_cover_of_a_music_file_is_no_video(tmp_path):
    write_wav(tmp_path / 'a.wav', (tone(3.0)[::6]))
    _, audio = read(tmp_path / 'a.wav')
    cover = tmp_path / 'cover.png'
    Image.new('RGB', (64, 64)).save(cover)
    with av.open(str(tmp_path / 'a.flac'), 'w') as file:
        sound = file.add_stream('flac', rate=RATE, layout='mono')
        picture = file.add_stream('png', rate=1)
        picture.height, picture.width, picture.pix_fmt = 64, 64, 'rgb24'
        picture.disposition = av.stream.Disposition.attached_pic
        image = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format='rgb24')
        file.mux(picture.encode(image))
        frame = av.AudioFrame.from_ndarray(audio[None], format='s16', layout='mono')
        frame.sample_rate = RATE
        file.mux(sound.encode(frame))
        file.mux(sound.encode())
    frames, heard = read(tmp_path / 'a.flac')
    assert frames is None
    assert abs(len(heard) - 3 * RATE) <= 1


# ---- Names.


def test_what_is_not_there_is_not_called_corrupt(tmp_path):
    for name in ('a.mp4', 'a.wav', 'a.jpg'):
        assert reason(tmp_path / name) == 'missing: no such file'
        (tmp_path / f'folder.{name}').mkdir()
        assert reason(tmp_path / f'folder.{name}').startswith('a folder')


@pytest.mark.parametrize(
    'name',
    [
        b'caf\xe9.mp4',
        b'a:b.mp4',
        b'http:b.mp4',
        b'-i.mp4',
        b'new\nline.mp4',
        b'frame%03d.mp4',
        b'A.MP4',
        b' a .mp4',
        b'x' * 251 + b'.mp4',
        b'\x1b[31m.mp4',
    ],
)
def test_names_that_mean_something_to_others(tmp_path, monkeypatch, name):
    frames, audio = clock(1.0)
    media.write_mp4(tmp_path / 'plain.mp4', frames, FPS, audio, RATE)
    monkeypatch.chdir(tmp_path)
    os.rename(b'plain.mp4', name)
    # Relative: nothing but the name tells FFmpeg what it is. As text, a path and bytes.
    for path in (os.fsdecode(name), tmp_path / os.fsdecode(name)):
        got, sound = read(path)
        chex.assert_shape(got, (10, 64, 64, 3))
        assert len(sound) == RATE
