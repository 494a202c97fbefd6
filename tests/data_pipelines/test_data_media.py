import fractions
import pathlib
import struct

import av
import chex
import numpy as np
import pytest
from clocks import FPS, RATE, audio_time, clock, video_time, write_wav

from data_pipelines import media


def read(path, fps=FPS, size=64, rate=RATE):
    m = media.read(path, fps, size, rate)
    frames = np.stack(list(m.frames)) if m.frames is not None else None
    return frames, m.audio if frames is None else media.fit_audio(m.audio, len(frames), fps, rate)


def test_round_trip_keeps_time(tmp_path):
    frames, audio = clock(3.0)
    media.write_mp4(tmp_path / 'a.mp4', frames, FPS, audio, RATE)
    got, pcm = read(tmp_path / 'a.mp4')
    chex.assert_equal_shape([got, frames])
    chex.assert_type([got, pcm], [np.uint8, np.int16])
    chex.assert_shape(pcm, (3 * RATE,))
    np.testing.assert_allclose(video_time(got), np.arange(30) / FPS, atol=0.05)
    middles = (np.arange(75) + 0.5) * 320 / RATE
    np.testing.assert_allclose(audio_time(pcm)[2:-2], middles[2:-2], atol=0.06)


def test_the_delay_of_the_encoder_is_taken_out(tmp_path):
    frames, _ = clock(2.0)
    white = np.random.default_rng(0).normal(size=2 * RATE)
    noise = (
        (8000 * np.convolve(white, np.hanning(9) / 4, 'same')).clip(-30000, 30000).astype(np.int16)
    )  # below 1.5 kHz
    media.write_mp4(tmp_path / 'a.mp4', frames, FPS, noise, RATE)
    _, pcm = read(tmp_path / 'a.mp4')
    score = np.correlate(pcm[4000:12000].astype(float), noise[4100:11900].astype(float), 'valid')
    assert score.argmax() == 100


def test_equal_input_equal_bytes(tmp_path):
    frames, audio = clock(1.5)
    frames = frames + np.random.default_rng(0).integers(0, 40, frames.shape).astype(np.uint8)
    for name in 'ab':
        media.write_mp4(tmp_path / name, frames, FPS, audio, RATE)
    assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()


@pytest.mark.parametrize(
    'shape, size, want',
    [((48, 96), 32, (32, 64)), ((96, 48), 32, (64, 32)), ((64, 64), 96, (96, 96))],
)
def test_short_side(tmp_path, shape, size, want):
    frames, _ = clock(1.0, *shape)
    media.write_mp4(tmp_path / 'a.mp4', frames, FPS)
    got, pcm = read(tmp_path / 'a.mp4', size=size)
    chex.assert_shape(got, (10, *want, 3))
    assert pcm is None


def test_other_frame_rates(tmp_path):
    frames, _ = clock(2.0, fps=30)
    media.write_mp4(tmp_path / 'a.mp4', frames, 30)
    for fps in (10, 12.5, 60):
        got, _ = read(tmp_path / 'a.mp4', fps=fps)
        assert len(got) == 2 * fps
        np.testing.assert_allclose(video_time(got), np.arange(len(got)) / fps, atol=0.06)


def encode(path, times, frames, audio=None, audio_at=0.0, container='mp4'):
    """A video whose pictures have the given time stamps, its sound beginning at `audio_at`."""
    with av.open(str(path), 'w', format=container) as c:
        v = c.add_stream('libx264', rate=FPS, options={'bf': '0'})
        v.height, v.width, v.pix_fmt = *frames.shape[1:3], 'yuv420p'
        v.codec_context.time_base = fractions.Fraction(1, 1000)
        a = None if audio is None else c.add_stream('aac', rate=RATE, layout='mono')
        for t, picture in zip(times, frames):
            f = av.VideoFrame.from_ndarray(picture, format='rgb24')
            f.pts, f.time_base = round(t * 1000), fractions.Fraction(1, 1000)
            c.mux(v.encode(f))
        c.mux(v.encode())
        if a is not None:
            f = av.AudioFrame.from_ndarray(audio[None], format='s16', layout='mono')
            f.sample_rate, f.pts, f.time_base = (
                RATE,
                round(audio_at * RATE),
                fractions.Fraction(1, RATE),
            )
            c.mux(a.encode(f))
            c.mux(a.encode())


def test_variable_frame_rate(tmp_path):
    times = np.sort(np.random.default_rng(0).uniform(0, 3, 50))
    times[0] = 0
    frames = np.broadcast_to(
        (20 + 60 * times).astype(np.uint8)[:, None, None, None], (50, 64, 64, 3)
    )
    encode(tmp_path / 'a.mkv', times, frames, container='matroska')
    got, _ = read(tmp_path / 'a.mkv')
    at = np.arange(len(got)) / FPS
    shown = times[
        np.searchsorted(times, at + 1e-3, side='right') - 1
    ]  # the picture on display at each moment
    np.testing.assert_allclose(video_time(got), shown, atol=0.05)
    assert abs(len(got) - 30) <= 1


@pytest.mark.parametrize('at', [0.5, 0.0])
def test_sound_is_placed_on_the_clock_of_the_pictures(tmp_path, at):
    frames, audio = clock(3.0)
    encode(tmp_path / 'a.mp4', np.arange(30) / FPS, frames, audio[round(at * RATE) :], at)
    _, pcm = read(tmp_path / 'a.mp4')
    assert len(pcm) == 3 * RATE
    quiet = round(at * RATE)
    assert not quiet or np.abs(pcm[: quiet - 400]).max() < 200
    np.testing.assert_allclose(
        audio_time(pcm[8000:16000]), 1 + (np.arange(25) + 0.5) * 320 / RATE, atol=0.06
    )


def test_pictures_that_begin_late_start_the_clock(tmp_path):
    frames, audio = clock(3.0)
    encode(
        tmp_path / 'a.mkv', np.arange(30) / FPS + 0.7, frames, audio, 0.0, 'matroska'
    )  # sound runs 0.7 s before
    got, pcm = read(tmp_path / 'a.mkv')
    np.testing.assert_allclose(video_time(got)[:5], np.arange(5) / FPS, atol=0.05)
    np.testing.assert_allclose(
        audio_time(pcm[:8000]), 0.7 + (np.arange(25) + 0.5) * 320 / RATE, atol=0.06
    )


def test_rotation(tmp_path):
    frames = np.zeros((10, 64, 96, 3), np.uint8)
    frames[:, :32, :48] = 255  # top left corner as stored
    media.write_mp4(tmp_path / 'a.mp4', frames, FPS)
    data = bytearray((tmp_path / 'a.mp4').read_bytes())
    at = (
        data.index(b'tkhd') + 4 + 40
    )  # version and flags, times, ids, duration, reserved, layer, group, volume: then the matrix
    unit = 1 << 16
    assert struct.unpack('>9i', data[at : at + 36]) == (unit, 0, 0, 0, unit, 0, 0, 0, 1 << 30)
    data[at : at + 36] = struct.pack(
        '>9i', 0, unit, 0, -unit, 0, 0, 64 * unit, 0, 1 << 30
    )  # to be shown turned clockwise
    (tmp_path / 'a.mp4').write_bytes(data)
    got, _ = read(tmp_path / 'a.mp4')
    chex.assert_shape(got, (10, 96, 64, 3))
    bright = got[0].mean(-1)
    assert (
        bright[:40, 40:].min() > 200 and bright[:40, :24].max() < 50 and bright[56:].max() < 50
    )  # now top right


def test_sound_alone_and_other_rates(tmp_path):
    _, audio = clock(2.0)
    write_wav(tmp_path / 'a.wav', audio)
    frames, pcm = read(tmp_path / 'a.wav', rate=16000)
    assert frames is None and abs(len(pcm) - 32000) <= 1
    np.testing.assert_allclose(
        audio_time(pcm[:32000:2])[1:-1], ((np.arange(50) + 0.5) * 320 / RATE)[1:-1], atol=0.05
    )


def test_broken_files_say_why(tmp_path):
    frames, audio = clock(2.0)
    media.write_mp4(tmp_path / 'a.mp4', frames, FPS, audio, RATE)
    whole = (tmp_path / 'a.mp4').read_bytes()
    cases = {'empty': b'', 'noise': bytes(1000), 'cut': whole[:1500], 'tail': whole[-1500:]}
    for name, data in cases.items():
        pathlib.Path(tmp_path / name).write_bytes(data)
        with pytest.raises(media.MediaError) as e:
            read(tmp_path / name)
        assert e.value.reason.startswith(('corrupt', 'truncated')), (name, e.value.reason)
    damaged = bytearray(whole)
    at = whole.index(b'mdat')
    damaged[at + 200 : at + 1400] = np.random.default_rng(0).bytes(1200)
    (tmp_path / 'b.mp4').write_bytes(damaged)
    with pytest.raises(media.MediaError, match='corrupt'):
        read(tmp_path / 'b.mp4')


def test_write_refuses_odd_sizes(tmp_path):
    with pytest.raises(ValueError, match='even H and W'):
        media.write_mp4(tmp_path / 'a.mp4', np.zeros((2, 31, 32, 3), np.uint8), 10)
