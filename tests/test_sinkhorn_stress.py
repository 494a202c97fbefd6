"""The labelling solver on confident rows, on rows with an offset, and on arguments that do not fit.

What it returns is recomputed in NumPy float64.
"""

import jax
import numpy as np
import pytest

from vatt_jax.clustering import newton, sinkhorn


def confident(m, p, margin, seed=0):
    """Logits [M P]: noise, and a margin for one cluster of each row; clusters of uneven sizes."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((m, p))
    share = 1 / (np.arange(p) + 10)
    cluster = rng.choice(p, m, p=share / share.sum())
    logits[np.arange(m), cluster] += margin
    return logits


def softmax(z):
    """By rows."""
    exponentials = np.exp(z - z.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def published_error(z, g, prior):
    """Σ over rows of |beta / beta' - 1| at potentials g, and Σ over clusters of |share - prior|."""
    soft = softmax(np.float64(z) + g)
    marginal = soft.mean(0)
    return np.abs(soft @ (prior / marginal) - 1).sum(), np.abs(marginal - prior).sum()


# ---- 8. Confident rows


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize(
    'm, p, margin',
    [(4000, 60, 10), (1500, 40, 60), pytest.param(20_000, 309, 20, marks=pytest.mark.slow)],
)
def test_confident_rows_are_solved_to_the_published_error(m, p, margin, dtype):
    """Gaps of 200 and 1200 nats: where the fast search gives up, Newton's goes on."""
    logits = confident(m, p, margin).astype(dtype)
    prior = np.full(p, 1 / p)
    got = sinkhorn.solve([logits], prior, 20, tolerance='published', dtype=dtype)
    assert got.converged
    assert got.published_error < 0.1
    error, residual = published_error(20 * np.float64(logits), got.potentials, prior)
    # float32 rounds z of 1200 nats to 1e-4, in each of the rows that are not decided.
    assert error < (0.1 if dtype == 'float64' else 0.12)
    np.testing.assert_allclose(residual, got.residual, atol=0.02 / m)
    labels = (20 * np.float64(logits) + got.potentials).argmax(1)
    assert (labels != got.labels).sum() <= 2


def test_newtons_steps_alone_find_the_solution():
    """From nothing, without the fast search, on a problem whose rows are all but decided."""
    z = 20 * confident(600, 12, 10)
    prior = np.full(12, 1 / 12)

    def marginal(g):
        return softmax(z + g).mean(0)

    def coupling(g):
        s = softmax(z + g)
        return s.T @ s / len(s)

    found, history = newton.maximise(marginal, coupling, np.zeros(12), prior, 1e-9, 500)
    assert found.residual < 1e-9
    assert len(history) < 200
    assert history[-1] == found.residual
    np.testing.assert_allclose(marginal(found.potentials), prior, atol=1e-9)
    # The one maximum of F: no small step raises it.
    direction = np.random.default_rng(0).standard_normal(12)

    def value(g):
        top = (z + g).max(1)
        return prior @ g - np.mean(top + np.log(np.exp(z + g - top[:, None]).sum(1)))

    for step in (1e-2, -1e-2):
        assert value(found.potentials + step * direction) < value(found.potentials)


def test_the_matrix_is_the_inverse_of_the_derivative_of_log_shares():
    """(I - A)⁻¹ against finite differences of -log c(g), up to a constant."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((50, 5))
    g = rng.standard_normal(5)
    s = softmax(z + g)
    inverse = newton.inverse(s.T @ s / len(s), 0.0)
    moved = rng.standard_normal(5)
    step = 1e-6 * moved
    change = np.log(softmax(z + g + step).mean(0)) - np.log(softmax(z + g - step).mean(0))
    back = inverse @ change / 2e-6
    difference = back - moved
    np.testing.assert_allclose(difference - difference.mean(), np.zeros(5), atol=1e-6)


# ---- 9. Offsets


def on_grid(m, p, seed=0):
    """Logits in steps of 1/64, which offsets up to 1e5 leave exact in float32."""
    logits = confident(m, p, 4, seed)
    return np.float32(np.round(64 * logits) / 64)


@pytest.mark.parametrize('offset', [1e3, 1e5])
@pytest.mark.parametrize('kind', ['float32', 'float64', 'blocks', 'device', 'eight devices'])
def test_an_offset_of_rows_changes_nothing(offset, kind):
    m, p = 1000, 12
    logits = on_grid(m, p)
    prior = np.full(p, 1 / p)
    offsets = np.float32(offset) * np.random.default_rng(1).choice([-1, 1], (m, 1))
    moved = (logits + offsets).astype(np.float32)
    np.testing.assert_array_equal(np.float64(moved) - offsets, logits)
    mesh = None
    if kind == 'float64':
        moved = moved.astype(np.float64) + 1e-9
    elif kind == 'blocks':
        moved = [moved[:300], moved[300:]]
    elif kind == 'device':
        moved = jax.device_put(moved)
    elif kind == 'eight devices':
        mesh = jax.make_mesh((8,), ('rows',))
    # Of centred rows the arithmetic is the same, number by number.
    expected = sinkhorn.solve([logits - logits.max(1, keepdims=True)], prior, 25, mesh=mesh)
    got = sinkhorn.solve([moved], prior, 25, mesh=mesh)
    assert got.converged
    np.testing.assert_array_equal(got.labels, expected.labels)
    np.testing.assert_allclose(got.potentials, expected.potentials, atol=1e-4)
    np.testing.assert_allclose(got.cost, expected.cost, rtol=1e-5)
    _, residual = published_error(25 * logits, got.potentials, prior)
    assert residual < 2e-5


def test_an_offset_of_a_head_changes_nothing():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((900, 8)).astype(np.float32)
    kernel = np.float32(rng.standard_normal((8, 10)))
    bias = np.float32(rng.standard_normal(10))
    prior = np.full(10, 0.1)
    expected = sinkhorn.solve([features], prior, 25, heads=[(kernel, bias)])
    # In float64, as float32 would lose the digits before the solver sees them.
    heads = [(np.float64(kernel) + 1e4, np.float64(bias) - 1e5)]
    got = sinkhorn.solve([features], prior, 25, heads=heads)
    assert got.converged
    np.testing.assert_array_equal(got.labels, expected.labels)
    np.testing.assert_allclose(got.potentials, expected.potentials, atol=1e-3)


def test_a_forbidden_cluster_stays_forbidden():
    """-inf in a head's bias, beside other clusters and an offset."""
    rng = np.random.default_rng(0)
    features = [rng.standard_normal((300, 4)).astype(np.float32) for _ in range(2)]
    kernel = np.float32(rng.standard_normal((4, 5)))
    bias = np.float32([0, -np.inf, 1000, 1001, 1000])
    shares = sinkhorn.shares(features[:1], 2.0, heads=[(kernel, bias)])
    z = 2 * (np.float64(features[0]) @ kernel + bias)
    np.testing.assert_allclose(shares, softmax(z).mean(0), rtol=1e-3, atol=1e-9)


# ---- 4 and 10. Arguments that do not fit


VIEW = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
KERNEL, BIAS = np.ones((4, 4), np.float32), np.zeros(4, np.float32)


@pytest.mark.parametrize(
    'views, options, message',
    [
        (
            [VIEW, VIEW],
            {'heads': [(KERNEL, BIAS)]},
            r'heads: expected one \(kernel, bias\) for each of 2 views, got 1',
        ),
        (
            [VIEW],
            {'heads': [(KERNEL[:, :3], BIAS[:3])]},
            r'heads\[0\]: expected a kernel \[D 4\] and a bias \[4\], got \(4, 3\) and \(3,\)',
        ),
        (
            [VIEW],
            {'heads': [(KERNEL[:3], BIAS)]},
            r'views: expected shape \[50 3\], got \(50, 4\)',
        ),
        ([], {}, 'views: expected at least one array of logits or features, got none'),
        ([VIEW[:0]], {}, r'views: expected at least one row, got shape \(0, 4\)'),
        ([[VIEW, VIEW[:0]]], {}, r'views: expected at least one row, got shape \(0, 4\)'),
        ([[VIEW, VIEW], [VIEW]], {}, 'expected all views cut into the same blocks, got 2, 1'),
        ([[]], {}, 'expected all views cut into the same blocks, got 0'),
        ([VIEW], {'tolerance': 'publshed'}, "tolerance: expected .* 'published', got 'publshed'"),
        ([VIEW], {'tolerance': float('nan')}, 'tolerance: expected a number from 0 up .*, got nan'),
        ([VIEW], {'max_passes': 0}, 'max_passes: expected a positive number, got 0'),
        (
            [VIEW],
            {'start': sinkhorn.Start(np.zeros(5))},
            r'start: expected potentials \[4\] and, .*, got shapes \(5,\)',
        ),
        (
            [VIEW],
            {'start': sinkhorn.Start(np.zeros(4), np.eye(5))},
            r'start: expected .* \[4 4\], got shapes \(4,\), \(5, 5\)',
        ),
        ([VIEW], {'start': sinkhorn.Start(np.full(4, np.nan))}, 'start: expected finite potent'),
    ],
)
def test_what_does_not_fit_is_named(views, options, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn.solve(views, np.full(4, 0.25), 20, **options)


@pytest.mark.parametrize('prior', [np.ones(1), np.full((2, 2), 0.25), np.array(1.0)])
def test_a_prior_is_a_vector_of_two_shares_or_more(prior):
    with pytest.raises(ValueError, match='prior: expected a vector with the share of each'):
        sinkhorn.solve([VIEW], prior, 20)


def test_shares_refuse_the_same():
    with pytest.raises(ValueError, match='views: expected at least one array'):
        sinkhorn.shares([], 20)
    with pytest.raises(ValueError, match='for each of 2 views, got 1'):
        sinkhorn.shares([VIEW, VIEW], 20, heads=[(KERNEL, BIAS)])


def test_values_that_are_not_finite_are_found():
    spoilt = VIEW.copy()
    spoilt[7, 2] = np.nan
    prior = np.full(4, 0.25)
    with pytest.raises(ValueError, match='hold NaN .* first in view 1, row 7'):
        sinkhorn.solve([VIEW, spoilt], prior, 20)
    with pytest.raises(ValueError, match='hold NaN .* first in view 0, row 57'):
        sinkhorn.solve([[VIEW, spoilt]], prior, 20)
    with pytest.raises(ValueError, match=r'heads\[0\]: expected finite weights'):
        sinkhorn.solve([VIEW], prior, 20, heads=[(np.full((4, 4), np.nan), BIAS)])


def test_large_finite_values_are_no_nan():
    """1e38 is a number: a logit of it decides its row, and a product that overflows is named."""
    logits = np.float32(np.where(np.arange(4) == np.arange(48)[:, None] % 4, 1e38, -1e38))
    got = sinkhorn.solve([logits], np.full(4, 0.25), 20)
    np.testing.assert_array_equal(got.labels, np.arange(48) % 4)
    assert got.converged
    features = np.full((50, 4), 1e38, np.float32)
    heads = [(np.float32(1e3 * np.random.default_rng(0).standard_normal((4, 4))), BIAS)]
    with pytest.raises(ValueError, match='all views are finite, but their sums overflow'):
        sinkhorn.solve([features], np.full(4, 0.25), 20, heads=heads)
