"""Image networks out of video networks: where the definition is exact it is exact, and the fit brings the rest nearer."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta
from flax.traverse_util import flatten_dict, unflatten_dict

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


def config(name, **fields):
    c = tiny.config(
        model__towers={'video': {'name': name, 'multiplier': 1 / 16, **fields}},
        model__head={'name': 'none'},
    )
    c.model.inputs.video = {'frames': 8, 'size': 32, 'fps': 8.0, 'range': (0.0, 1.0)}
    c.objective = {'name': 'classification', 'stream': 'video', 'label': 'class'}
    return c


def random_variables(c, seed=0):
    """Values under which nothing is symmetric: statistics, scales and offsets too."""
    model = models.build(c.model)
    rng = Rng.create(0, 0, jnp.zeros(1, jnp.uint32))
    x = {'data': jax.ShapeDtypeStruct((1, c.model.inputs.video.frames, 32, 32, 3), 'float32')}
    shapes = meta.unbox(
        jax.eval_shape(
            lambda key, x: model.init(key, 'video', x, train=False, rng=rng, method='encode'),
            jax.random.key(0),
            x,
        )
    )
    noise = np.random.default_rng(seed)

    def value(path, like):
        z, leaf = noise.normal(size=like.shape), path[-1].key
        if leaf == 'kernel':
            z = z * (1.5 / max(1, np.prod(like.shape[:-1]))) ** 0.5
        if leaf in ('scale', 'var'):
            z = 0.8 + 0.4 * np.abs(z)
        return np.asarray(0.2 * z if leaf in ('bias', 'mean') else z, like.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


def encode(c, variables, x, features=False):
    model = models.build(c.model)
    f = jax.jit(
        lambda v, x: model.apply(
            v,
            'video',
            {'data': x},
            train=False,
            rng=Rng.create(0, 0, jnp.zeros(len(x), jnp.uint32)),
            features=features,
            method='encode',
        )
    )
    return f(variables, jnp.asarray(x, jnp.float32))


PICTURES = np.random.default_rng(5).uniform(size=(3, 1, 32, 32, 3))


@pytest.fixture
def shallow(monkeypatch):
    monkeypatch.setitem(resnet_v2.DEPTHS, 50, ((1, 2, 1, 1), True, (256, 512, 1024, 2048)))


def test_tsm_without_shift_is_the_video_network_on_interior_frames(shallow):
    """Each of five blocks sees one frame further, so the sixth of eleven equal frames knows of no end."""
    c = config('tsm_resnet')
    c.model.inputs.video.frames = 11
    variables = random_variables(c)
    still = deflation.still_config(c)
    params = deflation.naive(c, variables['params'])
    video = encode(c, variables, np.repeat(PICTURES, 11, 1), features=True)
    maps = np.asarray(video.tokens).reshape(3, *video.grid, -1)
    image = encode(still, {**variables, 'params': params}, PICTURES, features=True)
    got = np.asarray(image.tokens).reshape(3, *image.grid, -1)[:, 0]
    np.testing.assert_allclose(got, maps[:, 5], rtol=1e-4, atol=1e-4 * np.abs(got).max())
    assert np.abs(got - maps[:, 0]).max() > 0.05 * np.abs(got).max()  # the first frame does
    unexchanged = encode(still, variables, PICTURES, features=True)  # the shift switched off alone
    assert (
        np.abs(np.asarray(unexchanged.tokens).reshape(got.shape) - maps[:, 5]).max()
        > 0.05 * np.abs(got).max()
    )


def test_the_exchange_of_the_release():
    np.testing.assert_array_equal(
        deflation.exchanged(16, 0.125), [14, 15, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 0, 1]
    )
    np.testing.assert_array_equal(deflation.exchanged(7, 0.125), range(7))


@pytest.mark.slow
@pytest.mark.parametrize('space_to_depth', [True, False])
def test_s3d_sums_over_time(space_to_depth):
    """Kernels are sums over time; where they have one tap, which meets no end of the clip, the video network on equal frames is the deflated one."""
    c = config('s3d', space_to_depth=space_to_depth)
    variables = random_variables(c)
    params = deflation.naive(c, variables['params'])
    have, was = (flatten_dict(p['nets_video'], sep='/') for p in (params, variables['params']))
    np.testing.assert_allclose(
        have['mixed_4b/b1/conv_1/conv/kernel'][0],
        was['mixed_4b/b1/conv_1/conv/kernel'].sum(0),
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_array_equal(
        have['mixed_4b/b1/conv_0/conv/kernel'], was['mixed_4b/b1/conv_0/conv/kernel']
    )
    k, w = have['conv_1a/conv_0/conv/kernel'], was['conv_1a/conv_0/conv/kernel']
    if space_to_depth:
        for i in range(12):  # (row, column, colour); the other frame of the block is 12 further on
            np.testing.assert_allclose(
                k[0, :, :, i], (w[:, :, :, i] + w[:, :, :, 12 + i]).sum(0), rtol=1e-5, atol=1e-6
            )
    else:
        np.testing.assert_allclose(k[0], w.sum(0), rtol=1e-5, atol=1e-6)

    def one_tap(path, x):
        x = np.array(x)
        if x.ndim == 5 and x.shape[0] > 1:
            safe = {2: 0, 3: 1, 7: 2}[
                x.shape[0]
            ]  # SAME pads (0, 1), (1, 1) and, with stride 2, (2, 3)
            x[np.arange(len(x)) != safe] = 0
        return x

    flat = flatten_dict(variables['params'])
    timeless = {**variables, 'params': unflatten_dict({p: one_tap(p, x) for p, x in flat.items()})}
    video = encode(c, timeless, np.repeat(PICTURES, 8, 1)).pooled
    image = encode(
        deflation.still_config(c),
        {**variables, 'params': deflation.naive(c, timeless['params'])},
        PICTURES,
    ).pooled
    assert np.std(video) > 1e-3
    np.testing.assert_allclose(image, video, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', [pytest.param('s3d', marks=pytest.mark.slow), 'tsm_resnet'])
def test_the_fit_brings_it_nearer_to_the_video_network_and_touches_norms_alone(shallow, name):
    c = config(name)
    variables, still = random_variables(c), deflation.still_config(c)
    params = deflation.naive(c, variables['params'])
    noise = np.random.default_rng(2)

    def pictures():
        while True:
            yield {
                'video': {
                    'data': noise.integers(0, 256, (8, 1, 32, 32, 3), dtype=np.uint8),
                    'valid': np.arange(8) < 7,
                    'flip': np.zeros(8, bool),
                    'box': np.tile(np.array([0, 0, 1, 1], np.float32), (8, 1)),
                },
                'position': np.arange(8),
            }

    fitted, losses = deflation.refit(
        c, variables, still, params, pictures(), 40, 2e-2, sharding.make_mesh(MESH)
    )
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    want = encode(c, variables, np.repeat(PICTURES, 8, 1)).pooled
    before, after = (
        float(np.abs(encode(still, {**variables, 'params': p}, PICTURES).pooled - want).mean())
        for p in (params, fitted)
    )
    assert after < 0.8 * before
    before, after = flatten_dict(params, sep='/'), flatten_dict(fitted, sep='/')
    moved = {k for k in before if not np.array_equal(before[k], after[k])}
    assert moved and all(
        k.startswith('nets_video')
        and k.rsplit('/', 2)[1].startswith('norm')
        and k.endswith(('scale', 'bias'))
        for k in moved
    )
    assert sum(k.endswith('scale') for k in moved) > 0.9 * sum(
        k.endswith('scale') for k in before
    )  # a channel of two may be dead


def test_a_run_is_deflated_by_the_command_and_embeds_pictures(tmp_path, shallow, capsys):
    import run

    c = config('tsm_resnet', depth=50)
    c.name, c.batch_size = 'tiny tsm', 4
    variables = random_variables(c)
    state = parameter_map.abstract_state(c, {'class': list('abcd')})
    arrays = {('params', *k): v for k, v in flatten_dict(variables['params']).items()}
    arrays |= {('batch_stats', *k): v for k, v in flatten_dict(variables['batch_stats']).items()}
    arrays |= {
        k: np.zeros(v.shape, v.dtype)
        for k, v in parameter_map.variables(state).items()
        if k[0] == 'objective'
    }
    (tmp_path / 'video').mkdir()
    parameter_map.write_run(
        tmp_path / 'video', c, state, arrays, {'labels': {'class': list('abcd')}, 'sources': []}
    )
    run.main(
        [
            '--mode=deflate',
            f'--workdir={tmp_path / "video"}',
            f'--out={tmp_path / "image"}',
            '--fit=2',
            '--config.jax_platform=',
        ]
    )
    assert 'step 2: mean |difference|' in capsys.readouterr().out
    run.main(
        [
            '--mode=deflate',
            f'--workdir={tmp_path / "video"}',
            f'--out={tmp_path / "plain"}',
            '--naive',
            '--config.jax_platform=',
        ]
    )
    video, image, plain = (vatt_jax.load(tmp_path / name) for name in ('video', 'image', 'plain'))
    assert (
        image.config.model.inputs.video.frames == 1
        and image.info['deflated']['steps'] == 2
        and not plain.info['deflated']['fitted']
    )
    picture = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    tiled = video.embed(image=picture)['image']['pooled']
    np.testing.assert_allclose(
        tiled,
        video.embed(video=np.repeat(picture[None], 8, 0))['video']['pooled'],
        rtol=1e-5,
        atol=1e-6,
    )
    got = plain.embed(image=np.stack([picture, picture[::-1]]))['image']['pooled']
    assert got.shape == (2, len(tiled))
    want = encode(
        plain.config,
        {
            'params': deflation.naive(c, variables['params']),
            'batch_stats': variables['batch_stats'],
        },
        picture[None, None] / 255,
    )
    np.testing.assert_allclose(got[0], want.pooled[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r'embed\(image=…\): .* got uint8 \[8, 8\]'):
        plain.embed(image=[np.zeros((8, 8), np.uint8)])
    with pytest.raises(ConfigError, match='already holds checkpoints'):
        run.main(
            [
                '--mode=deflate',
                f'--workdir={tmp_path / "video"}',
                f'--out={tmp_path / "plain"}',
                '--naive',
                '--config.jax_platform=',
            ]
        )
    with pytest.raises(ConfigError, match='one for images already'):
        run.main(
            [
                '--mode=deflate',
                f'--workdir={tmp_path / "plain"}',
                f'--out={tmp_path / "again"}',
                '--naive',
                '--config.jax_platform=',
            ]
        )


def test_other_towers_are_refused():
    with pytest.raises(
        ConfigError, match="towers.video.name='vit': s3d and tsm_resnet can be deflated"
    ):
        deflation.still_config(copy.deepcopy(tiny.config()))
