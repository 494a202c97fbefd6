"""What the training step promises to every objective (vatt_jax/objectives/base.py)."""

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
from vatt_jax.training import loop, train_step

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
