"""Colour, grey and blur of clips against their definitions in NumPy float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from vatt_jax import config as configs
from vatt_jax.config import ConfigError
from vatt_jax.inputs import augmentation, preprocess
from vatt_jax.rng import Rng

B, T, SIZE = 4, 3, 16
LUMA = np.array([0.299, 0.587, 0.114])
INPUTS = {'video': {'frames': T, 'size': SIZE, 'fps': 8.0}}
FLIPS = np.array([False, True, False, True])
# (y0 x0 y1 x1), fractions of the frame.
BOXES = np.array(
    [[0, 0, 1, 1], [0.1, 0.3, 0.9, 0.7], [0.25, 0.0, 0.6, 0.4], [0.02, 0.5, 0.98, 1.0]], np.float32
)
OFF = {
    'color': 0.0,
    'brightness': 0.1,
    'contrast': 0.4,
    'saturation': 0.4,
    'hue': 0.2,
    'gain': 0.0,
    'grey': 0.0,
    'blur': 0.0,
    'blur_sigma': (0.3, 2.0),
    'blur_width': 0.4,
    'solarise': 0.0,
    'strong': 1.0,
    'views': (),
    'audio_noise': 0.0,
}
# Kernels of 2 · 3 + 1 pixels: 0.4 · 16, rounded down, on both sides together.
RADIUS = 3
# Everything at once, mild enough that no pixel is clipped.
MILD = {
    'color': 0.5,
    'brightness': 0.05,
    'contrast': 0.1,
    'saturation': 0.1,
    'hue': 0.02,
    'gain': 0.1,
    'grey': 0.5,
    'blur': 0.5,
}


@pytest.fixture(scope='module')
def clips():
    # Far from the ends of the range, so that nothing is clipped.
    return np.random.default_rng(0).integers(70, 180, (B, T, 20, 26, 3), dtype=np.uint8)


@pytest.fixture(scope='module')
def planes():
    """Y, U and V [B T 3H/2 W]."""
    return np.random.default_rng(1).integers(90, 160, (B, T, 30, 26), dtype=np.uint8)


def stage(data, config, streams=('video',), boxes=BOXES, flips=FLIPS, position=None, inputs=INPUTS):
    """{stream: pixels float64 [B T size size 3]} after the device stage."""
    n = len(data)
    if position is None:
        position = np.arange(n)
    stream = {
        'data': data,
        'valid': np.ones(n, bool),
        'start': np.zeros(n, np.float32),
        'box': boxes,
        'flip': flips,
    }
    batch = {**dict.fromkeys(streams, stream), 'position': position, 'valid': np.ones(n, bool)}
    rng = root_rng(position)

    def apply(batch):
        return preprocess.device_stage(batch, inputs, config, rng, augment=True, dtype='float32')

    out = jax.jit(apply)(jax.tree.map(jnp.asarray, batch))
    return {name: np.asarray(out[name]['data'], np.float64) for name in streams}


def root_rng(position=None):
    if position is None:
        position = np.arange(B)
    return Rng.create(0, 0, jnp.asarray(position)).at('preprocess')


def drawn(site, low, high):
    """The numbers [B] that the main stream draws at a site."""
    rng = root_rng().at('video')
    for part in site.split('/'):
        rng = rng.at(part)
    return np.asarray(rng.uniform((), low, high), np.float64)


def blurred(clip, sigma, radius=RADIUS):
    """[T H W 3] blurred pixel by pixel: a square of the Gaussian, and only what is inside."""
    _, height, width, _ = clip.shape
    out = np.zeros_like(clip)
    for y in range(height):
        for x in range(width):
            total = 0.0
            for j in range(max(0, y - radius), min(height, y + radius + 1)):
                for i in range(max(0, x - radius), min(width, x + radius + 1)):
                    weight = np.exp(-((y - j) ** 2 + (x - i) ** 2) / (2 * sigma**2))
                    out[:, y, x] += weight * clip[:, j, i]
                    total += weight
            out[:, y, x] /= total
    return out


@pytest.mark.parametrize('source', ['clips', 'planes'])
def test_blur_is_a_gaussian_of_the_clip_that_the_model_sees(source, request):
    data = request.getfixturevalue(source)
    plain = stage(data, OFF)['video']
    out = stage(data, {**OFF, 'blur': 1.0})['video']
    sigmas = drawn('blur_sigma', *OFF['blur_sigma'])
    assert len(np.unique(sigmas)) == B
    for b in range(B):
        np.testing.assert_allclose(out[b], blurred(plain[b], sigmas[b]), atol=2e-5)


def test_the_kernel_is_as_wide_as_published():
    """SimCLR: a tenth of the picture, made odd."""
    assert augmentation.blur_radius(224, 0.1) == 11
    assert augmentation.blur_radius(128, 0.1) == 6
    # Less would blur nothing, whatever its probability.
    assert augmentation.blur_radius(8, 0.1) == 1


def test_grey_is_the_luma(clips):
    plain = stage(clips, OFF)['video']
    out = stage(clips, {**OFF, 'grey': 1.0})['video']
    expected = np.repeat((plain @ LUMA)[..., None], 3, axis=-1)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_gain_is_a_factor_of_the_light(clips):
    """Pixels of 0 to 1 times one number a clip."""
    config = {**OFF, 'color': 1.0, 'gain': 0.3}
    config.update(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    plain = stage(clips, OFF)['video']
    out = stage(clips, config)['video']
    factors = drawn('color/gain', 0.7, 1.3)
    assert len(np.unique(factors)) == B
    expected = (plain + 1) / 2 * factors[:, None, None, None, None]
    np.testing.assert_allclose((out + 1) / 2, expected, atol=1e-5)


@pytest.mark.parametrize('source', ['clips', 'planes'])
def test_jitter_comes_before_grey_and_grey_before_blur(source, request):
    """Contrast turns about the mean of the sharp crop, which blur would move.

    Saturation and hue keep the luma, so grey leaves nothing of them.
    """
    data = request.getfixturevalue(source)
    config = {**OFF, 'brightness': 0.0, 'color': 1.0, 'grey': 1.0, 'blur': 1.0}
    plain = stage(data, OFF)['video']
    out = stage(data, config)['video']
    contrasts = drawn('color/contrast', 0.6, 1.4)
    sigmas = drawn('blur_sigma', *OFF['blur_sigma'])
    for b in range(B):
        mean = plain[b].mean((0, 1, 2))
        jittered = mean + contrasts[b] * (plain[b] - mean)
        grey = np.repeat((jittered @ LUMA)[..., None], 3, axis=-1)
        np.testing.assert_allclose(out[b], blurred(grey, sigmas[b]), atol=5e-5)


@pytest.mark.parametrize('source', ['clips', 'planes'])
@pytest.mark.parametrize('pixel_range', [(-1.0, 1.0), (0.0, 1.0)], ids=['signed', 'unsigned'])
def test_solarisation_turns_the_brighter_half_round(source, pixel_range, request):
    """v and 1 - v of values in [0, 1], channel by channel; after the blur."""
    data = request.getfixturevalue(source)
    inputs = {'video': {**INPUTS['video'], 'range': pixel_range}}
    config = {**OFF, 'blur': 1.0}
    low, high = pixel_range
    plain = (stage(data, config, inputs=inputs)['video'] - low) / (high - low)
    out = (stage(data, {**config, 'solarise': 1.0}, inputs=inputs)['video'] - low) / (high - low)
    assert 0.1 < (plain > 0.5).mean() < 0.9
    expected = np.where(plain < 0.5, plain, 1 - plain)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_a_still_clip_stays_still(clips):
    """One draw holds for all frames."""
    still = np.repeat(clips[:, :1], T, axis=1)
    out = stage(still, {**OFF, **MILD, 'color': 1.0, 'blur': 1.0})['video']
    np.testing.assert_allclose(out, np.repeat(out[:, :1], T, axis=1), atol=1e-6)


def test_a_clip_takes_the_strong_set_or_nothing():
    n = 400
    data = np.random.default_rng(2).integers(64, 192, (n, 1, 8, 8, 3), dtype=np.uint8)
    options = {
        'boxes': np.tile(BOXES[:1], (n, 1)),
        'flips': np.zeros(n, bool),
        'inputs': {'video': {'frames': 1, 'size': 8, 'fps': 8.0}},
    }
    strong = {**OFF, **MILD, 'grey': 1.0, 'blur': 0.5, 'solarise': 0.5}
    plain = stage(data, OFF, **options)['video']
    always = stage(data, strong, **options)['video']
    sometimes = stage(data, {**strong, 'strong': 0.3}, **options)['video']
    is_plain = np.abs(sometimes - plain).max((1, 2, 3, 4)) < 1e-6
    is_strong = np.abs(sometimes - always).max((1, 2, 3, 4)) < 1e-6
    np.testing.assert_array_equal(is_plain, ~is_strong)
    assert abs(is_strong.mean() - 0.3) < 4.5 * np.sqrt(0.3 * 0.7 / n)


@pytest.mark.parametrize('field', ['grey', 'blur', 'solarise'])
def test_the_configured_share_of_clips_is_changed(field):
    n = 400
    data = np.random.default_rng(3).integers(64, 192, (n, 1, 8, 8, 3), dtype=np.uint8)
    options = {
        'boxes': np.tile(BOXES[:1], (n, 1)),
        'flips': np.zeros(n, bool),
        'inputs': {'video': {'frames': 1, 'size': 8, 'fps': 8.0}},
    }
    plain = stage(data, OFF, **options)['video']
    out = stage(data, {**OFF, field: 0.2}, **options)['video']
    changed = (np.abs(out - plain) > 1e-3).any((1, 2, 3, 4)).mean()
    assert abs(changed - 0.2) < 4.5 * np.sqrt(0.2 * 0.8 / n)


def test_each_stream_has_its_own_set(clips):
    streams = ('video', 'video.second', 'video.third')
    second = ('video.second', {'grey': 1.0, 'strong': 1.0})
    config = {**OFF, 'blur': 1.0, 'strong': 0.0, 'views': (second,)}
    out = stage(clips, config, streams)
    plain = stage(clips, OFF)['video']
    for name in ('video', 'video.third'):
        np.testing.assert_allclose(out[name], plain, atol=1e-6)
    # What its set does not name, here blur, is as everywhere.
    alone = stage(clips, {**OFF, 'blur': 1.0, 'grey': 1.0}, streams)['video.second']
    np.testing.assert_allclose(out['video.second'], alone, atol=1e-6)
    np.testing.assert_allclose(np.ptp(out['video.second'], axis=-1), 0, atol=1e-5)


def test_draws_belong_to_the_clip_and_its_stream(clips):
    """The same clip in another batch draws the same; another stream of it draws apart."""
    config = {**OFF, **MILD, 'strong': 0.8}
    out = stage(clips, config, ('video', 'video.second'))
    for b in range(B):
        row = slice(b, b + 1)
        alone = stage(clips[row], config, boxes=BOXES[row], flips=FLIPS[row], position=[b])
        np.testing.assert_allclose(alone['video'][0], out['video'][b], atol=1e-6)
    assert np.abs(out['video'] - out['video.second']).max() > 1e-2


def test_what_is_off_is_not_in_the_program(clips):
    """Configs from before these fields compile to the same text as today's with all of them off."""
    batch = {'video': {'data': clips, 'valid': np.ones(B, bool), 'box': BOXES, 'flip': FLIPS}}

    def lowered(config):
        def apply(batch):
            return preprocess.device_stage(
                batch, INPUTS, config, root_rng(), augment=True, dtype='float32'
            )

        return jax.jit(apply).lower(batch).as_text()

    old_fields = ('color', 'brightness', 'contrast', 'saturation', 'hue', 'audio_noise')
    old = {name: OFF[name] for name in old_fields}
    elsewhere = {**OFF, 'views': (('video.second', {'blur': 1.0}),)}
    for color in (0.0, 0.8):
        text = lowered({**old, 'color': color})
        assert lowered({**OFF, 'color': color}) == text
        assert lowered({**elsewhere, 'color': color}) == text


def test_a_blurred_line_is_a_mean_of_pixels():
    config = {**OFF, 'blur': 1.0}
    weights = augmentation.blur(SIZE, config, root_rng().at('video'))
    chex.assert_shape(weights, (B, SIZE, SIZE))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    # Weights that read columns commute with mirroring them.
    np.testing.assert_allclose(weights, weights[:, ::-1, ::-1], atol=1e-7)


@pytest.mark.parametrize(
    'views, message',
    [
        ((('video.second', {'blur': 1.5}),), 'video.second: config.augment.blur=1.5: expected a'),
        ((('video.second', {'blurr': 0.5}),), "no such field; did you mean 'blur'"),
        ((('video.second', {'blur': 'yes'}),), r'video.second.blur: expected float, .* got .yes'),
        ((('video.secnd', {'blur': 0.5}),), 'choose one of audio, text, video, video.second'),
        (('video.second',), 'expected pairs such as'),
        ((('video.second', 3),), 'expected pairs such as'),
        ((('video', {'blur_sigma': (2.0, 1.0)}),), 'expected two numbers, smaller one first'),
    ],
)
def test_mistakes_in_sets_of_streams_are_named(views, message):
    config = default.get_config()
    config.data.views = (('video.second', {'kind': 'clip'}),)
    config.augment.views = views
    with pytest.raises(ConfigError, match=f'config.augment.views.*{message}'):
        configs.check_values(config)


def test_sets_of_streams_survive_the_stored_config():
    config = default.get_config()
    config.augment.views = (('video', {'blur': 0.5, 'blur_sigma': (0.1, 1.0)}),)
    stored = configs.from_json(configs.to_json(config))
    configs.check_values(stored)
    own = augmentation.of_stream(stored.augment, 'video')
    assert (own['blur'], own['blur_sigma']) == (0.5, (0.1, 1.0))
    assert augmentation.of_stream(stored.augment, 'video.second')['blur'] == 0.0
