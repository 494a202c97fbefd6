"""IPOT and word-region alignment against definitions in float64, and linear assignment."""

import functools

import chex
import jax
import numpy as np
import pytest
import scipy.optimize

from tests import typecheck
from vatt_jax.clustering import ipot, sinkhorn
from vatt_jax.losses import word_region

BETA, STEPS = 0.5, 50


def log_sum_exp(x, axis):
    top = x.max(axis, keepdims=True)
    return np.squeeze(top + np.log(np.exp(x - top).sum(axis, keepdims=True)), axis)


def definition(cost, beta=BETA, steps=STEPS):
    """The plan of one example without padding [L N], in logarithms and float64."""
    num_x, num_y = cost.shape
    log_plan = np.zeros(cost.shape)
    log_x = np.full(num_x, -np.log(num_x))
    for _ in range(steps):
        log_weights = log_plan - np.float64(cost) / beta
        log_y = -np.log(num_y) - log_sum_exp(log_weights + log_x[:, None], 0)
        log_x = -np.log(num_x) - log_sum_exp(log_weights + log_y, 1)
        log_plan = log_x[:, None] + log_weights + log_y
    return np.exp(log_plan)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def distance_and_gradient(words, regions):
    """Of one example without padding: the distance, and its gradient in words with a fixed plan."""
    words, regions = np.float64(words), np.float64(regions)
    cosine = unit(words) @ unit(regions).T
    plan = definition(1 - cosine)
    # d cos(x, y) / dx = (y/|y| - cos x/|x|) / |x|
    pull = unit(regions)[None] - cosine[..., None] * unit(words)[:, None]  # [L N D]
    gradient = -np.sum(plan[..., None] * pull, 1) / np.linalg.norm(words, axis=-1, keepdims=True)
    return np.sum(plan * (1 - cosine)), gradient


@pytest.fixture
def batch():
    """Four examples of words [4 7 5] and regions [4 6 5], of different lengths, garbage at pads."""
    rng = np.random.default_rng(0)
    words = rng.normal(size=(4, 7, 5)).astype(np.float32)
    regions = rng.normal(size=(4, 6, 5)).astype(np.float32)
    words_valid = np.arange(7) < np.array([7, 3, 5, 1])[:, None]
    regions_valid = np.arange(6) < np.array([6, 6, 2, 4])[:, None]
    words[~words_valid] = np.nan
    regions[~regions_valid] = np.inf
    return words, regions, words_valid, regions_valid


def padded_costs(batch, dtype):
    """Costs [4 7 6], NaN at padding."""
    words, regions, _, _ = batch
    cosine = np.einsum('bld,bnd->bln', unit(np.float64(words)), unit(np.float64(regions)))
    return np.asarray(1 - cosine, dtype)


@pytest.mark.filterwarnings('ignore:invalid value')
@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-4), ('float64', 1e-12)])
def test_plans_with_padding_are_those_of_the_definition_without(batch, dtype, tolerance):
    _, _, words_valid, regions_valid = batch
    cost = padded_costs(batch, dtype)
    with jax.enable_x64(dtype == 'float64'):
        plan = np.asarray(jax.jit(ipot.transport_plan)(cost, words_valid, regions_valid))
    assert plan.dtype == dtype
    for b in range(4):
        own = np.ix_(words_valid[b], regions_valid[b])
        np.testing.assert_allclose(plan[b][own], definition(cost[b][own]), atol=tolerance)
    is_pair = words_valid[:, :, None] & regions_valid[:, None]
    assert (plan[~is_pair] == 0).all()

    # The last scaling makes the words' marginals exact; the regions' are near.
    of_words = np.where(words_valid, 1 / words_valid.sum(1, keepdims=True), 0)
    of_regions = np.where(regions_valid, 1 / regions_valid.sum(1, keepdims=True), 0)
    np.testing.assert_allclose(plan.sum(2), of_words, atol=1e-6)
    np.testing.assert_allclose(plan.sum(1), of_regions, atol=2e-2)


def test_one_step_is_one_sweep_of_sinkhorn():
    """SwAV's codes are rows of the same plan, scaled to 1."""
    cost = np.random.default_rng(1).uniform(0, 2, (24, 10)).astype(np.float32)
    everything = np.ones((1, 24), bool), np.ones((1, 10), bool)
    one_step = functools.partial(ipot.transport_plan, beta=0.3, iterations=1)
    one_sweep = functools.partial(sinkhorn.soft_codes, epsilon=0.3, iterations=1)
    plan = jax.jit(one_step)(cost[None], *everything)
    codes = jax.jit(one_sweep)(-cost)
    np.testing.assert_allclose(24 * plan[0], codes, rtol=1e-4, atol=1e-7)


def test_many_steps_tend_to_linear_assignment():
    """Equally many on both sides: the best plan is a permutation. One step is far from it."""
    costs = np.random.default_rng(2).uniform(0, 2, (5, 8, 8)).astype(np.float32)
    everything = np.ones((5, 8), bool)
    gaps = {}
    for steps in (1, 50, 2000):
        plan = np.float64(ipot.transport_plan(costs, everything, everything, iterations=steps))
        gaps[steps] = []
        for cost, found in zip(costs, plan):
            rows, columns = scipy.optimize.linear_sum_assignment(cost)
            gaps[steps].append(np.sum(cost * found) - cost[rows, columns].mean())
    assert min(gaps[1]) > 0.1
    assert max(gaps[50]) < 0.03
    np.testing.assert_allclose(gaps[2000], 0, atol=2e-4)


def test_distances_and_gradients_are_those_of_the_definition(batch):
    words, regions, words_valid, regions_valid = batch

    def total(words):
        distance = word_region.transport_distance(words, regions, words_valid, regions_valid)
        return distance.sum(), distance

    gradient, distance = jax.jit(jax.grad(total, has_aux=True))(words)
    for b in range(4):
        expected = distance_and_gradient(words[b][words_valid[b]], regions[b][regions_valid[b]])
        np.testing.assert_allclose(distance[b], expected[0], rtol=1e-4)
        np.testing.assert_allclose(gradient[b][words_valid[b]], expected[1], atol=1e-4)
    # Through the cost alone, and never into padding.
    np.testing.assert_array_equal(np.asarray(gradient)[~words_valid], 0)


def test_alignment_is_the_signed_mean_over_pairs(batch):
    words, regions, words_valid, regions_valid = batch
    is_match = np.array([True, False, True, False])
    valid = np.array([True, True, False, True])
    expected = [
        distance_and_gradient(words[b][words_valid[b]], regions[b][regions_valid[b]])[0]
        for b in range(4)
    ]
    masks = words_valid, regions_valid

    def of_all(words):
        return word_region.word_region_alignment(words, regions, is_match, *masks)

    loss = jax.jit(of_all)(words)
    mean = (expected[0] + expected[2] - expected[1] - expected[3]) / 4
    np.testing.assert_allclose(loss, mean, atol=1e-5)

    # What does not count may be anything.
    words[2] = np.nan

    def of_valid(words):
        return word_region.word_region_alignment(words, regions, is_match, *masks, valid=valid)

    loss, gradient = jax.jit(jax.value_and_grad(of_valid))(words)
    np.testing.assert_allclose(loss, (expected[0] - expected[1] - expected[3]) / 3, atol=1e-5)
    np.testing.assert_array_equal(gradient[2], 0)
    assert np.abs(gradient[0][words_valid[0]]).max() > 0


def test_an_example_without_words_or_regions_is_zero(batch):
    words, regions, words_valid, regions_valid = batch
    words_valid = words_valid & (np.arange(4) != 1)[:, None]
    regions_valid = regions_valid & (np.arange(4) != 2)[:, None]

    def total(words, regions):
        distance = word_region.transport_distance(words, regions, words_valid, regions_valid)
        return distance.sum(), distance

    differentiate = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    gradients, distance = differentiate(words, regions)
    np.testing.assert_array_equal(np.asarray(distance)[1:3], 0)
    chex.assert_tree_all_finite((distance, gradients))
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[1:3], 0)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'words_valid': np.ones((4, 6), bool)}, r'words_valid: expected shape \(4, 7\)'),
        ({'regions': np.zeros((4, 6, 4), np.float32)}, r'expected words \[B L D\] and regions'),
        ({'beta': 0.0}, 'beta: expected a positive number, got 0'),
        ({'iterations': 0}, 'iterations: expected a positive number, got 0'),
    ],
)
def test_mistakes_are_named(batch, changes, message):
    names = ('words', 'regions', 'words_valid', 'regions_valid')
    arguments = {**dict(zip(names, batch)), **changes}
    with typecheck.off(), pytest.raises(ValueError, match=message):
        word_region.transport_distance(**arguments)
