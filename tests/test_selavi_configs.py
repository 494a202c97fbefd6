"""The self-labelling settings: every one passes the checks, and holds the published values."""

import chex
import jax
import pytest

from configs import default, selavi
from vatt_jax import config as configs
from vatt_jax import evals, models, objectives, optim
from vatt_jax.inputs import preprocess
from vatt_jax.parallel import sharding
from vatt_jax.training import train_state

DEMO_OPTIONS = (*selavi.INGREDIENTS, *selavi.METHODS, 'vatt', 'synthetic')
PUBLISHED_OPTIONS = (
    'vggsound',
    'kinetics',
    'kinetics_sound,code',
    'ave,sela',
    'ave,xdc',
    'ave,swav',
)
FINETUNE_OPTIONS = (
    'ucf101',
    'hmdb51,3',
    'ucf101,2,scratch',
    'demo',
    'demo,scratch',
)
SPECS = [
    'configs/selavi.py:demo',
    *(f'configs/selavi.py:demo,{option}' for option in DEMO_OPTIONS),
    *(f'configs/selavi.py:{option}' for option in PUBLISHED_OPTIONS),
    *(f'configs/selavi_finetune.py:{option}' for option in FINETUNE_OPTIONS),
]


@pytest.mark.parametrize('spec', SPECS)
def test_passes_the_checks(spec):
    c = configs.load(spec)
    configs.check_fields(c, default.get_config())
    optim.schedule(c.optimizer.schedule, c.steps)
    objective = objectives.build(c.objective)
    for name, entry in c.evals.items():
        evals.build(name, entry)

    towers = set(c.model.towers)
    views = {name for name, _ in c.data.views}
    modalities = {name.split('.')[0] for name in views}
    assert modalities <= towers
    assert set(objective.streams()) <= towers | views


def test_the_objective_holds_the_published_values():
    c = configs.load('configs/selavi.py:vggsound')
    published = {
        'clusters': 309,
        'heads': 10,
        'groups': 2,
        'hidden': 512,
        'dropout': 0.3,
        'strength': 20.0,
        'refreshes': 100,
        'power': 1.5,
        'published_prior': False,
        'unit_logits': False,
    }
    assert {name: c.objective[name] for name in published} == published
    assert c.batch_size == 1024
    assert c.steps == 200 * 166
    assert configs.load('configs/selavi.py:vggsound,code').objective.published_prior


def test_the_rate_is_warmed_up_to_the_published_one():
    c = configs.load('configs/selavi.py:vggsound')
    rate = optim.schedule(c.optimizer.schedule, c.steps)
    assert abs(rate(830) - 0.32) < 1e-6
    assert abs(rate(1660) - 0.64) < 1e-6
    assert abs(rate(33_000) - 0.64) < 1e-6


@pytest.mark.parametrize(
    'dataset, clusters',
    [
        ('kinetics', 400),
        ('kinetics_sound', 32),
        ('ave', 28),
    ],
)
def test_there_are_as_many_clusters_as_classes(dataset, clusters):
    assert configs.load(f'configs/selavi.py:{dataset}').objective.clusters == clusters


@pytest.mark.parametrize(
    'method, targets',
    [
        ('xdc', 'other'),
        ('sdc', 'own'),
        ('mdc', 'both'),
        ('cdc', 'joint'),
    ],
)
def test_a_method_predicts_its_targets(method, targets):
    assert configs.load(f'configs/selavi.py:demo,{method}').objective.targets == targets


@pytest.mark.parametrize(
    'options, message',
    [
        ('demo,two_heads', "expected an option of one_head, .* got 'two_heads'"),
        ('vgg', "expected one of demo, vggsound, .* got 'vgg'"),
        ('demo,xdc,swav', 'expected at most one method, got xdc, swav'),
    ],
)
def test_options_that_do_not_exist_or_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        configs.load(f'configs/selavi.py:{options}')


def test_finetuning_holds_the_published_values():
    c = configs.load('configs/selavi_finetune.py:ucf101,2')
    epoch = 2980
    assert c.steps == 12 * epoch
    assert c.data.train.ucf101.path == 'data/ucf101/records'
    assert c.data.train.ucf101.fold == 2
    assert c.optimizer.weight_decay == 5e-3
    assert c.optimizer.rates == ((r'^objective/', 10.0),)
    assert c.evals.classification.windows == 10
    assert c.evals.classification.crops == 3

    rate = optim.schedule(c.optimizer.schedule, c.steps)
    for step, expected in (
        (epoch, 1e-3),
        (2 * epoch, 2e-3),
        (6 * epoch - 1, 2e-3),
        (6 * epoch, 1e-4),
        (10 * epoch - 1, 1e-4),
        (10 * epoch, 5e-6),
    ):
        assert float(rate(step)) == pytest.approx(expected, rel=1e-4)


def test_the_model_has_the_published_size():
    """Shapes only.

    R(2+1)D-18 and ResNet-9 have 31.3 M and 4.9 M parameters without classifiers. Each of two times
    ten heads has a hidden layer of 512 with its normalisation, and a classifier of 512 x K.
    """
    c = configs.load('configs/selavi.py:vggsound')
    model = models.build(c.model, c.compute_dtype)
    objective = objectives.build(c.objective)
    batch = preprocess.abstract(c.model.inputs, objective.streams(), 2, c.compute_dtype)
    chex.assert_shape(batch['audio']['data'], (2, 99, 257))
    chex.assert_shape(batch['video']['data'], (2, 30, 112, 112, 3))

    spec = train_state.abstract(model, batch, 170_752, {})
    mesh = sharding.make_mesh({'replica': 1})
    _, state, *_ = train_state.create(c, model, objective, spec, mesh)
    head = 512 * 512 + 2 * 512 + 513 * 309
    assert count(state.params['objective']) == 20 * head
    assert count(state.params['model']) == pytest.approx(31.3e6 + 4.9e6, rel=0.01)


def count(tree):
    """Number of elements in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
