"""MMV's graphs against their definition, what each pair's loss may move, and the runs' configs."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

import data_pipelines
import vatt_jax
from configs import default
from vatt_jax import config as configs
from vatt_jax import optim
from vatt_jax.config import ConfigError
from vatt_jax.models import layers, presets
from vatt_jax.models.common_space import GRAPHS, CommonSpaces
from vatt_jax.models.multimodal import NETS
from vatt_jax.models.towers import i3d, resnet_v2
from vatt_jax.training import loop

B, K = 5, 3
WIDTHS = {'video': 7, 'audio': 6, 'text': 4}
FAC = {'mmv_fac': 'mmv_fac', 'mmv_fac_relu': 'mmv_fac_relu', 'mmv_fac_bnrelu': 'mmv_fac_bnrelu'}
VALID = {
    'video': np.array([1, 1, 0, 1, 1], bool),
    'audio': np.ones(B, bool),
    'text': np.ones(B, bool),
}


def pooled(*modalities):
    noise = np.random.default_rng(1)
    of = {
        m: noise.normal(size=(B, *((K,) if m == 'text' else ()), w)).astype(np.float32)
        for m, w in WIDTHS.items()
    }
    return {m: of[m] for m in modalities or WIDTHS}


def head(**config):
    """(module, variables without a 0 or 1 that would hide something)."""
    module, x = CommonSpaces(config), pooled()
    variables = meta.unbox(jax.jit(lambda: module.init(jax.random.key(0), x, VALID, False))())
    noise = np.random.default_rng(0)
    stir = lambda v: (
        v
        if v.dtype == jnp.int32
        else np.abs(v + 0.3 * noise.normal(size=v.shape).astype(np.float32))
        if v.ndim == 1
        else v
    )
    return module, jax.tree.map(stir, dict(variables))


def f64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def parts(variables):
    p, s = f64(variables['params']), f64(variables['batch_stats'])
    dense = lambda name, x: x @ p[name]['kernel'] + p[name].get('bias', 0)
    norm = lambda name, x: (
        (x - s[name]['mean']) / np.sqrt(s[name]['var'] + 1e-5) * p[name]['scale'] + p[name]['bias']
    )
    return p, dense, norm


def mlp(dense, norm, name, x):
    return norm(
        f'{name}_norm',
        dense(name, np.maximum(norm(f'{name}_hidden_norm', dense(f'{name}_hidden', x)), 0)),
    )


@pytest.mark.parametrize('graph', FAC)
def test_fac_is_its_definition(graph):
    module, variables = head(name=graph, va=5, vat=3)
    got = module.apply(variables, pooled(), VALID, False)
    p, dense, norm = parts(variables)
    x = f64(pooled())
    between = {
        'mmv_fac': lambda y: y,
        'mmv_fac_relu': lambda y: np.maximum(y, 0),
        'mmv_fac_bnrelu': lambda y: np.maximum(norm('va_norm', y), 0),
    }[graph]
    coarse = lambda y: norm('va_to_vat_norm', dense('va_to_vat', between(y)))
    video, audio = mlp(dense, norm, 'video_va', x['video']), dense('audio_va', x['audio'])
    want = {
        'va': {'video': video, 'audio': audio},
        'vat': {
            'video': coarse(video),
            'audio': coarse(audio),
            'text': dense('text_vat', x['text']),
        },
    }
    assert {s: set(m) for s, m in got.items()} == {s: set(m) for s, m in want.items()}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)
    linear = {n: 'bias' in v for n, v in p.items() if 'kernel' in v}
    assert linear == {
        'video_va_hidden': True,
        'video_va': False,
        'audio_va': True,
        'va_to_vat': True,
        'text_vat': True,
    }


def gradients(module, variables, space, *streams):
    """Names of the parameters that a loss on `streams` in `space` moves in training, and the new statistics."""

    def loss(params):
        out, new = module.apply(
            {**variables, 'params': params}, pooled(), VALID, True, mutable=['batch_stats']
        )
        return sum(jnp.sum(jnp.sin(out[space][s])) for s in streams), new['batch_stats']

    grads, new = jax.grad(loss, has_aux=True)(variables['params'])
    return {
        name for name, g in grads.items() if any(np.abs(x).max() > 1e-9 for x in jax.tree.leaves(g))
    }, new


def test_in_training_fac_takes_only_video_to_the_coarse_space():
    module, variables = head(name='mmv_fac_relu', va=5, vat=3)
    out, both = module.apply(variables, pooled(), VALID, True, mutable=['batch_stats'])
    assert set(out['vat']) == {'video', 'text'} and set(out['va']) == {'video', 'audio'}
    # the shared norm's statistics are those of valid video rows, whether there is sound or not
    _, alone = module.apply(variables, pooled('video'), VALID, True, mutable=['batch_stats'])
    chex.assert_trees_all_equal(both, alone)
    assert int(both['batch_stats']['va_to_vat_norm']['count']) == 1
    video = {'video_va_hidden', 'video_va_hidden_norm', 'video_va', 'video_va_norm'}
    assert gradients(module, variables, 'va', 'video', 'audio')[0] == video | {'audio_va'}
    assert gradients(module, variables, 'vat', 'video', 'text')[0] == video | {
        'va_to_vat',
        'va_to_vat_norm',
        'text_vat',
    }


def test_disjoint_heads_share_nothing():
    module, variables = head(name='mmv_disjoint', va=5, vt=4, at=3)
    got = module.apply(variables, pooled(), VALID, False)
    _, dense, norm = parts(variables)
    x = f64(pooled())
    for space in ('va', 'vt'):
        np.testing.assert_allclose(
            got[space]['video'],
            mlp(dense, norm, f'video_{space}', x['video']),
            rtol=1e-3,
            atol=1e-4,
        )
    for m, space in (('audio', 'va'), ('text', 'vt'), ('audio', 'at'), ('text', 'at')):
        np.testing.assert_allclose(got[space][m], dense(f'{m}_{space}', x[m]), rtol=1e-4, atol=1e-5)
    assert {s: sorted(m) for s, m in got.items()} == {
        'va': ['audio', 'video'],
        'vt': ['text', 'video'],
        'at': ['audio', 'text'],
    }
    moved = [gradients(module, variables, s, *got[s])[0] for s in ('va', 'vt', 'at')]
    assert (
        moved[2] == {'audio_at', 'text_at'}
        and not moved[0] & moved[1]
        and all(n.startswith(('video_vt', 'text_vt')) for n in moved[1])
    )


def test_shared_has_one_head_for_each_modality():
    module, variables = head(name='mmv_shared', joint=5)
    got = module.apply(variables, pooled(), VALID, False)
    _, dense, norm = parts(variables)
    x = f64(pooled())
    np.testing.assert_allclose(
        got['joint']['video'], mlp(dense, norm, 'video_joint', x['video']), rtol=1e-3, atol=1e-4
    )
    for m in ('audio', 'text'):
        np.testing.assert_allclose(got['joint'][m], dense(f'{m}_joint', x[m]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'config,spaces,left_out',
    [
        ({'name': 'mmv_fac_relu', 'va': 5}, {'va': {'video', 'audio'}}, 'va_to_vat'),
        ({'name': 'mmv_disjoint', 'vt': 5}, {'vt': {'video', 'text'}}, 'video_va'),
        (
            {'name': 'mmv_disjoint', 'va': 5, 'vt': 5},
            {'va': {'video', 'audio'}, 'vt': {'video', 'text'}},
            'text_at',
        ),
        ({'name': 'fac', 'va': 5}, {'va': {'video', 'audio'}}, 'video_vat'),
    ],
)
def test_a_space_without_a_width_is_left_out(config, spaces, left_out):
    module, variables = head(**config)
    got = module.apply(variables, pooled(), VALID, False)
    assert {s: set(m) for s, m in got.items()} == spaces and left_out not in variables['params']


@pytest.mark.parametrize(
    'config,told',
    [
        (
            {'name': 'mmv_fac_relu', 'va': 5, 'vta': 3},
            "config.model.head.vta=3: the graph 'mmv_fac_relu' has the spaces va, vat",
        ),
        ({'name': 'mmv_shared'}, "no width for any space of the graph 'mmv_shared'; it has joint"),
        (
            {'name': 'mmv_fac_relu', 'vat': 5},
            "config.model.head.va is missing: video reaches other spaces of 'mmv_fac_relu' through that one",
        ),
        ({'name': 'mmv'}, "config.model.head.name='mmv': choose one of fac, joint, mmv_shared"),
    ],
)
def test_mistakes_are_sentences(config, told):
    with pytest.raises(ConfigError) as error:
        CommonSpaces(config).init(jax.random.key(0), pooled(), VALID, False)
    assert told in str(error.value)


# ---- through the loop
def tiny(video, head, pairs, audio=None, text=False):
    from tests import tiny as tests_tiny

    c = tests_tiny.config(steps=2, optimizer__schedule__warmup=1, batch_size=8)
    c.model.inputs.video.range = (0.0, 1.0)
    c.model.towers = {'video': video}
    if audio:
        c.model.towers.audio = audio
        c.model.inputs.audio.mel = {
            **presets.MMV_MEL,
            'bins': 8,
            'window': 64,
            'hop': 32,
            'low': 20.0,
            'high': 900.0,
        }
    if text:
        c.model.towers.text = {
            'name': 'linear',
            'vocab': 0,
            'word_width': 8,
            'width': 12,
            'init': 'fan_in',
        }
    c.model.head = head
    c.objective = {'name': 'contrastive', 'pairs': pairs}
    return c


@pytest.mark.parametrize(
    'case', ['tsm', *(pytest.param(c, marks=pytest.mark.slow) for c in ('s3d', 'r2plus1d'))]
)
def test_every_tower_trains(case, tmp_path, monkeypatch):
    """Two steps; words are missing in the odd rows. Everything that a pair reads moves, and the loss is the weighted mean of the pairs'.
    Fewer blocks than published: compiling is what takes the time."""
    monkeypatch.setattr(i3d, 'MIXED', {k: i3d.MIXED[k] for k in ('mixed_3b', 'mixed_4b')})
    monkeypatch.setitem(resnet_v2.DEPTHS, 18, ((1, 1), False, (64, 128)))
    c = {
        's3d': lambda: tiny(
            {'name': 's3d', 'multiplier': 0.05},
            {'name': 'mmv_fac_relu', 'va': 8, 'vat': 4},
            (('video', 'audio', 'va', 1.0), ('video', 'text', 'vat', 3.0)),
            {'name': 'resnet2d_v2', 'depth': 18, 'multiplier': 0.1},
            True,
        ),
        'tsm': lambda: tiny(
            {'name': 'tsm_resnet', 'depth': 18, 'multiplier': 0.1},
            {'name': 'mmv_shared', 'joint': 8},
            (('video', 'audio', 'joint', 1.0),),
            {'name': 'resnet9', 'multiplier': 0.1},
        ),
        'r2plus1d': lambda: tiny(
            {'name': 'r2plus1d', 'multiplier': 0.1},
            {'name': 'mmv_disjoint', 'vt': 8},
            (('video', 'text', 'vt', 1.0),),
            text=True,
        ),
    }[case]()
    data = data_pipelines.open(c)
    batches = data.train

    def some_without_words(*args, **kw):
        stream = batches(*args, **kw)

        class Iterator:
            close = stream.close

            def __next__(self):
                batch = next(stream)
                there = np.arange(8) % 2 == 0
                if 'text' in batch:
                    text = batch['text']
                    batch['text'] = {
                        **text,
                        'valid': text['valid'] & there,
                        'mask': text['mask'] & there[:, None],
                        'data': text['data'] * there[:, None, None],
                    }
                return batch

        return Iterator()

    data.train = some_without_words
    loop.train(c, data, tmp_path, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    line = [x for x in lines if 'loss' in x][-1]
    weights = {f'loss/{a}-{b}': w for a, b, _, w in c.objective.pairs}
    assert line['skipped'] == 0 and line['loss'] == pytest.approx(
        sum(w * line[k] for k, w in weights.items()) / sum(weights.values()), rel=1e-4
    )
    built = loop.build(c, data)
    from vatt_jax.training import checkpoint

    moved = jax.tree.map(
        lambda a, b: bool(np.any(a != np.asarray(b))),
        checkpoint.read_model(checkpoint.find(tmp_path))['params'],
        built.init().params['model'],
    )
    still = [
        p
        for p, m in zip(jax.tree.leaves(optim.paths(moved)), jax.tree.leaves(moved))
        if not m and 'word_table' not in p
    ]
    assert not still, still
    if case == 'tsm':
        out = vatt_jax.load(tmp_path).embed(
            video=np.zeros((4, 16, 16, 3), np.uint8), audio=np.zeros(1024, np.int16)
        )
        assert len(out) == 2 and all(
            set(v) == {'pooled', 'joint'} and np.isfinite(v['joint']).all() for v in out.values()
        )


def test_a_pair_that_training_does_not_compute_is_a_sentence():
    from vatt_jax.objectives.contrastive import Contrastive

    module, variables = head(name='mmv_fac_relu', va=5, vat=3)

    class Model:
        @staticmethod
        def apply(*_, **kw):
            return module.apply(variables, pooled(), VALID, True, mutable=['batch_stats'])

    with pytest.raises(
        ConfigError,
        match="no 'audio' in space 'vat' in training; it has video in va, audio in va, video in vat, text in vat",
    ):
        Contrastive({'pairs': (('audio', 'text', 'vat', 1.0),)}).compute_loss(
            Model, {}, {}, {}, {}, {}, None
        )


# ---- configs
NAMES = [
    f'{b}_{g}_{m}'
    for b in ('demo', *presets.MMV_BACKBONES)
    for g in presets.MMV_GRAPHS
    for m in presets.MMV_SUBSETS
]


@pytest.mark.parametrize('option', ['', ',synthetic'])
def test_configs_pass_the_checks(option):
    for name in NAMES:
        c = configs.load(f'configs/mmv.py:{name}{option}')
        configs.check_fields(c, default.get_config())
        optim.schedule(c.optimizer.schedule, c.steps)
        known = GRAPHS[c.model.head.name].spaces()
        assert set(c.model.head) - {'name'} <= set(known)
        for first, second, space, _ in c.objective.pairs:
            assert (
                space in c.model.head
                and {first, second} <= set(c.model.towers)
                and name.rsplit('_')[-1] in ('vat', f'v{second[0]}')
            )
        assert c.data.source == ('synthetic' if option else 'records')


def test_published_values():
    c = configs.load('configs/mmv.py:s3d_fac_vat')
    rate = optim.schedule(c.optimizer.schedule, c.steps)
    assert (c.steps, c.batch_size, c.optimizer.name, c.optimizer.weight_decay) == (
        500_000,
        4096,
        'adam',
        0.0,
    )
    assert (
        abs(rate(5_000) - 2e-3) < 1e-9 and rate(500_000) < 1e-9 and abs(rate(2_500) - 1e-3) < 1e-9
    )
    assert c.model.head.to_dict() == {'name': 'mmv_fac_relu', 'va': 512, 'vat': 256}
    assert c.model.inputs.video.to_dict() == {
        'frames': 32,
        'size': 200,
        'fps': 10.0,
        'range': (0.0, 1.0),
    }
    assert {s: d.share for s, d in c.data.train.items()} == {'howto100m': 0.5, 'audioset': 0.5}
    alone = configs.load('configs/mmv.py:tsm50_fac_vat,howto100m')
    assert list(alone.data.train) == ['howto100m'] and [p[3] for p in alone.objective.pairs] == [
        1.0,
        10.0,
    ]


@pytest.mark.parametrize(
    'backbone,places',
    [('s3d', (4, 4, 4)), ('s3d_pixels', (4, 4, 4)), ('tsm50', (8, 1, 1)), ('r2plus1d', (1, 2, 2))],
)
def test_a_demo_network_ends_on_several_places(backbone, places, monkeypatch):
    """With the four pools of the published S3D, eight frames of 32 pixels are one place from mixed_5b on, and 600 steps taught it next to nothing."""
    for init in layers.INITS:  # cheaper to trace
        monkeypatch.setitem(layers.INITS, init, jax.nn.initializers.zeros)
    m = configs.load(f'configs/mmv.py:demo_fac_vat,{backbone}').model
    fields = m.towers.video.to_dict()
    module = NETS[fields.pop('name')][1](**fields)
    x = jax.ShapeDtypeStruct(
        (2, m.inputs.video.frames, m.inputs.video.size, m.inputs.video.size, 3), jnp.float32
    )
    (_, last), _ = jax.eval_shape(
        lambda x: module.init_with_output(jax.random.key(0), x, jnp.ones(2, bool), False), x
    )
    assert last.shape[1:-1] == places


@pytest.mark.parametrize(
    'name,told',
    [
        ('s3d_fuc_vat', "graph='fuc': choose one of fac"),
        ('s3d_fac_tv', "modalities='tv': choose one of va, vt, vat"),
        ('s3e_fac_vat', "backbone='s3e': choose one of demo, s3d"),
        ('s3d_fac_vat,tsm50', "option='tsm50'"),
    ],
)
def test_an_unknown_name_is_a_sentence(name, told):
    with pytest.raises(ConfigError) as error:
        configs.load(f'configs/mmv.py:{name}')
    assert told in str(error.value)
