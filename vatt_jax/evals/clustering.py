"""How well clusters of a split agree with classes that nothing was trained on."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.special
from jaxtyping import Bool, Int

from vatt_jax.clustering import metrics
from vatt_jax.clustering.kmeans import cluster_rows
from vatt_jax.config import ConfigError, choose
from vatt_jax.evals import statistics
from vatt_jax.evals.base import (
    Evaluator,
    FeatureView,
    Result,
    count_unlabelled,
    has_label,
    single_class_labels,
)
from vatt_jax.parallel import hosts

SHOWN_CLUSTERS = 24  # in the report's gallery
SHOWN_CLIPS = 5  # of each of them


class Clusters(NamedTuple):
    """One clustering of N examples.

    Attributes:
      labels: int [N], the cluster of each example.
      log_probs: [N], log p of that cluster; None where the clustering gives none.
    """

    labels: np.ndarray
    log_probs: np.ndarray | None


class Clustering(Evaluator):
    """Scalars of clustering/metrics.py.

    Labels of heads are the argmax of the sum over views of log p. The head with the lowest running
    training loss is reported as `chosen/…`, the one with the best NMI against the classes (the
    published choice, an oracle's) without a prefix. NMI_between_heads is the mean over pairs of
    heads; it is low where heads found different things. NMI_to/<name>: see `against`. Chance: the
    same clusters against the classes in random order.
    """

    DEFAULTS = {
        'type': 'clustering',
        'label': 'class',
        # Self-labelling is evaluated on what it labelled; 'test': on what the heads make of new
        # clips.
        'split': 'train',
        'limit': 1 << 20,
        # heads: the objective's own clusters, of every head | features: k-means of pooled features
        'of': 'heads',
        # That must be there for an example to count; features: those clustered together.
        # (): the objective's, or all.
        'streams': (),
        # features: how many; 0: as many as classes.
        'clusters': 0,
        # features: of Lloyd's algorithm.
        'iterations': 50,
        # ((name, 'runs/other/evals/step_001000:entry'), …): clusters that other evaluations found
        # on the same split.
        'against': (),
        'baseline': True,
    }

    def __init__(self, config: Any, where: str = 'config.evals') -> None:
        super().__init__(config, where)
        choose(self.config.of, ('heads', 'features'), f'{where}.of')

    def run(self, view: FeatureView) -> Result:
        c = self.config
        features = view.features(c.split, limit=c.limit)
        streams = self._streams(view, features)
        is_present = np.all([features['valid'][stream] for stream in streams], 0)
        is_used = self._used_examples(features, streams, is_present)  # bool [N]
        classes = features['labels'][c.label][is_used]
        # Positions in the pass over the split, by which `against` finds the clips of another
        # evaluation.
        clips = features['index'][is_used]
        class_names = view.data.info['labels'].get(c.label, [])

        if c.of == 'features':
            found = self._cluster_features(view, features, streams, is_used, classes)
        else:
            found = self._clusters_of_heads(features, is_used)
        scores = {
            name: metrics.evaluate(clusters.labels, classes, clusters.log_probs)
            for name, clusters in found.items()
        }
        # Chosen by the classes it is scored against, as in SeLaVi's code: an upper bound.
        # `chosen/…` below uses no class.
        best = max(scores, key=lambda name: scores[name]['NMI'])
        clusters = found[best]
        scalars = dict(scores[best])
        artifacts = {
            'heads': {name: score['NMI'] for name, score in scores.items()},
            'best': best,
            **_against_classes(clusters, classes, class_names, view.seed),
            'labels': clusters.labels,
            'clips': clips,
        }
        # k-means gives no probabilities to rank clips by.
        if clusters.log_probs is not None:
            artifacts['surest'] = _surest_clips(
                clusters.labels,
                clusters.log_probs,
                artifacts['cluster_class'],
                clips,
                class_names,
            )
        for name, where in c.against:
            pair = others_labels(where, clusters.labels, clips)
            scalars[f'NMI_to/{name}'] = metrics.nmi(*pair)
        # Only for several heads: with one there is nothing to compare or to choose.
        if len(found) > 1:
            pairs = itertools.combinations(found.values(), 2)
            nmis = [metrics.nmi(first.labels, second.labels) for first, second in pairs]
            scalars['NMI_between_heads'] = float(np.mean(nmis))
            # `FeatureExtractor.heads` is (parameters, state) of the objective.
            losses = view.encoder.objective.running_losses(view.encoder.heads[1])
            if losses:
                chosen = min(scores, key=lambda name: losses[name])
                artifacts['chosen'] = chosen
                for name, value in scores[chosen].items():
                    scalars[f'chosen/{name}'] = value
        result = Result(scalars, artifacts)
        count_unlabelled(result, c.label, {c.split: is_used[is_present]})
        return result

    def _streams(self, view: FeatureView, features: Mapping[str, Any]) -> tuple[str, ...]:
        """The streams that an example must have."""
        streams = tuple(self.config.streams)
        objective = view.encoder.objective
        if not streams and self.config.of == 'heads' and objective is not None:
            # Labels of heads are the sum over these streams, so a clip must have them all.
            streams = objective.streams() or ()
        if not streams:
            pooled = features['pooled']
            # Text has several features per clip, [N K D], and cannot be clustered.
            streams = tuple(name for name, x in pooled.items() if x.ndim == 2)
        for stream in streams:
            if stream not in features['pooled']:
                raise ConfigError(
                    f'{self.where}.streams: expected some of {", ".join(features["pooled"])}, got '
                    f'{stream!r}.'
                )
        return streams

    def _used_examples(
        self,
        features: Mapping[str, Any],
        streams: Sequence[str],
        is_present: Bool[np.ndarray, ' N'],
    ) -> Bool[np.ndarray, ' N']:
        """The examples that have the label and are present in all of these streams."""
        c = self.config
        labels = single_class_labels(features, c.label, 'clustering')
        is_used = has_label(labels) & is_present
        if not is_used.any():
            raise ConfigError(
                f'{self.where}: no example of split {c.split!r} has label {c.label!r} and the '
                f'streams {", ".join(streams)}.'
            )
        return is_used

    def _cluster_features(
        self,
        view: FeatureView,
        features: Mapping[str, Any],
        streams: Sequence[str],
        is_used: np.ndarray,
        classes: np.ndarray,
    ) -> dict[str, Clusters]:
        """k-means of the unit features of all streams side by side."""
        # As for training with `kmeans_labels`: unit length gives every stream the same weight.
        unit_features = []
        for stream in streams:
            x = features['pooled'][stream][is_used]
            unit_features.append(x / np.linalg.norm(x, axis=-1, keepdims=True).clip(1e-6))
        # Of the classes that occur, which may be fewer than the data name.
        num_clusters = self.config.clusters or len(np.unique(classes))
        rows = np.concatenate(unit_features, -1)
        # Every host has the features of all.
        own = cluster_rows(
            jax.random.key(view.seed),
            rows[hosts.own_stretch(len(rows))],
            num_clusters,
            self.config.iterations,
            view.encoder.mesh,
        )
        labels = np.empty(len(rows), own.dtype)
        for first, block in hosts.blocks_of_all(own):
            labels[first : first + len(block)] = block
        return {'features': Clusters(labels, None)}

    def _clusters_of_heads(
        self, features: Mapping[str, Any], is_used: np.ndarray
    ) -> dict[str, Clusters]:
        """The clusters that the objective's heads predict."""
        found = {}
        for name, logits in features['predictions'].items():
            if name.startswith('cluster/'):
                # Predictions are sums over views of log p: normalised again, so that confidence
                # compares across clips.
                log_probs = scipy.special.log_softmax(logits[is_used], axis=-1)  # [N P]
                found[name] = Clusters(log_probs.argmax(-1), log_probs.max(-1))
        if not found:
            raise ConfigError(
                f"{self.where}.of: expected an objective with cluster heads for of='heads', got "
                "one without. Set of='features' for k-means of its features."
            )
        return found


def _against_classes(
    clusters: Clusters, classes: np.ndarray, class_names: Sequence[str], seed: int
) -> dict[str, Any]:
    """Artifacts that compare clusters with classes under the best one-to-one matching."""
    labels = clusters.labels
    # Clusters have no names; the matching that makes most clips right gives them some.
    _, class_of_cluster = metrics.hungarian(labels, classes)  # [P], -1: left over
    predicted = class_of_cluster[labels]  # [N]
    num_classes = len(class_names) or classes.max() + 1
    confusion = np.zeros((num_classes, num_classes), np.int64)
    # Index -1 would count as the last class.
    is_matched = predicted >= 0
    # `confusion[rows, columns] += 1` would count a repeated pair only once.
    np.add.at(confusion, (classes[is_matched], predicted[is_matched]), 1)

    # Chance keeps both marginals, of clusters and of classes: purity and NMI are above zero by
    # chance, the more so the more clusters there are.
    shuffled = np.random.default_rng(seed).permutation(classes)
    chance = metrics.evaluate(labels, shuffled, clusters.log_probs)
    artifacts = {
        'examples': len(classes),
        'contingency': metrics.contingency(labels, classes),
        'cluster_class': class_of_cluster.tolist(),
        'confusion': confusion,
        'classes': class_names,
        # Over clips, with the matching fixed.
        'accuracy/interval': statistics.bootstrap(predicted == classes, seed=seed),
    }
    for name, value in chance.items():
        # A count, which shuffling does not change.
        if name != 'clusters_used':
            artifacts[f'{name}/chance'] = value
    return artifacts


def _surest_clips(
    labels: np.ndarray,
    log_probs: np.ndarray,
    class_of_cluster: Sequence[int],
    clips: np.ndarray,
    class_names: Sequence[str],
) -> list[dict[str, Any]]:
    """[{'name', 'clips'}]: the surest clips of the largest clusters, for the report's gallery."""
    sizes = np.bincount(labels)  # [P]
    largest = np.argsort(-sizes, kind='stable')[:SHOWN_CLUSTERS]
    surest = []
    for cluster in largest.tolist():
        rows = np.flatnonzero(labels == cluster)
        # Among the largest where fewer clusters are used than shown.
        if not len(rows):
            continue
        kind = class_of_cluster[cluster]
        # -1: no class is left for this cluster.
        title = class_names[kind] if 0 <= kind < len(class_names) else 'no class'
        by_confidence = np.argsort(-log_probs[rows], kind='stable')
        surest_rows = rows[by_confidence[:SHOWN_CLIPS]]
        surest.append(
            {
                'name': f'cluster {cluster} ({title}), {len(rows)} clips',
                'clips': clips[surest_rows].tolist(),
            }
        )
    return surest


def others_labels(
    where: str, labels: Int[np.ndarray, ' N'], clips: Int[np.ndarray, ' N']
) -> tuple[Int[np.ndarray, ' n'], Int[np.ndarray, ' n']]:
    """Labels of the clips that this and another clustering evaluation both have.

    Args:
      where: 'FOLDER:entry', a folder of `evals.save`.
      labels: the clusters of this evaluation.
      clips: their clips.

    Returns:
      (the labels of this evaluation [n], those of the other one [n]).
    """
    # From the right: an entry has no colon, a path may.
    folder, _, entry = where.rpartition(':')
    path = pathlib.Path(folder) / 'arrays.npz'
    if not path.exists():
        raise ConfigError(
            f'clustering: against={where!r}: there is no {path}; expected a folder of an '
            "evaluation and its entry, such as 'runs/demo/evals/step_001000:kmeans'"
        )
    with np.load(path) as arrays:
        if f'{entry}/labels' not in arrays.files:
            suffix = '/labels'
            entries = [key.removesuffix(suffix) for key in arrays.files if key.endswith(suffix)]
            raise ConfigError(
                f'clustering: {path} has no clusters of {entry!r}; it has those of '
                f'{", ".join(entries) or "none"}'
            )
        other_labels = arrays[f'{entry}/labels']
        other_clips = arrays[f'{entry}/clips']
    # By clip: limits, labels or missing modalities may have left other clips out there.
    shared, rows, other_rows = np.intersect1d(clips, other_clips, return_indices=True)
    if not len(shared):
        raise ConfigError(f'clustering: {where} has no clip in common with this evaluation')
    return labels[rows], other_labels[other_rows]
