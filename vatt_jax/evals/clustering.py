"""How well clusters of a split agree with classes that nothing was trained on."""

from __future__ import annotations

import itertools
import pathlib

import jax
import numpy as np

from vatt_jax.clustering import metrics
from vatt_jax.clustering.kmeans import labels_of
from vatt_jax.config import ConfigError, choose, with_defaults
from vatt_jax.evals import statistics
from vatt_jax.evals.base import Result, View

DEFAULTS = {
    'type': 'clustering',
    'label': 'class',
    'split': 'train',  # self-labelling is judged on what it labelled; 'test': on what the heads make of new clips
    'limit': 1 << 20,
    'of': 'heads',  # heads: the objective's own clusters, of every head | features: k-means of pooled features
    'streams': (),  # that must be there for an example to count; features: those clustered together. (): the objective's, or all
    'clusters': 0,  # features: how many; 0: as many as classes
    'iterations': 50,  # features: of Lloyd's algorithm
    'against': (),  # ((name, 'runs/other/evals/step_001000:entry'), …): clusters that other evaluations found on the same split
    'baseline': True,
}
SHOWN = 24  # clusters in the report's gallery


class Clustering:
    """Scalars of clustering/metrics.py. Heads: labels are the argmax of the sum over views of log p; the head with the lowest running training
    loss is told as `chosen/…`, the one with the best NMI against the classes (the published choice, an oracle's) without a prefix.
    NMI_between_heads: mean over pairs of heads; low where heads found different things. NMI_to/<name>: see `against`. Chance: the same clusters
    against the classes in random order."""

    def __init__(self, config, where: str = 'config.evals'):
        self.config = with_defaults(config, DEFAULTS, where)
        choose(self.config.of, ('heads', 'features'), f'{where}.of')

    def run(self, view: View) -> Result:
        c = self.config
        f = view.features(c.split, limit=c.limit)
        if c.label not in f['labels'] or f['labels'][c.label].ndim != 1:
            raise ConfigError(
                f'clustering: label {c.label!r} is not among the single-class labels of the data '
                f'({", ".join(k for k, v in f["labels"].items() if v.ndim == 1) or "none"})'
            )
        objective = view.encoder.objective
        streams = (
            tuple(c.streams)
            or (objective.streams() if c.of == 'heads' and objective is not None else None)
            or tuple(s for s, x in f['pooled'].items() if x.ndim == 2)
        )
        missing = [s for s in streams if s not in f['pooled']]
        if missing:
            raise ConfigError(
                f'clustering: stream {missing[0]!r} is not among {", ".join(f["pooled"])}'
            )
        use = (f['labels'][c.label] >= 0) & np.all([f['valid'][s] for s in streams], 0)
        classes = f['labels'][c.label][use]
        if not len(classes):
            raise ConfigError(
                f'clustering: no example of split {c.split!r} has label {c.label!r} and the streams {", ".join(streams)}'
            )
        names = view.data.info['labels'].get(c.label, [])
        if c.of == 'features':
            x = [f['pooled'][s][use] for s in streams]
            x = np.concatenate(
                [v / np.linalg.norm(v, axis=-1, keepdims=True).clip(1e-6) for v in x], -1
            )
            count = c.clusters or len(np.unique(classes))
            found = {
                'features': (
                    labels_of(jax.random.key(view.seed), x, count, c.iterations, view.encoder.mesh),
                    None,
                )
            }
        else:
            found = {}
            for name, p in f['predictions'].items():
                if name.startswith('cluster/'):
                    p = (
                        p[use]
                        - np.log(
                            np.sum(
                                np.exp(p[use] - p[use].max(-1, keepdims=True)), -1, keepdims=True
                            )
                        )
                        - p[use].max(-1, keepdims=True)
                    )
                    found[name] = p.argmax(-1), p.max(-1)
            if not found:
                raise ConfigError(
                    "clustering: the run's objective has no cluster heads; set of='features' for k-means of its features"
                )
        scored = {
            name: metrics.evaluate(clusters, classes, sure)
            for name, (clusters, sure) in found.items()
        }
        best = max(scored, key=lambda n: scored[n]['NMI'])
        (clusters, sure), scalars = found[best], dict(scored[best])
        chance = metrics.evaluate(
            clusters, np.random.default_rng(view.seed).permutation(classes), sure
        )
        _, named = metrics.hungarian(clusters, classes)
        confusion = np.zeros((len(names) or classes.max() + 1,) * 2, np.int64)
        matched = named[clusters] >= 0
        np.add.at(confusion, (classes[matched], named[clusters][matched]), 1)
        artifacts = {
            'heads': {name: s['NMI'] for name, s in scored.items()},
            'best': best,
            'examples': len(classes),
            'contingency': metrics.contingency(clusters, classes),
            'cluster_class': named.tolist(),
            'confusion': confusion,
            'classes': names,
            'accuracy/interval': statistics.bootstrap(named[clusters] == classes, seed=view.seed),
            'labels': clusters,
            'clips': f['index'][use],
            **{f'{k}/chance': v for k, v in chance.items() if k != 'clusters_used'},
        }
        for name, where in c.against:
            scalars[f'NMI_to/{name}'] = metrics.nmi(
                *others_labels(where, artifacts['labels'], artifacts['clips'])
            )
        if len(found) > 1:
            scalars['NMI_between_heads'] = float(
                np.mean(
                    [metrics.nmi(a[0], b[0]) for a, b in itertools.combinations(found.values(), 2)]
                )
            )
        if sure is not None:
            biggest = np.argsort(-np.bincount(clusters), kind='stable')[:SHOWN]
            title = lambda p: names[named[p]] if 0 <= named[p] < len(names) else 'no class'
            own = {int(p): np.flatnonzero(clusters == p) for p in biggest}
            artifacts['surest'] = [
                {
                    'name': f'cluster {p} ({title(p)}), {len(rows)} clips',
                    'clips': f['index'][use][
                        rows[np.argsort(-sure[rows], kind='stable')[:5]]
                    ].tolist(),
                }
                for p, rows in own.items()
                if len(rows)
            ]
        losses = objective.running_losses(view.encoder.heads[1]) if len(scored) > 1 else {}
        if losses:
            artifacts['chosen'] = min(scored, key=lambda n: losses[n])
            scalars |= {f'chosen/{k}': v for k, v in scored[artifacts['chosen']].items()}
        return Result(scalars, artifacts)


def others_labels(
    where: str, labels: np.ndarray, clips: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(these labels, those of another clustering evaluation) of the clips that both have. where: 'FOLDER:entry', a folder of `evals.save`."""
    folder, _, entry = where.rpartition(':')
    path = pathlib.Path(folder) / 'arrays.npz'
    if not path.exists():
        raise ConfigError(
            f'clustering: against={where!r}: there is no {path}; a folder of an evaluation and its entry are wanted, such as '
            "'runs/demo/evals/step_001000:kmeans'"
        )
    with np.load(path) as arrays:
        if f'{entry}/labels' not in arrays.files:
            entries = [k.removesuffix('/labels') for k in arrays.files if k.endswith('/labels')]
            raise ConfigError(
                f'clustering: {path} has no clusters of {entry!r}; it has those of {", ".join(entries) or "none"}'
            )
        theirs, there = arrays[f'{entry}/labels'], arrays[f'{entry}/clips']
    both, i, j = np.intersect1d(clips, there, return_indices=True)
    if not len(both):
        raise ConfigError(f'clustering: {where} has no clip in common with this evaluation')
    return labels[i], theirs[j]
