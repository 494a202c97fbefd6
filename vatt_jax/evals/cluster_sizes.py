"""How near the sizes of clusters of features come to Zipf's law: a fitness without labels (ELo)."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import scipy.special
from jaxtyping import Float, Int

from vatt_jax.clustering.kmeans import cluster_rows
from vatt_jax.config import ConfigError, check_range
from vatt_jax.evals.base import Evaluator, FeatureView, Result


class ClusterSizes(Evaluator):
    """KL divergence of the sizes of k-means clusters, largest first, from Zipf's law.

    As in ELo (Piergiovanni et al., 2020): a clip belongs to cluster c in proportion to
    exp(-|x - c|² / width), the size of a cluster is its mean over all clips, and the prior of the
    i-th largest is 1 / i^exponent over their sum. Classes of videos, it is argued, are about as
    unequally frequent as words are. No label is read; lower is better, 0 is the law itself.
    """

    DEFAULTS = {
        'type': 'cluster_sizes',
        'split': 'train',
        'stream': 'video',
        'limit': 1 << 20,
        # How many, P.
        'clusters': 32,
        # Of Zipf's law; 0: equal sizes.
        'exponent': 1.0,
        # Twice the variance of the Gaussian about a centroid (ELo: 1). 0: a clip belongs to the
        # nearest one alone.
        'width': 1.0,
        # Of Lloyd's algorithm.
        'iterations': 50,
        'baseline': True,
    }

    def __init__(self, config: Any, where: str = 'config.evals') -> None:
        super().__init__(config, where)
        c = self.config
        check_range(c.clusters, 2, math.inf, f'{where}.clusters')
        check_range(c.exponent, 0, math.inf, f'{where}.exponent')
        check_range(c.width, 0, math.inf, f'{where}.width')

    def run(self, view: FeatureView) -> Result:
        c = self.config
        features = view.features(c.split, limit=c.limit)
        pooled = features['pooled']
        if c.stream not in pooled or pooled[c.stream].ndim != 2:
            streams = [name for name, x in pooled.items() if x.ndim == 2]
            raise ConfigError(
                f'{self.where}.stream: expected one of {", ".join(streams)}, got {c.stream!r}.'
            )
        x = pooled[c.stream][features['valid'][c.stream]].astype(np.float64)  # [N D]
        if len(x) < c.clusters:
            raise ConfigError(
                f'{self.where}.clusters: expected at most {len(x)}, the clips of split '
                f'{c.split!r} with the stream {c.stream!r}, got {c.clusters}.'
            )
        key = jax.random.key(view.seed)
        labels = cluster_rows(key, x, c.clusters, c.iterations, view.encoder.mesh)
        sizes = cluster_sizes(x, labels, c.width)
        prior = zipf(len(sizes), c.exponent)
        scalars = {'divergence': divergence(sizes, prior), 'largest': float(sizes.max())}
        artifacts = {'sizes': np.sort(sizes)[::-1], 'prior': prior, 'clips': len(x)}
        return Result(scalars, artifacts)


def zipf(count: int, exponent: float) -> Float[np.ndarray, ' P']:
    """Shares proportional to 1 / rank^exponent, the largest first."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def cluster_sizes(
    x: Float[np.ndarray, 'N D'], labels: Int[np.ndarray, ' N'], width: float
) -> Float[np.ndarray, ' P']:
    """Shares of the clips that belong to each cluster that has any.

    Args:
      x: features.
      labels: the cluster of each.
      width: see `ClusterSizes`.
    """
    used, numbers = np.unique(labels, return_inverse=True)
    one_hot = np.eye(len(used))[numbers]  # [N P]
    if width == 0:
        return one_hot.mean(0)
    centroids = one_hot.T @ x / one_hot.sum(0)[:, None]  # [P D]
    squared_distances = np.stack([((x - c) ** 2).sum(-1) for c in centroids], axis=-1)  # [N P]
    return scipy.special.softmax(-squared_distances / width, axis=-1).mean(0)


def divergence(sizes: Float[np.ndarray, ' P'], prior: Float[np.ndarray, ' P']) -> float:
    """KL divergence of shares, largest first, from a prior that falls."""
    return float(scipy.special.rel_entr(np.sort(sizes)[::-1], prior).sum())
