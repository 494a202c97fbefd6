"""Image networks out of video networks.

Where the definition is exact it is exact, and the fit brings the rest nearer.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta
from flax.traverse_util import flatten_dict, unflatten_dict

import run
import vatt_jax
from tests import tiny
from vatt_jax import models
from vatt_jax.adaptation import deflation
from vatt_jax.config import ConfigError
from vatt_jax.importers import parameter_map
from vatt_jax.models.towers import resnet_v2
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng

MESH = {'replica': 1, 'fsdp': 1, 'model': 1, 'seq': 1}
FRAMES = 8
PICTURES = np.random.default_rng(5).uniform(size=(3, 1, 32, 32, 3))


def config_of(name, **fields):
    """A classifier of clips of eight frames by one convolutional tower."""
    config = tiny.config(
        model__towers={'video': {'name': name, 'multiplier': 1 / 16, **fields}},
        model__head={'name': 'none'},
    )
    config.model.inputs.video = {'frames': FRAMES, 'size': 32, 'fps': 8.0, 'range': (0.0, 1.0)}
    config.objective = {'name': 'classification', 'stream': 'video', 'label': 'class'}
    return config


def random_variables(config):
    """Values under which nothing is symmetric: statistics, scales and offsets too."""
    model = models.build(config.model)
    rng = Rng.create(0, 0, jnp.zeros(1, jnp.uint32))

    def init(key, stream):
        return model.init(key, 'video', stream, train=False, rng=rng, method='encode')

    clip = (1, config.model.inputs.video.frames, 32, 32, 3)
    stream = {'data': jax.ShapeDtypeStruct(clip, 'float32')}
    shapes = meta.unbox(jax.eval_shape(init, jax.random.key(0), stream))
    noise = np.random.default_rng(0)

    def value(path, like):
        name = path[-1].key
        values = noise.normal(size=like.shape)
        if name == 'kernel':
            fan_in = max(1, np.prod(like.shape[:-1]))
            values = values * (1.5 / fan_in) ** 0.5
        if name in ('scale', 'var'):
            values = 0.8 + 0.4 * np.abs(values)
        if name in ('bias', 'mean'):
            values = 0.2 * values
        return np.asarray(values, like.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


def encode(config, variables, x, features=False):
    """What the tower gives for clips [B T H W 3]."""
    model = models.build(config.model)

    @jax.jit
    def apply(variables, x):
        rng = Rng.create(0, 0, jnp.zeros(len(x), jnp.uint32))
        return model.apply(
            variables,
            'video',
            {'data': x},
            train=False,
            rng=rng,
            features=features,
            method='encode',
        )

    return apply(variables, jnp.asarray(x, jnp.float32))


def map_of(encoded):
    """Tokens as maps [B T H W D]."""
    tokens = np.asarray(encoded.tokens)
    return tokens.reshape(len(tokens), *encoded.grid, tokens.shape[-1])


def still_clips(frames):
    """Each picture as a clip of equal frames."""
    return np.repeat(PICTURES, frames, 1)


@pytest.fixture
def shallow(monkeypatch):
    """ResNets of fewer blocks: compiling is what takes the time."""
    monkeypatch.setitem(resnet_v2.DEPTHS, 50, ((1, 2, 1, 1), True, (256, 512, 1024, 2048)))


def test_tsm_without_shift_is_the_video_network_on_interior_frames(shallow):
    """Each of five blocks sees one frame further, so that the sixth of eleven sees no end."""
    config = config_of('tsm_resnet')
    config.model.inputs.video.frames = 11
    variables = random_variables(config)
    image_config = deflation.still_config(config)
    params = deflation.naive(config, variables['params'])
    chex.assert_trees_all_equal_shapes_and_dtypes(params, variables['params'])

    video = map_of(encode(config, variables, still_clips(11), features=True))
    deflated = {**variables, 'params': params}
    image = map_of(encode(image_config, deflated, PICTURES, features=True))
    chex.assert_equal_shape([image[:, 0], video[:, 5]])
    chex.assert_axis_dimension(image, 1, 1)
    got = image[:, 0]
    scale = np.abs(got).max()
    np.testing.assert_allclose(got, video[:, 5], rtol=1e-4, atol=1e-4 * scale)

    # the first frame does see an end
    assert np.abs(got - video[:, 0]).max() > 0.05 * scale
    # switching the shift off without exchanging channels is not enough
    unexchanged = map_of(encode(image_config, variables, PICTURES, features=True))[:, 0]
    assert np.abs(unexchanged - video[:, 5]).max() > 0.05 * scale


def test_the_exchange_of_the_release():
    """The last eighth of the channels and the first are exchanged; too few stay as they are."""
    expected = [14, 15, *range(2, 14), 0, 1]
    np.testing.assert_array_equal(deflation.exchanged(16, 0.125), expected)
    np.testing.assert_array_equal(deflation.exchanged(7, 0.125), range(7))


def with_one_tap(params):
    """Kernels over time with one tap alone, which SAME padding never has at an end of the clip.

    SAME pads two taps by (0, 1), three by (1, 1) and seven, with stride 2, by (2, 3).
    """
    inner_tap = {2: 0, 3: 1, 7: 2}
    flat = {}
    for path, value in flatten_dict(params).items():
        value = np.array(value)
        taps = value.shape[0] if value.ndim == 5 else 1
        if taps > 1:
            value[np.arange(taps) != inner_tap[taps]] = 0
        flat[path] = value
    return unflatten_dict(flat)


@pytest.mark.slow
@pytest.mark.parametrize('space_to_depth', [True, False])
def test_s3d_sums_over_time(space_to_depth):
    """kernel of images (h, w) = Σ_t kernel of clips (t, h, w).

    Where kernels have one tap over time, which sees no end of the clip, the video network on
    equal frames is the deflated one.
    """
    config = config_of('s3d', space_to_depth=space_to_depth)
    variables = random_variables(config)
    params = deflation.naive(config, variables['params'])
    after = flatten_dict(params['nets_video'], sep='/')
    before = flatten_dict(variables['params']['nets_video'], sep='/')

    def close(got, expected):
        chex.assert_equal_shape([got, expected])
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

    over_time = 'mixed_4b/b1/conv_1/conv/kernel'
    close(after[over_time][0], before[over_time].sum(0))
    over_space = 'mixed_4b/b1/conv_0/conv/kernel'
    chex.assert_trees_all_equal(after[over_space], before[over_space])

    stem = 'conv_1a/conv_0/conv/kernel'
    if space_to_depth:
        # (row, column, colour); the other frame of the block is 12 further on
        for channel in range(12):
            both_frames = before[stem][:, :, :, channel] + before[stem][:, :, :, 12 + channel]
            close(after[stem][0, :, :, channel], both_frames.sum(0))
    else:
        close(after[stem][0], before[stem].sum(0))

    timeless = {**variables, 'params': with_one_tap(variables['params'])}
    deflated = {**variables, 'params': deflation.naive(config, timeless['params'])}
    video = encode(config, timeless, still_clips(FRAMES)).pooled
    image = encode(deflation.still_config(config), deflated, PICTURES).pooled
    assert np.std(video) > 1e-3
    chex.assert_equal_shape([image, video])
    np.testing.assert_allclose(image, video, rtol=1e-4, atol=1e-5)


def endless_pictures():
    """Batches of eight noise pictures, the last of each invalid."""
    noise = np.random.default_rng(2)
    whole_picture = np.array([0, 0, 1, 1], np.float32)
    while True:
        yield {
            'video': {
                'data': noise.integers(0, 256, (8, 1, 32, 32, 3), dtype=np.uint8),
                'valid': np.arange(8) < 7,
                'flip': np.zeros(8, bool),
                'box': np.tile(whole_picture, (8, 1)),
            },
            'position': np.arange(8),
        }


@pytest.mark.parametrize('name', [pytest.param('s3d', marks=pytest.mark.slow), 'tsm_resnet'])
def test_the_fit_brings_it_nearer_to_the_video_network_and_touches_norms_alone(shallow, name):
    config = config_of(name)
    variables = random_variables(config)
    image_config = deflation.still_config(config)
    params = deflation.naive(config, variables['params'])
    fitted, losses = deflation.refit(
        config,
        variables,
        image_config,
        params,
        endless_pictures(),
        40,
        2e-2,
        sharding.make_mesh(MESH),
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(fitted, params)
    chex.assert_tree_all_finite((fitted, losses))
    assert np.mean(losses[-5:]) < 0.6 * losses[0]

    video = encode(config, variables, still_clips(FRAMES)).pooled

    def distance(params):
        image = encode(image_config, {**variables, 'params': params}, PICTURES).pooled
        chex.assert_equal_shape([image, video])
        return float(np.abs(image - video).mean())

    assert distance(fitted) < 0.8 * distance(params)

    before, after = flatten_dict(params, sep='/'), flatten_dict(fitted, sep='/')
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved
    for path in moved:
        *_, module, leaf = path.split('/')
        assert path.startswith('nets_video')
        assert module.startswith('norm')
        assert leaf in ('scale', 'bias')

    def scales(paths):
        return sum(path.endswith('scale') for path in paths)

    # a channel of two may be dead
    assert scales(moved) > 0.9 * scales(before)


def write_run_of(config, variables, folder):
    """A run folder of a classifier with these variables; its own weights are zeros."""
    labels = {'class': list('abcd')}
    state = parameter_map.abstract_state(config, labels)
    arrays = {}
    for group in ('params', 'batch_stats'):
        for path, value in flatten_dict(variables[group]).items():
            arrays[(group, *path)] = value
    for path, like in parameter_map.variables(state).items():
        if path[0] == 'objective':
            arrays[path] = np.zeros(like.shape, like.dtype)
    folder.mkdir()
    parameter_map.write_run(folder, config, state, arrays, {'labels': labels, 'sources': []})


def deflate(source, target, *options):
    """The command, in this process."""
    arguments = [
        '--mode=deflate',
        f'--workdir={source}',
        f'--out={target}',
        *options,
        '--config.jax_platform=',
    ]
    run.main(arguments)


def test_a_run_is_deflated_by_the_command_and_embeds_pictures(tmp_path, shallow, capsys):
    config = config_of('tsm_resnet', depth=50)
    config.name, config.batch_size = 'tiny tsm', 4
    variables = random_variables(config)
    video_run, image_run, plain_run = (tmp_path / name for name in ('video', 'image', 'plain'))
    write_run_of(config, variables, video_run)
    deflate(video_run, image_run, '--fit=2')
    assert 'step 2: mean |difference|' in capsys.readouterr().out
    deflate(video_run, plain_run, '--naive')

    video, image, plain = (vatt_jax.load(folder) for folder in (video_run, image_run, plain_run))
    assert image.config.model.inputs.video.frames == 1
    assert image.info['deflated']['steps'] == 2
    assert not plain.info['deflated']['fitted']

    # a network of clips takes a picture as a clip of equal frames
    picture = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    of_picture = video.embed(image=picture)['image']['pooled']
    of_clip = video.embed(video=np.repeat(picture[None], FRAMES, 0))['video']['pooled']
    chex.assert_equal_shape([of_picture, of_clip])
    np.testing.assert_allclose(of_picture, of_clip, rtol=1e-5, atol=1e-6)

    got = plain.embed(image=np.stack([picture, picture[::-1]]))['image']['pooled']
    chex.assert_shape(got, (2, len(of_picture)))
    chex.assert_tree_all_finite(got)
    deflated = {**variables, 'params': deflation.naive(config, variables['params'])}
    expected = encode(plain.config, deflated, picture[None, None] / 255)
    np.testing.assert_allclose(got[0], expected.pooled[0], rtol=1e-4, atol=1e-5)

    with pytest.raises(ConfigError, match=r'embed\(image\[0\]=…\): .* got uint8 \[8, 8, 2\]'):
        plain.embed(image=[np.zeros((8, 8, 2), np.uint8)])
    with pytest.raises(ConfigError, match='already holds checkpoints'):
        deflate(video_run, plain_run, '--naive')
    with pytest.raises(ConfigError, match='one for images already'):
        deflate(plain_run, tmp_path / 'again', '--naive')


def test_other_towers_are_refused():
    message = "towers.video.name='vit': s3d and tsm_resnet can be deflated"
    with pytest.raises(ConfigError, match=message):
        deflation.still_config(tiny.config())
