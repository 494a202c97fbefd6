"""The published runs: every variant passes the checks, holds the published values and builds (shapes only)."""
import math

import jax
import pytest

from configs import default
from vatt_jax import config as configs
from vatt_jax import optim
from vatt_jax.config import ConfigError
from vatt_jax.importers import table, vatt_tf
from vatt_jax.models import presets

FILES = [f'configs/vatt.py:{n}{o}' for n in presets.MODELS for o in ('', ',paper', ',synthetic')]
TASKS = ('k400', 'k600', 'k700', 'mit', 'audioset', 'imagenet')
TUNED = [f'configs/vatt_finetune.py:{task}{size}' for task in TASKS for size in ('', ',bbs', ',agnostic_medium')]
TUNED += [f'configs/vatt_finetune.py:demo{o}' for o in ('', ',20', ',5,scratch')]


@pytest.mark.parametrize('spec', FILES + TUNED)
def test_passes_the_checks(spec):
    c = configs.load(spec)
    configs.check_fields(c, default.get_config())
    optim.schedule(c.optimizer.schedule, c.steps)


def test_published_values():
    c = configs.load('configs/vatt.py:mbs')
    rate = optim.schedule(c.optimizer.schedule, c.steps)
    assert (c.steps, c.batch_size, c.optimizer.name, c.optimizer.clip) == (500_000, 2048, 'keras_adam', 0.0)
    assert abs(rate(5_000) - 1e-4) < 1e-9 and abs(rate(500_000) - 5e-5) < 1e-9
    paper = configs.load('configs/vatt.py:mbs,paper').optimizer.schedule
    assert (paper.name, paper.warmup) == ('warmup_quarter_cosine', 10_000)
    c = configs.load('configs/vatt_finetune.py:k400')
    o, rate = c.optimizer, optim.schedule(c.optimizer.schedule, c.steps)
    assert (o.name, o.clip, o.clip_paths, c.steps) == ('keras_sgd', 0.75, ('^model/',), 100_000)
    assert abs(rate(2_500) - 5e-3) < 1e-8 and rate(100_000) < 1e-9
    tested = c.evals.classification
    assert (tested.windows, tested.crops) == (4, 3)
    few = configs.load('configs/vatt_finetune.py:demo,20')
    assert few.data.train.playground.per_class == 20 and few.init_from and not configs.load('configs/vatt_finetune.py:demo,20,scratch').init_from
    with pytest.raises(ConfigError, match=r"demo option \(a number of labels, or scratch\)='lots'"):
        configs.load('configs/vatt_finetune.py:demo,lots')


@pytest.mark.parametrize('spec,label', [('configs/vatt.py:bbs', None), ('configs/vatt.py:agnostic_medium', None), ('configs/vatt.py:mmv', None),
                                        ('configs/vatt_finetune.py:audioset', 527), ('configs/vatt_finetune.py:imagenet,agnostic_medium', 1000)])
def test_builds(spec, label):
    c = configs.load(spec)
    shape = table.abstract_state(c, {'class': [str(i) for i in range(label)]} if label else {})
    leaves = jax.tree.leaves(shape.params['objective'])
    assert (sorted(x.shape[-1] for x in leaves) == [label, label]) if label else not leaves


def test_the_official_layout_covers_published_models():
    """Each parameter of ours is one of theirs, and the other way, for every size the release has."""
    tuned = [f'vatt_finetune.py:{t}' for t in ('k400,bbs', 'audioset,bbs', 'k400,agnostic_medium', 'audioset,agnostic_medium')]
    for name in [*(f'vatt.py:{n}' for n in ('bbs', 'mbs', 'lbs', 'agnostic_medium')), *tuned]:
        c = configs.load(f'configs/{name}')
        shape = table.abstract_state(c, {'class': ['a', 'b', 'c']} if name in tuned else {})
        entries = list(vatt_tf.layout(vatt_tf.filled(c), *((c.objective, 3) if name in tuned else ())))
        ours = table.variables(shape)
        assert {e.ours for e in entries} == set(ours)
        assert len({e.theirs for e in entries}) == len(entries)
        assert sum(math.prod(e.shape) for e in entries) == sum(x.size for x in ours.values())
