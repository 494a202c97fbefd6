"""Optimizers and schedules against their definitions in NumPy float64."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
from vatt_jax import optim
from vatt_jax.config import ConfigError


def config(**fields):
    """The default optimizer config with some fields changed."""
    c = default.get_config().optimizer
    for name, value in fields.items():
        c[name] = value
    return c


def constant_sgd(rate, **fields):
    """Plain gradient descent at a constant rate: an update is minus rate times gradient."""
    c = config(name='sgd', momentum=0.0, **fields)
    c.schedule.name = 'constant'
    c.schedule.warmup = 0
    c.schedule.peak = rate
    return c


def params():
    """A backbone with a table of words, and a head."""
    return {
        'model': {
            'video': {'kernel': jnp.ones((3, 2)), 'bias': jnp.zeros(2)},
            'word_table': jnp.ones((5, 2)),
        },
        'objective': {'head': {'kernel': jnp.full((2, 2), 2.0)}},
    }


def global_norm(tree):
    """The Euclidean norm of all leaves together, summed in float64."""
    return math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(tree)))


def test_vatt_schedule_is_a_linear_warmup_and_half_a_cosine():
    # rate(s) = end + (peak - end) (1 + cos(pi (s - warmup) / (steps - warmup))) / 2
    c = config().schedule
    c.name = 'vatt'
    rate = optim.schedule(c, 500_000)
    assert rate(0) == 0
    assert math.isclose(rate(2500), 5e-5, rel_tol=1e-5)
    assert math.isclose(rate(5000), 1e-4, rel_tol=1e-6)
    for step in (100_000, 252_500, 499_999):
        expected = 5e-5 + 5e-5 * (1 + math.cos(math.pi * (step - 5000) / 495_000)) / 2
        assert math.isclose(rate(step), expected, rel_tol=1e-5)
    # The official formula is 0/0 here.
    assert math.isclose(rate(500_000), 5e-5, rel_tol=1e-6)


def half_cosine(step, first_step, first_rate, last_step, last_rate):
    """The rate on half a cosine from one level to the next."""
    progress = (step - first_step) / (last_step - first_step)
    return last_rate + (first_rate - last_rate) * 0.5 * (1 + math.cos(math.pi * progress))


def rate_through_levels(step):
    """Up to 1e-3 at step 10, 4e-4 at 30, 6e-4 at 50, and to zero at 90."""
    if step < 10:
        return 1e-3 * step / 10
    if step < 30:
        return half_cosine(step, 10, 1e-3, 30, 4e-4)
    if step < 50:
        return half_cosine(step, 30, 4e-4, 50, 6e-4)
    return half_cosine(min(step, 90), 50, 6e-4, 90, 0.0)


def test_vatt_schedule_of_several_levels_ends_at_zero():
    c = config().schedule
    c.name = 'vatt'
    c.levels = ((10, 1e-3), (30, 4e-4), (50, 6e-4))
    rate = optim.schedule(c, 90)
    for step in range(95):
        assert abs(rate(step) - rate_through_levels(step)) < 1e-9, step


@pytest.mark.parametrize('name', optim.schedules.SCHEDULES)
def test_a_warmup_may_start_above_zero(name):
    c = config().schedule
    c.update({'name': name, 'peak': 3e-3, 'warmup': 10, 'end': 1e-3, 'start': 1e-3})
    c.levels = ((10, 3e-3), (100, 1e-3))
    rate = optim.schedule(c, 100)
    for step in range(10):
        assert math.isclose(rate(step), 1e-3 + 2e-3 * step / 10, rel_tol=1e-5)
    assert math.isclose(rate(10), 3e-3, rel_tol=1e-6)
    expected = 3e-3 if name == 'constant' else 1e-3
    assert math.isclose(rate(100), expected, rel_tol=1e-5)


def test_one_level_is_held_even_where_the_warmup_goes_down():
    c = config().schedule
    c.update({'name': 'vatt', 'levels': ((10, 1e-3),), 'start': 2e-3})
    rate = optim.schedule(c, 10)
    assert math.isclose(rate(5), 1.5e-3, rel_tol=1e-5)
    assert math.isclose(rate(12), 1e-3, rel_tol=1e-6)


def test_warmup_must_leave_steps():
    with pytest.raises(
        ConfigError,
        match='warmup=5000 leaves nothing of config.steps=60; '
        'try --config.optimizer.schedule.warmup=6, or more steps',
    ):
        optim.schedule(config().schedule, 60)


@pytest.mark.parametrize('steps, warmup', [(1, 1), (1, 5), (2, 2), (9, 9), (10, 11), (60, 5000)])
def test_the_advice_on_a_warmup_that_is_too_long_works(steps, warmup):
    c = config().schedule
    c.name, c.warmup = 'warmup_cosine', warmup
    with pytest.raises(ConfigError) as caught:
        optim.schedule(c, steps)
    advice = re.search(r'schedule\.warmup=(\d+), or more steps .*steps=(\d+)', str(caught.value))
    shorter, longer = (int(number) for number in advice.groups())
    assert np.isfinite(optim.schedule(c, longer)(0))
    c.warmup = shorter
    assert np.isfinite(optim.schedule(c, steps)(0))


def test_frozen_rates_and_decay_by_path():
    # update = -rate * factor * (gradient + weight_decay * parameter)
    c = constant_sgd(0.5, weight_decay=0.1, rates=(('^objective/', 10.0),), frozen=('word_table',))
    p = params()
    tx = optim.build(c, 10, p)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, p), tx.init(p), p)
    expected = {
        'model': {
            'video': {
                'kernel': jnp.full((3, 2), -0.5 * (1 + 0.1 * 1)),
                'bias': jnp.full(2, -0.5),  # no decay on biases
            },
            'word_table': jnp.zeros((5, 2)),
        },
        'objective': {'head': {'kernel': jnp.full((2, 2), -5.0 * (1 + 0.1 * 2))}},
    }
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, p)
    chex.assert_trees_all_close(updates, expected, rtol=1e-7)
    chex.assert_trees_all_equal(updates['model']['word_table'], expected['model']['word_table'])


def test_a_frozen_table_has_no_moments():
    p = params()
    shapes = {}
    for frozen in ((), ('word_table',)):
        state = optim.build(config(frozen=frozen), 10_000, p).init(p)
        shapes[frozen] = [leaf.shape for leaf in jax.tree.leaves(state)]
    assert (5, 2) in shapes[()]
    assert (5, 2) not in shapes[('word_table',)]


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_a_step_that_is_not_applied_leaves_the_state(name):
    """Bit for bit, also with gradients that are not finite; `apply=True` changes nothing."""
    p = {'a': jnp.asarray([1.0, -2.0]), 'b': jnp.asarray([[0.5]])}
    tx = optim.build(config(name=name, clip=1.0), 10_000, p)
    _, before = tx.update(jax.tree.map(lambda x: 3 * x + 1, p), tx.init(p), p)
    assert len(jax.tree.leaves(before)) > 1

    not_finite = jax.tree.map(lambda x: x * jnp.nan, p)
    for grads in (p, not_finite):
        _, after = tx.update(grads, before, p, apply=jnp.asarray(False))
        chex.assert_trees_all_equal(after, before)

    plain = tx.update(p, before, p)
    applied = tx.update(p, before, p, apply=jnp.asarray(True))
    chex.assert_trees_all_equal(applied, plain)
    _, after = plain
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    moved = []
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        moved.append(not np.array_equal(new, old))
    assert all(moved), moved


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_an_update_compiles_once_and_keeps_shapes_and_dtypes(name):
    """A state that changed its types would compile the step of a run a second time."""
    p = {'a': jnp.asarray([1.0, -2.0]), 'b': jnp.asarray([[0.5]])}
    tx = optim.build(config(name=name), 10_000, p)
    chex.clear_trace_counter()  # counts by source text, so over all parametrisations

    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(state, params):
        updates, state = tx.update(params, state, params)
        return updates, state

    state = jax.jit(tx.init)(p)
    for _ in range(3):
        updates, after = update(state, p)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, p)
        chex.assert_tree_all_finite((updates, after))
        state = after


def test_unknown_rate_pattern():
    with pytest.raises(ConfigError, match="'nothing' matches no parameter"):
        optim.build(config(rates=(('nothing', 1.0),)), 10_000, params())


def test_clipped_gradients_have_the_norm_asked_for():
    p = params()
    tx = optim.build(constant_sgd(1.0, clip=1.0, frozen=()), 10, p)
    updates, _ = tx.update(jax.tree.map(lambda x: 3 * jnp.ones_like(x), p), tx.init(p), p)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, p)
    assert math.isclose(global_norm(updates), 1.0, rel_tol=1e-5)


def test_keras_sgd_is_its_definition():
    # v_t = momentum v_{t-1} - rate_t g_t;  w_t = w_{t-1} + v_t
    c = config(name='keras_sgd', momentum=0.9, frozen=())
    c.schedule.name = 'warmup_cosine'
    c.schedule.peak = 0.1
    c.schedule.end = 0.0
    c.schedule.warmup = 3
    p = {'w': jnp.array([1.0, -2.0])}
    tx = optim.build(c, 10, p)
    state = tx.init(p)
    w = np.array([1.0, -2.0])
    v = np.zeros(2)
    for t in range(6):
        g = np.array([0.3 * t + 1, -0.7])
        if t < 3:
            rate = 0.1 * t / 3
        else:
            rate = 0.05 * (1 + math.cos(math.pi * (t - 3) / 7))
        v = 0.9 * v - rate * g
        w = w + v
        updates, state = tx.update({'w': jnp.asarray(g, jnp.float32)}, state, p)
        p = optax.apply_updates(p, updates)
        chex.assert_trees_all_close(p, {'w': w.astype(np.float32)}, rtol=1e-5)


def test_quarter_cosine_is_its_definition():
    # rate(s) = end + (peak - end) cos(pi / 2 (s - warmup) / (steps - warmup))
    c = config().schedule
    c.name = 'warmup_quarter_cosine'
    c.peak = 1e-4
    c.end = 5e-5
    c.warmup = 10_000
    rate = optim.schedule(c, 500_000)
    for step in (10_000, 100_000, 400_000, 500_000):
        expected = 5e-5 + 5e-5 * math.cos(math.pi / 2 * (step - 10_000) / 490_000)
        assert math.isclose(rate(step), expected, rel_tol=1e-5)


def test_clip_of_some_paths_alone():
    c = constant_sgd(1.0, clip=0.75, clip_paths=(r'^model/',), frozen=('word_table',))
    p = params()
    tx = optim.build(c, 10, p)
    grads = jax.tree.map(lambda x: 3 * jnp.ones_like(x), p)
    updates, _ = tx.update(grads, tx.init(p), p)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, p)
    # Of the trained backbone; the frozen table is left out.
    assert math.isclose(global_norm(updates['model']['video']), 0.75, rel_tol=1e-5)
    np.testing.assert_allclose(updates['objective']['head']['kernel'], -3.0)
    with pytest.raises(ConfigError, match="clip_paths: 'nothing' matches no parameter"):
        optim.build(config(clip=1.0, clip_paths=('nothing',)), 10_000, p)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'frozen': ('[',)}, r"config.optimizer.frozen: '\[' is not a regular expression"),
        ({'decay_skip': (3,)}, 'config.optimizer.decay_skip: 3 is not a regular expression'),
        (
            {'rates': (('head',),)},
            r"config.optimizer.rates has \('head',\); expected pairs of a pattern and a factor",
        ),
        ({'rates': (('(', 2.0),)}, "config.optimizer.rates: '\\(' is not a regular"),
        ({'ema': 1.5}, 'config.optimizer.ema=1.5: expected a number of at least 0 and below 1'),
        ({'clip': -1.0}, 'config.optimizer.clip=-1: expected a number of at least 0'),
    ],
)
def test_a_mistake_in_the_config_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        optim.check(config(**fields), 10_000)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'peak': -1.0}, 'config.optimizer.schedule.peak=-1'),
        ({'warmup': -3}, 'schedule.warmup=-3'),
        ({'peak': math.nan}, 'schedule.peak=nan: expected a number of at least 0'),
        ({'end': math.inf}, 'schedule.end=inf'),
        ({'start': -1e-9}, 'schedule.start=-1e-09'),
        ({'name': 'vatt', 'levels': ((5, math.nan),)}, r'expected \(step, rate\) pairs'),
        ({'name': 'vatt', 'levels': ((-5, 1.0),)}, r'expected \(step, rate\) pairs'),
        ({'name': 'vatt', 'levels': ()}, r'schedule.levels=\(\): expected \(step, rate\) pairs'),
        ({'name': 'vatt', 'levels': (1, 2)}, r'expected \(step, rate\) pairs'),
    ],
)
def test_a_mistake_in_the_schedule_is_named(fields, message):
    c = config().schedule
    c.update(fields)
    with pytest.raises(ConfigError, match=message):
        optim.schedule(c, 10_000)
