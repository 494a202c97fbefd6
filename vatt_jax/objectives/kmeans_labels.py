"""Self-labelling by k-means: clusters of the whole set are the classes that the views must predict.

The scheme of DeepCluster and of XDC (Alwassel et al. 2019, section 3): at each refresh all training records are encoded, their features
clustered, and fresh linear classifiers learn to name the clusters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vatt_jax.clustering.kmeans import labels_of
from vatt_jax.config import ConfigError, choose, with_defaults
from vatt_jax.losses.classification import softmax_cross_entropy
from vatt_jax.objectives.base import Loss, Objective, Refreshed, only
from vatt_jax.parallel.sharding import logical

DEFAULTS = {
    'name': 'kmeans_labels',
    'views': ('video', 'audio'),  # streams that learn to predict clusters
    'targets': 'joint',  # clusters of what: joint (of all views together: CDC, DeepCluster) | own (SDC) | other (of the views of
    # other modalities: XDC) | both (own and other, a classifier each: MDC)
    'clusters': 24,
    'every': 500,  # steps between refreshes; the first comes before step 0
    'iterations': 20,  # of Lloyd's algorithm
    'balance': True,  # weight classes by the inverse of how often they were seen (DeepCluster's uniform sampling)
    'momentum': 0.99,  # of that running frequency
}
TARGETS = ('joint', 'own', 'other', 'both')


class KMeansLabels(Objective):
    """params: {view: {labeling: linear classifier}}; a labeling is 'joint' or the view whose features were clustered. A record that lacks a
    modality has no label (-1) in the labelings that need it."""

    def __init__(self, config):
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        c = self.config
        if c.clusters < 2 or c.every < 1:
            raise ConfigError(
                f'config.objective: clusters={c.clusters} must be at least 2 and every={c.every} at least 1'
            )
        choose(c.targets, TARGETS, 'config.objective.targets')
        modality = lambda view: view.split('.')[0]
        own = {v: (v,) for v in c.views}
        other = {v: tuple(u for u in c.views if modality(u) != modality(v)) for v in c.views}
        if c.targets in ('other', 'both') and not all(other.values()):
            raise ConfigError(
                f'config.objective.targets={c.targets!r} wants views of two modalities; config.objective.views has '
                f'{", ".join(c.views) or "none"} (targets="own" clusters each view by itself)'
            )
        self.targets = {
            'joint': {v: ('joint',) for v in c.views},
            'own': own,
            'other': other,
            'both': {v: own[v] + other[v] for v in c.views},
        }[c.targets]
        self.labelings = sorted({t for targets in self.targets.values() for t in targets})

    def streams(self):
        return tuple(self.config.views)

    def columns(self):
        return {f'cluster.{t}': jax.ShapeDtypeStruct((), jnp.int32) for t in self.labelings}

    def init(self, key, spec):
        p = self.config.clusters
        if spec.size < p:
            raise ConfigError(
                f'config.objective.clusters={p}: the training set has {spec.size} records only'
            )
        params = {}
        for k, view in zip(jax.random.split(key, len(self.config.views)), self.config.views):
            width = spec.outputs.encoded[view].pooled.shape[-1]
            params[view] = {
                t: {
                    'kernel': logical(jax.nn.initializers.normal(0.01), 'embed', 'classes')(
                        jax.random.fold_in(k, i), (width, p)
                    ),
                    'bias': logical(jax.nn.initializers.zeros, 'classes')(k, (p,)),
                }
                for i, t in enumerate(self.targets[view])
            }
        return params, {'frequency': {t: jnp.full((p,), 1 / p) for t in self.labelings}}

    def judge(self, model, variables, params, state, pooled, batch, rng) -> Loss:
        c, m = self.config, self.config.momentum
        frequency, weights, labels = {}, {}, {}
        for t in self.labelings:
            label = labels[t] = batch['columns'][f'cluster.{t}']
            seen = (label >= 0) & batch['valid']
            one_hot = jax.nn.one_hot(label, c.clusters) * seen[:, None]
            share = one_hot.sum(0) / jnp.maximum(seen.sum(), 1)
            before = state['frequency'][t]
            frequency[t] = jnp.where(seen.any(), m * before + (1 - m) * share, before)
            weights[t] = jnp.sum(
                one_hot / (c.clusters * jnp.maximum(before, 1e-3)) if c.balance else one_hot, -1
            )

        total, metrics = 0.0, {}
        for view in c.views:
            x, valid, values, rights = (
                pooled[view].astype(jnp.float32),
                batch[view]['valid'],
                [],
                [],
            )
            for t in self.targets[view]:
                logits = x @ params[view][t]['kernel'] + params[view][t]['bias']
                values.append(
                    softmax_cross_entropy(
                        logits, jnp.maximum(labels[t], 0), weight=weights[t] * valid
                    )
                )
                seen = (labels[t] >= 0) & batch['valid'] & valid
                rights.append(
                    ((logits.argmax(-1) == labels[t]) & seen).sum() / jnp.maximum(seen.sum(), 1)
                )
            metrics[f'loss/{view}'], metrics[f'accuracy/{view}'] = (
                sum(values) / len(values),
                sum(rights) / len(rights),
            )
            total = total + metrics[f'loss/{view}'] / len(c.views)
        return Loss(total, metrics, variables['batch_stats'], {'frequency': frequency})

    def features(self, model, variables, params, batch, rng):
        """Unit features and validity of every view."""
        encoded = model.apply(
            variables, only(batch, self.streams()), train=False, rng=rng, method='encode_all'
        )
        pooled = {v: encoded[v].pooled.astype(jnp.float32) for v in self.config.views}
        out = {
            v: x / jnp.linalg.norm(x, axis=-1, keepdims=True).clip(1e-6) for v, x in pooled.items()
        }
        return out | {f'{v}/valid': batch[v]['valid'] for v in self.config.views}

    def refresh_due(self, step, steps):
        return step % self.config.every == 0

    def refresh(self, variables, params, state, step, records) -> Refreshed:
        c = self.config
        rows = records.encode(self.features)
        key = jax.random.fold_in(jax.random.key(17), step)
        columns, frequency, metrics = {}, {}, {}
        for i, t in enumerate(self.labelings):
            views = c.views if t == 'joint' else (t,)
            there = np.all([rows[f'{v}/valid'] for v in views], 0)
            if there.sum() < c.clusters:
                raise ConfigError(
                    f'config.objective.clusters={c.clusters}: only {there.sum()} training records have {" and ".join(views)}'
                )
            x = np.concatenate([rows[v][there] for v in views], -1)
            column = np.full(records.size, -1, np.int32)
            column[rows['index'][there]] = labels_of(
                jax.random.fold_in(key, i) if i else key,
                x,
                c.clusters,
                c.iterations,
                jax.sharding.get_mesh(),
            )
            sizes = np.bincount(column[column >= 0], minlength=c.clusters)
            columns[f'cluster.{t}'], frequency[t] = (
                column,
                jnp.asarray(sizes / sizes.sum(), jnp.float32),
            )
            tag = '' if len(self.labelings) == 1 else f'/{t}'
            metrics |= {
                f'largest_cluster{tag}': float(sizes.max() / sizes.sum()),
                f'empty_clusters{tag}': float((sizes == 0).sum()),
            }
        leaves, tree = jax.tree.flatten(params)
        fresh = [
            0.01 * jax.random.normal(k, p.shape) if p.ndim == 2 else jnp.zeros(p.shape)
            for k, p in zip(jax.random.split(key, len(leaves)), leaves)
        ]
        return Refreshed(
            jax.tree.unflatten(tree, fresh),
            {'frequency': frequency},
            columns=columns,
            fresh_slots=('.*',),
            metrics=metrics,
        )
