"""The GDT settings: every one passes the checks, and holds the published values."""

import chex
import jax
import pytest

from configs import default, gdt
from vatt_jax import config as configs
from vatt_jax import models, objectives, optim
from vatt_jax.inputs import preprocess
from vatt_jax.models import presets
from vatt_jax.objectives.transformations import HYPOTHESES
from vatt_jax.parallel import sharding
from vatt_jax.training import loop, train_state

SPECS = [
    'demo',
    *(f'demo,h{number}' for number in HYPOTHESES),
    'demo,synthetic',
    'demo,h2,redrawn',
    *gdt.DATASETS,
    'kinetics,h9,code',
    'howto100m,h7',
]


@pytest.mark.parametrize('spec', SPECS)
def test_passes_the_checks_with_the_views_of_its_hypothesis(spec):
    c = configs.load(f'configs/gdt.py:{spec}')
    configs.check_fields(c, default.get_config())
    made = [name for name, _ in (*c.data.views, *c.augment.mirrored)]
    assert {*c.objective.modalities, *made} == set(objectives.build(c.objective).streams())


@pytest.mark.parametrize('spec', ['demo', 'howto100m,h7'])
def test_can_be_built(spec):
    c = configs.load(f'configs/gdt.py:{spec}')
    c.mesh.replica = 1
    loop.check(c)


def test_the_objective_and_the_optimizer_hold_the_published_values():
    c = configs.load('configs/gdt.py:kinetics')
    objective = objectives.build(c.objective).config
    published = {
        'width': 256,
        'hidden': 512,
        'dropout': 0.3,
        'temperature': 0.07,
        'shift': 'distinctive',
        'reversal': 'distinctive',
        'replicas': 1,
        'published_negatives': False,
    }
    assert {name: objective[name] for name in published} == published
    assert c.batch_size == 512
    epoch = 451
    assert c.steps == 200 * epoch
    rate = optim.schedule(c.optimizer.schedule, c.steps)
    assert float(rate(5 * epoch)) == pytest.approx(0.32)
    assert float(rate(10 * epoch)) == pytest.approx(0.64)
    assert float(rate(199 * epoch)) == pytest.approx(0.64)
    assert (c.optimizer.momentum, c.optimizer.weight_decay) == (0.9, 1e-5)

    code = configs.load('configs/gdt.py:kinetics,code').objective
    assert (code.published_negatives, code.replicas) == (True, 64)


def test_the_model_has_the_published_size():
    """Shapes only: R(2+1)D-18, ResNet-9 and two heads of 512-512-256, on 30 frames and 40 bands."""
    c = configs.load('configs/gdt.py:kinetics')
    model = models.build(c.model, c.compute_dtype)
    objective = objectives.build(c.objective)
    batch = preprocess.abstract(c.model.inputs, objective.streams(), 2, c.compute_dtype)
    chex.assert_shape(batch['audio.second_reversed']['data'], (2, 99, 40))
    chex.assert_shape(batch['video']['data'], (2, 30, 112, 112, 3))
    spec = train_state.abstract(model, batch, 230_976, {})
    _, state, *_ = train_state.create(c, model, objective, spec, sharding.make_mesh({'replica': 1}))
    head = 512 * 512 + 2 * 512 + 513 * 256
    assert count(state.params['objective']) == 2 * head
    assert count(state.params['model']) == pytest.approx(31.3e6 + 4.9e6, rel=0.01)


def count(tree):
    """Number of elements in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_words_are_those_of_word2vec():
    c = configs.load('configs/gdt.py:howto100m')
    assert c.batch_size == 12 * 64
    assert set(c.model.towers) == {'video', 'text'}
    assert c.model.towers.text.to_dict() == presets.tower('mmv_words')
    assert (c.model.inputs.text.words, c.model.inputs.text.candidates) == (20, 1)
    with pytest.raises(configs.ConfigError, match="with 'text', which has no direction of time"):
        configs.load('configs/gdt.py:howto100m,h6')


@pytest.mark.parametrize(
    'options, message',
    [
        ('demo,h10', "expected an option of h1, .* got 'h10'"),
        ('imagenet', "expected one of demo, kinetics, .* got 'imagenet'"),
        ('kinetics,h1,h2', 'expected at most one hypothesis, got h1, h2'),
        ('kinetics,synthetic', "expected an option of .* got 'synthetic'"),
    ],
)
def test_options_that_do_not_exist_or_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        configs.load(f'configs/gdt.py:{options}')
