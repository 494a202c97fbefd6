"""Zero-shot retrieval: does the right clip come first among N? (VATT paper.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vatt_jax.config import ConfigError, choose
from vatt_jax.evals import statistics
from vatt_jax.evals.base import Evaluator, FeatureView, Result, check_spaces, features_over_windows

POOLS = ('embeddings', 'similarities')
SHOWN_CLIPS = 5  # of each query, in the report's gallery
QUERIES_AT_ONCE = 1024  # whose similarities are in memory, where clips have several captions


class Retrieval(Evaluator):
    """R@1, R@5, R@10 in [0, 1] and median rank (1 is best) for each pair of streams.

    All come with 95 % bootstrap intervals over queries. A query stream `text` is the clip's
    annotated caption where the data has one (`text.caption`), else the normalised mean of its
    candidate sentences. Clips that lack either side are left out and counted. Ties share their
    ranks. With several windows both sides are pooled over those that have the modality, in either
    of VATT's ways.

    Where clips have several captions (MSR-VTT's full split has 20), all count, as published results
    have it: from text, every caption is a query whose one right answer is its clip; to text, the
    gallery is all captions, and the first of the clip's own counts. Intervals are over clips then,
    since captions of one clip are not independent; the scalar `captions` says how many there are.
    """

    DEFAULTS = {
        'type': 'retrieval',
        'split': 'test',
        # Clips in the gallery: the first of the split, so the gallery is fixed by the config.
        'limit': 512,
        # (query, gallery, space)
        'pairs': (
            ('text', 'video', 'vat'),
            ('video', 'text', 'vat'),
            ('audio', 'video', 'va'),
            ('video', 'audio', 'va'),
        ),
        # A change of the input, such as single_frame (evals/base.py).
        'change': '',
        # Extra streams, as config.data.views:
        # (('audio.shifted', {'kind': 'shift', 'seconds': 1.0}),)
        'views': (),
        # Also evaluate the random initialisation (controls need not).
        'baseline': True,
        # Of each clip, spaced linearly over it (VATT: 4).
        'windows': 1,
        # Over windows: embeddings (mean of those before normalisation) | similarities (mean of
        # cosines)
        'pool': 'embeddings',
    }

    def __init__(self, config: Any, where: str = 'config.evals') -> None:
        super().__init__(config, where)
        choose(self.config.pool, POOLS, f'{where}.pool')

    def check(self, data: Any, outputs: Any) -> None:
        super().check(data, outputs)
        for pair in self.config.pairs:
            if len(pair) != 3:
                raise ConfigError(
                    f'{self.where}.pairs: expected (query, gallery, space), such as '
                    f"('text', 'video', 'vat'), got {pair!r}."
                )
            check_spaces([pair], outputs, self.where)

    def run(self, view: FeatureView) -> Result:
        c = self.config
        parts = features_over_windows(
            view, c.split, c.windows, limit=c.limit, views=dict(c.views) or None, change=c.change
        )
        # All parts are of the same clips in the same order.
        clips = parts[0]['index']
        scalars: dict[str, float] = {}
        artifacts: dict[str, Any] = {}
        for query, gallery, space in c.pairs:
            name = f'{query}_to_{gallery}'
            query_embeddings, query_valid = _pooled(parts, space, query, c.pool)  # [N E]
            gallery_embeddings, gallery_valid = _pooled(parts, space, gallery, c.pool)
            # The same clips on both sides, so the diagonal of the similarities holds the right
            # answers.
            rows = np.flatnonzero(query_valid & gallery_valid)
            if len(rows) < 2:
                raise ConfigError(
                    f'retrieval {query} → {gallery}: only {len(rows)} of {len(query_valid)} clips '
                    f'of split {c.split!r} have both'
                )
            query_captions = _captions(parts[0], space, query, rows)
            gallery_captions = _captions(parts[0], space, gallery, rows)
            if query_captions is None and gallery_captions is None:
                similarity = query_embeddings[rows] @ gallery_embeddings[rows].T  # [n n]
                pair_scalars, pair_artifacts = _scores(similarity, clips[rows], view.seed)
            else:
                alone = np.arange(len(rows))
                pair_scalars, pair_artifacts = _scores_of_captions(
                    query_captions or (query_embeddings[rows], alone),
                    gallery_captions or (gallery_embeddings[rows], alone),
                    clips[rows],
                    view.seed,
                )
            scalars.update({f'{name}/{key}': value for key, value in pair_scalars.items()})
            artifacts.update({f'{name}/{key}': value for key, value in pair_artifacts.items()})
        return Result(scalars, artifacts)


def _scores(
    similarity: np.ndarray, clips: np.ndarray, seed: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """(scalars, artifacts) of the similarities [N N] of queries and gallery, both of `clips`."""
    num_clips = len(clips)
    scalars = {}
    artifacts: dict[str, Any] = {}
    for k in (1, 5, 10):
        hits = statistics.hits(similarity, k)
        scalars[f'R@{k}'] = float(hits.mean())
        artifacts[f'R@{k}/interval'] = statistics.bootstrap(hits, seed=seed)
        artifacts[f'R@{k}/chance'] = min(1.0, k / num_clips)

    rank = statistics.ranks(similarity)
    # Ranks are counted from 0, the median rank is reported from 1.
    scalars['median_rank'] = float(np.median(rank) + 1)
    artifacts['median_rank/interval'] = statistics.bootstrap(rank + 1, np.median, seed)
    artifacts['median_rank/chance'] = (num_clips + 1) / 2

    # Only for show: here ties go to the earlier clip, in the scores above they are shared.
    nearest = np.argsort(-similarity, 1, kind='stable')[:, :SHOWN_CLIPS]
    # Half precision: N² numbers, for the report. No score is computed from them.
    artifacts['similarity'] = similarity.astype(np.float16)
    artifacts['clips'] = clips
    artifacts['top'] = clips[nearest]
    artifacts['rank'] = rank + 1
    scalars['clips'] = float(num_clips)
    return scalars, artifacts


def _captions(
    features: Mapping[str, Any], space: str, stream: str, rows: Int[np.ndarray, ' n']
) -> tuple[Float[np.ndarray, 'Q E'], Int[np.ndarray, ' Q']] | None:
    """Unit embeddings of all captions of the clips, and the row of each one's clip.

    They are the same in every window. None if no clip has several, or the stream is no caption.
    """
    name = _stored_name(features['spaces'].get(space, {}), stream)
    if name != 'text.caption':
        return None
    embeddings = features['spaces'][space][name][rows]  # [n K E]
    mask = features['mask'][name][rows]  # [n K]
    if mask.sum(1).max() < 2:
        return None
    owners, _ = np.nonzero(mask)  # by clip, then by caption
    return embeddings[mask], owners


def _scores_of_captions(
    query: tuple[Float[np.ndarray, 'Q E'], Int[np.ndarray, ' Q']],
    gallery: tuple[Float[np.ndarray, 'M E'], Int[np.ndarray, ' M']],
    clips: np.ndarray,
    seed: int,
) -> tuple[dict[str, float], dict[str, Any]]:
    """As `_scores`, where a clip has several rows on one side.

    What is shown is one row a clip and one column a clip: the first of its queries, and the best of
    its answers.

    Args:
      query: embeddings, and the clip of each.
      gallery: embeddings, and the clip of each.
      clips: index of each clip in the pass.
      seed: of the intervals.
    """
    query_embeddings, query_owners = query
    gallery_embeddings, gallery_owners = gallery
    # Owners ascend: where each clip's rows begin.
    first_query = np.searchsorted(query_owners, np.arange(len(clips)))
    first_answer = np.searchsorted(gallery_owners, np.arange(len(clips)))
    counts = []
    shown = []
    # In blocks: 59,800 captions by 2,990 clips are 0.7 GB.
    for begin in range(0, len(query_owners), QUERIES_AT_ONCE):
        block = slice(begin, begin + QUERIES_AT_ONCE)
        similarity = query_embeddings[block] @ gallery_embeddings.T  # [q M]
        is_own = query_owners[block, None] == gallery_owners[None]
        counts.append(statistics.compare_with_own(similarity, is_own))
        is_first = np.isin(np.arange(begin, begin + len(similarity)), first_query)
        shown.append(np.maximum.reduceat(similarity[is_first], first_answer, axis=1))
    better, equal, tied = (np.concatenate(column) for column in zip(*counts))

    scalars: dict[str, float] = {}
    num_own = np.bincount(gallery_owners)[query_owners]  # right answers of each query
    artifacts: dict[str, Any] = {}
    for k in (1, 5, 10):
        hits = statistics.hits_of_best(better, equal, tied, k)
        scalars[f'R@{k}'] = float(hits.mean())
        artifacts[f'R@{k}/interval'] = statistics.bootstrap_groups(hits, query_owners, seed=seed)
        artifacts[f'R@{k}/chance'] = float(_chance(num_own, len(gallery_owners), k).mean())

    rank = statistics.ranks_of_best(better, equal, tied)
    scalars['median_rank'] = float(np.median(rank) + 1)
    artifacts['median_rank/interval'] = statistics.bootstrap_groups(
        rank + 1, query_owners, np.median, seed
    )
    artifacts['median_rank/chance'] = _median_chance(num_own, len(gallery_owners))

    similarity = np.concatenate(shown)  # [n n]
    nearest = np.argsort(-similarity, 1, kind='stable')[:, :SHOWN_CLIPS]
    artifacts['similarity'] = similarity.astype(np.float16)
    artifacts['clips'] = clips
    artifacts['top'] = clips[nearest]
    artifacts['rank'] = rank[first_query] + 1
    scalars['clips'] = float(len(clips))
    scalars['captions'] = float(max(len(query_owners), len(gallery_owners)))
    return scalars, artifacts


def _chance(num_own: Int[np.ndarray, ' Q'], size: int, k: int) -> Float[np.ndarray, ' Q']:
    """Probability that one of `num_own` right answers is among the first k of `size` by chance."""
    nothing = np.zeros(len(num_own), int)
    return statistics.hits_of_best(nothing, size - num_own, num_own, k)


def _median_chance(num_own: Int[np.ndarray, ' Q'], size: int) -> float:
    """Median rank, from 1, of the first right answer of all queries in random orders."""
    if num_own.max() == 1:
        return (size + 1) / 2
    # Queries with equally many right answers have equal odds.
    values, weights = np.unique(num_own, return_counts=True)
    all_wrong = np.ones(len(values))
    for k in range(size):
        all_wrong = all_wrong * np.maximum(size - values - k, 0) / (size - k)
        if np.average(all_wrong, weights=weights) <= 0.5:
            return float(k + 1)
    return float(size)


def _pooled(
    parts: Sequence[Mapping[str, Any]], space: str, stream: str, pool: str
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of a stream over windows.

    Dot products of two pooled sides are the cosine of the mean embeddings, or the mean over all
    pairs of windows of their cosines: cosines are linear in each unit vector, so these are averaged
    and not normalised again.

    Args:
      parts: features of each window, of the same examples.
      space: common space.
      stream: whose embeddings.
      pool: entry of POOLS.

    Returns:
      (embeddings [N E], valid bool [N]).
    """
    if len(parts) == 1:
        return embeddings(parts[0], space, stream)
    total: Any = 0.0
    count: Any = 0.0
    for part in parts:
        x, valid = embeddings(part, space, stream)
        if pool == 'embeddings':
            # The mean is of embeddings before normalisation, which `FeatureExtractor` has already
            # applied.
            x = x * embedding_lengths(part, space, stream)[:, None]
        total = total + np.where(valid[:, None], x, 0)
        count = count + valid
    # `count` is 0 where no window has the modality: such a row is not valid.
    mean = total / np.maximum(count, 1)[:, None]
    if pool == 'embeddings':
        mean = mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)
    return mean, count > 0


def embeddings(
    features: Mapping[str, Any], space: str, stream: str
) -> tuple[np.ndarray, np.ndarray]:
    """(unit embeddings [N E], valid bool [N]) of a stream in a common space."""
    members = features['spaces'].get(space, {})
    # Before anything is looked up: mask and validity are stored under the same name.
    stream = _stored_name(members, stream)
    if stream not in members:
        raise ConfigError(
            f'config.evals asks for stream {stream!r} in space {space!r}, which has '
            f'{", ".join(members) or "nothing"}'
        )
    x = members[stream]
    # One vector for each clip, as a query needs.
    if x.ndim == 3:  # candidates [N K E]: the normalised mean of those that are there
        mask = features['mask'][stream][..., None]
        x = np.where(mask, x, 0).sum(1)
        x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
    return x, features['valid'][stream]


def embedding_lengths(features: Mapping[str, Any], space: str, stream: str) -> np.ndarray:
    """float [N]: length of the stream's embeddings before they were normalised.

    It is 1 for sentences, which are normalised one by one.
    """
    members = features['lengths'][space]
    lengths = members[_stored_name(members, stream)]
    if lengths.ndim == 1:
        return lengths
    # [N K] of sentences: `embeddings` has already put their mean on the unit sphere.
    return np.ones(len(lengths))


def _stored_name(members: Mapping[str, Any], stream: str) -> str:
    """`text` is the annotated caption where there is one."""
    if stream == 'text' and 'text.caption' in members:
        return 'text.caption'
    return stream
