"""The labelling solver against the published loop and against plain Sinkhorn run to convergence, both written out in NumPy float64."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vatt_jax.clustering import sinkhorn


def published(log_p, prior, strength, tolerance=0.1, cap=2000):
    """The published loop on probabilities exp(log_p): (labels, log alpha, iterations, error)."""
    kernel = np.exp(strength * log_p)
    m = len(kernel)
    beta = np.full(m, 1 / m)
    error, count = np.inf, 0
    while error > tolerance and count < cap:
        alpha = prior / (kernel.T @ beta)
        new = (1 / m) / (kernel @ alpha)
        if count % 10 == 0:
            error = np.abs(beta / new - 1).sum()
        beta = new
        count += 1
    return (kernel * alpha).argmax(1), np.log(alpha), count, error


def converged(z, prior, rounds=20000, tolerance=1e-12):
    """Potentials of the exact solution by plain log-domain iterations: log column sums through their own maxima, so nothing underflows."""
    lse = lambda x, axis: (
        x.max(axis, keepdims=True)
        + np.log(np.exp(x - x.max(axis, keepdims=True)).sum(axis, keepdims=True))
    )
    g = np.zeros(z.shape[1])
    for _ in range(rounds):
        log_c = lse(z + g - lse(z + g, 1), 0)[0] - np.log(len(z))
        g = g + np.log(prior) - log_c
        if np.abs(np.exp(log_c) - prior).sum() < tolerance:
            break
    return g - prior @ g


def column_means(z, g):
    x = z + g
    e = np.exp(x - x.max(1, keepdims=True))
    return (e / e.sum(1, keepdims=True)).mean(0)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def problem(m, p, kind, seed=0):
    rng = np.random.default_rng(seed)
    views = [rng.standard_normal((m, p)).astype(np.float32) for _ in range(2)]
    if kind == 'structured':
        share = 1 / (np.arange(p) + 10)
        z = rng.choice(p, m, p=share / share.sum())
        for v in views:
            v[np.arange(m), z] += 4
    return views


def priors(p, kind):
    share = {
        'uniform': np.ones(p),
        'zipf': 1 / (1 + np.arange(p)),
        'exponential': np.exp(-np.arange(p) / p * 4),
        'gaussian': 1 + 0.1 * np.random.default_rng(1).standard_normal(p),
    }[kind]
    return share / share.sum()


def check_labels(labels, z, g, gap):
    """Equal to argmax(z + g) wherever the best two differ by more than `gap`; the rest are ties and few."""
    x = z + g
    top = np.sort(x, 1)[:, -2:]
    tie = top[:, 1] - top[:, 0] <= gap
    wrong = labels != x.argmax(1)
    assert not (wrong & ~tie).any(), f'{(wrong & ~tie).sum()} labels differ'
    assert tie.mean() < 0.02
    return tie


@pytest.mark.parametrize('method', ['newton', 'anderson'])
@pytest.mark.parametrize(
    'kind, prior',
    [
        ('random', 'uniform'),
        ('structured', 'uniform'),
        ('structured', 'zipf'),
        ('structured', 'gaussian'),
    ],
)
def test_labels_are_those_of_the_published_loop(kind, prior, method):
    m, p = 3000, 24
    views, r = problem(m, p, kind), priors(p, prior)
    log_p = sum(log_softmax(v) for v in views) / 2
    want, log_alpha, _, _ = published(log_p, r, 20)
    got = sinkhorn.solve(views, r, 20, method=method, tolerance='published')
    assert got.converged and got.residual < 0.1 / m and got.published_error < 0.1
    exact = column_means(20 * log_p, got.potentials)
    # what float32 passes report holds in float64, up to their rounding
    assert np.abs(exact - r).sum() < 0.1 / m + 2e-6
    ratio = r / exact
    s = sinkhorn.soft_assignments(20 * log_p, got.potentials)
    np.testing.assert_allclose(np.abs(s @ ratio - 1).sum(), got.published_error, atol=0.02)
    # the two stop at different potentials, both close to the optimum: their distance bounds the margin of labels that may differ
    gap = np.ptp(got.potentials - log_alpha)
    assert gap < 0.3
    tie = check_labels(got.labels, 20 * log_p, got.potentials, 1e-4)
    x = np.sort(20 * log_p + log_alpha, 1)
    assert not ((got.labels != want) & (x[:, -1] - x[:, -2] > gap) & ~tie).any()
    np.testing.assert_allclose(got.cost, -log_p[np.arange(m), got.labels].mean(), rtol=1e-5)


def test_float64_reaches_what_float32_cannot():
    views, r = problem(1500, 12, 'structured'), priors(12, 'zipf')
    log_p = sum(log_softmax(v) for v in views) / 2
    got = sinkhorn.solve(views, r, 20, dtype='float64', tolerance=1e-11)
    assert got.converged and np.abs(column_means(20 * log_p, got.potentials) - r).sum() < 2e-11
    np.testing.assert_allclose(got.potentials, converged(20 * log_p, r), atol=1e-7)
    assert jax.numpy.zeros(1).dtype == 'float32'  # the caller's precision is untouched
    rough = sinkhorn.solve(views, r, 20, dtype='float32', tolerance=1e-11, max_passes=200)
    assert not rough.converged and rough.residual < 3e-6  # says so, and gives the best it saw


@pytest.mark.parametrize('mesh', [(2, 4), pytest.param((8,), marks=pytest.mark.slow)])
def test_one_device_is_eight(mesh):
    """M not divisible by 8: padding rows must weigh nothing."""
    views, r = problem(1501, 16, 'structured'), priors(16, 'zipf')
    one = sinkhorn.solve(views, r, 20)
    eight = sinkhorn.solve(views, r, 20, mesh=jax.make_mesh(mesh, ('a', 'b')[: len(mesh)]))
    assert len(eight.labels) == 1501
    np.testing.assert_allclose(eight.potentials, one.potentials, atol=2e-3)
    z = 10 * sum(v.astype(np.float64) for v in views)
    check_labels(eight.labels, z, one.potentials, 5e-3)
    np.testing.assert_allclose(eight.cost, one.cost, rtol=1e-4)


def test_features_and_head_weights_give_the_labels_of_their_logits():
    rng = np.random.default_rng(3)
    features = [rng.standard_normal((1300, 20)).astype(np.float32) for _ in range(2)]
    heads = [
        (
            rng.standard_normal((20, 10)).astype(np.float32) * 0.4,
            rng.standard_normal(10).astype(np.float32),
        )
        for _ in range(2)
    ]
    logits = [x @ k + b for x, (k, b) in zip(features, heads)]
    r = priors(10, 'exponential')
    a = sinkhorn.solve(logits, r, 20)
    b = sinkhorn.solve(features, r, 20, heads=heads, mesh=jax.make_mesh((8,), ('rows',)))
    check_labels(b.labels, 10 * sum(x.astype(np.float64) for x in logits), a.potentials, 1e-2)
    np.testing.assert_allclose(b.cost, a.cost, rtol=1e-4)


def test_no_array_of_samples_times_clusters_is_made_from_features():
    m, d, p = 40_000, 8, 500
    x = (jax.ShapeDtypeStruct((m, d), 'float32'),)
    heads = ((jax.ShapeDtypeStruct((d, p), 'float32'), jax.ShapeDtypeStruct((p,), 'float32')),)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('rows',))
    for statistic in ('marginal', 'label'):
        lowered = sinkhorn._block_pass.lower(
            x,
            heads,
            jax.ShapeDtypeStruct((3, p), 'float32'),
            jax.ShapeDtypeStruct((), 'float32'),
            jax.ShapeDtypeStruct((), 'int32'),
            statistic=statistic,
            mesh=mesh,
            chunk=sinkhorn.chunk_rows(p),
        )
        assert lowered.compile().memory_analysis().temp_size_in_bytes < m * p * 4 / 8


def test_blocks_are_the_whole():
    views, r = problem(1000, 12, 'structured'), priors(12, 'uniform')
    whole = sinkhorn.solve(views, r, 20)
    cut = sinkhorn.solve([[v[:400], v[400:900], v[900:]] for v in views], r, 20)
    check_labels(cut.labels, 10 * sum(v.astype(np.float64) for v in views), whole.potentials, 5e-3)
    assert cut.labels.shape == (1000,)


def hard(kind, m=400, p=8, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.integers(0, p, m)
    return {
        'one-hot': 60.0 * np.eye(p)[z]
        + 1e-3 * rng.standard_normal((m, p)),  # gaps of 1200 nats at λ = 20
        'one cluster': 50.0 * np.eye(p)[np.zeros(m, int)]
        + rng.standard_normal((m, p)),  # all rows want the same cluster
        'huge': 1e4 * rng.standard_normal((m, p)),
        'constant': np.zeros((m, p)),
        'forbidden': np.where(rng.uniform(size=(m, p)) < 0.3, -np.inf, rng.standard_normal((m, p))),
        'tiny': 1e-6 * rng.standard_normal((m, p)),
    }[kind].astype(np.float32)


@pytest.mark.parametrize(
    'kind',
    [
        'one-hot',
        'huge',
        'forbidden',
        *[pytest.param(k, marks=pytest.mark.slow) for k in ('one cluster', 'constant', 'tiny')],
    ],
)
def test_hard_inputs_end_finite(kind):
    """No NaN, overflow or endless loop, and the sizes are met where float precision lets them."""
    logits, r = hard(kind), priors(8, 'zipf')
    got = sinkhorn.solve([logits], r, 20, max_passes=3000)
    assert (
        np.isfinite(got.potentials).all() and np.isfinite([got.residual, got.published_error]).all()
    )
    assert got.residual < {'huge': 1e-3}.get(kind, 1e-4), got.residual
    exact = sinkhorn.solve(
        [logits.astype(np.float64)], r, 20, dtype='float64', tolerance=1e-6, max_passes=3000
    )
    assert exact.residual < {'huge': 1e-3}.get(kind, 1e-6), exact.residual
    if kind == 'one-hot':
        z = logits.argmax(1)
        # rows stay in the cluster they are sure of as far as its size lets them
        expected = np.minimum(np.bincount(z, minlength=8), r * 400)
        assert (got.labels == z).sum() >= 0.9 * expected.sum()


@pytest.mark.slow
def test_huge_strength():
    views, r = problem(600, 8, 'structured'), priors(8, 'zipf')
    got = sinkhorn.solve(views, r, 5000, dtype='float64', tolerance=1e-3, max_passes=3000)
    assert np.isfinite(got.potentials).all() and got.residual < 0.02
    # nearly an assignment: all but a few rows are hard, so hard counts follow the prior
    assert np.abs(np.bincount(got.labels, minlength=8) / 600 - r).sum() < 0.04


def test_mistakes_are_sentences():
    views = problem(50, 4, 'random')
    with pytest.raises(
        ValueError, match=r'prior\[1\]=0.0 \(2 such of 4\): every cluster needs a positive share'
    ):
        sinkhorn.solve(views, np.array([0.5, 0, 0, 0.5]), 20)
    with pytest.raises(ValueError, match='prior sums to 2'):
        sinkhorn.solve(views, np.full(4, 0.5), 20)
    with pytest.raises(ValueError, match=r'expected shape \[50 5\], got \(50, 4\)'):
        sinkhorn.solve(views, np.full(5, 0.2), 20)
    bad = [v.copy() for v in views]
    bad[1][7, 2] = np.nan
    with pytest.raises(ValueError, match='hold NaN'):
        sinkhorn.solve(bad, np.full(4, 0.25), 20)


def test_warm_start_needs_fewer_passes():
    views, r = problem(6000, 40, 'structured'), priors(40, 'uniform')
    cold = sinkhorn.solve(views, r, 20, tolerance='published')
    drift = [
        v + 0.2 * np.random.default_rng(9).standard_normal(v.shape).astype(np.float32)
        for v in views
    ]
    warm = sinkhorn.solve(drift, r, 20, tolerance='published', start=cold)
    plain = sinkhorn.solve(drift, r, 20, tolerance='published', method='plain')
    assert warm.converged and plain.converged and warm.work < plain.work / 4
    check_labels(warm.labels, 10 * sum(v.astype(np.float64) for v in drift), plain.potentials, 0.1)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    m=st.sampled_from([5, 333]),
    p=st.sampled_from([2, 7]),
    strength=st.sampled_from([1.0, 25.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_prior(m, p, strength, seed):
    rng = np.random.default_rng(seed)
    r = rng.dirichlet(np.ones(p) * 3) * 0.9 + 0.1 / p
    logits = rng.standard_normal((m, p)).astype(np.float32)
    got = sinkhorn.solve([logits], r, strength, tolerance=1e-5)
    assert got.converged
    z = strength * logits.astype(np.float64)
    assert np.abs(column_means(z, got.potentials) - r).sum() < 2e-5
    np.testing.assert_array_equal(got.labels, (z + got.potentials).argmax(1))


@pytest.mark.parametrize('seed', [192, 193])
def test_a_cluster_that_takes_a_part_of_one_row(seed):
    """Rows nearly decided: Sinkhorn's steps are tiny and Newton's jump over the solution; these two stalled."""
    rng = np.random.default_rng(seed)
    r = rng.dirichlet(np.ones(2) * 3) * 0.9 + 0.05
    got = sinkhorn.solve([rng.standard_normal((5, 2)).astype(np.float32)], r, 25.0, tolerance=1e-5)
    assert got.converged and got.residual <= 1e-5


def swav(scores, epsilon, iterations=3):
    """The published code's order of operations on Q = exp(scores / eps)ᵀ [K B]."""
    q = np.exp(scores.astype(np.float64) / epsilon).T
    q /= q.sum()
    k, b = q.shape
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * k
        q /= q.sum(0, keepdims=True) * b
    return (q * b).T


def test_soft_codes_are_swavs():
    scores = np.random.default_rng(0).uniform(-1, 1, (24, 10)).astype(np.float32)
    got = np.asarray(sinkhorn.soft_codes(scores))
    np.testing.assert_allclose(got, swav(scores, 0.05), rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-5)
    valid = np.arange(24) % 3 != 0
    some = np.asarray(sinkhorn.soft_codes(scores, valid=valid))
    np.testing.assert_allclose(some[valid], swav(scores[valid], 0.05), rtol=2e-4, atol=1e-7)
    assert (some[~valid] == 0).all()
    assert np.isfinite(np.asarray(sinkhorn.soft_codes(1000 * scores))).all()
    assert np.isfinite(np.asarray(sinkhorn.soft_codes(scores, valid=np.zeros(24, bool)))).all()
    rows = jax.NamedSharding(jax.make_mesh((8,), ('rows',)), jax.sharding.PartitionSpec('rows'))
    np.testing.assert_allclose(
        jax.jit(sinkhorn.soft_codes)(jax.device_put(scores, rows)), got, rtol=1e-5, atol=1e-7
    )
