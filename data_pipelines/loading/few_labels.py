"""Training from few labels: which segments of a source keep theirs."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, UInt32

from data_pipelines.errors import DataError
from data_pipelines.loading import order
from data_pipelines.loading.lazy_split import LazySplit


def few_labels(part: LazySplit, label: str, per_class: int, seed: int) -> UInt32[np.ndarray, ' M']:
    """Leave the labels of `per_class` segments of each class known.

    All other labels of `part.index` become unknown, in place.

    Segments are taken in a random order of the records that the seed decides, so fewer are a part
    of more.

    Args:
      part: the source, named as in config.data.train.
      label: a label with one class for each segment.
      per_class: segments of each class whose label stays known.
      seed: config.seed.

    Returns:
      Sampling weights of the records: how many of the labelled segments each has.

    Raises:
      DataError: no such label, or a class that has too few segments.
    """
    field = f'config.data.train.{part.name}.per_class={per_class}'
    labels = part.index.labels
    stored = labels.get(label)
    # `stored` is [G] for class numbers and [G P] for a multi-hot label, which has no "segments of
    # one class" to count.
    if stored is None or stored.ndim != 1:
        possible = [name for name, values in labels.items() if values.ndim == 1]
        raise DataError(
            f'{field}: {part.prepared.path} has no label {label!r} with one class for each '
            f'segment; it has {", ".join(possible) or "none"} (field label)'
        )
    segment_record = part.index.segment_record
    is_known = np.zeros(len(stored), bool)
    for number, name in enumerate(part.prepared.labels[label]):
        segments = np.flatnonzero(stored == number)  # [n]
        if len(segments) < per_class:
            raise DataError(
                f'{field}: class {name!r} of label {label!r} has {len(segments)} segments '
                f'in split {part.split!r}'
            )
        # [n] Rank of each segment's record in a random order. Ranks do not depend on `per_class`,
        # which is what makes a smaller labelled set a subset of a larger one.
        record_rank = order.permute(segment_record[segments], len(part), seed, 'few labels')
        # Stable: segments of one record share a rank and are taken in their order.
        by_rank = np.argsort(record_rank, kind='stable')
        is_known[segments[by_rank[:per_class]]] = True
    # All labels of the other segments, not only `label`.
    part.index.labels = {name: _keep_known(values, is_known) for name, values in labels.items()}
    # Records without a labelled segment get weight 0, that is, they are never drawn.
    weights = np.zeros(len(part), np.uint32)
    # `weights[…] += 1` would count a record once, however many of its segments are known.
    np.add.at(weights, segment_record[is_known], 1)
    return weights


def _keep_known(labels: np.ndarray, is_known: Bool[np.ndarray, ' G']) -> np.ndarray:
    """Labels [G], or multi-hot ones [G P], the other segments' made unknown (-1, or no class)."""
    if labels.ndim == 1:
        return np.where(is_known, labels, -1).astype(labels.dtype)
    return np.where(is_known[:, None], labels, 0).astype(labels.dtype)
