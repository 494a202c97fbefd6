"""Optimizers and schedules against their definitions in NumPy float64."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from vatt_jax import optim
from vatt_jax.config import ConfigError


def config(**fields):
    c = default.get_config().optimizer
    for k, v in fields.items():
        c[k] = v
    return c


def params():
    return {
        'model': {
            'video': {'kernel': jnp.ones((3, 2)), 'bias': jnp.zeros(2)},
            'word_table': jnp.ones((5, 2)),
        },
        'objective': {'head': {'kernel': jnp.full((2, 2), 2.0)}},
    }


def test_vatt_schedule():
    c = config().schedule
    c.name = 'vatt'
    rate = optim.schedule(c, 500_000)
    assert (
        rate(0) == 0
        and math.isclose(rate(2500), 5e-5, rel_tol=1e-5)
        and math.isclose(rate(5000), 1e-4, rel_tol=1e-6)
    )
    for s in (100_000, 252_500, 499_999):
        want = 5e-5 + 5e-5 * (1 + math.cos(math.pi * (s - 5000) / 495_000)) / 2
        assert math.isclose(rate(s), want, rel_tol=1e-5)
    assert math.isclose(rate(500_000), 5e-5, rel_tol=1e-6)  # where the official formula is 0/0


def test_vatt_schedule_of_several_levels_ends_at_zero():
    c = config().schedule
    c.name, c.levels = 'vatt', ((10, 1e-3), (30, 4e-4), (50, 6e-4))
    rate = optim.schedule(c, 90)
    cosine = lambda s, s0, l0, s1, l1: (
        l1 + (l0 - l1) * 0.5 * (1 + math.cos(math.pi * (s - s0) / (s1 - s0)))
    )
    for s in range(95):
        want = (
            1e-3 * s / 10
            if s < 10
            else cosine(s, 10, 1e-3, 30, 4e-4)
            if s < 30
            else cosine(s, 30, 4e-4, 50, 6e-4)
            if s < 50
            else cosine(min(s, 90), 50, 6e-4, 90, 0.0)
        )
        assert abs(rate(s) - want) < 1e-9, s


def test_warmup_must_leave_steps():
    with pytest.raises(ConfigError, match='warmup=5000 leaves nothing of config.steps=100'):
        optim.schedule(config().schedule, 100)


def test_frozen_rates_and_decay_by_path():
    c = config(
        name='sgd',
        momentum=0.0,
        weight_decay=0.1,
        rates=(('^objective/', 10.0),),
        frozen=('word_table',),
    )
    c.schedule.name, c.schedule.warmup, c.schedule.peak = 'constant', 0, 0.5
    p = params()
    tx = optim.build(c, 10, p)
    state = tx.init(p)
    grads = jax.tree.map(jnp.ones_like, p)
    updates, _ = tx.update(grads, state, p)
    np.testing.assert_allclose(updates['model']['video']['kernel'], -0.5 * (1 + 0.1 * 1))
    np.testing.assert_allclose(updates['model']['video']['bias'], -0.5)  # no decay on biases
    np.testing.assert_allclose(updates['objective']['head']['kernel'], -5.0 * (1 + 0.1 * 2))
    np.testing.assert_array_equal(updates['model']['word_table'], 0)
    adam = optim.build(config(frozen=('word_table',)), 10_000, p).init(p)
    shapes = [x.shape for x in jax.tree.leaves(adam)]
    assert (5, 2) not in shapes  # a frozen table has no moments


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_a_step_that_is_not_applied_leaves_the_state(name):
    """Bit for bit, with gradients that are not finite too; and one that is applied is the one without the question."""
    p = {'a': jnp.asarray([1.0, -2.0]), 'b': jnp.asarray([[0.5]])}
    tx = optim.build(config(name=name, clip=1.0), 10_000, p)
    before = tx.update(jax.tree.map(lambda x: 3 * x + 1, p), tx.init(p), p)[1]
    for grads in (p, jax.tree.map(lambda x: x * jnp.nan, p)):
        after = tx.update(grads, before, p, apply=jnp.asarray(False))[1]
        chex.assert_trees_all_equal(after, before)
    assert len(jax.tree.leaves(before)) > 1
    plain, asked = tx.update(p, before, p), tx.update(p, before, p, apply=jnp.asarray(True))
    chex.assert_trees_all_equal(asked, plain)
    moved = [
        not np.array_equal(n, o) for n, o in zip(jax.tree.leaves(plain[1]), jax.tree.leaves(before))
    ]
    assert all(moved), moved


def test_unknown_rate_pattern():
    with pytest.raises(ConfigError, match="'nothing' matches no parameter"):
        optim.build(config(rates=(('nothing', 1.0),)), 10_000, params())


def test_clip():
    c = config(name='sgd', momentum=0.0, clip=1.0, frozen=())
    c.schedule.name, c.schedule.warmup, c.schedule.peak = 'constant', 0, 1.0
    p = params()
    tx = optim.build(c, 10, p)
    updates, _ = tx.update(jax.tree.map(lambda x: 3 * jnp.ones_like(x), p), tx.init(p), p)
    norm = math.sqrt(sum(float(jnp.sum(u**2)) for u in jax.tree.leaves(updates)))
    assert math.isclose(norm, 1.0, rel_tol=1e-5)


def test_keras_sgd_is_its_definition():
    c = config(name='keras_sgd', momentum=0.9, frozen=())
    c.schedule.name, c.schedule.peak, c.schedule.end, c.schedule.warmup = (
        'warmup_cosine',
        0.1,
        0.0,
        3,
    )
    p = {'w': jnp.array([1.0, -2.0])}
    tx = optim.build(c, 10, p)
    state, w, v = tx.init(p), np.array([1.0, -2.0]), np.zeros(2)
    for t in range(6):
        g = np.array([0.3 * t + 1, -0.7])
        rate = 0.1 * t / 3 if t < 3 else 0.05 * (1 + math.cos(math.pi * (t - 3) / 7))
        v = 0.9 * v - rate * g
        w = w + v
        updates, state = tx.update({'w': jnp.asarray(g, jnp.float32)}, state, p)
        p = {'w': p['w'] + updates['w']}
        np.testing.assert_allclose(p['w'], w, rtol=1e-5)


def test_quarter_period():
    c = config().schedule
    c.name, c.peak, c.end, c.warmup = 'warmup_quarter_cosine', 1e-4, 5e-5, 10_000
    rate = optim.schedule(c, 500_000)
    for s in (10_000, 100_000, 400_000, 500_000):
        want = 5e-5 + 5e-5 * math.cos(math.pi / 2 * (s - 10_000) / 490_000)
        assert math.isclose(rate(s), want, rel_tol=1e-5)


def test_clip_of_some_paths_alone():
    c = config(
        name='sgd', momentum=0.0, clip=0.75, clip_paths=(r'^model/',), frozen=('word_table',)
    )
    c.schedule.name, c.schedule.warmup, c.schedule.peak = 'constant', 0, 1.0
    p = params()
    tx = optim.build(c, 10, p)
    grads = jax.tree.map(lambda x: 3 * jnp.ones_like(x), p)
    updates, _ = tx.update(grads, tx.init(p), p)
    video = updates['model']['video']
    norm = math.sqrt(sum(float(jnp.sum(u**2)) for u in jax.tree.leaves(video)))
    assert math.isclose(
        norm, 0.75, rel_tol=1e-5
    )  # of the trained backbone, the frozen table left out
    np.testing.assert_allclose(updates['objective']['head']['kernel'], -3.0)
    with pytest.raises(ConfigError, match="clip_paths: 'nothing' matches no parameter"):
        optim.build(config(clip=1.0, clip_paths=('nothing',)), 10_000, p)


@pytest.mark.parametrize(
    'fields, told',
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
def test_mistakes_are_sentences(fields, told):
    with pytest.raises(ConfigError, match=told):
        optim.check(config(**fields), 10_000)


@pytest.mark.parametrize(
    'fields, told',
    [
        ({'peak': -1.0}, 'config.optimizer.schedule.peak=-1'),
        ({'warmup': -3}, 'schedule.warmup=-3'),
        ({'name': 'vatt', 'levels': ()}, r'schedule.levels=\(\): expected \(step, rate\) pairs'),
        ({'name': 'vatt', 'levels': (1, 2)}, r'expected \(step, rate\) pairs'),
    ],
)
def test_schedule_mistakes_are_sentences(fields, told):
    c = config().schedule
    c.update(fields)
    with pytest.raises(ConfigError, match=told):
        optim.schedule(c, 10_000)
