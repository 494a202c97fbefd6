"""What the training step promises to every objective (vatt_jax/objectives/base.py)."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data_pipelines
from tests import tiny
from vatt_jax import models, objectives
from vatt_jax.config import ConfigError
from vatt_jax.inference import feature_extractor
from vatt_jax.objectives import Loss, Objective
from vatt_jax.objectives.base import select_streams
from vatt_jax.training import checkpoint, loop, train_step

# Steps in which the objective below fills its memory, and the step whose loss is NaN.
FILLING, SPOILT = 2, 4


class WithMemory(Objective):
    """A momentum copy of the model, and a memory that is filled before parameters move."""

    def streams(self):
        return ('audio',)

    def init(self, key, spec):
        state = {
            'filled': jnp.zeros((), jnp.int32),
            'seen': jnp.zeros(3),
            'momentum': spec.model_params,
        }
        return {'weight': jnp.ones(3), 'unit': jnp.full(3, 0.3)}, state

    def compute_loss(self, model, variables, params, state, pooled, batch, rng):
        value = jnp.sum(params['weight'] ** 2) + jnp.mean(pooled['audio'] ** 2)
        value = value + jnp.sum(params['unit'] * jnp.arange(3))
        value = jnp.where(state['filled'] == SPOILT, jnp.nan, value)
        is_full = state['filled'] >= FILLING
        state = {**state, 'filled': state['filled'] + 1}
        return Loss(value, {}, variables['batch_stats'], state, is_full)

    def after_update(self, model_params, params, state, step):
        momentum = jax.tree.map(lambda m, p: 0.5 * m + 0.5 * p, state['momentum'], model_params)
        state = {**state, 'seen': params['weight'], 'momentum': momentum}
        unit = params['unit'] / jnp.linalg.norm(params['unit'])
        return model_params, {**params, 'unit': unit}, state


@pytest.fixture(scope='module')
def states():
    """The state before the first step and after each of six, on the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(objectives.OBJECTIVES, 'with_memory', WithMemory)
        config = tiny.config(optimizer__schedule__warmup=0)
        config.objective = type(config)({'name': 'with_memory'})
        data = data_pipelines.open(config)
        built = loop.build(config, data)
    with jax.set_mesh(built.mesh):
        state = built.init()
        seen = [jax.device_get(state)]
        batches = data.train(0, config.batch_size)
        for _ in range(6):
            batch = select_streams(next(batches), ('audio',))
            state, _ = built.step(state, feature_extractor.place_on_mesh(batch, built.mesh))
            seen.append(jax.device_get(state))
    return seen


def test_init_is_given_the_parameters_that_the_model_starts_with(states):
    chex.assert_trees_all_equal(states[0].objective['momentum'], states[0].params['model'])


def test_after_update_sees_what_the_step_keeps(states):
    """While the memory is filled the old parameters, later the new ones."""
    for before, after in zip(states, states[1:], strict=False):
        was_spoilt = int(before.objective['filled']) == SPOILT and after.bad
        expected = before if was_spoilt else after
        seen = after.objective['seen']
        np.testing.assert_array_equal(seen, expected.params['objective']['weight'])


def test_a_momentum_copy_does_not_drift_while_the_memory_is_filled(states):
    for state in states[1 : FILLING + 1]:
        # Half of a number and half of it again is the number.
        chex.assert_trees_all_equal(state.objective['momentum'], states[0].params['model'])
    # float64: the recursion m = (m + p) / 2 over the steps that moved the parameters.
    after = states[FILLING + 1]
    expected = jax.tree.map(
        lambda m, p: 0.5 * np.float64(m) + 0.5 * np.float64(p),
        states[FILLING].objective['momentum'],
        after.params['model'],
    )
    chex.assert_trees_all_close(after.objective['momentum'], expected, rtol=1e-6)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected, states[0].params['model'])
    assert max(jax.tree.leaves(moved)) > 1e-5


def test_parameters_that_are_not_updated_stay_bit_by_bit(states):
    """Though `after_update` would change them: `unit` does not have length 1 at first."""
    for state in states[1 : FILLING + 1]:
        chex.assert_trees_all_equal(state.params, states[0].params)
    unit = states[FILLING + 1].params['objective']['unit']
    np.testing.assert_allclose(np.linalg.norm(np.float64(unit)), 1, rtol=1e-6)


def test_a_step_that_is_not_finite_leaves_parameters_and_state(states):
    spoilt = states[SPOILT + 1]
    assert int(spoilt.bad) == 1
    chex.assert_trees_all_equal(spoilt.params, states[SPOILT].params)
    chex.assert_trees_all_equal(spoilt.objective, states[SPOILT].objective)


class WithTeacher(Objective):
    """A copy of the model that begins with it, and the records of the last batch."""

    def streams(self):
        return ('audio',)

    def init(self, key, spec):
        rows = spec.batch['index'].shape
        return {}, {'teacher': spec.model_params, 'record': jnp.zeros(rows, jnp.int32)}

    def begin(self, model_params, batch_stats, state):
        return {**state, 'teacher': model_params}

    def encode(self, model, variables, params, state, batch, rng):
        encoding = super().encode(model, variables, params, state, batch, rng)
        taught = super().encode(model, {'params': state['teacher']}, params, state, batch, rng)
        pooled = {**encoding.pooled, 'teacher/audio': taught.pooled['audio']}
        return encoding.replace(pooled=pooled)

    def compute_loss(self, model, variables, params, state, pooled, batch, rng):
        # The same random bits and, in the first step, the same parameters.
        value = jnp.mean((pooled['audio'] - pooled['teacher/audio']) ** 2)
        return Loss(value, {}, variables['batch_stats'], {**state, 'record': batch['record']})


@pytest.mark.parametrize('accumulate', [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_teacher_begins_where_the_run_begins(tmp_path, monkeypatch, accumulate):
    """Also after config.init_from, and its features are those of its own parameters."""
    monkeypatch.setitem(objectives.OBJECTIVES, 'with_teacher', WithTeacher)
    first = tiny.config(steps=1, seed=3, optimizer__schedule__warmup=0)
    loop.train(first, data_pipelines.open(first), tmp_path / 'first', quiet=True)
    config = tiny.config(
        steps=1,
        optimizer__schedule__warmup=0,
        init_from=str(tmp_path / 'first'),
        accumulate=accumulate,
        accumulation='exact',
    )
    config.objective = type(config)({'name': 'with_teacher'})
    data = data_pipelines.open(config)
    built, _ = loop.train(config, data, tmp_path / 'second', quiet=True)
    lines = (tmp_path / 'second' / 'metrics.jsonl').read_text().splitlines()
    # Two programs of the same sums; other parameters would differ by far more.
    assert json.loads(lines[0])['loss'] < 1e-12

    saved = checkpoint.Checkpoints(tmp_path / 'second' / 'checkpoints', config.checkpoint)
    state, _, _ = saved.restore(1, built.shape, built.shardings, config)
    saved.close()
    taken = checkpoint.read_model(checkpoint.find(tmp_path / 'first'))['params']
    teacher = {name: taken[name] for name in state.objective['teacher'] if 'audio' in name}
    assert teacher
    for name, values in teacher.items():
        chex.assert_trees_all_equal(jax.device_get(state.objective['teacher'][name]), values)
    # The synthetic source is one source, whose index is the record.
    expected = next(data.train(0, config.batch_size))['index']
    np.testing.assert_array_equal(state.objective['record'], expected)


class WithOwnHead(WithTeacher):
    """Embeds sound in a space of its own: the first two numbers of its feature."""

    def embed(self, params, state, encoded):
        return {'own': {name: stream.pooled[:, :2] for name, stream in encoded.items()}}


def test_evaluators_see_the_spaces_of_an_objectives_own_heads(tmp_path, monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, 'with_own_head', WithOwnHead)
    config = tiny.config(steps=1, optimizer__schedule__warmup=0)
    config.objective = type(config)({'name': 'with_own_head'})
    pair = {'type': 'retrieval', 'pairs': (('audio', 'audio', 'own'),), 'limit': 16}
    config.evals.own = pair
    _, scalars = loop.train(config, data_pipelines.open(config), tmp_path / 'run', quiet=True)
    # Each clip is nearest to itself.
    assert scalars['own/audio_to_audio/R@1'] == 1

    config.evals.own = {**pair, 'pairs': (('audio', 'audio', 'other'),)}
    with pytest.raises(ConfigError, match="do not meet in space 'other'; spaces are .*own: audio"):
        loop.build(config, data_pipelines.open(config))


# ---- config.accumulation='exact' calls encode and compute_loss, and says what it cannot call


class OwnLoss(WithMemory):
    """Computes its loss in one piece."""

    def loss(self, model, variables, params, state, batch, rng):
        return Loss(jnp.zeros(()), {}, variables['batch_stats'], state)


class OwnMixing(WithMemory):
    """Mixes clips of the batch, and does not say so."""

    def mix_examples(self, batch, rng):
        return {**batch, 'audio': batch['audio'][::-1]}


@pytest.mark.parametrize(
    'objective, message',
    [
        (OwnLoss, r"accumulation='exact': the objective OwnLoss overrides loss\(\), .*'plain'"),
        (OwnMixing, "accumulation='exact': .* mixes clips of the whole batch"),
    ],
)
def test_what_exact_accumulation_would_leave_out_is_refused(objective, message):
    config = tiny.config(accumulate=4, accumulation='exact')
    model = models.build(config.model)
    with pytest.raises(ConfigError, match=message):
        train_step.check(config, model, objective({}), {})
    # The same objectives elsewhere.
    train_step.check(tiny.config(accumulation='exact'), model, objective({}), {})
    train_step.check(tiny.config(accumulate=4, accumulation='plain'), model, objective({}), {})
    train_step.check(config, model, WithMemory({}), {})
