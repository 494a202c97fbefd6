"""What objectives get of the towers: pooled features, and maps where they ask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import tiny
from vatt_jax import models
from vatt_jax.config import ConfigError
from vatt_jax.inputs import preprocess
from vatt_jax.objectives.forward import map_of, run_towers
from vatt_jax.rng import Rng


def features_of(maps, **overrides):
    """`run_towers` on noise, by a model of pictures [B 4 16 16 3] and sound [B 1024]."""
    c = tiny.config(**overrides)
    c.model.towers = ConfigDict({name: c.model.towers[name] for name in ('video', 'audio')})
    c.model.head = ConfigDict({'name': 'none'})
    model = models.build(c.model)
    batch = preprocess.abstract(c.model.inputs, ('video', 'audio'), 2, 'float32')
    generator = np.random.default_rng(0)
    for stream in batch.values():
        if isinstance(stream, dict):
            stream['data'] = jnp.asarray(generator.normal(size=stream['data'].shape), jnp.float32)
            stream['valid'] = jnp.ones(2, bool)
    rng = Rng.create(0, 0, jnp.arange(2))
    variables = model.init(jax.random.key(0), batch, rng=rng, train=False)
    features, _ = run_towers(model, variables, batch, rng, maps)
    return features


def test_maps_come_for_the_streams_that_ask():
    without = features_of(())
    assert set(without) == {'video', 'audio'}
    features = features_of(('video',), model__towers__video__drop_token=0.0)
    assert set(features) == {'video', 'audio', map_of('video')}
    # Patches of 2 frames, 8 rows and 8 columns.
    assert features[map_of('video')].shape == (2, 2, 2, 2, 32)


def test_a_map_is_what_a_network_pools():
    tower = ConfigDict({'name': 'tsm_resnet', 'depth': 18, 'multiplier': 0.07})
    inputs = {'model__inputs__video__size': 64, 'model__towers__video': tower}
    features = features_of(('video',), **inputs)
    assert features[map_of('video')].shape[:4] == (2, 4, 2, 2)
    means = features[map_of('video')].mean((1, 2, 3))
    np.testing.assert_allclose(means, features['video'], rtol=1e-5, atol=1e-6)


def test_maps_need_all_tokens():
    with pytest.raises(ConfigError, match=r'towers\.video\.drop_token.*expected 0'):
        features_of(('video',))
