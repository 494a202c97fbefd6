"""The labelling solver against the published loop and plain Sinkhorn run to convergence.

Both are written out in NumPy float64.
"""

import functools

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vatt_jax.clustering import sinkhorn


def published(log_p, prior, strength, tolerance=0.1, cap=2000):
    """The published loop on probabilities exp(log_p): labels [M] and log alpha [P].

        alpha = prior / (Kᵀ beta),  beta' = (1 / M) / (K alpha),  K = exp(strength log_p)

    until Σ |beta / beta' - 1|, which is looked at every ten rounds, falls below the tolerance.
    """
    kernel = np.exp(strength * log_p)
    m = len(kernel)
    beta = np.full(m, 1 / m)
    error = np.inf
    count = 0
    while error > tolerance and count < cap:
        alpha = prior / (kernel.T @ beta)
        new_beta = (1 / m) / (kernel @ alpha)
        if count % 10 == 0:
            error = np.abs(beta / new_beta - 1).sum()
        beta = new_beta
        count += 1
    return (kernel * alpha).argmax(1), np.log(alpha)


def log_sum_exp(x, axis):
    """log Σ exp over an axis, which stays."""
    top = x.max(axis, keepdims=True)
    return top + np.log(np.exp(x - top).sum(axis, keepdims=True))


def converged(z, prior, rounds=20000, tolerance=1e-12):
    """Potentials of the exact solution by plain iterations: g += log(prior / c(g)).

    In the log domain: log column means c through their own maxima, so nothing underflows.
    """
    g = np.zeros(z.shape[1])
    for _ in range(rounds):
        log_softmax_of_rows = z + g - log_sum_exp(z + g, 1)
        log_c = log_sum_exp(log_softmax_of_rows, 0)[0] - np.log(len(z))
        g = g + np.log(prior) - log_c
        if np.abs(np.exp(log_c) - prior).sum() < tolerance:
            break
    return g - prior @ g


def column_means(z, g):
    """c(g): the column means of softmax(z + g) by rows."""
    return np.exp(log_softmax(z + g)).mean(0)


def log_softmax(x):
    """By rows, in float64."""
    x = np.asarray(x, np.float64)
    return x - log_sum_exp(x, 1)


def float64_sum(views):
    """The sum of all views, in float64."""
    return sum(view.astype(np.float64) for view in views)


def problem(m, p, kind, seed=0):
    """Logits [M P] of two views: noise, to which `structured` adds a cluster of each row."""
    rng = np.random.default_rng(seed)
    views = [rng.standard_normal((m, p)).astype(np.float32) for _ in range(2)]
    if kind == 'structured':
        share = 1 / (np.arange(p) + 10)
        cluster = rng.choice(p, m, p=share / share.sum())
        for view in views:
            view[np.arange(m), cluster] += 4
    return views


def priors(p, kind):
    """Shares [P] of clusters."""
    share = {
        'uniform': np.ones(p),
        'zipf': 1 / (1 + np.arange(p)),
        'exponential': np.exp(-np.arange(p) / p * 4),
        'gaussian': 1 + 0.1 * np.random.default_rng(1).standard_normal(p),
    }[kind]
    return share / share.sum()


def check_solution(solution, m, p):
    """Shapes and types of what `solve` promises."""
    chex.assert_shape([solution.potentials, solution.labels], [(p,), (m,)])
    chex.assert_type([solution.potentials, solution.labels], [np.float64, np.int32])
    chex.assert_tree_all_finite([solution.potentials, solution.cost, solution.residual])
    assert solution.labels.min() >= 0
    assert solution.labels.max() < p


def check_labels(labels, z, g, gap):
    """Labels are argmax(z + g) wherever the best two differ by more than `gap`.

    The rest are ties, and few. Returns which rows are ties.
    """
    scores = z + g
    second, best = np.sort(scores, 1)[:, -2:].T
    tie = best - second <= gap
    wrong = labels != scores.argmax(1)
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
    views = problem(m, p, kind)
    prior = priors(p, prior)
    log_p = sum(log_softmax(view) for view in views) / 2
    z = 20 * log_p
    published_labels, log_alpha = published(log_p, prior, 20)
    got = sinkhorn.solve(views, prior, 20, method=method, tolerance='published')
    check_solution(got, m, p)
    assert got.converged
    assert got.residual < 0.1 / m
    assert got.published_error < 0.1

    # What float32 passes report holds in float64, up to their rounding.
    exact = column_means(z, got.potentials)
    assert np.abs(exact - prior).sum() < 0.1 / m + 2e-6
    # The published loop's beta / beta' is the mean of prior / c under a row's soft assignment.
    soft = sinkhorn.soft_assignments(z, got.potentials)
    published_error = np.abs(soft @ (prior / exact) - 1).sum()
    np.testing.assert_allclose(published_error, got.published_error, atol=0.02)

    # The two stop at different potentials, both close to the optimum: their distance bounds the
    # margin of labels that may differ.
    gap = np.ptp(got.potentials - log_alpha)
    assert gap < 0.3
    tie = check_labels(got.labels, z, got.potentials, 1e-4)
    scores = np.sort(z + log_alpha, 1)
    clear = scores[:, -1] - scores[:, -2] > gap
    assert not ((got.labels != published_labels) & clear & ~tie).any()
    cost = -log_p[np.arange(m), got.labels].mean()
    np.testing.assert_allclose(got.cost, cost, rtol=1e-5)


def test_float64_reaches_what_float32_cannot():
    views = problem(1500, 12, 'structured')
    prior = priors(12, 'zipf')
    z = 20 * sum(log_softmax(view) for view in views) / 2
    got = sinkhorn.solve(views, prior, 20, dtype='float64', tolerance=1e-11)
    check_solution(got, 1500, 12)
    assert got.converged
    assert np.abs(column_means(z, got.potentials) - prior).sum() < 2e-11
    np.testing.assert_allclose(got.potentials, converged(z, prior), atol=1e-7)
    # The caller's precision is untouched.
    chex.assert_type(jax.numpy.zeros(1), np.float32)
    rough = sinkhorn.solve(views, prior, 20, dtype='float32', tolerance=1e-11, max_passes=200)
    # It says so, and gives the best that it saw.
    assert not rough.converged
    assert rough.residual < 3e-6


@pytest.mark.parametrize('mesh', [(2, 4), pytest.param((8,), marks=pytest.mark.slow)])
def test_one_device_is_eight(mesh):
    """M not divisible by 8: padding rows must weigh nothing."""
    views = problem(1501, 16, 'structured')
    prior = priors(16, 'zipf')
    one = sinkhorn.solve(views, prior, 20)
    axes = ('a', 'b')[: len(mesh)]
    eight = sinkhorn.solve(views, prior, 20, mesh=jax.make_mesh(mesh, axes))
    check_solution(eight, 1501, 16)
    np.testing.assert_allclose(eight.potentials, one.potentials, atol=2e-3)
    check_labels(eight.labels, 10 * float64_sum(views), one.potentials, 5e-3)
    np.testing.assert_allclose(eight.cost, one.cost, rtol=1e-4)


def test_features_and_head_weights_give_the_labels_of_their_logits():
    rng = np.random.default_rng(3)
    features = [rng.standard_normal((1300, 20)).astype(np.float32) for _ in range(2)]
    heads = []
    for _ in features:
        kernel = rng.standard_normal((20, 10)).astype(np.float32) * 0.4
        bias = rng.standard_normal(10).astype(np.float32)
        heads.append((kernel, bias))
    logits = [x @ kernel + bias for x, (kernel, bias) in zip(features, heads, strict=True)]
    prior = priors(10, 'exponential')
    from_logits = sinkhorn.solve(logits, prior, 20)
    mesh = jax.make_mesh((8,), ('rows',))
    from_features = sinkhorn.solve(features, prior, 20, heads=heads, mesh=mesh)
    check_solution(from_features, 1300, 10)
    check_labels(from_features.labels, 10 * float64_sum(logits), from_logits.potentials, 1e-2)
    np.testing.assert_allclose(from_features.cost, from_logits.cost, rtol=1e-4)


@pytest.mark.parametrize('statistic', ['marginal', 'label'])
def test_no_array_of_samples_times_clusters_is_made_from_features(statistic):
    m, d, p = 40_000, 8, 500
    shape = functools.partial(jax.ShapeDtypeStruct, dtype='float32')
    lowered = sinkhorn._block_pass.lower(
        (shape((m, d)),),
        ((shape((d, p)), shape((p,))),),
        shape((3, p)),
        shape(()),
        jax.ShapeDtypeStruct((1,), 'int32'),
        statistic=statistic,
        mesh=jax.sharding.Mesh(np.array(jax.devices()[:1]), ('rows',)),
        chunk=sinkhorn.chunk_rows(p),
    )
    float32_logits = m * p * 4
    assert lowered.compile().memory_analysis().temp_size_in_bytes < float32_logits / 8


def test_blocks_are_the_whole():
    views = problem(1000, 12, 'structured')
    prior = priors(12, 'uniform')
    whole = sinkhorn.solve(views, prior, 20)
    blocks = [[view[:400], view[400:900], view[900:]] for view in views]
    in_blocks = sinkhorn.solve(blocks, prior, 20)
    check_solution(in_blocks, 1000, 12)
    check_labels(in_blocks.labels, 10 * float64_sum(views), whole.potentials, 5e-3)


def hard(kind, m=400, p=8, seed=0):
    """Logits [M P] at the edge of float precision."""
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, p, m)
    if kind == 'one-hot':
        # Gaps of 1200 nats at a strength of 20.
        logits = 60.0 * np.eye(p)[cluster] + 1e-3 * rng.standard_normal((m, p))
    elif kind == 'one cluster':
        # All rows prefer the same one.
        logits = 50.0 * np.eye(p)[np.zeros(m, int)] + rng.standard_normal((m, p))
    elif kind == 'huge':
        logits = 1e4 * rng.standard_normal((m, p))
    elif kind == 'constant':
        logits = np.zeros((m, p))
    elif kind == 'forbidden':
        forbidden = rng.uniform(size=(m, p)) < 0.3
        logits = np.where(forbidden, -np.inf, rng.standard_normal((m, p)))
    else:
        assert kind == 'tiny'
        logits = 1e-6 * rng.standard_normal((m, p))
    return logits.astype(np.float32)


@pytest.mark.parametrize(
    'kind',
    [
        'one-hot',
        'huge',
        'forbidden',
        pytest.param('one cluster', marks=pytest.mark.slow),
        pytest.param('constant', marks=pytest.mark.slow),
        pytest.param('tiny', marks=pytest.mark.slow),
    ],
)
def test_hard_inputs_end_finite(kind):
    """No NaN, overflow or endless loop, and the sizes are right where float precision lets them."""
    logits = hard(kind)
    prior = priors(8, 'zipf')
    got = sinkhorn.solve([logits], prior, 20, max_passes=3000)
    check_solution(got, 400, 8)
    chex.assert_tree_all_finite(got.published_error)
    assert got.residual < (1e-3 if kind == 'huge' else 1e-4), got.residual
    exact = sinkhorn.solve(
        [logits.astype(np.float64)], prior, 20, dtype='float64', tolerance=1e-6, max_passes=3000
    )
    assert exact.residual < (1e-3 if kind == 'huge' else 1e-6), exact.residual
    if kind == 'one-hot':
        # Rows stay in the cluster they are sure of as far as its size lets them.
        cluster = logits.argmax(1)
        room = np.minimum(np.bincount(cluster, minlength=8), prior * 400)
        assert (got.labels == cluster).sum() >= 0.9 * room.sum()


@pytest.mark.slow
def test_huge_strength():
    views = problem(600, 8, 'structured')
    prior = priors(8, 'zipf')
    got = sinkhorn.solve(views, prior, 5000, dtype='float64', tolerance=1e-3, max_passes=3000)
    check_solution(got, 600, 8)
    assert got.residual < 0.02
    # Nearly an assignment: all but a few rows are hard, so hard counts follow the prior.
    shares = np.bincount(got.labels, minlength=8) / 600
    assert np.abs(shares - prior).sum() < 0.04


def nan_at(views, view, row, column):
    """A copy of the views with one NaN."""
    spoilt = [v.copy() for v in views]
    spoilt[view][row, column] = np.nan
    return spoilt


def test_a_mistake_is_named():
    views = problem(50, 4, 'random')
    message = r'prior\[1\]=0.0 \(2 such of 4\): every cluster needs a positive share'
    with pytest.raises(ValueError, match=message):
        sinkhorn.solve(views, np.array([0.5, 0, 0, 0.5]), 20)
    with pytest.raises(ValueError, match='prior sums to 2'):
        sinkhorn.solve(views, np.full(4, 0.5), 20)
    with pytest.raises(ValueError, match=r'expected shape \[50 5\], got \(50, 4\)'):
        sinkhorn.solve(views, np.full(5, 0.2), 20)
    with pytest.raises(ValueError, match='hold NaN'):
        sinkhorn.solve(nan_at(views, view=1, row=7, column=2), np.full(4, 0.25), 20)


def test_warm_start_needs_fewer_passes():
    views = problem(6000, 40, 'structured')
    prior = priors(40, 'uniform')
    cold = sinkhorn.solve(views, prior, 20, tolerance='published')
    drift = []
    for view in views:
        noise = np.random.default_rng(9).standard_normal(view.shape).astype(np.float32)
        drift.append(view + 0.2 * noise)
    warm = sinkhorn.solve(drift, prior, 20, tolerance='published', start=cold)
    plain = sinkhorn.solve(drift, prior, 20, tolerance='published', method='plain')
    assert warm.converged
    assert plain.converged
    assert warm.work < plain.work / 4
    check_labels(warm.labels, 10 * float64_sum(drift), plain.potentials, 0.1)


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
    prior = rng.dirichlet(np.ones(p) * 3) * 0.9 + 0.1 / p
    logits = rng.standard_normal((m, p)).astype(np.float32)
    got = sinkhorn.solve([logits], prior, strength, tolerance=1e-5)
    check_solution(got, m, p)
    assert got.converged
    z = strength * logits.astype(np.float64)
    assert np.abs(column_means(z, got.potentials) - prior).sum() < 2e-5
    np.testing.assert_array_equal(got.labels, (z + got.potentials).argmax(1))


@pytest.mark.parametrize('seed', [192, 193])
def test_a_cluster_that_takes_a_part_of_one_row(seed):
    """Rows nearly decided: Sinkhorn's steps are tiny and Newton's jump over the solution.

    The search stalled at these two.
    """
    rng = np.random.default_rng(seed)
    prior = rng.dirichlet(np.ones(2) * 3) * 0.9 + 0.05
    logits = rng.standard_normal((5, 2)).astype(np.float32)
    got = sinkhorn.solve([logits], prior, 25.0, tolerance=1e-5)
    check_solution(got, 5, 2)
    assert got.converged
    assert got.residual <= 1e-5


def swav(scores, epsilon, iterations=3):
    """SwAV's codes [B K], in the published code's order of operations on Q = exp(scores / eps)ᵀ."""
    q = np.exp(scores.astype(np.float64) / epsilon).T
    q /= q.sum()
    k, b = q.shape
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * k
        q /= q.sum(0, keepdims=True) * b
    return (q * b).T


@pytest.fixture(scope='module')
def scores():
    """Cosines of 24 rows with 10 prototypes."""
    return np.random.default_rng(0).uniform(-1, 1, (24, 10)).astype(np.float32)


@pytest.mark.parametrize('compiled', [False, True])
def test_soft_codes_are_swavs(scores, compiled):
    soft_codes = jax.jit(sinkhorn.soft_codes) if compiled else sinkhorn.soft_codes
    codes = soft_codes(scores)
    chex.assert_equal_shape([codes, scores])
    chex.assert_type(codes, np.float32)
    np.testing.assert_allclose(codes, swav(scores, 0.05), rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(np.asarray(codes).sum(1), 1, rtol=1e-5)


def test_soft_codes_of_valid_rows_are_those_of_a_batch_without_the_others(scores):
    valid = np.arange(24) % 3 != 0
    codes = np.asarray(sinkhorn.soft_codes(scores, valid=valid))
    np.testing.assert_allclose(codes[valid], swav(scores[valid], 0.05), rtol=2e-4, atol=1e-7)
    assert (codes[~valid] == 0).all()


def test_soft_codes_of_large_scores_and_of_no_row_are_finite(scores):
    chex.assert_tree_all_finite(sinkhorn.soft_codes(1000 * scores))
    chex.assert_tree_all_finite(sinkhorn.soft_codes(scores, valid=np.zeros(24, bool)))


def test_soft_codes_on_eight_devices_are_those_on_one(scores):
    chex.assert_devices_available(8, 'cpu')
    mesh = jax.make_mesh((8,), ('rows',))
    rows = jax.NamedSharding(mesh, jax.sharding.PartitionSpec('rows'))
    spread = jax.jit(sinkhorn.soft_codes)(jax.device_put(scores, rows))
    expected = sinkhorn.soft_codes(scores)
    chex.assert_trees_all_equal_shapes_and_dtypes(spread, expected)
    np.testing.assert_allclose(spread, expected, rtol=1e-5, atol=1e-7)
