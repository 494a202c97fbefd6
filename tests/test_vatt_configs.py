"""The published runs: every variant passes the checks, holds the published values and builds (shapes only)."""

import math

import jax
import jax.numpy as jnp
import pytest

from configs import default
from vatt_jax import config as configs
from vatt_jax import evals, models, optim
from vatt_jax.config import ConfigError
from vatt_jax.importers import parameter_map, vatt_tf
from vatt_jax.inputs import preprocess
from vatt_jax.models import presets
from vatt_jax.rng import Rng

FILES = [
    f'configs/vatt.py:{n}{o}' for n in presets.MODELS for o in ('', ',paper', ',code', ',synthetic')
]
TASKS = ('k400', 'k600', 'k700', 'mit', 'audioset', 'imagenet')
TUNED = [
    f'configs/vatt_finetune.py:{task}{size}'
    for task in TASKS
    for size in ('', ',bbs', ',agnostic_medium', ',mmv', ',bbs,scratch')
]
PROBES = [
    f'configs/vatt_probes.py:{t}'
    for t in ('', 'ucf101', 'hmdb51,bbs,3', 'esc50,agnostic_medium,5', 'youcook2,lbs', 'msrvtt')
]
TUNED += [f'configs/vatt_finetune.py:demo{o}' for o in ('', ',20', ',5,scratch')]


@pytest.mark.parametrize('spec', FILES + TUNED + PROBES)
def test_passes_the_checks(spec):
    c = configs.load(spec)
    configs.check_fields(c, default.get_config())
    optim.schedule(c.optimizer.schedule, c.steps)
    assert all(evals.build(name, entry) for name, entry in c.evals.items()) and (
        c.evals or spec in FILES
    )


def test_probes_as_the_release_codes_them():
    load = lambda arg: configs.load(f'configs/vatt_probes.py:{arg}')
    c = load('esc50,bbs,4')
    head = c.evals.head
    assert (
        c.data.train.esc50.fold == 4
        and c.model.inputs.video.fps == 12.5
        and c.model.towers == configs.load('configs/vatt.py:bbs').model.towers
    )
    assert (head.stream, head.windows, head.solver, c.evals.svm.solver) == (
        'audio',
        4,
        'head',
        'svm',
    ) and 'passes' not in head
    assert load('hmdb51').evals.svm.folds == (
        ('fold1', 'test'),
        ('fold2', 'test'),
        ('fold3', 'test'),
    ) and not head.get('folds')
    assert {e.pool for e in load('msrvtt').evals.values()} == {'embeddings', 'similarities'}
    assert load('youcook2').evals.cosines.split == 'validation'
    with pytest.raises(ConfigError, match="hmdb51,mbs fold='4': choose one of 1, 2, 3"):
        load('hmdb51,mbs,4')
    with pytest.raises(ConfigError, match="msrvtt has no folds, got '1'; leave it out"):
        load('msrvtt,mbs,1')


def test_published_values():
    c = configs.load('configs/vatt.py:mbs')
    rate = optim.schedule(c.optimizer.schedule, c.steps)
    assert (c.steps, c.batch_size, c.optimizer.name, c.optimizer.clip) == (
        500_000,
        2048,
        'keras_adam',
        0.0,
    )
    assert abs(rate(5_000) - 1e-4) < 1e-9 and abs(rate(500_000) - 5e-5) < 1e-9
    paper = configs.load('configs/vatt.py:mbs,paper').optimizer.schedule
    assert (paper.name, paper.warmup) == ('warmup_quarter_cosine', 10_000)
    variants = [configs.load(f'configs/vatt.py:mbs{o}') for o in ('', ',paper', ',code')]
    assert [c.batch_size for c in variants] == [2048, 2048, 8] and variants[
        2
    ].optimizer == c.optimizer != variants[1].optimizer
    rate = optim.schedule(
        paper, 500_000
    )  # a quarter of a period falls fastest at its end: cos(pi / 4) of the way down at half of it
    assert (
        abs(rate(10_000) - 1e-4) < 1e-9
        and abs(rate(255_000) - (5e-5 + 5e-5 * math.cos(math.pi / 4))) < 1e-9
        and abs(rate(500_000) - 5e-5) < 1e-9
    )
    assert [
        configs.load(f'configs/vatt_finetune.py:k400,mbs{o}').batch_size for o in ('', ',code')
    ] == [64, 8]
    with pytest.raises(ConfigError, match='paper and code exclude each other'):
        configs.load('configs/vatt.py:mbs,paper,code')
    c = configs.load('configs/vatt_finetune.py:k400')
    o, rate = c.optimizer, optim.schedule(c.optimizer.schedule, c.steps)
    assert (o.name, o.clip, o.clip_paths, c.steps) == ('keras_sgd', 0.75, ('^model/',), 100_000)
    assert abs(rate(2_500) - 5e-3) < 1e-8 and rate(100_000) < 1e-9
    tested = c.evals.classification
    assert (tested.windows, tested.crops) == (4, 3)
    few = configs.load('configs/vatt_finetune.py:demo,20')
    assert (
        few.data.train.playground.per_class == 20
        and few.init_from
        and not configs.load('configs/vatt_finetune.py:demo,20,scratch').init_from
    )
    with pytest.raises(ConfigError, match=r"demo option \(a number of labels, or scratch\)='lots'"):
        configs.load('configs/vatt_finetune.py:demo,lots')


@pytest.mark.parametrize(
    'spec,label',
    [
        ('configs/vatt.py:bbs', None),
        ('configs/vatt.py:agnostic_medium', None),
        ('configs/vatt.py:mmv', None),
        ('configs/vatt_finetune.py:audioset', 527),
        ('configs/vatt_finetune.py:imagenet,agnostic_medium', 1000),
        ('configs/vatt_finetune.py:imagenet,mmv', 1000),
        ('configs/vatt_finetune.py:audioset,mmv', 527),
        ('configs/vatt_finetune.py:k400,mmv', 400),
    ],
)
def test_builds(spec, label):
    c = configs.load(spec)
    shape = parameter_map.abstract_state(
        c, {'class': [str(i) for i in range(label)]} if label else {}
    )
    leaves = jax.tree.leaves(shape.params['objective'])
    assert (sorted(x.shape[-1] for x in leaves) == [label, label]) if label else not leaves


def test_scratch_is_the_same_network_from_nothing():
    for spec, size in (
        ('k400,mbs,scratch', 'mbs'),
        ('imagenet,scratch', 'mbs'),
        ('audioset,bbs,scratch', 'bbs'),
    ):
        c, start = (
            configs.load(f'configs/vatt_finetune.py:{spec}'),
            configs.load(f'configs/vatt_finetune.py:{spec.split(",")[0]},{size}'),
        )
        assert (
            not c.init_from
            and start.init_from == f'runs/vatt_{size}'
            and c.model == start.model
            and c.optimizer == start.optimizer
        )
    with pytest.raises(ConfigError, match="k400,mbs option='scrath': choose one of scratch, code"):
        configs.load('configs/vatt_finetune.py:k400,mbs,scrath')


def test_an_image_keeps_all_its_patches_in_training():
    """One temporal patch of 14 × 14: DropToken keeps half of the table's 8 × 14 × 14 places. In a clip of 32 frames it drops half."""
    kept = {}
    for task in ('imagenet', 'k400'):
        c = configs.load(f'configs/vatt_finetune.py:{task},bbs')
        c.model.towers.video.layers = 1
        model = models.build(c.model)
        batch = preprocess.abstract(c.model.inputs, ('video',), 2, 'float32')
        spec = jax.eval_shape(lambda: Rng.create(0, 0, jnp.zeros(2)))

        def encode(batch, rng):
            init = model.init(jax.random.key(0), batch, train=False, rng=rng)  # noqa: B023
            return model.apply(
                init, 'video', batch['video'], train=True, rng=rng, features=True, method='encode'
            )  # noqa: B023

        kept[task] = jax.eval_shape(encode, batch, spec).tokens.shape[1]
    assert kept == {'imagenet': 196, 'k400': 784}


def test_the_official_layout_covers_published_models():
    """Each parameter of ours is one of theirs, and the other way, for every size the release has."""
    tuned = [
        f'vatt_finetune.py:{t}'
        for t in ('k400,bbs', 'audioset,bbs', 'k400,agnostic_medium', 'audioset,agnostic_medium')
    ]
    for name in [*(f'vatt.py:{n}' for n in ('bbs', 'mbs', 'lbs', 'agnostic_medium')), *tuned]:
        c = configs.load(f'configs/{name}')
        shape = parameter_map.abstract_state(c, {'class': ['a', 'b', 'c']} if name in tuned else {})
        entries = list(
            vatt_tf.layout(vatt_tf.filled(c), *((c.objective, 3) if name in tuned else ()))
        )
        ours = parameter_map.variables(shape)
        assert {e.ours for e in entries} == set(ours)
        assert len({e.theirs for e in entries}) == len(entries)
        assert sum(math.prod(e.shape) for e in entries) == sum(x.size for x in ours.values())
