"""Inputs of Model.embed as libraries and files bring them."""

import dataclasses
import io
import itertools
import os
import pickle
import warnings
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vatt_jax
from data_pipelines import media
from vatt_jax.config import ConfigError
from vatt_jax.inference import arrays, media_files, sounds
from vatt_jax.inference.read_ahead import read_ahead

# Of tests/tiny.py.
FRAMES, SIZE, FPS, SAMPLES, RATE = 4, 16, 8, 1024, 2000


@pytest.fixture(scope='module')
def model(tiny_run):
    folder, _, _ = tiny_run
    return vatt_jax.load(folder)


@pytest.fixture
def untold(model):
    """The model before it has told anything."""
    model._told.clear()
    return model


def random_frames(*shape, seed=0):
    """uint8 of a shape; [T H W 3] of the model's own size without one."""
    shape = shape or (FRAMES, SIZE, SIZE, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def noise(*shape, seed=0):
    """int16 samples."""
    return np.random.default_rng(seed).integers(-20000, 20000, shape).astype(np.int16)


def assert_same(a, b, atol=1e-5):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    chex.assert_trees_all_close(a, b, rtol=1e-6, atol=atol)


def say(key, message):
    raise AssertionError(f'nothing is to be said, got {message}')


# ---- pictures and clips


def clip_of(value):
    """What arrays.py makes of a clip: uint8 [T H W 3]."""
    clip = arrays.frames(value, 'video')
    return arrays.to_uint8(clip, arrays.pixel_scale([clip], 'video'))


RGB = random_frames(5, 10, 12, 3)
GREY = RGB[..., 0]


@pytest.mark.parametrize(
    'value, expected',
    [
        (RGB, RGB),
        (RGB.astype(np.float32) / 255, RGB),
        (RGB.astype(np.float64) / 255, RGB),
        (RGB.astype(np.float32), RGB),
        (RGB.astype(np.int64), RGB),
        (jnp.asarray(RGB), RGB),
        (np.moveaxis(RGB, -1, 1), RGB),  # torch
        (np.concatenate([RGB, GREY[..., None]], -1), RGB),  # RGBA
        (RGB[..., ::-1], RGB[..., ::-1]),  # OpenCV, turned round
        (GREY, np.stack([GREY] * 3, -1)),
        (GREY[..., None], np.stack([GREY] * 3, -1)),
        (RGB[0], RGB[:1]),
        (GREY[0], np.stack([GREY[:1]] * 3, -1)),
        (list(RGB), RGB),
        (list(RGB / 255.0), RGB),
        ([Image.fromarray(x) for x in RGB], RGB),
        (Image.fromarray(RGB[0]), RGB[:1]),
        ([Image.fromarray(x, 'RGB').convert('RGBA') for x in RGB], RGB),
        (RGB.tolist(), RGB),
    ],
)
def test_clips_as_libraries_hand_them_over(value, expected):
    np.testing.assert_array_equal(clip_of(value), expected)


def test_halves_and_bfloat16_are_close():
    for dtype in (jnp.float16, jnp.bfloat16):
        clip = clip_of(jnp.asarray(RGB / 255.0, dtype))
        assert np.abs(clip.astype(int) - RGB).max() <= 1


def test_a_black_frame_of_a_list_is_scaled_as_the_others():
    clip = [np.full((4, 4, 3), 200.0), np.ones((4, 4, 3))]
    np.testing.assert_array_equal(clip_of(clip)[:, 0, 0, 0], [200, 1])


def test_floats_that_overshoot_are_clipped():
    clip = np.full((2, 4, 4, 3), 1.04)
    clip[1] = -0.02
    np.testing.assert_array_equal(clip_of(clip)[:, 0, 0, 0], [255, 0])


def test_palettes_and_rotated_pictures():
    """PIL's own conversions: a palette becomes its colours, EXIF turns the picture."""
    palette = Image.fromarray(np.tile(np.uint8([[[255, 0, 0]]]), (4, 6, 1))).quantize(4)
    np.testing.assert_array_equal(clip_of(palette)[0, 0, 0], [255, 0, 0])
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    stream = io.BytesIO()
    Image.fromarray(RGB[0]).save(stream, 'PNG', exif=exif)
    turned = clip_of(Image.open(stream))
    np.testing.assert_array_equal(turned[0], np.rot90(RGB[0], -1))


def test_frames_of_several_sizes_become_those_of_the_first():
    large = np.full((20, 24, 3), 90, np.uint8)
    small = np.full((5, 7, 3), 40, np.uint8)
    clip = clip_of([RGB[0], large, small])
    chex.assert_shape(clip, (3, 10, 12, 3))
    np.testing.assert_array_equal(clip[1], 90)
    np.testing.assert_array_equal(clip[2], 40)


def test_resizing_averages_whole_blocks():
    frame = random_frames(8, 12, 3)
    expected = frame.reshape(4, 2, 4, 3, 3).mean((1, 3))
    np.testing.assert_array_equal(arrays.resized(frame, 4, 4), np.round(expected))
    np.testing.assert_array_equal(arrays.resized(frame, 16, 24), frame.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize(
    'value, message',
    [
        (np.zeros((3, 16, 18), np.uint8), r'may be one picture \[C H W\] or 3 grey frames'),
        (np.zeros((3, 5, 16, 18), np.uint8), r'np.moveaxis\(x, 0, -1\) puts channels last'),
        (np.zeros((3, 4, 16, 18), np.uint8), r'puts the channels of \[C T H W\] last, .* those of'),
        (np.ma.masked_less(np.arange(192).reshape(1, 8, 8, 3), 9), 'got 9 of 192; pass x.filled'),
        (np.zeros((5, 1, 16, 18), np.uint8), r'np.moveaxis\(x, 1, -1\) puts channels last'),
        (np.zeros((5, 16, 18, 2), np.uint8), r'got uint8 \[5, 16, 18, 2\]'),
        (np.full((2, 4, 4, 3), -0.9), r'undo a normalisation first: \(x \+ 1\) / 2'),
        (np.full((2, 4, 4, 3), 1.5), r'expected floats in \[0, 1\] or 0…255'),
        (np.full((2, 4, 4, 3), 2.6), r'with values 2.6 to 2.6'),
        (np.full((2, 4, 4, 3), np.nan), r'expected finite floats'),
        (np.full((2, 4, 4, 3), 900, np.uint16), r'\(x >> 8\)'),
        (np.full((2, 4, 4, 3), 90, np.uint16), r'x.astype\(np.uint8\) of pixels of 8 bits'),
        (np.full((2, 4, 4, 3), 256), r'expected uint8 frames of 0…255'),
        (
            np.zeros((2, 4, 4, 3), bool),
            r'expected an array of numbers, got bool \[2, 4, 4, 3\]',
        ),
        (np.zeros((2, 4, 4, 3), complex), r'got complex128 '),
        ({'frames': 1}, r'expected an array or a list of them, got dict'),
        (Image.fromarray(np.zeros((4, 4), np.uint16)), r"got a picture of mode 'I;16'"),
    ],
)
def test_clips_that_may_be_several_things_are_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        clip_of(value)


def test_lists_are_clips_or_frames_of_one(model):
    clip = random_frames()
    one = model.embed(video=clip)
    assert_same(model.embed(video=list(clip)), one)
    assert_same(model.embed(video=iter(clip)), one)
    several = model.embed(video=[clip, list(clip), clip[0]])
    chex.assert_shape(several['video']['va'], (3, 16))
    assert_same(several['video']['va'][1], one['video']['va'])
    assert_same(several['video']['va'][2], model.embed(video=clip[0])['video']['va'])
    assert_same(model.embed(image=clip[0])['image'], model.embed(video=clip[0])['video'])


def test_images_of_all_kinds(model, tmp_path):
    pixels = random_frames(20, 30, 3)
    expected = model.embed(image=pixels)
    assert_same(model.embed(image=Image.fromarray(pixels)), expected)
    assert_same(model.embed(image=pixels / 255.0), expected)
    chex.assert_shape(model.embed(image=[pixels, pixels[..., 0]])['image']['va'], (2, 16))
    chex.assert_shape(model.embed(image=pixels[..., 0])['image']['va'], (16,))
    with pytest.raises(ConfigError, match=r'may be one picture \[C H W\] or 3 grey ones'):
        model.embed(image=np.moveaxis(pixels, -1, 0))

    path = tmp_path / 'a.PNG'
    Image.fromarray(pixels[:, :20]).save(path)
    from_file = model.embed(image=path)
    decoded = next(iter(media.read(path, 1.0, SIZE, RATE).frames))
    assert_same(from_file, model.embed(image=decoded))
    assert_same(model.embed(video=str(path))['video'], from_file['image'])
    chex.assert_shape(model.embed(image=[path, os.fsencode(path)])['image']['va'], (2, 16))


# ---- sounds


def heard(value, tell=say):
    return sounds.samples(value, 'audio', tell)


class Tensor:
    """As much of torch as counts here: NumPy refuses it before it is detached and on the host."""

    def __init__(self, x, dtype='torch.float32', is_ready=False):
        self.x, self.dtype, self.is_ready = x, dtype, is_ready
        self.shape = x.shape

    def detach(self):
        return self

    def cpu(self):
        return Tensor(self.x, self.dtype, True)

    def float(self):
        return Tensor(self.x, 'torch.float32', self.is_ready)

    def __array__(self, dtype=None, copy=None):
        if not self.is_ready or 'bfloat16' in self.dtype:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return np.asarray(self.x, dtype)


@pytest.mark.parametrize('dtype', ['torch.float32', 'torch.bfloat16'])
def test_tensors_of_other_libraries(dtype):
    x = np.moveaxis(RGB, -1, 1) / 255.0
    np.testing.assert_array_equal(clip_of(Tensor(x, dtype)), RGB)
    np.testing.assert_array_equal(clip_of([Tensor(frame, dtype) for frame in x]), RGB)


def test_sounds_of_every_type():
    pcm = noise(500) // 256 * 256
    x = pcm.astype(np.int64)
    np.testing.assert_array_equal(heard(pcm / 32768), pcm)
    np.testing.assert_array_equal(heard((pcm / 32768).astype(np.float32)), pcm)
    np.testing.assert_array_equal(heard((x * 65536).astype(np.int32)), pcm)
    np.testing.assert_array_equal(heard((x // 256 + 128).astype(np.uint8)), pcm)
    np.testing.assert_array_equal(heard((x // 256).astype(np.int8)), pcm)
    np.testing.assert_array_equal(heard(pcm.tolist()), pcm)
    np.testing.assert_array_equal(heard(pcm.astype('>i2')), pcm)


def test_channels_are_mixed_down():
    stereo = noise(300, 2)
    expected = np.round(stereo.astype(float).mean(1))
    np.testing.assert_array_equal(heard(stereo), expected)
    np.testing.assert_array_equal(heard(stereo.T), expected)
    np.testing.assert_array_equal(heard(stereo[:, :1]), stereo[:, 0])


def test_a_clip_is_never_guessed_from_a_channel(untold):
    stereo = noise(SAMPLES, 2)
    mono = np.round(stereo.astype(float).mean(1)).astype(np.int16)
    expected = untold.embed(audio=mono)
    assert_same(untold.embed(audio=stereo), expected)
    assert_same(untold.embed(audio=stereo, rate=float(RATE)), expected)
    chex.assert_shape(untold.embed(audio=noise(3000, 2), rate=6000)['audio']['va'], (16,))
    chex.assert_shape(untold.embed(audio=[stereo.T])['audio']['va'], (1, 16))
    with pytest.warns(UserWarning, match='is read as two sounds; pass x.mean'):
        both = untold.embed(audio=stereo.T.copy())
    chex.assert_shape(both['audio']['va'], (2, 16))
    # Once is enough.
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        untold.embed(audio=stereo.T.copy())
    with pytest.raises(ConfigError, match=r'expected samples \[S\], or \[S C\]'):
        untold.embed(audio=noise(4, 8))


def test_a_pair_of_samples_and_rate_is_one_sound(model):
    pcm = noise(3 * SAMPLES)
    expected = model.embed(audio=pcm, rate=3 * RATE)
    assert_same(model.embed(audio=(pcm, 3 * RATE)), expected)
    assert_same(model.embed(audio=(np.int64(3 * RATE), pcm)), expected)
    with pytest.raises(ConfigError, match='expected one rate'):
        model.embed(audio=(pcm, 3 * RATE), rate=RATE)


def test_lists_of_sounds_with_their_rates(model):
    """torchaudio and soundfile return pairs, `datasets` dicts."""
    recordings = [noise(1024), noise(700, seed=1)]
    expected = model.embed(audio=recordings)
    assert_same(model.embed(audio=[(x, RATE) for x in recordings]), expected)
    dicts = [{'path': None, 'array': x / 32768, 'sampling_rate': RATE} for x in recordings]
    assert_same(model.embed(audio=dicts), expected)
    assert_same(model.embed(audio=dicts[0])['audio']['va'], expected['audio']['va'][0])


def test_traced_arrays_are_refused(model):
    for transform in (jax.jit, jax.vmap):
        with pytest.raises(ConfigError, match='expected an array with values, .* outside of'):
            transform(lambda x: model.embed(video=x))(jnp.zeros((2, FRAMES, SIZE, SIZE, 3)))


def test_a_pickled_model_gives_the_same(model):
    """As worker processes of other libraries are handed it."""
    clip = random_frames()
    restored = pickle.loads(pickle.dumps(model))
    assert_same(restored.embed(video=clip, text='red'), model.embed(video=clip, text='red'))
    assert repr(restored) == repr(model)


def test_the_buffer_of_an_array(model):
    clip = random_frames()
    assert_same(model.embed(video=memoryview(clip)), model.embed(video=clip))


def test_peaks_above_one_are_clipped_and_told_once(untold):
    loud = 1.05 * np.sin(np.arange(SAMPLES) / 10)
    with pytest.warns(UserWarning, match=r'samples reach 1.05 and are clipped to \[-1, 1\]'):
        got = untold.embed(audio=loud)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert_same(untold.embed(audio=np.clip(loud, -1, 1)), got)
        untold.embed(audio=loud)


def test_quiet_int32_is_told():
    said = []
    heard(np.full(100, 2**20, np.int32), lambda key, message: said.append(message))
    assert 'pass x / 2**23 if they are 24-bit' in said[0]
    heard(np.full(100, 2**28, np.int32))


@pytest.mark.parametrize(
    'call, message',
    [
        ({'audio': np.full(100, 9000.0)}, 'divide by the full scale, which is 32768'),
        ({'audio': np.full(100, -(2**63))}, r'pass floats in \[-1, 1\]'),
        ({'video': jax.random.key(0)}, 'expected an array, got PRNGKeyArray'),
        ({'audio': [(noise(9), 2000), (noise(9), 8000)]}, 'of one rate, got 2000 and 8000'),
        ({'audio': [(noise(9), 2000), noise(9)]}, 'of one rate, got 2000 and none'),
        ({'audio': np.full(100, 70000)}, r'pass floats in \[-1, 1\]'),
        ({'audio': np.zeros(100, np.uint16)}, 'expected int16, int32, uint8 or float samples'),
        ({'audio': np.zeros(100, bool)}, 'expected an array of numbers'),
        ({'audio': noise(100), 'rate': -1}, 'rate=-1.: expected samples per second'),
        ({'audio': noise(100), 'rate': float('nan')}, 'rate=nan.: expected samples per second'),
        ({'audio': noise(100), 'rate': '8k'}, "rate='8k'.: expected samples per second"),
        ({'audio': noise(100), 'rate': 44.1}, 'rate=44.1.: expected .* such as 44100'),
        ({'audio': [noise(100), None]}, r'embed\(audio\[1\]=…\): .*, got NoneType'),
        ({'audio': noise(100).tobytes()}, 'got bytes with the content of a file; pass its path'),
        ({'image': io.BytesIO(b'1')}, 'got BytesIO with the content of a file; pass its path'),
        ({'image': {'a.jpg'}}, 'expected an array or a list of them, got set'),
        ({'audio': noise(100), 'batch_size': 0}, r'embed\(batch_size=0\): expected a whole number'),
        ({'audio': noise(100), 'batch_size': 2.5}, r'batch_size=2.5\): expected a whole number'),
        ({'audio': noise(100), 'windows': 0}, r'windows=0\): expected a whole number'),
        ({'audio': noise(100), 'stride': -1.0}, r'stride=-1.0\): expected a positive number'),
        ({'audio': noise(100), 'on_error': 'no'}, r"on_error='no'\): expected one of raise, skip"),
        ({'text': b'red'}, 'expected strings, got bytes'),
        ({'text': 3}, 'expected strings, got int'),
        ({'text': [float('nan')]}, 'expected strings, got float'),
    ],
)
def test_what_is_wrong_is_one_sentence(model, call, message):
    with pytest.raises(ConfigError, match=message) as caught:
        model.embed(**call)
    assert '\n' not in str(caught.value)


def test_where_windows_begin():
    def begins(length, **request):
        return arrays.window_begins(length, 4, 2.0, request.get('windows'), request.get('stride'))

    assert begins(11) == begins(11, windows=1) == [3]
    assert begins(11, windows=3) == [0, 4, 7]
    assert begins(11, stride=1.5) == [0, 3, 6]
    assert begins(11, stride=1.5, windows=2) == [0, 3]
    assert begins(3) == begins(3, stride=1.0) == [0]
    assert begins(3, windows=2) == [0, 0]
    # Shorter than a frame, however much.
    assert begins(6, stride=0.1) == [0, 1, 2]
    assert begins(6, stride=1e-12) == [0, 1, 2]


# ---- sentences


def test_unknown_words_and_long_sentences_are_told_once(untold):
    sentences = ['red stripes', 'quagga okapi', 'yes quokka']
    with pytest.warns(UserWarning, match="2 of 3 sentences have no word .* first 'quagga okapi'"):
        untold.embed(text=sentences)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        untold.embed(text=sentences)
    with pytest.warns(UserWarning, match='1 of 1 sentences have more than the 6 words'):
        untold.embed(text='red stripes move left with a deep tone')


def test_an_empty_sentence_is_told(untold):
    with pytest.warns(UserWarning, match="1 of 2 sentences have no word .* first ''"):
        untold.embed(text=['red', ''])


def test_texts_of_arrays_and_columns(model):
    expected = model.embed(text=['red', 'blue'])
    assert_same(model.embed(text=np.array('red')), jax.tree.map(lambda x: x[0], expected))
    assert_same(model.embed(text=np.array(['red', 'blue'])), expected)
    assert_same(model.embed(text=(word for word in ('red', 'blue'))), expected)


# ---- files


@pytest.fixture(scope='module')
def long_file(tmp_path_factory):
    """40 s whose pictures and sound change all the time."""
    path = tmp_path_factory.mktemp('long') / 'long.mp4'
    count = 40 * FPS
    frames = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    frames = frames.repeat(8, 1).repeat(8, 2)
    sound = np.random.default_rng(1).normal(0, 4000, 40 * 8000).astype(np.int16)
    media.write_mp4(path, frames, FPS, sound, 8000)
    return path


@pytest.fixture(scope='module')
def decoded(long_file):
    """(frames, sound) of all of it."""
    file = media.read(long_file, FPS, SIZE, RATE)
    frames = np.stack(list(file.frames))
    return frames, media.fit_audio(file.audio, len(frames), FPS, RATE)


def windows_of(path, **request):
    return list(
        media_files.video_windows(
            path,
            'video',
            {'fps': FPS, 'size': SIZE, 'frames': FRAMES},
            {'rate': RATE, 'samples': SAMPLES},
            **request,
        )
    )


@pytest.mark.parametrize(
    'request_, starts',
    [
        ({}, [19.75]),
        ({'windows': 3}, [0, 19.75, 39.5]),
        ({'stride': 1.0}, np.arange(40)),
        ({'stride': 0.25, 'windows': 5}, [0, 0.25, 0.5, 0.75, 1.0]),
        ({'stride': 13.0}, [0, 13, 26, 39]),
    ],
)
def test_windows_of_a_long_file_are_those_of_its_frames(long_file, decoded, request_, starts):
    frames, sound = decoded
    assert len(frames) == 40 * FPS
    windows = windows_of(long_file, **request_)
    np.testing.assert_allclose([window.start for window in windows], starts)
    for window in windows:
        begin = round(window.start * FPS)
        np.testing.assert_array_equal(np.stack(window.frames), frames[begin : begin + FRAMES])
        # A resampler that begins elsewhere rounds otherwise.
        first = round(window.start * RATE)
        expected = sound[first : first + SAMPLES].astype(float)
        got = window.samples[: len(expected)].astype(float)
        margin = slice(20, min(len(expected), len(got)) - 20)
        error = np.abs(got[margin] - expected[margin]).max()
        assert error < 0.02 * np.abs(expected).max(), window.start


def test_embeddings_over_time(model, long_file, decoded):
    frames, _ = decoded
    out = model.embed(video=long_file, stride=4.0, batch_size=4)
    np.testing.assert_array_equal(out['video']['start'], np.arange(0, 40, 4))
    np.testing.assert_array_equal(out['audio']['start'], out['video']['start'])
    clips = [frames[8 * s : 8 * s + FRAMES] for s in range(0, 40, 4)]
    expected = model.embed(video=clips)['video']
    assert_same(out['video']['va'], expected['va'])
    # Frames in memory have windows as well.
    in_memory = model.embed(video=frames, stride=4.0)['video']
    assert_same(in_memory, out['video'])
    sound = model.embed(audio=long_file, windows=3)['audio']
    np.testing.assert_allclose(sound['start'], [0, 19.744, 39.488], atol=0.02)
    several = model.embed(video=[frames[:8], frames[:16]], stride=0.5)['video']
    np.testing.assert_array_equal(several['item'], [0, 0, 1, 1, 1, 1])
    np.testing.assert_allclose(several['start'], [0, 0.5, 0, 0.5, 1, 1.5])


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    # The frames that something still holds.
    alive: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
    numbers = itertools.count()
    most_frames, longest_sound = 0, 0

    def watched(frames):
        nonlocal most_frames
        for frame in frames:
            alive[next(numbers)] = frame
            most_frames = max(most_frames, len(alive))
            yield frame

    read = media.read

    def read_watched(*args, **kwargs):
        nonlocal longest_sound
        file = read(*args, **kwargs)
        longest_sound = max(longest_sound, len(file.audio))
        return dataclasses.replace(file, frames=watched(file.frames))

    seconds = 160
    path = tmp_path / 'long.mp4'
    frames = np.zeros((seconds * FPS, 32, 32, 3), np.uint8)
    # Each picture differs from the one before, which would otherwise be one array with it.
    frames[1::2] = 255
    media.write_mp4(path, frames, FPS, np.zeros(seconds * 8000, np.int16), 8000)
    monkeypatch.setattr(media, 'read', read_watched)
    windows = media_files.video_windows(
        path,
        'video',
        {'fps': FPS, 'size': SIZE, 'frames': FRAMES},
        {'rate': RATE, 'samples': SAMPLES},
        stride=0.5,
    )
    assert sum(1 for _ in windows) == 2 * seconds
    # The window that is out, and the next one being filled.
    assert most_frames <= 3 * FRAMES
    assert longest_sound <= 2 * media_files.BLOCK_SECONDS * RATE


def test_a_file_that_does_not_state_its_length(long_file, decoded, monkeypatch):
    monkeypatch.setattr(media, 'duration', lambda path, kind: None)
    frames, _ = decoded
    for window in windows_of(long_file, windows=3):
        begin = round(window.start * FPS)
        np.testing.assert_array_equal(np.stack(window.frames), frames[begin : begin + FRAMES])


def test_sound_of_a_file_that_does_not_state_its_length(long_file, decoded, monkeypatch):
    monkeypatch.setattr(media, 'duration', lambda path, kind: None)
    _, sound = decoded
    for window in windows_of(long_file, stride=9.0):
        first = round(window.start * RATE)
        np.testing.assert_array_equal(window.samples, sound[first : first + SAMPLES])
    alone = list(
        media_files.sound_windows(long_file, 'x', {'rate': RATE, 'samples': SAMPLES}, windows=4)
    )
    for window in alone:
        first = round(window.start * RATE)
        expected = sound[first : first + SAMPLES]
        np.testing.assert_array_equal(window.samples[: len(expected)], expected)
    assert [len(window.samples) for window in alone] == [SAMPLES] * 4


def test_samples_are_cut_out_of_blocks():
    x = noise(100)
    blocks = [x[:7], x[7:8], x[8:50], x[50:]]
    begins = [0, 3, 30, 30, 95]
    got = list(media_files.cut_samples(iter(blocks), begins, 10))
    for begin, samples in zip(begins, got, strict=True):
        np.testing.assert_array_equal(samples, x[begin : begin + 10])


def test_pictures_of_16_bits(tmp_path):
    ramp = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / 'deep.png')
    pixels = media_files.read_picture(tmp_path / 'deep.png', 'x', SIZE)
    np.testing.assert_array_equal(pixels, np.stack([ramp >> 8] * 3, -1))


def test_a_list_of_files_with_bad_ones(model, long_file, tmp_path):
    broken = tmp_path / 'broken [' / 'b].mp4'
    broken.parent.mkdir()
    broken.write_bytes(long_file.read_bytes()[:700])
    missing = tmp_path / 'missing.mp4'
    paths = [long_file, broken, long_file, missing]
    with pytest.raises(ConfigError, match=r'1 of 4 files are not there: .*missing.mp4.*No such'):
        model.embed(video=paths)
    with pytest.raises(ConfigError, match='broken .*corrupt'):
        model.embed(video=paths[:3])
    with pytest.warns(UserWarning, match='2 of 4 items were left out: .*broken.*; .*missing'):
        out = model.embed(video=paths, on_error='skip', batch_size=2)
    np.testing.assert_array_equal(out['video']['valid'], [True, False, True, False])
    np.testing.assert_array_equal(out['audio']['valid'], [True, False, True, False])
    assert_same(out['video']['va'][0], model.embed(video=long_file)['video']['va'])
    assert not out['video']['va'][1].any()
    ranked = np.argsort(-model.similarity(out['video'], out['video'], 'va'), -1)
    assert set(ranked[0, :2]) == {0, 2}
    with pytest.raises(ConfigError, match='broken'):
        model.embed(video=[broken], on_error='skip')


@pytest.mark.parametrize(
    'path, message',
    [
        ('https://example.org/a.mp4', 'addresses are not read, download it first'),
        ('clips/*.mp4', r'pass sorted\(glob.glob'),
        ('~/a.mp4', r'pass os.path.expanduser'),
        ('nowhere.mp4', r'No such file \(looked for in '),
        ('tests', 'expected a media file, got a folder'),
        (b'caf\xe9.mp4', 'No such file'),
    ],
)
def test_paths_that_are_no_files(model, path, message):
    with pytest.raises(ConfigError, match=message) as caught:
        model.embed(video=path)
    assert 'corrupt' not in str(caught.value)


def test_a_video_for_a_picture_and_the_reverse(model, long_file):
    with pytest.raises(ConfigError, match='expected a picture, got a video; pass it as video='):
        model.embed(image=long_file)


# ---- similarity


def test_similarity_is_the_cosine(model):
    out = model.embed(text=['red', 'blue stripes'], video=[random_frames(seed=i) for i in range(3)])
    got = model.similarity(out['text'], out['video'])  # vat is the only one of both
    x, y = out['text']['vat'].astype(float), out['video']['vat'].astype(float)
    np.testing.assert_allclose(got, x @ y.T, atol=1e-5)
    np.testing.assert_allclose(model.similarity(3 * x, y), x @ y.T, atol=1e-5)
    one = jax.tree.map(lambda rows: rows[0], out['text'])
    chex.assert_shape(model.similarity(one, out['video']), (3,))
    chex.assert_shape(model.similarity(out['video'], one), (3,))
    assert np.ndim(model.similarity(one, one, 'vat')) == 0
    for arguments, message in (
        ((out, out['video']), r"such as out\['video'\]"),
        ((out['video'], out['video']), 'expected one common space of both, got va, vat'),
        ((out['text'], out['video'], 'va'), "space='va'.: a has pooled, vat"),
        ((x, y[:, :3]), 'expected embeddings of one width'),
    ):
        with pytest.raises(ConfigError, match=message):
            model.similarity(*arguments)


# ---- reading ahead


def test_reading_ahead_keeps_the_order_and_raises_where_it_is_read():
    def reader(number):
        def read():
            if number == 7:
                raise ValueError('seven')
            for i in range(number):
                yield 10 * number + i

        return read

    got = list(read_ahead([reader(i) for i in range(6)], files=3))
    assert got == [(n, 10 * n + i) for n in range(6) for i in range(n)]
    items = read_ahead([reader(i) for i in (3, 7, 4)], files=2)
    assert [next(items) for _ in range(3)] == [(0, 30), (0, 31), (0, 32)]
    with pytest.raises(ValueError, match='seven'):
        next(items)


def test_the_progress_bar_is_for_terminals_and_may_be_left_out(
    model, long_file, monkeypatch, capfd
):
    def shown(**options):
        model.embed(video=[long_file] * 3, **options)
        return capfd.readouterr().err

    # What rich takes for a terminal.
    monkeypatch.setenv('FORCE_COLOR', '1')
    assert 'files' in shown()
    assert shown(quiet=True) == ''
    monkeypatch.setenv('FORCE_COLOR', '')
    monkeypatch.setenv('TERM', 'dumb')
    assert shown() == ''


def test_a_wide_clip_of_the_models_height_is_cropped_as_in_evaluation(model):
    """The central square as the device cuts it out of records."""
    wide = random_frames(FRAMES, SIZE, 28, 3)
    side = SIZE / 28
    stream = {
        'data': wide[None],
        'valid': np.ones(1, bool),
        'box': np.array([[0, (1 - side) / 2, 1, (1 + side) / 2]], np.float32),
        'flip': np.zeros(1, bool),
    }
    batch = {'video': stream, 'position': np.zeros(1, int), 'valid': np.ones(1, bool)}
    expected = model._encoder(batch)['pooled']['video'][0]
    np.testing.assert_allclose(model.embed(video=wide)['video']['pooled'], expected, atol=1e-4)


def test_a_file_whose_resolution_changes(model, tmp_path):
    """Two transport streams, one behind the other: frames take the shape of the first."""
    parts = []
    for number, width in enumerate((64, 96)):
        path = tmp_path / f'{number}.ts'
        with media.av.open(str(path), 'w', format='mpegts') as container:
            video = container.add_stream('libx264', rate=FPS)
            video.width, video.height, video.pix_fmt = width, 48, 'yuv420p'
            for _ in range(10):
                pixels = np.full((48, width, 3), 50 + 100 * number, np.uint8)
                frame = media.av.VideoFrame.from_ndarray(pixels, format='rgb24')
                container.mux(video.encode(frame))
            container.mux(video.encode())
        parts.append(path.read_bytes())
    path = tmp_path / 'both.ts'
    path.write_bytes(b''.join(parts))
    (window,) = windows_of(path)
    out = model.embed(video=path)['video']['pooled']
    chex.assert_tree_all_finite(out)
    # Grey of 50, then of 150: what the frames show is not changed.
    levels = [round(float(frame.mean()), -1) for frame in window.frames]
    flat = np.stack([np.full((SIZE, SIZE, 3), frame.mean(), np.uint8) for frame in window.frames])
    assert sorted(set(levels)) == [50, 150]
    np.testing.assert_allclose(out, model.embed(video=flat)['video']['pooled'], atol=0.05)
