"""The device stage against its definition, written out pixel by pixel in float64."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vatt_jax.config import ConfigError
from vatt_jax.inputs import preprocess
from vatt_jax.rng import Rng

B, T, H, W, SIZE = 4, 3, 20, 26, 8
BOXES = np.array(
    [[0, 0, 1, 1], [0.1, 0.3, 0.9, 0.7], [0.25, 0.0, 0.4, 0.2], [0.02, 0.5, 0.98, 1.0]], np.float32
)
FLIPS = np.array([False, True, False, True])
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


def batch_of(clips, boxes=BOXES, flips=FLIPS, valid=None):
    n = len(clips)
    return {
        'video': {
            'data': clips,
            'valid': np.ones(n, bool) if valid is None else valid,
            'start': np.zeros(n, np.float32),
            'box': boxes,
            'flip': flips,
        },
        'position': np.arange(n),
        'valid': np.ones(n, bool),
    }


def stage(batch, config, augment=True, inputs=INPUTS, seed=0, dtype='float32'):
    rng = Rng.create(seed, 0, jnp.asarray(batch['position'])).at('preprocess')
    return jax.jit(
        lambda b: preprocess.device_stage(b, inputs, config, rng, augment=augment, dtype=dtype)
    )(batch)


def rng_of(n, seed=0):
    return Rng.create(seed, 0, jnp.arange(n)).at('preprocess').at('video').at('color')


def triangle(line, low, high, size):
    """`size` values read from the part low..high of a line [length C], one at a time: a tent over the source's pixel centres, as wide as
    the distance between two of them or between two target pixels, whichever is more."""
    length, out = len(line), []
    step = (high - low) * length / size
    for i in range(size):
        centre = low * length + (i + 0.5) * step
        weights = np.array(
            [max(0.0, 1 - abs(centre - (j + 0.5)) / max(1.0, step)) for j in range(length)]
        )
        out.append((weights[:, None] * line).sum(0) / weights.sum())
    return np.array(out)


def resized(clip, box, flip, size=SIZE):
    """float64 [T size size 3] in [-1, 1]."""
    out = []
    for frame in clip.astype(np.float64) / 127.5 - 1:
        rows = np.stack(
            [triangle(frame[:, x], box[0], box[2], size) for x in range(frame.shape[1])], 1
        )
        frame = np.stack([triangle(rows[y], box[1], box[3], size) for y in range(size)])
        out.append(frame[:, ::-1] if flip else frame)
    return np.array(out)


def test_a_whole_frame_at_its_own_size_is_the_identity():
    clips = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16, 1).repeat(3, -1)
    whole = np.array([[0, 0, 1, 1]], np.float32)
    inputs = {**INPUTS, 'video': {**INPUTS['video'], 'size': 16}}
    for flip, want in ((False, clips), (True, clips[:, :, :, ::-1])):
        out = np.asarray(
            stage(batch_of(clips, whole, np.array([flip])), OFF, inputs=inputs)['video']['data']
        )
        np.testing.assert_allclose(out, want / 127.5 - 1, atol=1e-6)
        assert out.min() == -1 and out.max() == 1  # 0 and 255 are the ends of the range


def test_crop_resize_and_flip(clips):
    out = stage(batch_of(clips), OFF)['video']
    assert out['data'].shape == (B, T, SIZE, SIZE, 3) and set(out) == {'data', 'valid', 'start'}
    want = np.stack([resized(*row) for row in zip(clips, BOXES.astype(np.float64), FLIPS)])
    np.testing.assert_allclose(out['data'], want, atol=2e-5)


def test_pixels_in_the_range_the_model_was_made_for(clips):
    minus, unit = (
        np.asarray(
            stage(
                batch_of(clips), OFF, inputs={**INPUTS, 'video': {**INPUTS['video'], 'range': r}}
            )['video']['data']
        )
        for r in ((-1.0, 1.0), (0.0, 1.0))
    )
    np.testing.assert_allclose(unit, (minus + 1) / 2, atol=1e-6)
    assert unit.min() >= 0 and minus.min() < -0.5
    np.testing.assert_array_equal(
        minus, stage(batch_of(clips), OFF)['video']['data']
    )  # checkpoints that do not say: VATT's
    with pytest.raises(ConfigError, match=r'config.model.inputs.video.range: .* got \(1.0, 0.0\)'):
        stage(
            batch_of(clips),
            OFF,
            inputs={**INPUTS, 'video': {**INPUTS['video'], 'range': (1.0, 0.0)}},
        )


def test_shrinking_does_not_alias_and_keeps_the_mean():
    """Stripes one pixel wide, four times smaller: grey, where picking pixels would give black or white."""
    clips = np.zeros((1, 1, 64, 64, 3), np.uint8)
    clips[:, :, :, ::2] = 255
    inputs = {**INPUTS, 'video': {**INPUTS['video'], 'size': 16}}
    out = np.asarray(
        stage(
            batch_of(clips, np.array([[0, 0, 1, 1]], np.float32), np.zeros(1, bool)),
            OFF,
            inputs=inputs,
        )['video']['data']
    )
    assert np.abs(out[:, :, :, 1:-1]).max() < 1e-5 and np.abs(out).max() < 0.15


def written_out(clip, brightness, saturation, contrast, hue):
    """Each operation by itself on [T H W 3] in [-1, 1]; hue as a turn of the (I, Q) plane at constant luma."""
    luma = np.array([0.299, 0.587, 0.114])
    clip = clip + 2 * brightness  # brightness is a share of 0…1, pixels here span 2
    gray = (clip @ luma)[..., None]
    clip = gray + saturation * (clip - gray)
    mean = clip.mean((0, 1, 2))
    clip = mean + contrast * (clip - mean)
    y = clip @ luma
    i, q = clip @ [0.596, -0.274, -0.322], clip @ [0.211, -0.523, 0.312]
    turned = np.exp(2j * np.pi * hue) * (i + 1j * q)
    to_rgb = np.linalg.inv([luma, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    return np.stack([y, turned.real, turned.imag], -1) @ to_rgb.T


def test_color_jitter_is_its_operations_one_after_another(clips):
    config = {**OFF, 'color': 1.0}
    out = np.asarray(stage(batch_of(clips), config)['video']['data'])
    rng = rng_of(B)
    draw = lambda site, low, high: np.asarray(rng.at(site).uniform((), low, high), np.float64)
    drawn = [
        draw('brightness', -config['brightness'], config['brightness']),
        draw('saturation', 0.6, 1.4),
        draw('contrast', 0.6, 1.4),
        draw('hue', -0.2, 0.2),
    ]
    assert all(len(np.unique(d)) == B for d in drawn)  # one draw per clip
    for b in range(B):
        want = written_out(
            resized(clips[b], BOXES[b].astype(np.float64), FLIPS[b]), *[d[b] for d in drawn]
        )
        np.testing.assert_allclose(out[b], np.clip(want, -1, 1), atol=1e-4)


@pytest.mark.parametrize(
    'name, value', [('brightness', 32 / 255), ('contrast', 0.4), ('saturation', 0.4), ('hue', 0.2)]
)
def test_each_jitter_alone(clips, name, value):
    """With the others at zero: what it keeps, and that it does something."""
    config = {
        **OFF,
        'color': 1.0,
        **{n: 0.0 for n in ('brightness', 'contrast', 'saturation', 'hue')},
        name: value,
    }
    clips = (64 + clips // 2).astype(np.uint8)  # far from the ends, so that nothing is clipped
    before = np.asarray(stage(batch_of(clips), config, augment=False)['video']['data'], np.float64)
    after = np.asarray(stage(batch_of(clips), config)['video']['data'], np.float64)
    assert np.abs(after - before).max() > 0.02
    luma = np.array([0.299, 0.587, 0.114])
    if name == 'brightness':
        added = (after - before).reshape(B, -1)
        assert np.ptp(added, axis=1).max() < 1e-5 and np.abs(added).max() <= 2 * value
    if name == 'contrast':
        np.testing.assert_allclose(after.mean((1, 2, 3)), before.mean((1, 2, 3)), atol=1e-5)
        ratio = after.std((1, 2, 3)) / before.std((1, 2, 3))
        assert ((ratio > 1 - value) & (ratio < 1 + value)).all() and np.ptp(
            ratio, axis=1
        ).max() < 1e-4
    if name in ('saturation', 'hue'):
        np.testing.assert_allclose(after @ luma, before @ luma, atol=1e-5)


def test_a_hue_turn_turns_the_colour_and_keeps_grey():
    turn = np.asarray(preprocess._hue(jnp.array([0.0, 1 / 3, 1.0])), np.float64)
    np.testing.assert_allclose(turn[[0, 2]], np.eye(3)[None].repeat(2, 0), atol=1e-5)
    np.testing.assert_allclose(turn @ np.ones(3), 1, atol=1e-5)
    angles = [
        colorsys.rgb_to_hsv(*np.clip(turn[1] @ np.array(c) * 0.3 + 0.35, 0, 1))[0]
        for c in np.eye(3)
    ]
    away = np.abs((np.array(angles) - [0, 1 / 3, 2 / 3] + 0.5) % 1 - 0.5)
    assert (
        np.abs(away - 1 / 3) < 0.1
    ).all()  # a third of the circle, give or take what YIQ and HSV disagree on


def test_jitter_touches_the_asked_share_of_clips():
    n = 400
    clips = np.random.default_rng(1).integers(64, 192, (n, 1, 4, 4, 3), dtype=np.uint8)
    batch = batch_of(clips, np.tile(np.array([0, 0, 1, 1], np.float32), (n, 1)), np.zeros(n, bool))
    inputs = {**INPUTS, 'video': {**INPUTS['video'], 'size': 4}}
    plain = np.asarray(stage(batch, OFF, inputs=inputs)['video']['data'])
    for share in (0.3, 1.0):
        out = np.asarray(stage(batch, {**OFF, 'color': share}, inputs=inputs)['video']['data'])
        touched = (np.abs(out - plain) > 1e-3).any((1, 2, 3, 4)).mean()
        assert abs(touched - share) < 4.5 * np.sqrt(share * (1 - share) / n) + 0.01
    np.testing.assert_array_equal(
        stage(batch, {**OFF, 'color': 1.0}, augment=False, inputs=inputs)['video']['data'], plain
    )


def audio_batch(samples, valid=None):
    n = len(samples)
    return {
        'audio': {
            'data': samples,
            'valid': np.ones(n, bool) if valid is None else valid,
            'start': np.zeros(n, np.float32),
        },
        'position': np.arange(n),
        'valid': np.ones(n, bool),
    }


def test_sound_is_scaled_and_noise_follows_the_peak():
    samples = np.random.default_rng(0).integers(-3000, 3001, (6, 20_000)).astype(np.int16)
    samples[1] //= 100  # a quiet clip
    samples[2] = 0  # silence
    samples[3, 5] = -32768  # one full-scale click
    plain = np.asarray(stage(audio_batch(samples), OFF)['audio']['data'], np.float64)
    np.testing.assert_array_equal(plain, samples / 32768)
    assert plain[3].min() == -1
    noise = (
        np.asarray(
            stage(audio_batch(samples), {**OFF, 'audio_noise': 0.01})['audio']['data'], np.float64
        )
        - plain
    )
    peak = np.abs(plain).max(1)
    np.testing.assert_allclose(noise.std(1), 0.01 * peak, rtol=0.03, atol=1e-9)
    assert (np.abs(noise.mean(1)) <= 5 * 0.01 * peak / np.sqrt(20_000)).all() and not noise[2].any()
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.04
    np.testing.assert_array_equal(
        stage(audio_batch(samples), {**OFF, 'audio_noise': 0.01}, augment=False)['audio']['data'],
        plain,
    )


def test_volume_is_one_factor_a_clip():
    samples = np.random.default_rng(0).integers(-3000, 3001, (400, 50)).astype(np.int16)
    plain = samples / 32768
    loud = np.asarray(
        stage(audio_batch(samples), {**OFF, 'volume': 0.2})['audio']['data'], np.float64
    )
    factor = (loud * plain).sum(1) / (plain**2).sum(1)
    np.testing.assert_allclose(loud, factor[:, None] * plain, atol=1e-7)
    assert (
        0.8 <= factor.min() < 0.82 and 1.18 < factor.max() <= 1.2 and abs(factor.mean() - 1) < 0.02
    )
    np.testing.assert_array_equal(
        stage(audio_batch(samples), {**OFF, 'volume': 0.2}, augment=False)['audio']['data'], plain
    )


def test_invalid_rows_are_zeros_and_the_rest_is_untouched(clips):
    valid = np.array([True, False, True, False])
    config = {**OFF, 'color': 1.0, 'audio_noise': 0.5}
    batch = batch_of(clips, valid=valid)
    batch['audio'] = audio_batch(np.full((B, 500), 9000, np.int16), valid)['audio']
    batch['text'] = {
        'data': np.ones((B, 2, 3), np.int32),
        'mask': np.ones((B, 2), bool),
        'valid': valid,
        'start': np.zeros(B, np.float32),
    }
    batch['labels'] = {'class': np.arange(B)}
    out, full = (
        stage(batch, config),
        stage({**batch, 'video': {**batch['video'], 'valid': np.ones(B, bool)}}, config),
    )
    for name in ('video', 'audio'):
        x = np.asarray(out[name]['data'])
        assert not x[~valid].any() and np.abs(x[valid]).reshape(2, -1).max(1).min() > 0.1
    np.testing.assert_array_equal(
        np.asarray(out['video']['data'])[valid], np.asarray(full['video']['data'])[valid]
    )
    np.testing.assert_array_equal(out['text']['data'], batch['text']['data'])
    np.testing.assert_array_equal(out['labels']['class'], np.arange(B))


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
        [[0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5], [0.99, 0.0, 1.0, 0.01], [0, 0.999, 1, 1]], np.float32
    )
    out = stage(batch_of(clips, boxes), config, dtype='bfloat16')['video']['data']
    assert out.dtype == jnp.bfloat16
    x = np.asarray(out, np.float32)
    assert np.isfinite(x).all() and np.abs(x).max() == 1
    assert preprocess.resample(jnp.array([0.1]), jnp.array([0.9]), 20, 8).sum(-1) == pytest.approx(
        1, abs=1e-6
    )


def test_a_clip_is_jittered_alike_in_any_batch(clips):
    """Views of one clip draw apart; the same clip in another batch draws the same."""
    config = {**OFF, 'color': 1.0}
    batch = batch_of(clips)
    batch['video.second'] = batch['video']
    out = stage(batch, config)
    assert not np.allclose(out['video']['data'], out['video.second']['data'], atol=1e-2)
    one = {
        k: (v[2:3] if not isinstance(v, dict) else {n: a[2:3] for n, a in v.items()})
        for k, v in batch_of(clips).items()
    }
    np.testing.assert_allclose(
        stage(one, config)['video']['data'][0], out['video']['data'][2], atol=1e-6
    )
