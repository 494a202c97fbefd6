"""Nearest neighbours: do the clips that lie nearest to a clip of another split show its class?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from vatt_jax.config import ConfigError, choose
from vatt_jax.evals import several_streams, statistics
from vatt_jax.evals.base import (
    Evaluator,
    FeatureView,
    Result,
    count_unlabelled,
    features_over_windows,
    has_label,
    single_class_labels,
)

# Bounds the memory of distances: CHUNK × gallery floats.
CHUNK = 256  # queries compared at a time


class Neighbours(Evaluator):
    """R@k in [0, 1]: the share of queries with a clip of their class among the k nearest.

    Distances to the gallery are Euclidean. This is the published retrieval of SeLaVi and GDT; there
    ten random clips of the gallery's videos, here windows spaced evenly. That of CoCLR is
    of='pooled', unit='mean', centre=True: cosines of centred means. Of clips that are equally
    far the earlier ones come first. Chance is what k clips drawn from the gallery give. Clips
    without the streams or the label are left out.
    """

    DEFAULTS = {
        'type': 'neighbours',
        'stream': 'video',
        # Squared distances are averaged: where features have unit length, the mean of cosines.
        **several_streams.BESIDE,
        'label': 'class',
        # Splits.
        'queries': 'test',
        'gallery': 'train',
        # In effect all.
        'query_limit': 1 << 20,
        'gallery_limit': 1 << 20,
        # maps: the last map of features after a 2 x 2 x 2 maximum (SeLaVi, GDT) | pooled: the
        # backbone feature
        'of': 'maps',
        # Of each clip, whose features are averaged.
        'windows': 10,
        # windows: features have length 1 before they are averaged, and their mean is taken as it is
        # (SeLaVi, GDT) | mean: the mean has length 1 (CoCLR)
        'unit': 'windows',
        # Whether the mean over the clips of a split is subtracted from each of them (CoCLR), before
        # unit='mean'.
        'centre': False,
        # The numbers k of neighbours.
        'first': (1, 5, 10, 20, 50),
        'baseline': True,
    }

    def __init__(self, config: Any, where: str = 'config.evals') -> None:
        super().__init__(several_streams.with_baseline(config), where)
        c = self.config
        choose(c.of, ('maps', 'pooled'), f'{where}.of')
        choose(c.unit, ('windows', 'mean'), f'{where}.unit')
        several_streams.check_entry(c, where)
        if not c.first or min(c.first) < 1:
            raise ConfigError(
                f'{where}.first: expected numbers of neighbours, such as (1, 5, 10), got '
                f'{tuple(c.first)}.'
            )

    def other_runs(self) -> dict[str, tuple[str, ...]]:
        return several_streams.other_runs(self.config)

    def check(self, data: Any, outputs: Any) -> None:
        super().check(data, outputs)
        several_streams.check_encoded(self.config, outputs, self.where)

    def examples(
        self, view: FeatureView, split: str, limit: int
    ) -> tuple[Float[np.ndarray, 'N F'], Int[np.ndarray, ' N'], Bool[np.ndarray, ' M']]:
        """The clips of a split that have the streams and the label.

        Returns:
          (features [N F], class [N], which of the clips with the streams have the label [M]).
        """
        c = self.config

        def request(source: FeatureView, streams: tuple[str, ...]) -> list[dict[str, Any]]:
            maps = streams if c.of == 'maps' else ()
            return features_over_windows(source, split, c.windows, limit=limit, maps=maps)

        found = several_streams.features(view, c, request)
        several_streams.check_computed(found, c.of, 'neighbours')
        labels = single_class_labels(found[0].windows[0], c.label, 'neighbours')
        is_valid = several_streams.all_valid(found)
        is_used = has_label(labels) & is_valid
        if not is_used.any():
            streams = ' and '.join(repr(stream) for stream, _ in found)
            raise ConfigError(
                f'neighbours: no clip of split {split!r} has label {c.label!r} and the stream '
                f'{streams}'
            )
        by_stream = []
        for stream, parts in found:
            windows = (part[c.of][stream][is_used] for part in parts)
            by_stream.append(self.features(windows))
        # Side by side, so that squared distances are summed over streams.
        return np.concatenate(by_stream, -1), labels[is_used], is_used[is_valid]

    def features(self, windows: Iterable[Float[np.ndarray, 'N F']]) -> Float[np.ndarray, 'N F']:
        """One feature for each clip of a split out of those of its windows."""
        c = self.config
        total: Any = 0
        for x in windows:
            x = x.astype(np.float32)
            total = total + (_unit(x) if c.unit == 'windows' else x)
        features = total / c.windows
        if c.centre:
            features = features - features.mean(0)
        return _unit(features) if c.unit == 'mean' else features

    def run(self, view: FeatureView) -> Result:
        c = self.config
        queries, query_classes, query_labelled = self.examples(view, c.queries, c.query_limit)
        gallery, gallery_classes, gallery_labelled = self.examples(view, c.gallery, c.gallery_limit)
        num_nearest = max(c.first)
        if num_nearest > len(gallery):
            raise ConfigError(
                f'neighbours: the gallery has {len(gallery)} clips, fewer than the {num_nearest} '
                'neighbours asked for; set first to smaller numbers'
            )
        nearest = _nearest(queries, gallery, num_nearest)
        is_same_class = gallery_classes[nearest] == query_classes[:, None]  # [N K]
        num_same = _count_of_class(gallery_classes, query_classes)  # [N]

        scalars = {}
        artifacts: dict[str, Any] = {
            'queries': len(queries),
            'gallery': len(gallery),
            'width': queries.shape[1],
        }
        for k in c.first:
            is_hit = is_same_class[:, :k].any(1)
            scalars[f'R@{k}'] = float(is_hit.mean())
            artifacts[f'R@{k}/interval'] = statistics.bootstrap(is_hit, seed=view.seed)
            artifacts[f'R@{k}/chance'] = _chance(num_same, len(gallery), k)
        result = Result(scalars, artifacts)
        labelled = {c.queries: query_labelled, c.gallery: gallery_labelled}
        count_unlabelled(result, c.label, labelled)
        return result


def _unit(x: Float[np.ndarray, 'N F']) -> Float[np.ndarray, 'N F']:
    """Rows scaled to length 1; a row of zeros stays."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True).clip(1e-6)


def _nearest(
    queries: Float[np.ndarray, 'N F'], gallery: Float[np.ndarray, 'M F'], count: int
) -> Int[np.ndarray, 'N count']:
    """Rows of the gallery nearest to each query, nearest first."""
    squared_lengths = np.sum(gallery**2, -1)  # [M]
    nearest = []
    for first in range(0, len(queries), CHUNK):
        block = queries[first : first + CHUNK]
        # |q - g|² up to |q|², which does not change the order.
        distances = squared_lengths - 2 * block @ gallery.T  # [CHUNK M]
        # A full sort, since `argpartition` breaks ties arbitrarily.
        nearest.append(np.argsort(distances, 1, kind='stable')[:, :count])
    return np.concatenate(nearest)


def _count_of_class(
    gallery_classes: Int[np.ndarray, ' M'], query_classes: Int[np.ndarray, ' N']
) -> Int[np.ndarray, ' N']:
    """How many clips of the gallery are of each query's class."""
    kinds, kind_of_query = np.unique(query_classes, return_inverse=True)
    is_of_kind = gallery_classes[None] == kinds[:, None]  # [kinds M]
    return is_of_kind.sum(1)[kind_of_query]


def _chance(num_same: Int[np.ndarray, ' N'], num_clips: int, k: int) -> float:
    """Mean probability that k clips drawn without replacement hold one of the query's class."""
    # P(none) = Π_j (M - m - j) / (M - j), j = 0 … k - 1, m of M clips being of the class.
    factors = [np.maximum(num_clips - num_same - j, 0) / (num_clips - j) for j in range(k)]
    none_of_class = np.prod(factors, 0)  # [N]
    return float(1 - none_of_class.mean())
