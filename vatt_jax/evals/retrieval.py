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
MATRIX_CLIPS = 1024  # the first, whose similarities to each other are kept for the report
QUERIES_AT_ONCE = 1024  # whose similarities are in memory


class Retrieval(Evaluator):
    """R@1, R@5, R@10 in [0, 1] and median rank (1 is best) for each pair of streams.

    All come with 95 % bootstrap intervals over queries. A query stream `text` is the clip's
    annotated caption where the data has one (`text.caption`), else the normalised mean of its
    candidate sentences. Clips that lack either side are left out and counted. Ties share their
    ranks. With several windows both sides are pooled over those that have the modality, in either
    of VATT's ways.

    Where clips have several captions (pictures of Flickr30k have 5, MSR-VTT's full split 20), all
    count, as published results have it (Karpathy & Fei-Fei 2015, section 4.1): from text, every
    caption is a query whose one right answer is its clip; to text, the gallery is all captions, and
    the first of the clip's own counts. Intervals are over clips then, since captions of one clip
    are not independent; the scalar `captions` says how many there are.
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
        # Captions of a clip that count, the first of them; 0: all. (COCO has 5 to 7, of which some
        # count 5.)
        'captions': 0,
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
            pair_scalars, pair_artifacts = _scores(
                _candidates(parts[0], space, query, query_embeddings, rows, c.captions),
                _candidates(parts[0], space, gallery, gallery_embeddings, rows, c.captions),
                clips[rows],
                view.seed,
            )
            scalars.update({f'{name}/{key}': value for key, value in pair_scalars.items()})
            artifacts.update({f'{name}/{key}': value for key, value in pair_artifacts.items()})
        return Result(scalars, artifacts)


def _candidates(
    features: Mapping[str, Any],
    space: str,
    stream: str,
    pooled: Float[np.ndarray, 'N E'],
    rows: Int[np.ndarray, ' n'],
    max_captions: int,
) -> tuple[Float[np.ndarray, 'Q E'], Int[np.ndarray, ' Q']]:
    """Unit embeddings that stand for the clips, and the row of each one's clip, ascending.

    Args:
      features: of one window; captions are the same in all.
      space: common space.
      stream: whose embeddings: one a clip, or all its captions.
      pooled: one embedding a clip.
      rows: of the n clips in the pass.
      max_captions: of a clip; 0: all.
    """
    name = _stored_name(features['spaces'].get(space, {}), stream)
    if name != 'text.caption':
        return pooled[rows], np.arange(len(rows))
    embeddings = features['spaces'][space][name][rows]  # [n K E]
    mask = features['mask'][name][rows]  # [n K]
    if max_captions:
        mask = mask & (np.cumsum(mask, axis=1) <= max_captions)
    owners, _ = np.nonzero(mask)  # by clip, then by caption
    return embeddings[mask], owners


def _scores(
    query: tuple[Float[np.ndarray, 'Q E'], Int[np.ndarray, ' Q']],
    gallery: tuple[Float[np.ndarray, 'M E'], Int[np.ndarray, ' M']],
    clips: np.ndarray,
    seed: int,
) -> tuple[dict[str, float], dict[str, Any]]:
    """(scalars, artifacts) of queries and gallery, both of `clips`.

    Args:
      query: embeddings, and the clip of each.
      gallery: embeddings, and the clip of each.
      clips: index of each clip in the pass.
      seed: of the intervals.
    """
    query_owners, gallery_owners = query[1], gallery[1]
    better, equal, tied, artifacts = _compare(query, gallery, clips)
    num_own = np.bincount(gallery_owners)[query_owners]  # right answers of each query
    scalars: dict[str, float] = {}
    for k in (1, 5, 10):
        hits = statistics.hits_of_best(better, equal, tied, k)
        scalars[f'R@{k}'] = float(hits.mean())
        artifacts[f'R@{k}/interval'] = statistics.bootstrap_groups(hits, query_owners, seed=seed)
        artifacts[f'R@{k}/chance'] = float(_chance(num_own, len(gallery_owners), k).mean())

    # Ranks are counted from 0, the median rank is reported from 1.
    rank = statistics.ranks_of_best(better, equal, tied) + 1
    scalars['median_rank'] = float(np.median(rank))
    artifacts['median_rank/interval'] = statistics.bootstrap_groups(
        rank, query_owners, np.median, seed
    )
    artifacts['median_rank/chance'] = _median_chance(num_own, len(gallery_owners))
    artifacts['clips'] = clips
    artifacts['rank'] = rank[_first_of_each(query_owners, len(clips))]
    scalars['clips'] = float(len(clips))
    num_captions = max(len(query_owners), len(gallery_owners))
    if num_captions > len(clips):
        scalars['captions'] = float(num_captions)
    return scalars, artifacts


def _compare(
    query: tuple[Float[np.ndarray, 'Q E'], Int[np.ndarray, ' Q']],
    gallery: tuple[Float[np.ndarray, 'M E'], Int[np.ndarray, ' M']],
    clips: np.ndarray,
) -> tuple[Int[np.ndarray, ' Q'], Int[np.ndarray, ' Q'], Int[np.ndarray, ' Q'], dict[str, Any]]:
    """`statistics.compare_with_own` of all queries, and what is shown of them.

    That is one row a clip and one column a clip: the first of its queries, and the best of its
    answers. Queries are compared in blocks: 25,010 captions by 5,000 pictures are 0.5 GB.

    Args:
      query: embeddings, and the clip of each.
      gallery: embeddings, and the clip of each.
      clips: index of each clip in the pass.

    Returns:
      Counts of better, equal and tied answers, and the artifacts `similarity` (of the first clips)
      and `top`.
    """
    query_embeddings, query_owners = query
    gallery_embeddings, gallery_owners = gallery
    first_query = _first_of_each(query_owners, len(clips))
    first_answer = _first_of_each(gallery_owners, len(clips))
    counts, matrix, top = [], [], []
    for begin in range(0, len(query_owners), QUERIES_AT_ONCE):
        block = slice(begin, begin + QUERIES_AT_ONCE)
        similarity = query_embeddings[block] @ gallery_embeddings.T  # [q M]
        is_own = query_owners[block, None] == gallery_owners[None]
        counts.append(statistics.compare_with_own(similarity, is_own))
        is_first = np.isin(np.arange(begin, begin + len(similarity)), first_query)
        shown = np.maximum.reduceat(similarity[is_first], first_answer, axis=1)
        # Ties go to the earlier clip here; in the scores they are shared.
        nearest = np.argsort(-shown, 1, kind='stable')[:, :SHOWN_CLIPS]
        top.append(clips[nearest])
        # Half precision, as no score is computed from them.
        matrix.append(shown[:, :MATRIX_CLIPS].astype(np.float16))
    better, equal, tied = (np.concatenate(column) for column in zip(*counts))
    artifacts: dict[str, Any] = {
        'similarity': np.concatenate(matrix)[:MATRIX_CLIPS],
        'top': np.concatenate(top),
    }
    return better, equal, tied, artifacts


def _first_of_each(owners: Int[np.ndarray, ' Q'], num_clips: int) -> Int[np.ndarray, ' n']:
    """Where each clip's rows begin, of owners that ascend."""
    return np.searchsorted(owners, np.arange(num_clips))


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
