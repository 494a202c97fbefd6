"""k-means against closed forms."""

import jax
import numpy as np
import pytest

from vatt_jax.clustering.kmeans import kmeans


@pytest.mark.parametrize('seed', range(5))
def test_the_start_is_drawn_by_squared_distance(seed):
    """A hundred points some units apart and one a thousand away: of two first centroids it is one, but for odds of 1 in 10^4."""
    x = np.concatenate(
        [np.random.default_rng(seed).uniform(-3, 3, (100, 2)), [[1000.0, 0.0]]]
    ).astype(np.float32)
    _, centroids = kmeans(jax.random.key(seed), x, clusters=2, iterations=0)
    assert (np.asarray(centroids)[:, 0] > 900).sum() == 1


def test_far_apart_groups_are_found():
    """Four groups that no iteration can merge; centroids are their means."""
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat(np.arange(4), 25))
    x = (100 * np.eye(4)[group] + rng.normal(size=(100, 4))).astype(np.float32)
    labels, centroids = map(np.asarray, kmeans(jax.random.key(1), x, clusters=4))
    for g in range(4):
        found = np.unique(labels[group == g])
        assert len(found) == 1 and (labels == found[0]).sum() == 25
        np.testing.assert_allclose(centroids[found[0]], x[group == g].mean(0), rtol=1e-4, atol=1e-4)
