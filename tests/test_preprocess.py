"""The device stage against its definition, written out pixel by pixel in float64."""

import colorsys
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import default
from vatt_jax.config import ConfigError
from vatt_jax.inference import arrays
from vatt_jax.inputs import augmentation, preprocess
from vatt_jax.models import presets
from vatt_jax.rng import Rng

B, T, H, W, SIZE = 4, 3, 20, 26, 8
# Luma weights of BT.601, and the two colour axes of YIQ.
LUMA = np.array([0.299, 0.587, 0.114])
YIQ_I = np.array([0.596, -0.274, -0.322])
YIQ_Q = np.array([0.211, -0.523, 0.312])
# (y0 x0 y1 x1), fractions of the frame.
WHOLE_FRAME = np.array([0, 0, 1, 1], np.float32)
BOXES = np.array(
    [
        [0, 0, 1, 1],
        [0.1, 0.3, 0.9, 0.7],
        [0.25, 0.0, 0.4, 0.2],
        [0.02, 0.5, 0.98, 1.0],
    ],
    np.float32,
)
FLIPS = np.array([False, True, False, True])
JITTERS = ('brightness', 'contrast', 'saturation', 'hue')
OFF = {
    'color': 0.0,
    'brightness': 32 / 255,
    'contrast': 0.4,
    'saturation': 0.4,
    'hue': 0.2,
    'audio_noise': 0.0,
}
INPUTS = {'video': {'frames': T, 'size': SIZE, 'fps': 8.0}, 'audio': {'samples': 500, 'rate': 8000}}


@pytest.fixture(scope='module')
def clips():
    return np.random.default_rng(0).integers(0, 256, (B, T, H, W, 3), dtype=np.uint8)


def video_batch(clips, boxes=BOXES, flips=FLIPS, valid=None):
    """A device batch of one video stream."""
    n = len(clips)
    if valid is None:
        valid = np.ones(n, bool)
    return {
        'video': {
            'data': clips,
            'valid': valid,
            'start': np.zeros(n, np.float32),
            'box': boxes,
            'flip': flips,
        },
        'position': np.arange(n),
        'valid': np.ones(n, bool),
    }


def audio_batch(samples, valid=None):
    """A device batch of one audio stream."""
    n = len(samples)
    if valid is None:
        valid = np.ones(n, bool)
    return {
        'audio': {'data': samples, 'valid': valid, 'start': np.zeros(n, np.float32)},
        'position': np.arange(n),
        'valid': np.ones(n, bool),
    }


def video_inputs(**fields):
    """INPUTS with other fields of the video."""
    return {**INPUTS, 'video': {**INPUTS['video'], **fields}}


def stage(batch, config, augment=True, inputs=INPUTS, seed=0, dtype='float32', jit=True):
    """The batch after the device stage, with the random bits of `seed`."""
    rng = Rng.create(seed, 0, jnp.asarray(batch['position'])).at('preprocess')

    def apply(batch):
        return preprocess.device_stage(batch, inputs, config, rng, augment=augment, dtype=dtype)

    if jit:
        apply = jax.jit(apply)
    return apply(jax.tree.map(jnp.asarray, batch))


def stage_video(*args, **kwargs):
    """The pixels after the device stage, on the host."""
    return np.asarray(stage(*args, **kwargs)['video']['data'])


def stage_audio(*args, **kwargs):
    """The samples after the device stage, on the host, float64."""
    return np.asarray(stage(*args, **kwargs)['audio']['data'], np.float64)


def triangle(line, low, high, size):
    """`size` values read from the part low..high of a line [length C], one at a time.

    A tent over the source's pixel centres, as wide as the distance between two of them or between
    two target pixels, whichever is more.
    """
    length = len(line)
    step = (high - low) * length / size
    values = []
    for i in range(size):
        centre = low * length + (i + 0.5) * step
        weights = np.zeros(length)
        for j in range(length):
            weights[j] = max(0.0, 1 - abs(centre - (j + 0.5)) / max(1.0, step))
        values.append((weights[:, None] * line).sum(0) / weights.sum())
    return np.array(values)


def resized(clip, box, flip, size=SIZE):
    """The box of a clip at its new size, float64 [T size size 3] in [-1, 1]."""
    top, left, bottom, right = np.float64(box)
    frames = []
    for frame in clip.astype(np.float64) / 127.5 - 1:
        columns = [triangle(frame[:, x], top, bottom, size) for x in range(frame.shape[1])]
        rows = np.stack(columns, 1)  # [size W 3]
        frame = np.stack([triangle(row, left, right, size) for row in rows])
        frames.append(frame[:, ::-1] if flip else frame)
    return np.array(frames)


@pytest.mark.parametrize('flip', [False, True])
def test_a_whole_frame_at_its_own_size_is_the_identity(flip):
    clips = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16, 1).repeat(3, -1)
    batch = video_batch(clips, WHOLE_FRAME[None], np.array([flip]))
    out = stage_video(batch, OFF, inputs=video_inputs(size=16))
    expected = clips[:, :, :, ::-1] if flip else clips
    np.testing.assert_allclose(out, expected / 127.5 - 1, atol=1e-6)
    # 0 and 255 are the ends of the range.
    assert out.min() == -1
    assert out.max() == 1


@pytest.mark.parametrize('jit', [True, False], ids=['with_jit', 'without_jit'])
def test_crop_resize_and_flip(clips, jit):
    video = stage(video_batch(clips), OFF, jit=jit)['video']
    assert set(video) == {'data', 'valid', 'start'}
    chex.assert_shape(video['data'], (B, T, SIZE, SIZE, 3))
    chex.assert_type(video['data'], jnp.float32)
    expected = np.stack([resized(*row) for row in zip(clips, BOXES, FLIPS)])
    np.testing.assert_allclose(video['data'], expected, atol=2e-5)


def test_pixels_in_the_range_the_model_was_made_for(clips):
    batch = video_batch(clips)
    signed = stage_video(batch, OFF, inputs=video_inputs(range=(-1.0, 1.0)))
    unit = stage_video(batch, OFF, inputs=video_inputs(range=(0.0, 1.0)))
    np.testing.assert_allclose(unit, (signed + 1) / 2, atol=1e-6)
    assert unit.min() >= 0
    assert signed.min() < -0.5
    # Checkpoints that have no range are VATT's.
    np.testing.assert_array_equal(stage_video(batch, OFF), signed)
    with pytest.raises(ConfigError, match=r'config.model.inputs.video.range: .* got \(1.0, 0.0\)'):
        stage(batch, OFF, inputs=video_inputs(range=(1.0, 0.0)))


def test_shrinking_does_not_alias_and_keeps_the_mean():
    """Stripes one pixel wide, four times smaller, are grey; picked pixels are black or white."""
    clips = np.zeros((1, 1, 64, 64, 3), np.uint8)
    clips[:, :, :, ::2] = 255
    batch = video_batch(clips, WHOLE_FRAME[None], np.zeros(1, bool))
    out = stage_video(batch, OFF, inputs=video_inputs(size=16))
    assert np.abs(out[:, :, :, 1:-1]).max() < 1e-5
    assert np.abs(out).max() < 0.15


def jitter_definition(clip, brightness, saturation, contrast, hue):
    """Each operation by itself on [T H W 3] in [-1, 1].

    Hue is a turn of the (I, Q) plane at constant luma.
    """
    clip = clip + 2 * brightness  # brightness is a share of 0…1, pixels here span 2
    gray = (clip @ LUMA)[..., None]
    clip = gray + saturation * (clip - gray)
    mean = clip.mean((0, 1, 2))
    clip = mean + contrast * (clip - mean)
    luma = clip @ LUMA
    turned = np.exp(2j * np.pi * hue) * (clip @ YIQ_I + 1j * (clip @ YIQ_Q))
    to_rgb = np.linalg.inv([LUMA, YIQ_I, YIQ_Q])
    return np.stack([luma, turned.real, turned.imag], -1) @ to_rgb.T


def test_color_jitter_is_its_operations_one_after_another(clips):
    config = {**OFF, 'color': 1.0}
    out = stage_video(video_batch(clips), config)
    rng = Rng.create(0, 0, jnp.arange(B)).at('preprocess').at('video').at('color')
    limits = {
        'brightness': (-config['brightness'], config['brightness']),
        'saturation': (0.6, 1.4),
        'contrast': (0.6, 1.4),
        'hue': (-0.2, 0.2),
    }
    drawn = {}
    for name, (low, high) in limits.items():
        drawn[name] = np.asarray(rng.at(name).uniform((), low, high), np.float64)
        assert len(np.unique(drawn[name])) == B  # one draw per clip
    for b in range(B):
        plain = resized(clips[b], BOXES[b], FLIPS[b])
        expected = jitter_definition(plain, **{name: drawn[name][b] for name in drawn})
        np.testing.assert_allclose(out[b], np.clip(expected, -1, 1), atol=1e-4)


@pytest.mark.parametrize(
    'name, value',
    [
        ('brightness', 32 / 255),
        ('contrast', 0.4),
        ('saturation', 0.4),
        ('hue', 0.2),
    ],
)
def test_each_jitter_alone_changes_pixels_and_preserves_its_invariant(clips, name, value):
    config = {**OFF, 'color': 1.0, **dict.fromkeys(JITTERS, 0.0), name: value}
    clips = (64 + clips // 2).astype(np.uint8)  # far from the ends, so that nothing is clipped
    before = np.float64(stage_video(video_batch(clips), config, augment=False))
    after = np.float64(stage_video(video_batch(clips), config))
    chex.assert_equal_shape([before, after])
    assert np.abs(after - before).max() > 0.02
    if name == 'brightness':
        added = (after - before).reshape(B, -1)
        assert np.ptp(added, axis=1).max() < 1e-5
        assert np.abs(added).max() <= 2 * value
    if name == 'contrast':
        np.testing.assert_allclose(after.mean((1, 2, 3)), before.mean((1, 2, 3)), atol=1e-5)
        ratio = after.std((1, 2, 3)) / before.std((1, 2, 3))  # [B 3]
        assert (ratio > 1 - value).all()
        assert (ratio < 1 + value).all()
        assert np.ptp(ratio, axis=1).max() < 1e-4
    if name in ('saturation', 'hue'):
        np.testing.assert_allclose(after @ LUMA, before @ LUMA, atol=1e-5)


def test_a_hue_turn_turns_the_colour_and_keeps_grey():
    turn = np.asarray(augmentation._hue(jnp.array([0.0, 1 / 3, 1.0])), np.float64)
    chex.assert_shape(turn, (3, 3, 3))
    none, third, whole = turn
    np.testing.assert_allclose(none, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(whole, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(turn @ np.ones(3), 1, atol=1e-5)
    hues = []
    for primary in np.eye(3):
        red, green, blue = np.clip(third @ primary * 0.3 + 0.35, 0, 1)
        hues.append(colorsys.rgb_to_hsv(red, green, blue)[0])
    difference = np.array(hues) - [0, 1 / 3, 2 / 3]
    distance = np.abs((difference + 0.5) % 1 - 0.5)  # around the circle
    # A third of the circle, give or take what YIQ and HSV disagree on.
    assert (np.abs(distance - 1 / 3) < 0.1).all()


def test_jitter_changes_the_configured_share_of_clips():
    n = 400
    clips = np.random.default_rng(1).integers(64, 192, (n, 1, 4, 4, 3), dtype=np.uint8)
    batch = video_batch(clips, np.tile(WHOLE_FRAME, (n, 1)), np.zeros(n, bool))
    inputs = video_inputs(size=4)
    plain = stage_video(batch, OFF, inputs=inputs)
    for share in (0.3, 1.0):
        out = stage_video(batch, {**OFF, 'color': share}, inputs=inputs)
        jittered = (np.abs(out - plain) > 1e-3).any((1, 2, 3, 4)).mean()
        deviation = np.sqrt(share * (1 - share) / n)
        assert abs(jittered - share) < 4.5 * deviation + 0.01
    not_augmented = stage_video(batch, {**OFF, 'color': 1.0}, augment=False, inputs=inputs)
    np.testing.assert_array_equal(not_augmented, plain)


def test_sound_is_scaled_and_noise_follows_the_peak():
    samples = np.random.default_rng(0).integers(-3000, 3001, (6, 20_000)).astype(np.int16)
    samples[1] //= 100  # a quiet clip
    samples[2] = 0  # silence
    samples[3, 5] = -32768  # one full-scale click
    batch = audio_batch(samples)
    plain = stage_audio(batch, OFF)
    np.testing.assert_array_equal(plain, samples / 32768)
    assert plain[3].min() == -1

    config = {**OFF, 'audio_noise': 0.01}
    noise = stage_audio(batch, config) - plain
    peak = np.abs(plain).max(1)
    np.testing.assert_allclose(noise.std(1), 0.01 * peak, rtol=0.03, atol=1e-9)
    assert (np.abs(noise.mean(1)) <= 5 * 0.01 * peak / np.sqrt(20_000)).all()
    assert not noise[2].any()
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.04
    np.testing.assert_array_equal(stage_audio(batch, config, augment=False), plain)


def test_volume_is_one_factor_a_clip():
    samples = np.random.default_rng(0).integers(-3000, 3001, (400, 50)).astype(np.int16)
    batch = audio_batch(samples)
    config = {**OFF, 'volume': 0.2}
    plain = samples / 32768
    scaled = stage_audio(batch, config)
    # Least squares of scaled = factor · plain.
    factor = (scaled * plain).sum(1) / (plain**2).sum(1)
    np.testing.assert_allclose(scaled, factor[:, None] * plain, atol=1e-7)
    assert 0.8 <= factor.min() < 0.82
    assert 1.18 < factor.max() <= 1.2
    assert abs(factor.mean() - 1) < 0.02
    np.testing.assert_array_equal(stage_audio(batch, config, augment=False), plain)


def test_invalid_rows_are_zeros_and_the_rest_is_untouched(clips):
    valid = np.array([True, False, True, False])
    config = {**OFF, 'color': 1.0, 'audio_noise': 0.5}
    batch = video_batch(clips, valid=valid)
    batch['audio'] = audio_batch(np.full((B, 500), 9000, np.int16), valid)['audio']
    batch['text'] = {
        'data': np.ones((B, 2, 3), np.int32),
        'mask': np.ones((B, 2), bool),
        'valid': valid,
        'start': np.zeros(B, np.float32),
    }
    batch['labels'] = {'class': np.arange(B)}
    all_valid = {**batch, 'video': {**batch['video'], 'valid': np.ones(B, bool)}}
    out = stage(batch, config)
    full = stage(all_valid, config)
    for name in ('video', 'audio'):
        data = np.asarray(out[name]['data'])
        np.testing.assert_array_equal(data[~valid], 0)
        largest = np.abs(data[valid]).reshape(2, -1).max(1)
        assert largest.min() > 0.1
    np.testing.assert_array_equal(
        np.asarray(out['video']['data'])[valid], np.asarray(full['video']['data'])[valid]
    )
    chex.assert_trees_all_equal(out['text'], batch['text'])
    chex.assert_trees_all_equal(out['labels'], batch['labels'])


def test_range_and_dtype(clips):
    """However hard the jitter, pixels stay in [-1, 1]; degenerate boxes stay finite."""
    config = {
        **OFF,
        'color': 1.0,
        'brightness': 0.9,
        'contrast': 0.99,
        'saturation': 0.99,
        'hue': 0.5,
    }
    boxes = np.array(
        [
            [0, 0, 1, 1],
            [0.5, 0.5, 0.5, 0.5],
            [0.99, 0.0, 1.0, 0.01],
            [0, 0.999, 1, 1],
        ],
        np.float32,
    )
    out = stage(video_batch(clips, boxes), config, dtype='bfloat16')['video']['data']
    chex.assert_type(out, jnp.bfloat16)
    chex.assert_tree_all_finite(out)
    assert np.abs(np.asarray(out, np.float32)).max() == 1


def test_weights_of_a_resampled_pixel_sum_to_one():
    weights = preprocess.resample(jnp.array([0.1]), jnp.array([0.9]), 20, 8)
    chex.assert_shape(weights, (1, 8, 20))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6, rtol=0)


def test_a_clip_is_jittered_alike_in_any_batch(clips):
    """Views of one clip draw apart; the same clip in another batch draws the same."""
    config = {**OFF, 'color': 1.0}
    batch = video_batch(clips)
    batch['video.second'] = batch['video']
    out = stage(batch, config)
    assert not np.allclose(out['video']['data'], out['video.second']['data'], atol=1e-2)
    third_clip = jax.tree.map(lambda x: x[2:3], video_batch(clips))
    alone = stage(third_clip, config)
    np.testing.assert_allclose(alone['video']['data'][0], out['video']['data'][2], atol=1e-6)


@pytest.mark.parametrize('shape', [(40, 61), (53, 30), (9, 12)])
def test_clips_pictures_are_those_of_pillow_on_host_and_device(shape):
    # Far from black and white, where Pillow clips what the first of its two passes overshoots.
    noise = np.random.default_rng(0).integers(60, 196, (*shape, 3)).astype(np.uint8)
    size, short = 16, min(shape)
    whole = [int(size * side / short) for side in shape]  # torchvision's Resize
    picture = Image.fromarray(noise).resize(whole[::-1], Image.Resampling.BICUBIC)
    top, left = (round((side - size) / 2) for side in whole)
    expected = np.asarray(picture)[top : top + size, left : left + size]
    host = arrays.short_side_square(noise, size)
    np.testing.assert_array_equal(host, expected)

    spec = presets.clip('clip_b32').inputs.video
    spec.size = size
    mean, deviation = np.array(spec.mean), np.array(spec.deviation)
    box = [top / whole[0], left / whole[1], (top + size) / whole[0], (left + size) / whole[1]]
    # Of the picture as it is, and of the square that the host made.
    for data, part in ((noise, box), (host, [0, 0, 1, 1])):
        stream = {
            'data': jnp.asarray(data[None, None]),
            'box': jnp.array([part], jnp.float32),
            'flip': jnp.zeros(1, bool),
            'valid': np.ones(1, bool),
        }
        rng = Rng.create(0, 0, jnp.zeros(1))
        augment = default.get_config().augment
        got = preprocess.video(stream, spec, augment, rng, False)[0, 0]
        pixels = np.asarray(got, np.float64) * deviation + mean
        # Pillow rounds to bytes twice; the device does not.
        tolerance = 1e-5 if data is host else 1.6 / 255
        np.testing.assert_allclose(pixels, expected / 255, rtol=0, atol=tolerance)


def test_bilinear_reads_the_nearest_pixels_alone():
    weights = preprocess.resample(jnp.zeros(1), jnp.ones(1), 12, 3, 'bilinear')[0]
    expected = np.zeros((3, 12))
    for row in range(3):  # each output lies between two pixels in the middle of its four
        expected[row, 4 * row + 1 : 4 * row + 3] = 0.5
    np.testing.assert_allclose(weights, expected, atol=1e-6)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'resize': 'lanczos'}, "config.model.inputs.video.resize='lanczos': choose one of linear"),
        ({'deviation': ()}, 'expected mean and deviation of three colours'),
    ],
)
def test_a_mistake_in_the_pixels_of_a_model_is_named(fields, message):
    spec = presets.clip('clip_b32').inputs.video
    spec.update({'size': 4, **fields})
    stream = {
        'data': jnp.zeros((1, 1, 4, 4, 3), jnp.uint8),
        'box': jnp.array([[0.0, 0.0, 1.0, 1.0]]),
        'flip': jnp.zeros(1, bool),
    }
    augment = default.get_config().augment
    with pytest.raises(ConfigError, match=re.escape(message)):
        preprocess.video(stream, spec, augment, Rng.create(0, 0, jnp.zeros(1)), False)
