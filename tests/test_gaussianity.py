"""SIGReg and LeJEPA's loss against definitions in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vatt_jax.losses import gaussianity
from vatt_jax.objectives import lejepa
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng

B, E, S = 16, 6, 5


def definition(x, valid):
    """n · ∫ |φ_x(t) - φ(t)|² exp(-t²/2) dt over [-3, 3], both halves, of one column of numbers."""
    x = np.asarray(x, np.float64)[valid]
    t = np.linspace(-3, 3, 33)
    normal = np.exp(-(t**2) / 2)
    empirical = np.array([np.mean(np.exp(1j * point * x)) for point in t])
    return len(x) * np.trapezoid(np.abs(empirical - normal) ** 2 * normal, t)


@pytest.fixture(scope='module')
def rows():
    draws = np.random.default_rng(0)
    x = draws.normal(0.4, 1.7, (B, E)).astype(np.float32)
    return x, draws.uniform(size=B) < 0.7


def directions(step, examples=4):
    rng = Rng.create(0, step, jnp.arange(examples))
    return gaussianity.draw_directions(E, S, rng)


def test_the_statistic_is_its_definition(rows):
    x, valid = rows
    # A row that does not count has no say, whatever it holds.
    spoilt = np.where(valid[:, None], x, np.nan)
    found = gaussianity.epps_pulley(jnp.asarray(spoilt), jnp.asarray(valid))
    expected = [definition(x[:, column], valid) for column in range(E)]
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_sigreg_is_the_mean_along_directions_and_so_is_its_gradient(rows):
    x, valid = rows
    along = directions(3)

    def loss(x):
        return gaussianity.sliced_epps_pulley(x, jnp.asarray(valid), along)

    def expected(x):
        projections = x @ np.asarray(along, np.float64)
        return np.mean([definition(projections[:, s], valid) for s in range(S)])

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(x))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(value, expected(exact), rtol=2e-5)
    step = np.random.default_rng(1).normal(size=x.shape)
    slope = (expected(exact + 1e-5 * step) - expected(exact - 1e-5 * step)) / 2e-5
    np.testing.assert_allclose(np.sum(np.asarray(gradient, np.float64) * step), slope, rtol=1e-4)


def test_gaussian_rows_score_low_and_collapsed_ones_high():
    normal = np.random.default_rng(2).normal(size=(512, E)).astype(np.float32)
    valid = jnp.ones(512, bool)
    along = directions(0)
    score = gaussianity.sliced_epps_pulley(jnp.asarray(normal), valid, along)
    collapsed = gaussianity.sliced_epps_pulley(jnp.zeros((512, E)), valid, along)
    assert score < 2 < 100 < collapsed


def test_eight_devices_compute_what_one_does(rows):
    x, valid = rows
    mesh = sharding.make_mesh({'replica': 8})
    split = NamedSharding(mesh, P('replica'))
    along = directions(3)
    score = jax.jit(jax.value_and_grad(gaussianity.sliced_epps_pulley))
    alone = score(jnp.asarray(x), jnp.asarray(valid), along)
    apart = score(jax.device_put(x, split), jax.device_put(valid, split), along)
    np.testing.assert_allclose(apart[0], alone[0], rtol=1e-6)
    np.testing.assert_allclose(apart[1], alone[1], rtol=1e-5, atol=1e-7)


def test_directions_are_of_the_step_and_not_of_the_batch():
    np.testing.assert_allclose(np.linalg.norm(directions(0), axis=0), 1, rtol=1e-6)
    np.testing.assert_array_equal(directions(0, examples=4), directions(0, examples=9))
    assert not np.allclose(directions(0), directions(1))


def test_views_are_drawn_to_the_mean_of_those_that_a_clip_has():
    draws = np.random.default_rng(3)
    views = {name: draws.normal(size=(B, E)).astype(np.float32) for name in 'abc'}
    valid = {name: draws.uniform(size=B) < 0.6 for name in 'abc'}
    distances = []
    for row in range(B):
        centre = [views[name][row] for name in 'ab' if valid[name][row]]
        for name in 'abc':
            has_others = sum(valid[other][row] for other in 'abc') > 1
            if centre and has_others and valid[name][row]:
                distances.append(np.mean((views[name][row] - np.mean(centre, axis=0)) ** 2))
    found = lejepa.disagreement(
        {name: jnp.asarray(x) for name, x in views.items()},
        {name: jnp.asarray(x) for name, x in valid.items()},
        ('a', 'b'),
    )
    np.testing.assert_allclose(found, np.mean(distances), rtol=1e-5)
