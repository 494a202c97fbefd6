"""Files as windows of time, against `media.read` of the whole file."""

import itertools

import numpy as np
import pytest

from data_pipelines import media, media_windows

FPS, SIZE, RATE = 10.0, 32, 8000


def pictures(count):
    """uint8 [count 32 48 3]: frame i is of the grey 5 i."""
    frames = np.zeros((count, 32, 48, 3), np.uint8)
    frames += (5 * np.arange(count, dtype=np.uint8))[:, None, None, None]
    return frames


def tone(seconds, rate=RATE):
    time = np.arange(round(seconds * rate)) / rate
    return (8000 * np.sin(2 * np.pi * 440 * time)).astype(np.int16)


def windows_of(path, seconds=1.0, stride=1.0, fps=FPS, rate=RATE):
    return list(media_windows.read_windows(path, fps, SIZE, rate, seconds, stride))


def spans(windows):
    return [(round(window.start, 3), round(window.end, 3)) for window in windows]


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    """4.5 seconds of pictures and sound."""
    path = tmp_path_factory.mktemp('windows') / 'clip.mp4'
    media.write_mp4(path, pictures(45), FPS, tone(4.5), rate=RATE)
    return path


def test_windows_are_parts_of_the_whole_file(clip):
    whole = media.read(clip, FPS, SIZE, RATE)
    frames = np.stack(list(whole.frames))
    sound = media.fit_audio(whole.audio, len(frames), FPS, RATE)
    windows = windows_of(clip, seconds=2.0, stride=1.0)
    assert spans(windows) == [(0, 2), (1, 3), (2, 4), (2.5, 4.5)]
    for window in windows:
        first = round(window.start * FPS)
        np.testing.assert_array_equal(window.frames, frames[first : first + 20])
        first = round(window.start * RATE)
        assert len(window.samples) == 2 * RATE
        np.testing.assert_array_equal(window.samples, sound[first : first + 2 * RATE])


@pytest.mark.parametrize(
    ('seconds', 'stride', 'expected'),
    [
        (10.0, 10.0, [(0, 4.5)]),
        (1.5, 1.5, [(0, 1.5), (1.5, 3), (3, 4.5)]),
        # Gaps between the windows are what was asked for.
        (1.0, 2.0, [(0, 1), (2, 3), (3.5, 4.5)]),
        (1.0, 4.0, [(0, 1), (3.5, 4.5)]),
        (1.0, 5.0, [(0, 1)]),
    ],
)
def test_where_windows_lie(clip, seconds, stride, expected):
    assert spans(windows_of(clip, seconds, stride)) == expected


def test_one_stream_alone(clip, tmp_path):
    assert all(window.samples is None for window in windows_of(clip, rate=0))
    assert all(window.frames is None for window in windows_of(clip, fps=0))
    path = tmp_path / 'silent.mp4'
    media.write_mp4(path, pictures(20), FPS)
    assert [window.samples for window in windows_of(path)] == [None, None]


def test_the_last_picture_stays_while_sound_goes_on(tmp_path):
    path = tmp_path / 'song.mp4'
    media.write_mp4(path, pictures(2), FPS, tone(3.0), rate=RATE)
    windows = windows_of(path)
    assert len(windows) == 3
    last = windows[-1]
    assert last.frames.shape == (10, 32, 48, 3)
    np.testing.assert_array_equal(last.frames, np.repeat(last.frames[:1], 10, axis=0))
    assert np.abs(last.samples).max() > 4000


def test_sound_that_ends_early_is_missing_afterwards(tmp_path):
    path = tmp_path / 'quiet.mp4'
    media.write_mp4(path, pictures(30), FPS, tone(1.5), rate=RATE)
    windows = windows_of(path)
    assert [window.samples is not None for window in windows] == [True, True, False]


def test_only_the_windows_in_use_are_held(monkeypatch):
    """A stream without an end is read as it is taken."""
    num_read = 0

    def endless(path, fps, size):
        nonlocal num_read
        for number in itertools.count():
            num_read = number + 1
            yield np.full((1, 8, 8, 3), number % 256, np.uint8)

    monkeypatch.setattr(media_windows, '_frames', endless)
    windows = media_windows.read_windows('x', 10.0, 8, 0, seconds=2.0, stride=1.0)
    for _ in range(500):
        window = next(windows)
    assert window.start == 499
    assert num_read <= 5011


def test_what_cannot_be_read_says_why(tmp_path):
    path = tmp_path / 'bad.mp4'
    path.write_bytes(b'no video at all' * 100)
    with pytest.raises(media.MediaError, match='corrupt'):
        windows_of(path)
    with pytest.raises(ValueError, match='positive'):
        windows_of(path, stride=0.0)
