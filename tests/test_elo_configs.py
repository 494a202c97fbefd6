"""The settings of ELo: every one passes the checks, and has the tasks of its modalities."""

import jax
import pytest

from configs import default, elo
from vatt_jax import config as configs
from vatt_jax import evals, models, objectives
from vatt_jax.inputs import preprocess
from vatt_jax.training import train_state

TASKS = {
    'video': {'reversed_video', 'shuffled_video'},
    'audio': {'aligned_audio', 'reversed_audio', 'shuffled_audio', 'distilled_audio'},
    'flow': {'aligned_flow', 'reversed_flow', 'shuffled_flow', 'distilled_flow'},
}


@pytest.mark.parametrize(
    'spec, modalities',
    [
        ('demo', ('video', 'audio')),
        ('demo,synthetic', ('video', 'audio')),
        ('demo,flow', ('video', 'audio', 'flow')),
        *[(name, ('video', 'audio', 'flow')) for name in elo.DATASETS],
    ],
)
def test_passes_the_checks(spec, modalities):
    c = configs.load(f'configs/elo.py:{spec}')
    configs.check_fields(c, default.get_config())
    for name, entry in c.evals.items():
        evals.build(name, entry)
    objective = objectives.build(c.objective)
    assert set(objective.streams()) == set(modalities)
    assert set(objective.tasks) == set().union(*(TASKS[name] for name in modalities))
    assert {c.objective.weights[name] for name in objective.tasks if 'distilled' in name} == {0.1}


@pytest.mark.parametrize('name, width', [('kinetics,stages', 2048), ('demo,flow,stages', 128)])
def test_features_have_one_width(name, width):
    """Distillation would be refused otherwise."""
    c = configs.load(f'configs/elo.py:{name}')
    objective = objectives.build(c.objective)
    inputs = preprocess.abstract(c.model.inputs, objective.streams(), 2, c.compute_dtype)
    spec = train_state.abstract(models.build(c.model, c.compute_dtype), inputs, 2, {})
    params, _ = jax.eval_shape(lambda key: objective.init(key, spec), jax.random.key(0))
    assert params['reversed_flow']['kernel'].value.shape == (width, 2)
    assert params['distilled_flow'] == params['distilled_audio_2'] == {}
    assert len(objective.tower_stages()) == 6


def test_a_weight_is_a_field_of_the_command_line():
    c = configs.load('configs/elo.py:demo')
    overrides = [
        ('objective.weights.distilled_audio', '0.5'),
        ('objective.weights.aligned_audio', '0'),
    ]
    configs.override(c, overrides)
    objective = objectives.build(c.objective)
    assert objective.weights['distilled_audio'] == 0.5
    assert 'aligned_audio' not in objective.tasks


@pytest.mark.parametrize(
    'spec, words',
    [('howto100m', 'choose one of demo, kinetics'), ('kinetics,flow', 'elo.py:kinetics option')],
)
def test_mistakes_are_named(spec, words):
    with pytest.raises(configs.ConfigError, match=words):
        configs.load(f'configs/elo.py:{spec}')
