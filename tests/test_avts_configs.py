"""The settings of AVTS: every one passes the checks, and the curriculum is the published one."""

import pytest

import data_pipelines
from configs import avts, default
from vatt_jax import config as configs
from vatt_jax import evals, objectives
from vatt_jax.training import loop

SPECS = [
    f'configs/avts.py:{",".join([name, *options])}'
    for name, known in avts.OPTIONS.items()
    for options in ([], *[[option] for option in known])
]


@pytest.mark.parametrize('spec', SPECS)
def test_passes_the_checks(spec):
    c = configs.load(spec)
    configs.check_fields(c, default.get_config())
    for name, entry in c.evals.items():
        evals.build(name, entry)
    objective = objectives.build(c.objective)
    views = {name for name, _ in c.data.views}
    assert set(objective.streams()) == {'video', 'audio'} | views


@pytest.mark.parametrize('name', avts.OPTIONS)
def test_easy_negatives_alone_for_fifty_of_ninety_epochs(name):
    c = configs.load(f'configs/avts.py:{name}')
    (start, first), (change, second) = c.objective.curriculum
    assert (start, first, second) == (0, (1.0, 0.0, 0.0), (0.75, 0.25, 0.0))
    assert change == c.steps * 50 // 90
    assert c.objective.get('margin', 0.99) == 0.99


def test_options_choose_the_negatives():
    easy = configs.load('configs/avts.py:demo,no_curriculum')
    assert easy.objective.curriculum == ((0, (1.0, 0.0, 0.0)),)
    hard = configs.load('configs/avts.py:demo,hard_only')
    assert hard.objective.curriculum == ((0, (0.0, 1.0, 0.0)),)


@pytest.mark.parametrize(
    'spec, words',
    [
        ('howto100m', 'choose one of demo, kinetics'),
        ('demo,mc2', 'no_curriculum, hard_only, synthetic'),
        ('demo,no_curriculum,hard_only', 'expected one of no_curriculum and hard_only, got both'),
    ],
)
def test_mistakes_are_named(spec, words):
    with pytest.raises(configs.ConfigError, match=words):
        configs.load(f'configs/avts.py:{spec}')


def test_the_model_reads_the_inputs_of_the_demo():
    c = configs.load('configs/avts.py:demo,synthetic')
    built = loop.build(c, data_pipelines.open(c))
    embeddings = built.outputs.spaces['va']
    assert {stream: x.shape for stream, x in embeddings.items()} == {
        'video': (64, 128),
        'audio': (64, 128),
        'audio.shifted': (64, 128),
    }
