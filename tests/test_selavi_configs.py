"""The self-labelling settings: every one passes the checks, and holds the published values."""

import jax
import pytest

from configs import default, selavi
from vatt_jax import config as configs
from vatt_jax import evals, models, objectives, optim
from vatt_jax.inputs import preprocess
from vatt_jax.parallel import sharding
from vatt_jax.training import train_state

DEMO = [
    'configs/selavi.py:demo',
    *(
        f'configs/selavi.py:demo,{o}'
        for o in (*selavi.INGREDIENTS, *selavi.METHODS, 'vatt', 'synthetic')
    ),
]
PUBLISHED = [
    f'configs/selavi.py:{o}'
    for o in ('vggsound', 'kinetics', 'kinetics_sound,code', 'ave,sela', 'ave,xdc', 'ave,swav')
]
TUNED = [
    f'configs/selavi_finetune.py:{o}'
    for o in ('ucf101', 'hmdb51,3', 'ucf101,2,scratch', 'demo', 'demo,scratch')
]


@pytest.mark.parametrize('spec', DEMO + PUBLISHED + TUNED)
def test_passes_the_checks(spec):
    c = configs.load(spec)
    configs.check_fields(c, default.get_config())
    optim.schedule(c.optimizer.schedule, c.steps)
    objective = objectives.build(c.objective)
    for name, entry in c.evals.items():
        evals.build(name, entry)
    made = {name for name, _ in c.data.views}
    assert set(objective.streams()) <= set(c.model.towers) | made and {
        name.split('.')[0] for name in made
    } <= set(c.model.towers)


def test_published_values():
    c = configs.load('configs/selavi.py:vggsound')
    o = c.objective
    assert (
        o.clusters,
        o.heads,
        o.groups,
        o.hidden,
        o.dropout,
        o.strength,
        o.refreshes,
        o.power,
    ) == (309, 10, 2, 512, 0.3, 20.0, 100, 1.5)
    assert (
        (c.batch_size, c.steps) == (1024, 200 * 166) and not o.published_prior and not o.unit_logits
    )
    assert configs.load('configs/selavi.py:vggsound,code').objective.published_prior
    rate = optim.schedule(c.optimizer.schedule, c.steps)
    assert (
        abs(rate(1660) - 0.64) < 1e-6
        and abs(rate(33_000) - 0.64) < 1e-6
        and abs(rate(830) - 0.32) < 1e-6
    )
    assert [
        configs.load(f'configs/selavi.py:{d}').objective.clusters
        for d in ('kinetics', 'kinetics_sound', 'ave')
    ] == [400, 32, 28]
    assert [
        configs.load(f'configs/selavi.py:demo,{m}').objective.targets
        for m in ('xdc', 'sdc', 'mdc', 'cdc')
    ] == ['other', 'own', 'both', 'joint']
    with pytest.raises(ValueError, match="expected an option of one_head, .* got 'two_heads'"):
        configs.load('configs/selavi.py:demo,two_heads')
    with pytest.raises(ValueError, match="expected one of demo, vggsound, .* got 'vgg'"):
        configs.load('configs/selavi.py:vgg')

    c = configs.load('configs/selavi_finetune.py:ucf101,2')
    rate, epoch = optim.schedule(c.optimizer.schedule, c.steps), 2980
    assert (
        c.steps == 12 * epoch
        and c.data.train.ucf101.path == 'data/ucf101_2/records'
        and c.optimizer.weight_decay == 5e-3
    )
    for step, want in (
        (epoch, 1e-3),
        (2 * epoch, 2e-3),
        (6 * epoch - 1, 2e-3),
        (6 * epoch, 1e-4),
        (10 * epoch - 1, 1e-4),
        (10 * epoch, 5e-6),
    ):
        assert float(rate(step)) == pytest.approx(want, rel=1e-4)
    assert c.optimizer.rates == ((r'^objective/', 10.0),) and (
        c.evals.classification.windows,
        c.evals.classification.crops,
    ) == (10, 3)


def test_builds():
    """Shapes only. Parameters of R(2+1)D-18 and ResNet-9 as published, without classifiers: 31.3 M and 4.9 M; heads 512 x 512 and 512 x K."""
    c = configs.load('configs/selavi.py:vggsound')
    model, objective = models.build(c.model, c.compute_dtype), objectives.build(c.objective)
    batch = preprocess.abstract(c.model.inputs, objective.streams(), 2, c.compute_dtype)
    assert batch['audio']['data'].shape == (2, 99, 257) and batch['video']['data'].shape == (
        2,
        30,
        112,
        112,
        3,
    )
    spec = train_state.abstract(model, batch, 170_752, {})
    params = train_state.create(c, model, objective, spec, sharding.make_mesh({'replica': 1}))[
        1
    ].params
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert count(params['objective']) == 20 * (512 * 512 + 2 * 512 + 513 * 309)
    assert count(params['model']) == pytest.approx(31.3e6 + 4.9e6, rel=0.01)


def test_two_methods_are_refused():
    with pytest.raises(ValueError, match='expected at most one method, got xdc, swav'):
        configs.load('configs/selavi.py:demo,xdc,swav')
