"""The contrastive margin loss against its definition in NumPy float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import typecheck
from vatt_jax.losses import margin as margins

MARGIN = 0.99


def definition(x, y, is_match, valid, margin=MARGIN):
    """Loss and its gradient in x, pair by pair, in float64."""
    total = 0.0
    gradient = np.zeros(np.shape(x))
    for pair in np.ndindex(np.shape(is_match)):
        if not valid[pair]:
            continue
        difference = np.float64(x[pair]) - np.float64(y[pair])
        d = np.linalg.norm(difference)
        if is_match[pair]:
            total += d**2
            gradient[pair] = 2 * difference
        elif d < margin:
            total += (margin - d) ** 2
            gradient[pair] = -2 * (margin - d) * difference / d if d else 0
    count = max(np.sum(valid), 1)
    return total / count, gradient / count


@pytest.fixture
def pairs():
    """24 pairs [12 2 5] at distances on both sides of the margin; a third does not count."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 2, 5)).astype(np.float32)
    reach = rng.uniform(0, 2, (12, 2, 1))
    direction = rng.normal(size=x.shape)
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    y = (x + reach * direction).astype(np.float32)
    is_match = rng.random((12, 2)) < 0.5
    valid = rng.random((12, 2)) < 0.67
    return x, y, is_match, valid


def value_and_gradients(x, y, is_match, valid, margin=MARGIN):
    """Loss and its gradients in x and y, jitted."""

    def loss(x, y):
        return margins.contrastive_margin(x, y, is_match, margin=margin, valid=valid)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, y)


@pytest.mark.parametrize('margin', [0.5, MARGIN])
def test_loss_and_gradients_are_those_of_the_definition(pairs, margin):
    x, y, is_match, valid = pairs
    value, gradients = value_and_gradients(*pairs, margin)
    expected, expected_gradient = definition(x, y, is_match, valid, margin)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # The loss depends on the difference alone: the two gradients are opposite.
    np.testing.assert_allclose(gradients[0], expected_gradient, atol=1e-6)
    np.testing.assert_allclose(gradients[1], -expected_gradient, atol=1e-6)
    # Both branches were met on both sides of the margin.
    assert 0 < np.sum(np.any(expected_gradient != 0, -1)) < np.sum(valid)


def test_without_a_mask_all_pairs_count(pairs):
    x, y, is_match, _ = pairs
    value = margins.contrastive_margin(x, y, is_match)
    expected, _ = definition(x, y, is_match, np.ones(is_match.shape, bool))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_pairs_at_distance_zero_have_finite_gradients():
    x = np.ones((2, 3), np.float32)
    is_match = np.array([True, False])
    value, gradients = value_and_gradients(x, x, is_match, np.ones(2, bool))
    np.testing.assert_allclose(value, MARGIN**2 / 2, rtol=1e-6)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


def test_tiny_distances_push_with_full_strength():
    """The gradient of a mismatch is the margin times a unit vector, however close the two are."""
    x = np.zeros((1, 3), np.float32)
    y = np.array([[1e-12, 0, 0]], np.float32)
    _, (gradient, _) = value_and_gradients(x, y, np.array([False]), np.array([True]))
    np.testing.assert_allclose(gradient, [[2 * MARGIN, 0, 0]], rtol=1e-4)


def test_what_does_not_count_may_be_anything(pairs):
    x, y, is_match, valid = pairs
    expected, expected_gradients = value_and_gradients(*pairs)
    x = np.where(valid[..., None], x, np.nan)
    y = np.where(valid[..., None], y, np.inf)
    value, gradients = value_and_gradients(x, y, is_match, valid)
    np.testing.assert_array_equal(value, expected)
    chex.assert_trees_all_equal(gradients, expected_gradients)
    np.testing.assert_array_equal(gradients[0][~valid], 0)


def test_without_any_pair_that_counts_it_is_zero(pairs):
    x, y, is_match, valid = pairs
    value, gradients = value_and_gradients(x, y, is_match, np.zeros_like(valid))
    assert value == 0
    chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))


def test_nan_in_a_pair_that_counts_is_seen(pairs):
    x, y, is_match, valid = pairs
    x = x.copy()
    x[tuple(np.argwhere(valid)[0])] = np.nan
    assert np.isnan(margins.contrastive_margin(x, y, is_match, valid=valid))


def test_bfloat16_is_compared_in_float32(pairs):
    x, y, is_match, valid = pairs
    x, y = jnp.bfloat16(x), jnp.bfloat16(y)
    value = margins.contrastive_margin(x, y, is_match, valid=valid)
    expected, _ = definition(np.float32(x), np.float32(y), is_match, valid)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'y': np.zeros((12, 2, 4), np.float32)}, 'expected x and y of one shape'),
        (
            {'is_match': np.ones((2, 12), bool)},
            r'is_match: expected shape \(12, 2\), got \(2, 12\)',
        ),
        ({'valid': np.ones(24, bool)}, r'valid: expected shape \(12, 2\), got \(24,\)'),
        ({'margin': 0.0}, 'margin: expected a positive number, got 0'),
    ],
)
def test_mistakes_are_named(pairs, changes, message):
    x, y, is_match, valid = pairs
    arguments = {'x': x, 'y': y, 'is_match': is_match, 'valid': valid, **changes}
    # The shapes are annotated too; what is tested is the loss's own message.
    with typecheck.off(), pytest.raises(ValueError, match=message):
        margins.contrastive_margin(**arguments)
