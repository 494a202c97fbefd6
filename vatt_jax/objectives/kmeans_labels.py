"""Self-labelling by k-means: clusters of the whole set are the classes that every view must predict.

The scheme of DeepCluster and of XDC's concatenation variant (CDC): at each refresh all training records are encoded, the
concatenated features clustered, and fresh linear classifiers learn to name the cluster from each view alone.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vatt_jax.clustering.kmeans import kmeans
from vatt_jax.config import ConfigError, with_defaults
from vatt_jax.losses.classification import softmax_cross_entropy
from vatt_jax.objectives.base import Loss, Objective, Refreshed, only
from vatt_jax.sharding import logical

DEFAULTS = {
    'name': 'kmeans_labels',
    'views': ('video', 'audio'),  # streams that learn to predict the cluster; their features are clustered together
    'clusters': 24,
    'every': 500,                 # steps between refreshes; the first comes before step 0
    'iterations': 20,             # of Lloyd's algorithm
    'balance': True,              # weight classes by the inverse of how often they were seen (DeepCluster's uniform sampling)
    'momentum': 0.99,             # of that running frequency
}


class KMeansLabels(Objective):
    def __init__(self, config):
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        if self.config.clusters < 2 or self.config.every < 1:
            raise ConfigError(f'config.objective: clusters={self.config.clusters} must be at least 2 and '
                              f'every={self.config.every} at least 1')

    def streams(self):
        return tuple(self.config.views)

    def init(self, key, spec):
        p = self.config.clusters
        if spec.size < p:
            raise ConfigError(f'config.objective.clusters={p}: the training set has {spec.size} records only')
        params = {}
        for k, view in zip(jax.random.split(key, len(self.config.views)), self.config.views):
            width = spec.outputs.encoded[view].pooled.shape[-1]
            params[view] = {'kernel': logical(jax.nn.initializers.normal(0.01), 'embed', 'classes')(k, (width, p)),
                            'bias': logical(jax.nn.initializers.zeros, 'classes')(k, (p,))}
        return params, {'frequency': jnp.full((p,), 1 / p)}

    def loss(self, model, variables, params, state, batch, rng) -> Loss:
        label = batch['columns']['cluster']
        seen = (label >= 0) & batch['valid']
        one_hot = jax.nn.one_hot(label, self.config.clusters) * seen[:, None]
        share = one_hot.sum(0) / jnp.maximum(seen.sum(), 1)
        m = self.config.momentum
        frequency = jnp.where(seen.any(), m * state['frequency'] + (1 - m) * share, state['frequency'])
        weight = 1 / (self.config.clusters * jnp.maximum(state['frequency'], 1e-3)) if self.config.balance else jnp.ones(1)
        per_row = jnp.sum(one_hot * weight, -1)

        outputs, updates = model.apply(variables, only(batch, self.streams()), train=True, rng=rng, mutable=['batch_stats'],
                                       method='encode_all')
        total, metrics = 0.0, {}
        for view in self.config.views:
            logits = outputs[view].pooled.astype(jnp.float32) @ params[view]['kernel'] + params[view]['bias']
            mask = per_row * batch[view]['valid']
            value = softmax_cross_entropy(logits, jnp.maximum(label, 0), weight=mask)
            metrics[f'loss/{view}'] = value
            right = (logits.argmax(-1) == label) & seen & batch[view]['valid']
            metrics[f'accuracy/{view}'] = right.sum() / jnp.maximum((seen & batch[view]['valid']).sum(), 1)
            total = total + value / len(self.config.views)
        stats = {**variables['batch_stats'], **updates.get('batch_stats', {})}
        return Loss(total, metrics, stats, {'frequency': frequency})

    def refresh_due(self, step):
        return step % self.config.every == 0

    def refresh(self, variables, params, state, step, pass_over_data) -> Refreshed:
        def features(model, variables, params, batch, rng):
            encoded = model.apply(variables, only(batch, self.streams()), train=False, rng=rng, method='encode_all')
            pooled = [encoded[v].pooled.astype(jnp.float32) for v in self.config.views]
            unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True).clip(1e-6) for x in pooled]
            return {'features': jnp.concatenate(unit, -1)}
        rows = list(pass_over_data(features, augment=True))
        index = np.concatenate([r['index'] for r in rows])
        x = np.concatenate([r['features'] for r in rows])[np.argsort(index)]
        key = jax.random.fold_in(jax.random.key(17), step)
        labels, _ = kmeans(key, x, self.config.clusters, self.config.iterations)
        column = np.full(int(index.max()) + 1, -1, np.int32)
        column[np.sort(index)] = np.asarray(labels)
        fresh = {}
        for k, (view, p) in zip(jax.random.split(key, len(params)), sorted(params.items())):
            fresh[view] = {'kernel': 0.01 * jax.random.normal(k, p['kernel'].shape), 'bias': jnp.zeros(p['bias'].shape)}
        sizes = np.bincount(column[column >= 0], minlength=self.config.clusters)
        return Refreshed(fresh, {'frequency': jnp.asarray(sizes / sizes.sum(), jnp.float32)}, columns={'cluster': column},
                         fresh_slots=('.*',), metrics={'largest_cluster': float(sizes.max() / sizes.sum()),
                                                       'empty_clusters': float((sizes == 0).sum())})
