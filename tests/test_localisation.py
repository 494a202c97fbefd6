"""Localisation from sound: its objective through the common loop and against its definition."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from ml_collections import ConfigDict

from configs import default
from tests import tiny
from tests.test_train import losses, run
from vatt_jax import config as configs
from vatt_jax import objectives, optim
from vatt_jax.config import ConfigError
from vatt_jax.models.multimodal import Encoded
from vatt_jax.models.towers.tsm_resnet import TSMResNet
from vatt_jax.objectives.forward import map_of
from vatt_jax.objectives.localisation import HEAT, SALIENCY

FIELDS = {'name': 'localisation', 'clusters': 4, 'refreshes': 3, 'warmup': 1, 'width': 6}


def config(**fields):
    """A run of pictures and sounds of four steps, with towers of one layer."""
    c = tiny.config(steps=4)
    del c.model.towers['text']
    for tower in c.model.towers.values():
        tower.update({'layers': 1, 'drop_token': 0.0})
    c.model.inputs.video.frames = 1
    c.model.towers.video.patch = (1, 8, 8)
    c.model.head = ConfigDict({'name': 'none'})
    c.objective = ConfigDict({**FIELDS, **fields})
    return c


def made(**fields):
    """(objective, parameters, state) for maps of 4 × 3 × 5 and sounds of width 7."""
    objective = objectives.build(ConfigDict({**FIELDS, **fields}))
    widths = {'video': 5, 'audio': 7}
    encoded = {name: Encoded(jax.ShapeDtypeStruct((2, w), 'float32')) for name, w in widths.items()}
    output = type('Output', (), {'encoded': encoded})
    spec = objectives.Spec(None, output, None, 8, {})
    params, state = jax.jit(lambda key: meta.unbox(objective.init(key, spec)))(jax.random.key(0))
    return objective, params, state


def cosines(objective, params, grid, sound):
    """[B B positions] in float64, one after another."""

    def projected(name, x):
        layer = {k: np.asarray(v, np.float64) for k, v in params['projections'][name].items()}
        y = x.astype(np.float64) @ layer['kernel'] + layer['bias']
        return y / np.linalg.norm(y, axis=-1, keepdims=True)

    positions = projected('picture', grid.reshape(len(grid), -1, grid.shape[-1]))
    return np.einsum('ipe,je->ijp', positions, projected('sound', sound))


def features(num_clips=3):
    rng = np.random.default_rng(0)
    grid = rng.normal(size=(num_clips, 1, 4, 3, 5)).astype(np.float32)
    sound = rng.normal(size=(num_clips, 7)).astype(np.float32)
    return grid, sound


@pytest.mark.parametrize('share', [0.0, 0.25])
def test_loss_is_the_weighted_sum_of_both(share):
    objective, params, state = made(contrast=0.3, temperature=0.2, pooled_share=share)
    grid, sound = features()
    pooled = {'video': jnp.asarray(grid.mean((1, 2, 3))), 'audio': jnp.asarray(sound)}
    pooled[map_of('video')] = jnp.asarray(grid)
    there = {'valid': jnp.ones(3, bool)}
    batch = {'video': there, 'audio': there, 'valid': jnp.ones(3, bool)}
    rng = objectives.localisation.Rng.create(0, 0, jnp.arange(3))

    def loss(batch):
        return objective.compute_loss(None, {'batch_stats': {}}, params, state, pooled, batch, rng)

    def info_nce(scores):
        rows, columns = np.log(np.exp(scores).sum(1)), np.log(np.exp(scores).sum(0))
        return np.mean((rows + columns) / 2 - np.diag(scores))

    of_best = info_nce(cosines(objective, params, grid, sound).max(-1) / 0.2)
    whole = grid.mean((1, 2, 3))
    of_whole = info_nce(cosines(objective, params, whole, sound)[..., 0] / 0.2)
    contrast = (1 - share) * of_best + share * of_whole
    # No labels yet: the contrast alone, which moves parameters.
    first = loss(batch)
    np.testing.assert_allclose(first.value, 0.3 * contrast, rtol=1e-5)
    assert first.apply_update is True
    labelled = loss({**batch, 'columns': {'label': jnp.zeros((3, 1), jnp.int8)}})
    labels = labelled.metrics['loss/labels']
    assert labels > 0
    np.testing.assert_allclose(labelled.value, 0.3 * contrast + 0.7 * labels, rtol=1e-5)


def test_a_margin_is_left_out():
    """Of maps of 4 × 3 the two positions in the middle: whatever the others are."""
    objective, params, state = made(contrast=1.0, margin=1)
    grid, sound = features()
    pooled = {'video': jnp.asarray(grid.mean((1, 2, 3))), 'audio': jnp.asarray(sound)}
    there = {'valid': jnp.ones(3, bool)}
    batch = {'video': there, 'audio': there, 'valid': jnp.ones(3, bool)}
    rng = objectives.localisation.Rng.create(0, 0, jnp.arange(3))
    scores = cosines(objective, params, grid[:, :, 1:3, 1:2], sound).max(-1) / 0.07
    rows, columns = np.log(np.exp(scores).sum(1)), np.log(np.exp(scores).sum(0))
    pooled[map_of('video')] = jnp.asarray(grid)
    got = objective.compute_loss(None, {'batch_stats': {}}, params, state, pooled, batch, rng)
    expected = np.mean((rows + columns) / 2 - np.diag(scores))
    np.testing.assert_allclose(got.value, expected, rtol=1e-5)

    picture = Encoded(pooled['video'], jnp.asarray(grid).reshape(3, 12, 5), grid=(1, 4, 3))
    encoded = {'video': picture, 'audio': Encoded(pooled['audio'])}
    maps = objective.heat_maps(params, state, encoded)
    inner = np.linalg.norm(grid[:, :, 1:3, 1], axis=-1)  # [B T 2]
    expected_map = np.broadcast_to(inner.mean(2)[..., None, None], (3, 1, 4, 3)).copy()
    expected_map[:, :, 1:3, 1] = inner
    np.testing.assert_allclose(maps[SALIENCY], expected_map, rtol=1e-5)
    assert maps[HEAT].shape == (3, 1, 4, 3)
    with pytest.raises(ConfigError, match='margin=2: the map of 4 × 3 positions has nothing left'):
        objectives.build(ConfigDict({**FIELDS, 'margin': 2}))._check_margin((1, 4, 3))


def test_heat_maps_are_cosines():
    objective, params, state = made()
    grid, sound = map(jnp.asarray, features())
    picture = Encoded(grid.mean((1, 2, 3)), grid.reshape(3, 12, 5), grid=(1, 4, 3))
    encoded = {'video': picture, 'audio': Encoded(sound)}
    maps = objective.heat_maps(params, state, encoded)
    expected = np.stack([cosines(objective, params, grid, sound)[i, i] for i in range(3)])
    np.testing.assert_allclose(maps[HEAT], expected.reshape(3, 1, 4, 3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(maps[SALIENCY], np.linalg.norm(grid, axis=-1), rtol=1e-5)
    assert set(objective.heat_maps(params, state, {'video': picture})) == {SALIENCY}
    assert objective.heat_maps(params, state, {'audio': encoded['audio']}) == {}


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'contrast': 1.5}, r'config\.objective\.contrast'),
        ({'temperature': 0.0}, r'config\.objective\.temperature'),
        ({'pooled_share': -0.1}, r'config\.objective\.pooled_share'),
        ({'method': 'ring'}, r'config\.objective\.method'),
        ({'sound': 'video'}, r'config\.objective\.sound: expected another stream'),
        ({'heat': 1}, r'config\.objective'),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        objectives.build(ConfigDict({**FIELDS, **fields}))


@pytest.mark.parametrize('stride', [4, 8, 16, 32])
def test_a_residual_network_keeps_positions(stride):
    tower = TSMResNet(depth=18, multiplier=0.1, share=0.0, stride=stride)

    def init(x):
        return tower.init_with_output(jax.random.key(0), x, jnp.ones(2, bool), False)

    (pooled, feature_map), _ = jax.eval_shape(init, jnp.zeros((2, 1, 64, 32, 3)))
    assert feature_map.shape == (2, 1, 64 // stride, 32 // stride, pooled.shape[-1])


@pytest.mark.slow
def test_trains_alike_on_one_and_eight_devices(tmp_path):
    """Contrast alone, then with labels; refreshes come before steps 1 and 3."""
    for devices in (1, 8):
        c = config(contrast=0.4)
        c.mesh.replica = devices
        assert run(tmp_path / str(devices), c)
    alone = losses(tmp_path / '1')
    chex.assert_trees_all_close(losses(tmp_path / '8'), alone, rtol=1e-3)
    assert len(alone) == 4


@pytest.mark.parametrize(
    'arg, clusters, prior',
    [
        ('demo', 8, 'uniform'),
        ('demo,contrast,synthetic', 8, 'uniform'),
        ('vggsound', 39, 'uniform'),
        ('audioset', 30, 'gaussian'),
        ('general,contrast', 300, 'uniform'),
    ],
)
def test_named_configs_pass_the_checks(arg, clusters, prior):
    c = configs.load(f'configs/detection.py:{arg}')
    configs.check_fields(c, default.get_config())
    configs.check_values(c)
    optim.check(c.optimizer, c.steps)
    objective = objectives.build(c.objective).config
    assert (objective.clusters, objective.prior) == (clusters, prior)
    assert objective.contrast == (1.0 if 'contrast' in arg else 0.5)


def test_the_playground_detector_continues_the_demo():
    """Same pictures, same tower: config.init_from finds every parameter of it."""
    localisation = configs.load('configs/detection.py:demo').model
    detector = configs.load('configs/detector.py:playground').model
    assert detector.towers.video == localisation.towers.video
    assert detector.inputs.video == localisation.inputs.video


@pytest.mark.parametrize('arg', ['demo,fast', 'kinetics'])
def test_unknown_settings_are_named(arg):
    with pytest.raises(ConfigError, match=r'configs/detection\.py.*choose one of'):
        configs.load(f'configs/detection.py:{arg}')
