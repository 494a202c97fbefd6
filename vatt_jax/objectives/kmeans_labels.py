"""Self-labelling by k-means: clusters of the whole set are the classes that views must predict.

The scheme of DeepCluster and of XDC (Alwassel et al. 2019): at each refresh all training
records are encoded, their features clustered, and fresh linear classifiers learn to name the
clusters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vatt_jax.clustering.kmeans import cluster_rows
from vatt_jax.config import ConfigError, check_range, choose, with_defaults
from vatt_jax.losses.classification import softmax_cross_entropy
from vatt_jax.objectives import heads
from vatt_jax.objectives.base import (
    Loss,
    Objective,
    RefreshResult,
    Spec,
    TrainingRecords,
    select_streams,
)
from vatt_jax.parallel import hosts
from vatt_jax.parallel.sharding import logical

DEFAULTS = {
    'name': 'kmeans_labels',
    # Streams that learn to predict clusters.
    'views': ('video', 'audio'),
    # Clusters of what: joint (of all views together: CDC, DeepCluster) | own (SDC) | other (of the
    # views of other modalities: XDC) | both (own and other, a classifier each: MDC)
    'targets': 'joint',
    'clusters': 24,
    # Steps between refreshes; the first comes before step 0.
    'every': 500,
    # Of Lloyd's algorithm.
    'iterations': 20,
    # Weight classes by the inverse of how often they were seen (DeepCluster's uniform sampling).
    'balance': True,
    # Of that running frequency.
    'momentum': 0.99,
}
# Field -> smallest and largest value.
RANGES = {
    'iterations': (1, math.inf),
    'momentum': (0, 1),
}
TARGETS = ('joint', 'own', 'other', 'both')


class KMeansLabels(Objective):
    """Mean over views of the cross entropy of linear classifiers with cluster labels.

    params: {view: {labeling: linear classifier}}; a labeling is 'joint' or the view whose features
    were clustered. A record that lacks a modality has no label (-1) in the labelings that need it.

    Attributes:
      targets: view -> the labelings it learns to predict.
      labelings: all of them, sorted.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        for field, (low, high) in RANGES.items():
            check_range(self.config[field], low, high, f'config.objective.{field}')
        c = self.config
        for field, smallest in (('clusters', 2), ('every', 1)):
            if c[field] < smallest:
                raise ConfigError(
                    f'config.objective.{field}: expected at least {smallest}, got {c[field]}.'
                )
        choose(c.targets, TARGETS, 'config.objective.targets')
        # Several views may learn the same labeling; it is clustered only once.
        self.targets = {view: self._targets_of(view) for view in c.views}
        labelings = {target for targets in self.targets.values() for target in targets}
        self.labelings = sorted(labelings)

    def _targets_of(self, view: str) -> tuple[str, ...]:
        """The labelings that this view learns to predict."""
        c = self.config
        if c.targets == 'joint':
            return ('joint',)
        if c.targets == 'own':
            return (view,)
        modality = heads.modality_of(view)
        others = tuple(other for other in c.views if heads.modality_of(other) != modality)
        if not others:
            raise ConfigError(
                f'config.objective.views: expected views of two modalities for '
                f'targets={c.targets!r}, got {", ".join(c.views)}. '
                'Set targets="own" to cluster each view by itself.'
            )
        if c.targets == 'other':
            return others
        return (view, *others)

    def streams(self) -> tuple[str, ...]:
        return tuple(self.config.views)

    def columns(self) -> dict[str, jax.ShapeDtypeStruct]:
        # [] for each record, -1 without a label.
        label = jax.ShapeDtypeStruct((), heads.label_dtype(self.config.clusters))
        return {f'cluster.{labeling}': label for labeling in self.labelings}

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        c = self.config
        if spec.size < c.clusters:
            raise ConfigError(
                f'config.objective.clusters: expected at most one cluster per record, got '
                f'{c.clusters} for {spec.size} records. Set fewer clusters.'
            )
        kernel_init = logical(jax.nn.initializers.normal(0.01), 'embed', 'classes')
        bias_init = logical(jax.nn.initializers.zeros, 'classes')
        params: dict[str, Any] = {}
        view_keys = jax.random.split(key, len(c.views))
        for view_key, view in zip(view_keys, c.views):
            width = spec.outputs.encoded[view].pooled.shape[-1]
            params[view] = {}
            for i, labeling in enumerate(self.targets[view]):
                kernel_key = jax.random.fold_in(view_key, i)
                params[view][labeling] = {
                    'kernel': kernel_init(kernel_key, (width, c.clusters)),
                    'bias': bias_init(view_key, (c.clusters,)),
                }
        # The first refresh, before step 0, replaces it by the true shares.
        uniform = {labeling: jnp.full((c.clusters,), 1 / c.clusters) for labeling in self.labelings}
        return params, {'frequency': uniform}

    def compute_loss(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        pooled: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: Any,
    ) -> Loss:
        labels = {}
        for name in self.labelings:
            labels[name] = batch['columns'][f'cluster.{name}'].astype(jnp.int32)  # [B]
        frequency = {}
        weights = {}
        # Once for each labeling, not for each view: views that share one see the same weights, and
        # its frequency moves once per step.
        for name in self.labelings:
            weights[name], frequency[name] = self._class_weights(
                labels[name], batch['valid'], state['frequency'][name]
            )

        total: Any = 0.0
        metrics: dict[str, Any] = {}
        for view in self.config.views:
            features = pooled[view].astype(jnp.float32)  # [B D]
            valid = batch[view]['valid']
            losses = []
            accuracies = []
            for name in self.targets[view]:
                label = labels[name]
                classifier = params[view][name]
                logits = features @ classifier['kernel'] + classifier['bias']  # [B P]
                # Labels of -1 weigh nothing; they only need to be valid indices.
                targets = jnp.maximum(label, 0)
                # `weights` already leaves out padding and unlabelled rows; `valid` those without
                # this view.
                weight = weights[name] * valid
                losses.append(softmax_cross_entropy(logits, targets, weight=weight))
                is_labelled = (label >= 0) & batch['valid'] & valid
                num_correct = ((logits.argmax(-1) == label) & is_labelled).sum()
                accuracies.append(num_correct / jnp.maximum(is_labelled.sum(), 1))
            view_loss = sum(losses) / len(losses)
            metrics[f'loss/{view}'] = view_loss
            metrics[f'accuracy/{view}'] = sum(accuracies) / len(accuracies)
            total = total + view_loss / len(self.config.views)
        return Loss(total, metrics, variables['batch_stats'], {'frequency': frequency})

    def _class_weights(
        self, label: jax.Array, valid: jax.Array, frequency: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Weights of rows from how often their class was seen.

        Args:
          label: int [B], -1: none.
          valid: bool [B].
          frequency: float32 [P], the running frequency of classes before this batch.

        Returns:
          (weights [B], 0 for rows without a label; frequency [P] after this batch).
        """
        c = self.config
        is_labelled = (label >= 0) & valid
        # `jax.nn.one_hot` of -1 is a row of zeros.
        one_hot = jax.nn.one_hot(label, c.clusters) * is_labelled[:, None]  # [B P]
        share = one_hot.sum(0) / jnp.maximum(is_labelled.sum(), 1)  # [P]
        updated = c.momentum * frequency + (1 - c.momentum) * share
        # A batch without any label says nothing about frequencies.
        new_frequency = jnp.where(is_labelled.any(), updated, frequency)
        # w_b = 1 / (P f_k) for a row of cluster k with running frequency f_k: 1 for uniform
        # clusters, and the expected weight of a row stays 1 for any others.
        if c.balance:
            # Below 1e-3 a class is not weighted up any further.
            one_hot = one_hot / (c.clusters * jnp.maximum(frequency, 1e-3))
        return jnp.sum(one_hot, -1), new_frequency

    def features(
        self, model: Any, variables: Any, params: Any, batch: Mapping[str, Any], rng: Any
    ) -> dict[str, jax.Array]:
        """Unit features (<view>, float32 [B D]) and validity (<view>/valid) of every view."""
        # Running statistics: with those of the batch a feature would depend on which records happen
        # to share its batch.
        streams = select_streams(batch, self.streams())
        encoded = model.apply(variables, streams, train=False, rng=rng, method='encode_all')
        features = {}
        for view in self.config.views:
            x = encoded[view].pooled.astype(jnp.float32)
            # Unit length, so that with joint targets no view outweighs the others in the distance.
            features[view] = x / jnp.linalg.norm(x, axis=-1, keepdims=True).clip(1e-6)
            features[f'{view}/valid'] = batch[view]['valid']
        return features

    def refresh_due(self, step: int, steps: int) -> bool:
        # Step 0 included: there is nothing to learn before the first clustering.
        return step % self.config.every == 0

    def refresh(
        self, variables: Any, params: Any, state: Any, step: int, records: TrainingRecords
    ) -> RefreshResult:
        encoded = records.encode(self.features)
        key = _clustering_key(records.seed, step)
        columns = {}
        frequency = {}
        metrics = {}
        for i, labeling in enumerate(self.labelings):
            # The first one uses the key as it is.
            labeling_key = jax.random.fold_in(key, i) if i else key
            column = self._cluster(labeling_key, labeling, encoded, records.size)
            columns[f'cluster.{labeling}'] = column
            sizes = np.bincount(column[column >= 0], minlength=self.config.clusters)
            sizes = hosts.total(sizes)
            # Cluster numbers have no relation to those of the last refresh, so the running
            # frequency starts again from the known sizes.
            frequency[labeling] = jnp.asarray(sizes / sizes.sum(), jnp.float32)
            suffix = '' if len(self.labelings) == 1 else f'/{labeling}'
            metrics[f'largest_cluster{suffix}'] = float(sizes.max() / sizes.sum())
            metrics[f'empty_clusters{suffix}'] = float((sizes == 0).sum())
        return RefreshResult(
            # For the same reason classifiers cannot go on from where they were (DeepCluster).
            _fresh_classifiers(key, params),
            {'frequency': frequency},
            columns=columns,
            fresh_slots=('.*',),  # the classifiers are new, so their optimizer slots are too
            metrics=metrics,
        )

    def _cluster(
        self, key: jax.Array, labeling: str, encoded: Mapping[str, np.ndarray], size: int
    ) -> np.ndarray:
        """The column [m] of a labeling: k-means of the features of its views, of all hosts."""
        c = self.config
        views = c.views if labeling == 'joint' else (labeling,)
        is_present = np.all([encoded[f'{view}/valid'] for view in views], 0)  # [n]
        num_present = hosts.total(is_present.sum())
        if num_present < c.clusters:
            raise ConfigError(
                f'config.objective.clusters: expected at most one cluster per record, got '
                f'{c.clusters} for {num_present} training records that have '
                f'{" and ".join(views)}. Set fewer clusters.'
            )
        parts = [encoded[view] for view in views]
        # Features of millions of records are copied only where it must be.
        if not is_present.all():
            parts = [part[is_present] for part in parts]
        features = parts[0] if len(parts) == 1 else np.concatenate(parts, -1)  # [n D]
        column = np.full(size, -1, heads.label_dtype(c.clusters))
        rows = encoded['index'][is_present]
        # All other rows, those that could not be read among them, keep -1.
        column[rows] = cluster_rows(
            key, features, c.clusters, c.iterations, jax.sharding.get_mesh()
        )
        return column


def _clustering_key(seed: int, step: int) -> jax.Array:
    """The key of a refresh: the same on every host, and in a resumed run."""
    # 17 is arbitrary. Seed 0 leaves it as it is: runs of the default seed stay what they were.
    key = jax.random.key(17)
    # A seed may be any integer; JAX would refuse one beyond 32 bits.
    word = seed & 0xFFFFFFFF
    if word:
        key = jax.random.fold_in(key, word)
    return jax.random.fold_in(key, step)


def _fresh_classifiers(key: jax.Array, params: Any) -> Any:
    """New classifiers in the shapes of `params`: small normal kernels, biases of zero."""
    leaves, tree = jax.tree.flatten(params)
    fresh = []
    for leaf_key, leaf in zip(jax.random.split(key, len(leaves)), leaves):
        # As in `init`: kernels [D P], biases [P].
        if leaf.ndim == 2:
            fresh.append(0.01 * jax.random.normal(leaf_key, leaf.shape))
        else:
            fresh.append(jnp.zeros(leaf.shape))
    return jax.tree.unflatten(tree, fresh)
