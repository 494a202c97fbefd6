"""What objectives get of the towers: pooled features, and maps where they ask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import small_nets, tiny  # noqa: F401 (registers towers)
from vatt_jax import models
from vatt_jax.config import ConfigError
from vatt_jax.inputs import preprocess
from vatt_jax.objectives.forward import map_of, run_towers
from vatt_jax.rng import Rng


def towers_and_batch(**overrides):
    """(function of a key and a batch that runs the towers, maps asked for; the abstract batch)."""
    c = tiny.config(**overrides)
    c.model.towers = ConfigDict({name: c.model.towers[name] for name in ('video', 'audio')})
    c.model.head = ConfigDict({'name': 'none'})
    model = models.build(c.model)
    rng = Rng.create(0, 0, jnp.arange(2))

    def run(key, batch, maps):
        variables = model.init(key, batch, rng=rng, train=False)
        features, _ = run_towers(model, variables, batch, rng, maps)
        return features

    return run, preprocess.abstract(c.model.inputs, ('video', 'audio'), 2, 'float32')


def shapes_of(maps, **overrides):
    run, batch = towers_and_batch(**overrides)
    features = jax.eval_shape(lambda key, batch: run(key, batch, maps), jax.random.key(0), batch)
    return {name: feature.shape for name, feature in features.items()}


def test_maps_come_for_the_streams_that_ask():
    assert set(shapes_of(())) == {'video', 'audio'}
    shapes = shapes_of(('video',), model__towers__video__drop_token=0.0)
    assert set(shapes) == {'video', 'audio', map_of('video')}
    # Patches of 2 frames, 8 rows and 8 columns.
    assert shapes[map_of('video')] == (2, 2, 2, 2, 32)


def test_a_map_is_that_of_the_network():
    run, batch = towers_and_batch(
        model__towers__video=ConfigDict({'name': 'small_video'}),
        model__towers__audio=ConfigDict({'name': 'small_audio'}),
    )
    batch = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), batch)
    # Two clips that differ: of equal ones batch norm leaves nothing.
    noise = np.random.default_rng(0).normal(size=batch['video']['data'].shape)
    batch['video']['data'] = noise.astype(np.float32)
    features = run(jax.random.key(0), batch, ('video',))
    assert np.abs(features['video']).max() > 0.1
    # Its map has one position, which is what it pools.
    np.testing.assert_array_equal(features[map_of('video')][:, 0], features['video'])


def test_maps_need_all_tokens():
    with pytest.raises(ConfigError, match=r'towers\.video\.drop_token.*expected 0'):
        shapes_of(('video',))
