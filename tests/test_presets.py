"""Every named size has the published number of parameters. Shapes only: nothing is computed."""

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


def shapes(fields):
    """Abstract variables of a model preset, by module."""
    c = default.get_config().model
    c.update(fields)
    c.scan = True  # same parameters, one layer traced
    i = c.inputs
    mel = i.audio.get('mel')
    audio = (150, mel.bins) if mel else (i.audio.samples,)
    data = {
        'video': ((i.video.frames, i.video.size, i.video.size, 3), 'float32'),
        'audio': (audio, 'float32'),
        'text': ((i.text.candidates, i.text.words), 'int32'),
    }
    batch = {
        m: {
            'data': jax.ShapeDtypeStruct((2, *data[m][0]), data[m][1]),
            'valid': jax.ShapeDtypeStruct((2,), bool),
        }
        for m in c.towers
    }
    model = models.build(c)
    init = lambda b, r: model.init(jax.random.key(0), b, train=False, rng=r)
    variables = meta.unbox(
        jax.eval_shape(init, batch, jax.eval_shape(lambda: Rng.create(0, 0, jnp.zeros(2))))
    )
    return variables


def count(tree):
    return sum(np.prod(x.shape, dtype=np.int64) for x in jax.tree.leaves(tree))


def millions(variables, modality=None):
    """Of the backbone (a modality's, or all), batch statistics included, the frozen word table not."""
    of = lambda group: (
        {k: v for k, v in variables.get(group, {}).items() if k.endswith(modality) or k == 'head'}
        if modality
        else variables.get(group, {})
    )
    keep = lambda tree: {k: v for k, v in tree.items() if k != 'head'}
    table = sum(x['word_table'].size for k, x in of('params').items() if 'word_table' in x)
    return round((count(keep(of('params'))) + count(keep(of('batch_stats'))) - table) / 1e6, 3)


def alone(modality, name):
    """The presets' inputs with one tower only."""
    fields = presets.model('mmv' if name.startswith(('spt', 'resnet')) else 'bbs')
    fields.towers = ConfigDict({modality: presets.tower(name)})
    return fields


@pytest.mark.parametrize(
    'name,want',
    [
        ('vit_base', 87.446),
        ('vit_medium', 154.343),
        ('vit_large', 305.498),
        ('vit_xlarge', 533.695),
        ('wat_base', 86.079),
        ('wat_medium', 152.521),
        ('wat_large', 303.675),
        ('spt_base', 85.057),
        ('spt_medium', 151.158),
        ('spt_large', 302.202),
        ('t5_small', 19.038),
        ('t5_base', 85.194),
        ('bert_small', 19.078),
        ('bert_base', 85.301),
        ('linear', 0.616),
        ('i3d', 12.302),
        ('resnet2d_50', 23.555),
    ],
)
def test_towers(name, want):
    modality = next(
        m
        for m, names in {
            'video': ('vit', 'i3d'),
            'audio': ('wat', 'spt', 'res'),
            'text': ('t5', 'bert', 'linear'),
        }.items()
        if name.startswith(names)
    )
    assert millions(shapes(alone(modality, name)), modality) == want


@pytest.mark.parametrize(
    'name,backbone,head',
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
    variables = shapes(presets.model(name))
    if backbone:
        assert millions(variables) == backbone
    if head:
        assert (
            round(
                (count(variables['params']['head']) + count(variables['batch_stats']['head']))
                / 1e6,
                3,
            )
            == head
        )
    tables = [x['word_table'] for x in variables['params'].values() if 'word_table' in x]
    assert [t.shape for t in tables] == [(65536, 300)]


def test_presets_go_through_config_checks():
    for name in [*presets.MODELS, *presets.OFFICIAL]:
        c = default.get_config()
        c.model.update(presets.model(name))
        configs.check_fields(c, default.get_config())
    with pytest.raises(
        configs.ConfigError, match="presets.tower='vit_small': choose one of vit_base"
    ):
        presets.tower('vit_small')
