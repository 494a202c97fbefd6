"""Nearest neighbours: do the clips of one split that lie nearest to a clip of another show its class?"""

from __future__ import annotations

import numpy as np

from vatt_jax.config import ConfigError, choose, with_defaults
from vatt_jax.evals import statistics
from vatt_jax.evals.base import Result, View, over_windows

DEFAULTS = {
    'type': 'neighbours',
    'stream': 'video',
    'label': 'class',
    'queries': 'test',
    'gallery': 'train',  # splits
    'query_limit': 1 << 20,
    'gallery_limit': 1 << 20,
    'of': 'maps',  # maps: the last map of features after a 2 x 2 x 2 maximum (SeLaVi, GDT) | pooled: the backbone feature
    'windows': 10,  # of each clip, whose unit features are averaged and not normalised again
    'first': (1, 5, 10, 20, 50),
    'baseline': True,
}
CHUNK = 256  # queries compared at a time


class Neighbours:
    """R@k in [0, 1]: the share of queries with a clip of their class among the k nearest of the gallery, by Euclidean distance (the published
    retrieval of SeLaVi and GDT; there ten random clips of the gallery's videos, here windows spaced evenly). Of clips that are equally far the
    earlier ones come first. Chance: what k clips drawn from the gallery give. Clips without the stream or the label are left out.
    """

    def __init__(self, config, where: str = 'config.evals'):
        c = self.config = with_defaults(config, DEFAULTS, where)
        choose(c.of, ('maps', 'pooled'), f'{where}.of')
        if not c.first or min(c.first) < 1:
            raise ConfigError(
                f'{where}.first={tuple(c.first)}: numbers of neighbours, such as (1, 5, 10), are wanted'
            )

    def examples(
        self, view: View, split: str, limit: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(x float32 [N F], class [N], place in the pass [N]) of the clips that count."""
        c = self.config
        parts = over_windows(
            view, split, c.windows, limit=limit, **({'maps': (c.stream,)} if c.of == 'maps' else {})
        )
        f = parts[0]
        if c.stream not in f[c.of]:
            raise ConfigError(
                f'neighbours: stream {c.stream!r} is not among {", ".join(f["pooled"])}'
            )
        if c.label not in f['labels'] or f['labels'][c.label].ndim != 1:
            raise ConfigError(
                f'neighbours: label {c.label!r} is not among the single-class labels of the data '
                f'({", ".join(k for k, v in f["labels"].items() if v.ndim == 1) or "none"})'
            )
        use = (f['labels'][c.label] >= 0) & f['valid'][c.stream]
        if not use.any():
            raise ConfigError(
                f'neighbours: no clip of split {split!r} has label {c.label!r} and the stream {c.stream!r}'
            )
        unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True).clip(1e-6)
        x = sum(unit(p[c.of][c.stream][use].astype(np.float32)) for p in parts) / len(parts)
        return x, f['labels'][c.label][use], f['index'][use]

    def run(self, view: View) -> Result:
        c = self.config
        x, y, _ = self.examples(view, c.queries, c.query_limit)
        gallery, classes, _ = self.examples(view, c.gallery, c.gallery_limit)
        if max(c.first) > len(gallery):
            raise ConfigError(
                f'neighbours: the gallery has {len(gallery)} clips, fewer than the {max(c.first)} neighbours asked for; '
                'set first to smaller numbers'
            )
        length, right = np.sum(gallery**2, -1), []
        for i in range(0, len(x), CHUNK):
            distance = length - 2 * x[i : i + CHUNK] @ gallery.T
            nearest = np.argsort(distance, 1, kind='stable')[:, : max(c.first)]
            right.append(classes[nearest] == y[i : i + CHUNK, None])
        right = np.concatenate(right)
        scalars, artifacts = {}, {'queries': len(x), 'gallery': len(gallery), 'width': x.shape[1]}
        same = (classes[None] == np.unique(y)[:, None]).sum(1)[np.unique(y, return_inverse=True)[1]]
        for k in c.first:
            hit = right[:, :k].any(1)
            scalars[f'R@{k}'] = float(hit.mean())
            artifacts[f'R@{k}/interval'] = statistics.bootstrap(hit, seed=view.seed)
            # none of k draws without replacement is of the class
            none = np.prod(
                [np.maximum(len(gallery) - same - j, 0) / (len(gallery) - j) for j in range(k)], 0
            )
            artifacts[f'R@{k}/chance'] = float(1 - none.mean())
        return Result(scalars, artifacts)
