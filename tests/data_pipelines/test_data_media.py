"""Media files written and read: time, shape and sound survive, broken files say why."""

import fractions
import struct

import av
import chex
import numpy as np
import pytest
from clocks import FPS, RATE, audio_time, brightness, clock, piece_middles, video_time, write_wav

from data_pipelines import media


def read(path, fps=FPS, size=64, rate=RATE):
    """(frames [T H W 3] or None, audio [S] or None); beside frames, audio is as long as they."""
    content = media.read(path, fps, size, rate)
    if content.frames is None:
        return None, content.audio
    frames = np.stack(list(content.frames))
    return frames, media.fit_audio(content.audio, len(frames), fps, rate)


def test_round_trip_keeps_time(tmp_path):
    frames, audio = clock(3.0)
    media.write_mp4(tmp_path / 'a.mp4', frames, FPS, audio, RATE)
    got, pcm = read(tmp_path / 'a.mp4')
    chex.assert_equal_shape([got, frames])
    chex.assert_type([got, pcm], [np.uint8, np.int16])
    chex.assert_shape(pcm, (3 * RATE,))
    np.testing.assert_allclose(video_time(got), np.arange(30) / FPS, atol=0.05)
    np.testing.assert_allclose(audio_time(pcm)[2:-2], piece_middles(75)[2:-2], atol=0.06)


def test_the_delay_of_the_encoder_is_taken_out(tmp_path):
    frames, _ = clock(2.0)
    white = np.random.default_rng(0).normal(size=2 * RATE)
    below_1500_hz = 8000 * np.convolve(white, np.hanning(9) / 4, 'same')
    noise = below_1500_hz.clip(-30000, 30000).astype(np.int16)
    media.write_mp4(tmp_path / 'a.mp4', frames, FPS, noise, RATE)
    _, pcm = read(tmp_path / 'a.mp4')
    # Aligned if the part that begins 100 samples later correlates best at a lag of 100.
    correlation = np.correlate(
        pcm[4000:12000].astype(float), noise[4100:11900].astype(float), 'valid'
    )
    assert correlation.argmax() == 100


def test_equal_input_gives_equal_bytes(tmp_path):
    frames, audio = clock(1.5)
    frames = frames + np.random.default_rng(0).integers(0, 40, frames.shape).astype(np.uint8)
    for name in ('a', 'b'):
        media.write_mp4(tmp_path / name, frames, FPS, audio, RATE)
    assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()


@pytest.mark.parametrize(
    'shape, size, expected_shape',
    [
        ((48, 96), 32, (32, 64)),
        ((96, 48), 32, (64, 32)),
        ((64, 64), 96, (96, 96)),
    ],
)
def test_the_short_side_gets_the_size(tmp_path, shape, size, expected_shape):
    frames, _ = clock(1.0, *shape)
    media.write_mp4(tmp_path / 'a.mp4', frames, FPS)
    got, pcm = read(tmp_path / 'a.mp4', size=size)
    chex.assert_shape(got, (10, *expected_shape, 3))
    assert pcm is None


def test_other_frame_rates(tmp_path):
    frames, _ = clock(2.0, fps=30)
    media.write_mp4(tmp_path / 'a.mp4', frames, 30)
    for fps in (10, 12.5, 60):
        got, _ = read(tmp_path / 'a.mp4', fps=fps)
        assert len(got) == 2 * fps
        np.testing.assert_allclose(video_time(got), np.arange(len(got)) / fps, atol=0.06)


def encode(path, times, frames, audio=None, audio_start=0.0, container='mp4'):
    """A video whose pictures have the given time stamps, its sound beginning at `audio_start`."""
    milliseconds = fractions.Fraction(1, 1000)
    with av.open(str(path), 'w', format=container) as file:
        video = file.add_stream('libx264', rate=FPS, options={'bf': '0'})
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = 'yuv420p'
        video.codec_context.time_base = milliseconds
        if audio is not None:
            sound = file.add_stream('aac', rate=RATE, layout='mono')
        for time, picture in zip(times, frames):
            frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
            frame.pts = round(time * 1000)
            frame.time_base = milliseconds
            file.mux(video.encode(frame))
        file.mux(video.encode())
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(audio[None], format='s16', layout='mono')
            frame.sample_rate = RATE
            frame.pts = round(audio_start * RATE)
            frame.time_base = fractions.Fraction(1, RATE)
            file.mux(sound.encode(frame))
            file.mux(sound.encode())


def test_variable_frame_rate(tmp_path):
    times = np.sort(np.random.default_rng(0).uniform(0, 3, 50))
    times[0] = 0
    gray = brightness(times)[:, None, None, None]
    frames = np.broadcast_to(gray, (50, 64, 64, 3))
    encode(tmp_path / 'a.mkv', times, frames, container='matroska')
    got, _ = read(tmp_path / 'a.mkv')
    # The picture on display at each moment.
    moments = np.arange(len(got)) / FPS
    on_display = np.searchsorted(times, moments + 1e-3, side='right') - 1
    np.testing.assert_allclose(video_time(got), times[on_display], atol=0.05)
    assert abs(len(got) - 30) <= 1


@pytest.mark.parametrize('start', [0.5, 0.0])
def test_sound_is_on_the_clock_of_the_pictures(tmp_path, start):
    frames, audio = clock(3.0)
    first_sample = round(start * RATE)
    encode(tmp_path / 'a.mp4', np.arange(30) / FPS, frames, audio[first_sample:], start)
    _, pcm = read(tmp_path / 'a.mp4')
    chex.assert_shape(pcm, (3 * RATE,))
    if first_sample:
        assert np.abs(pcm[: first_sample - 400]).max() < 200
    np.testing.assert_allclose(audio_time(pcm[8000:16000]), 1 + piece_middles(25), atol=0.06)


def test_pictures_that_begin_late_start_the_clock(tmp_path):
    frames, audio = clock(3.0)
    # Sound runs 0.7 s before the first picture.
    times = np.arange(30) / FPS + 0.7
    encode(tmp_path / 'a.mkv', times, frames, audio, 0.0, 'matroska')
    got, pcm = read(tmp_path / 'a.mkv')
    np.testing.assert_allclose(video_time(got)[:5], np.arange(5) / FPS, atol=0.05)
    np.testing.assert_allclose(audio_time(pcm[:8000]), 0.7 + piece_middles(25), atol=0.06)


def test_rotation(tmp_path):
    path = tmp_path / 'a.mp4'
    frames = np.zeros((10, 64, 96, 3), np.uint8)
    frames[:, :32, :48] = 255  # top left corner as stored
    media.write_mp4(path, frames, FPS)
    content = bytearray(path.read_bytes())
    # In the track header, version and flags, times, ids, duration, reserved, layer, group and
    # volume come before the matrix.
    begin = content.index(b'tkhd') + 4 + 40
    matrix = slice(begin, begin + 36)
    unit = 1 << 16
    identity = (unit, 0, 0, 0, unit, 0, 0, 0, 1 << 30)
    assert struct.unpack('>9i', content[matrix]) == identity
    clockwise = (0, unit, 0, -unit, 0, 0, 64 * unit, 0, 1 << 30)
    content[matrix] = struct.pack('>9i', *clockwise)
    path.write_bytes(content)

    got, _ = read(path)
    chex.assert_shape(got, (10, 96, 64, 3))
    # The bright corner is now top right.
    gray = got[0].mean(-1)
    assert gray[:40, 40:].min() > 200
    assert gray[:40, :24].max() < 50
    assert gray[56:].max() < 50


def test_sound_alone_and_another_rate(tmp_path):
    _, audio = clock(2.0)
    write_wav(tmp_path / 'a.wav', audio)
    frames, pcm = read(tmp_path / 'a.wav', rate=16000)
    assert frames is None
    assert abs(len(pcm) - 32000) <= 1
    heard = audio_time(pcm[:32000:2])
    np.testing.assert_allclose(heard[1:-1], piece_middles(50)[1:-1], atol=0.05)


@pytest.fixture(scope='module')
def whole_mp4(tmp_path_factory):
    """The bytes of a good file."""
    path = tmp_path_factory.mktemp('whole') / 'a.mp4'
    frames, audio = clock(2.0)
    media.write_mp4(path, frames, FPS, audio, RATE)
    return path.read_bytes()


def test_broken_files_say_why(tmp_path, whole_mp4):
    contents = {
        'empty': b'',
        'noise': bytes(1000),
        'cut': whole_mp4[:1500],
        'tail': whole_mp4[-1500:],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(media.MediaError) as error:
            read(tmp_path / name)
        reason = error.value.reason
        assert reason.startswith(('corrupt', 'truncated', 'empty')), (name, reason)


def test_damaged_pictures_are_noticed(tmp_path, whole_mp4):
    damaged = bytearray(whole_mp4)
    begin = whole_mp4.index(b'mdat')
    damaged[begin + 200 : begin + 1400] = np.random.default_rng(0).bytes(1200)
    (tmp_path / 'b.mp4').write_bytes(damaged)
    with pytest.raises(media.MediaError, match='corrupt'):
        read(tmp_path / 'b.mp4')


def test_write_refuses_odd_sizes(tmp_path):
    with pytest.raises(ValueError, match='even H and W'):
        media.write_mp4(tmp_path / 'a.mp4', np.zeros((2, 31, 32, 3), np.uint8), 10)
