"""Fusion in a model: what meets, what is missing, mistakes in its config; configs/fusion.py."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from flax.traverse_util import flatten_dict

from configs import default
from configs import fusion as fusion_config
from tests import tiny
from tests.test_fusion import B, drawn, noise
from vatt_jax import config as configs
from vatt_jax import models
from vatt_jax.config import ConfigError
from vatt_jax.inputs import preprocess
from vatt_jax.models.multimodal import Encoded
from vatt_jax.rng import Rng

FUSION = {'types': ('merged',), 'mlp': 24, 'heads': 2, 'head_width': 8, 'dropout': 0.0}


def model_of(**fields):
    """A model of tiny towers whose streams meet by these fields."""
    config = tiny.config()
    config.model.towers.text.vocab = 9
    config.model.fusion = {**FUSION, **fields} if fields else {}
    return models.build(config.model)


def encoded_streams(width=32):
    """Video and two sentences a clip; the second sentence of the first clip is padding."""
    mask = np.ones((B, 2, 4), bool)
    mask[0, 1] = False
    mask[1, 0, 2:] = False
    return {
        'video': Encoded(noise(0, B, width), noise(1, B, 5, width), grid=(5,)),
        'text': Encoded(noise(2, B, 2, width), noise(3, B, 2, 4, width), mask),
    }


def interact(model, params, encoded, valid=None):
    def call(params, encoded):
        return model.apply({'params': params}, encoded, valid=valid, method='interact')

    return jax.jit(call)(params, encoded)


def initial_fusion(model, encoded):
    """Parameters of a model that only lets streams meet."""
    return drawn(lambda x: model.init(jax.random.key(0), x, method='interact'), encoded)


def batch_of(config):
    """Shapes of a device batch."""
    return preprocess.abstract(config.model.inputs, ('video', 'audio', 'text'), 4, 'float32')


def test_without_fusion_streams_stay_and_there_are_no_parameters():
    model = model_of()
    encoded = encoded_streams()
    found = model.apply({'params': {}}, encoded, method='interact')
    for name, stream in encoded.items():
        assert found[name] is stream
    batch = batch_of(tiny.config())

    def init(batch):
        rng = Rng.create(0, 0, jnp.zeros(4))
        return model.init_with_output(jax.random.key(0), batch, train=False, rng=rng)

    outputs, variables = jax.eval_shape(init, batch)
    assert not any('fusion' in name for name in variables['params'])
    assert outputs.encoded['video'].tokens is None


def test_all_streams_of_a_model_meet_in_training_and_evaluation():
    model = model_of(types=('merged', 'co'))

    def init(batch):
        rng = Rng.create(0, 0, jnp.zeros(4))
        return model.init_with_output(jax.random.key(0), batch, train=True, rng=rng)

    outputs, variables = jax.eval_shape(init, batch_of(tiny.config()))
    parts = flatten_dict(meta.unbox(variables)['params'], sep='/')
    for modality in ('video', 'audio', 'text'):
        assert f'fusion/stack/layer_1/{modality}/query/kernel' in parts
    text = outputs.encoded['text']
    assert (text.pooled.shape, text.tokens.shape) == ((4, 2, 32), (4, 2, 6, 32))


def test_sentences_that_are_padding_and_streams_that_are_missing_change_nothing_else():
    model = model_of(streams=('video', 'text'))
    encoded = encoded_streams()
    params = initial_fusion(model, encoded)
    expected = interact(model, params, encoded)
    chex.assert_trees_all_equal_shapes(expected, encoded)

    other = encoded['text'].replace(
        pooled=encoded['text'].pooled.copy(), tokens=encoded['text'].tokens.copy()
    )
    other.pooled[0, 1] = 5
    other.tokens[~other.mask] = 7
    got = interact(model, params, {**encoded, 'text': other})
    np.testing.assert_allclose(got['video'].pooled, expected['video'].pooled, atol=1e-6)
    np.testing.assert_allclose(got['text'].pooled[1:], expected['text'].pooled[1:], atol=1e-6)

    valid = {'video': jnp.ones(B, bool), 'text': jnp.array([False, True, True])}
    got = interact(model, params, encoded, valid)['video']
    alone = interact(model, params, {'video': encoded['video']})['video']
    np.testing.assert_allclose(got.pooled[0], alone.pooled[0], atol=1e-6)
    np.testing.assert_allclose(got.tokens[1:], expected['video'].tokens[1:], atol=1e-6)
    assert np.abs(got.pooled[0] - expected['video'].pooled[0]).max() > 1e-3


def test_streams_that_are_not_named_pass_and_a_width_is_given_to_those_that_are():
    model = model_of(streams=('video', 'text'), types=('single',), width=16)
    encoded = {**encoded_streams(), 'audio': Encoded(noise(5, B, 32), noise(6, B, 3, 32))}
    got = interact(model, initial_fusion(model, encoded), encoded)
    np.testing.assert_array_equal(got['audio'].tokens, encoded['audio'].tokens)
    assert got['video'].tokens.shape == (B, 5, 16)
    assert got['text'].pooled.shape == (B, 2, 16)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'types': ('mrged',)}, "config.model.fusion.types='mrged': choose one of co, merged"),
        ({'types': ()}, 'config.model.fusion.types: expected a type for each layer'),
        ({'streams': ('video',)}, 'config.model.fusion.streams: expected at least two'),
        ({'streams': ('video', 'video')}, 'expected at least two different streams'),
        ({'streams': ('video', 'smell')}, "towers audio, text, video, got 'smell'"),
        ({'types': ('asymmetric',)}, "config.model.fusion.query='': choose one of audio"),
        ({'passive': 'asleep'}, "config.model.fusion.passive='asleep'"),
        ({'activation': 'tanh'}, "config.model.fusion.activation='tanh'"),
        ({'init': 'zeros'}, "config.model.fusion.init='zeros'"),
        ({'heads': 0}, 'config.model.fusion.heads=0: expected a number'),
        ({'eps': math.nan}, 'config.model.fusion.eps=nan'),
        ({'dropout': 1.0}, 'config.model.fusion.dropout=1'),
        ({'layers': 3}, 'config.model.fusion.layers=3: no such field'),
    ],
)
def test_a_mistake_in_the_config_is_named(fields, message):
    with pytest.raises(ConfigError) as error:
        model_of(**fields).init(jax.random.key(0), encoded_streams(), method='interact')
    assert message in str(error.value)


def test_streams_of_different_widths_cannot_share_weights_or_be_one_sequence():
    encoded = encoded_streams()
    wide = {**encoded, 'video': encoded_streams(48)['video']}
    with pytest.raises(ConfigError, match=r"one width for 'single'.*text 32, video 48"):
        model_of(types=('single',)).init(jax.random.key(0), wide, method='interact')
    odd = {**encoded, 'video': encoded['video'].replace(pooled=noise(0, B, 8))}
    with pytest.raises(ConfigError, match="got 8 and 32 of 'video'"):
        model_of(types=('merged',)).init(jax.random.key(0), odd, method='interact')


# ---- configs/fusion.py


@pytest.mark.parametrize(
    'name, types',
    [
        ('demo', ('merged',) * 2),
        ('demo,co,4,audio', ('co',) * 4),
        ('demo,mixed,3,hard', ('specific', 'specific', 'merged')),
        ('demo,asymmetric,1,synthetic', ('asymmetric',)),
        ('demo,single,frozen', ('single',) * 2),
        ('demo,specific', ('specific',) * 2),
    ],
)
def test_every_option_is_a_config(name, types):
    config = fusion_config.get_config(name)
    configs.check_fields(config, default.get_config())
    assert config.model.fusion.types == types
    assert ('audio' in config.objective.streams) == ('audio' in name)
    config.model.towers.text.vocab = 9
    initial_fusion(models.build(config.model), encoded_streams(128))


@pytest.mark.parametrize(
    'name, message',
    [
        ('base', "configs/fusion.py='base': choose one of demo"),
        ('demo,flamingo', "configs/fusion.py:demo option='flamingo': choose one of co, merged"),
        ('demo,co,merged', 'expected one attention type, got co and merged'),
        ('demo,2,4', 'expected one number of layers, got 2 and 4'),
        ('demo,0', 'config.model.fusion.types'),
    ],
)
def test_a_mistake_in_a_name_of_a_config_is_named(name, message):
    with pytest.raises(ValueError) as error:
        config = fusion_config.get_config(name)
        config.model.towers.text.vocab = 9
        models.build(config.model).init(jax.random.key(0), encoded_streams(), method='interact')
    assert message in str(error.value)
