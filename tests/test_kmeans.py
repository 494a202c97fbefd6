"""k-means against closed forms."""

import chex
import jax
import numpy as np
import pytest

from vatt_jax.clustering.kmeans import kmeans


@pytest.mark.parametrize('seed', range(5))
def test_the_start_is_drawn_by_squared_distance(seed):
    """A hundred points some units apart and one a thousand away.

    Of two first centroids, it is one, but for odds of 1 in 10^4.
    """
    near = np.random.default_rng(seed).uniform(-3, 3, (100, 2))
    x = np.concatenate([near, [[1000.0, 0.0]]]).astype(np.float32)
    labels, centroids = kmeans(jax.random.key(seed), x, clusters=2, iterations=0)
    chex.assert_shape([labels, centroids], [(101,), (2, 2)])
    chex.assert_type([labels, centroids], [np.int32, np.float32])
    assert (np.asarray(centroids)[:, 0] > 900).sum() == 1


def test_rows_in_another_order_are_clustered_alike():
    """Points without groups, where the start decides: rows that are numbered start the same."""
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    expected, _ = kmeans(jax.random.key(2), x, clusters=6)
    numbers = np.random.default_rng(1).permutation(60)
    weight = np.ones(60, bool)
    labels, _ = kmeans(jax.random.key(2), x[numbers], 6, 20, weight, numbers)
    np.testing.assert_array_equal(labels, np.asarray(expected)[numbers])
    otherwise, _ = kmeans(jax.random.key(2), x[numbers], clusters=6)
    assert (np.asarray(otherwise) != np.asarray(expected)[numbers]).any()


def test_far_apart_groups_are_found():
    """Four groups that no iteration can merge; centroids are their means."""
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat(np.arange(4), 25))
    x = (100 * np.eye(4)[group] + rng.normal(size=(100, 4))).astype(np.float32)
    labels, centroids = map(np.asarray, kmeans(jax.random.key(1), x, clusters=4))
    chex.assert_shape([labels, centroids], [(100,), (4, 4)])
    for g in range(4):
        found = np.unique(labels[group == g])
        assert len(found) == 1
        assert (labels == found[0]).sum() == 25
        mean = x[group == g].mean(0)
        np.testing.assert_allclose(centroids[found[0]], mean, rtol=1e-4, atol=1e-4)
