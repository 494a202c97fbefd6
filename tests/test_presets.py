"""Every named size has the published number of parameters. Shapes only: nothing is computed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta
from ml_collections import ConfigDict

from configs import default
from vatt_jax import config as configs
from vatt_jax import models
from vatt_jax.models import presets
from vatt_jax.rng import Rng


def abstract_batch(config):
    """Two examples of every modality that a model has a tower for, shapes only."""
    sizes = config.inputs
    mel = sizes.audio.get('mel')
    shapes = {
        'video': (sizes.video.frames, sizes.video.size, sizes.video.size, 3),
        'audio': (150, mel.bins) if mel else (sizes.audio.samples,),
        'text': (sizes.text.candidates, sizes.text.words),
    }
    batch = {}
    for modality in config.towers:
        dtype = 'int32' if modality == 'text' else 'float32'
        batch[modality] = {
            'data': jax.ShapeDtypeStruct((2, *shapes[modality]), dtype),
            'valid': jax.ShapeDtypeStruct((2,), bool),
        }
    return batch


def abstract_variables(fields):
    """Abstract variables of a model preset, by module."""
    config = default.get_config().model
    config.update(fields)
    config.scan = True  # same parameters, one layer traced
    model = models.build(config)
    rng = jax.eval_shape(lambda: Rng.create(0, 0, jnp.zeros(2)))

    def init(batch, rng):
        return model.init(jax.random.key(0), batch, train=False, rng=rng)

    variables = meta.unbox(jax.eval_shape(init, abstract_batch(config), rng))
    chex.assert_type(jax.tree.leaves(variables['params']), jnp.float32)
    return variables


def count(tree):
    """Number of values in a tree."""
    return sum(np.prod(leaf.shape, dtype=np.int64) for leaf in jax.tree.leaves(tree))


def millions(variables, modality=None):
    """Millions of parameters and statistics of the backbone: one modality's, or all.

    The head and the frozen word table are left out.
    """
    total = 0
    for group in ('params', 'batch_stats'):
        for name, module in variables.get(group, {}).items():
            if name == 'head':
                continue
            if modality and not name.endswith(modality):
                continue
            total += count(module)
            if 'word_table' in module:
                total -= module['word_table'].size
    return round(total / 1e6, 3)


def only_tower(modality, name):
    """The presets' inputs with one tower."""
    with_spectrograms = name.startswith(('spt', 'resnet'))
    fields = presets.model('mmv' if with_spectrograms else 'bbs')
    fields.towers = ConfigDict({modality: presets.tower(name)})
    return fields


@pytest.mark.parametrize(
    'modality, name, expected',
    [
        ('video', 'vit_base', 87.446),
        ('video', 'vit_medium', 154.343),
        ('video', 'vit_large', 305.498),
        ('video', 'vit_xlarge', 533.695),
        ('audio', 'wat_base', 86.079),
        ('audio', 'wat_medium', 152.521),
        ('audio', 'wat_large', 303.675),
        ('audio', 'spt_base', 85.057),
        ('audio', 'spt_medium', 151.158),
        ('audio', 'spt_large', 302.202),
        ('text', 't5_small', 19.038),
        ('text', 't5_base', 85.194),
        ('text', 'bert_small', 19.078),
        ('text', 'bert_base', 85.301),
        ('text', 'linear', 0.616),
        ('video', 'i3d', 12.302),
        ('audio', 'resnet2d_50', 23.555),
    ],
)
def test_towers(modality, name, expected):
    variables = abstract_variables(only_tower(modality, name))
    assert millions(variables, modality) == expected


@pytest.mark.parametrize(
    'name, backbone, head',
    [
        ('tx_fac', round(87.446016 + 86.078976 + 19.038252, 3), 1.317),
        ('mbs', None, 1.448),
        ('lbs', None, 1.448),
        ('ut_base', 92.258, None),
        ('ut_medium', 161.283, 1.710),
        ('ut_large', 312.438, None),
        ('mmv_fac', None, None),
    ],
)
def test_models(name, backbone, head):
    """Of the backbone and of the head, where they are published; one word table for all."""
    variables = abstract_variables(presets.model(name))
    if backbone:
        assert millions(variables) == backbone
    if head:
        total = count(variables['params']['head']) + count(variables['batch_stats']['head'])
        assert round(total / 1e6, 3) == head

    modules = variables['params'].values()
    tables = [module['word_table'] for module in modules if 'word_table' in module]
    assert len(tables) == 1
    chex.assert_shape(tables, (65536, 300))


@pytest.mark.parametrize('name', [*presets.MODELS, *presets.OFFICIAL])
def test_presets_go_through_config_checks(name):
    config = default.get_config()
    config.model.update(presets.model(name))
    configs.check_fields(config, default.get_config())


def test_an_unknown_preset_is_a_sentence():
    message = "presets.tower='vit_small': choose one of vit_base"
    with pytest.raises(configs.ConfigError, match=message):
        presets.tower('vit_small')
