"""Zero-shot retrieval: does the right clip come first among N? (VATT paper.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vatt_jax.config import ConfigError, choose
from vatt_jax.evals import statistics
from vatt_jax.evals.base import Evaluator, FeatureView, Result, check_spaces, features_over_windows

POOLS = ('embeddings', 'similarities')
SHOWN_CLIPS = 5  # of each query, in the report's gallery


class Retrieval(Evaluator):
    """R@1, R@5, R@10 in [0, 1] and median rank (1 is best) for each pair of streams.

    All come with 95 % bootstrap intervals over queries. A query stream `text` is the clip's
    annotated caption where the data has one (`text.caption`), else the normalised mean of its
    candidate sentences. Clips that lack either side are left out and counted. Ties share their
    ranks. With several windows both sides are pooled over those that have the modality, in either
    of VATT's ways.
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
            similarity = query_embeddings[rows] @ gallery_embeddings[rows].T  # [n n]
            pair_scalars, pair_artifacts = _scores(similarity, clips[rows], view.seed)
            name = f'{query}_to_{gallery}'
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


class Sync(Evaluator):
    """Share of clips whose video is nearer to its own sound than to that of another moment.

    The other sound is the clip's own, `seconds` away. Chance is one half, ties are half.
    """

    DEFAULTS = {
        'type': 'sync',
        'split': 'test',
        'limit': 512,
        # How far the other sound is shifted.
        'seconds': 1.0,
        'space': 'va',
        'baseline': True,
    }

    def check(self, data: Any, outputs: Any) -> None:
        super().check(data, outputs)
        check_spaces([('video', 'audio', self.config.space)], outputs, self.where)

    def run(self, view: FeatureView) -> Result:
        c = self.config
        # An extra stream that goes through the same audio tower.
        shifted = {'audio.shifted': {'kind': 'shift', 'seconds': c.seconds}}
        features = view.features(c.split, limit=c.limit, views=shifted)
        video, video_valid = _embeddings(features, c.space, 'video')  # [N E]
        audio, audio_valid = _embeddings(features, c.space, 'audio')
        other_audio, other_valid = _embeddings(features, c.space, 'audio.shifted')
        is_used = video_valid & audio_valid & other_valid
        if not is_used.any():
            raise ConfigError(
                f'sync: none of {len(is_used)} clips of split {c.split!r} has video and sound'
            )
        similarity = (video * audio).sum(-1)[is_used]
        other_similarity = (video * other_audio).sum(-1)[is_used]
        # A model that embeds all sounds alike scores one half, not 0 or 1.
        is_tie = similarity == other_similarity
        scores = (similarity > other_similarity) + 0.5 * is_tie
        interval = statistics.bootstrap(scores, seed=view.seed)
        return Result(
            {'accuracy': float(scores.mean())},
            {'accuracy/interval': interval, 'accuracy/chance': 0.5},
        )


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
        return _embeddings(parts[0], space, stream)
    total: Any = 0.0
    count: Any = 0.0
    for part in parts:
        x, valid = _embeddings(part, space, stream)
        if pool == 'embeddings':
            # The mean is of embeddings before normalisation, which `FeatureExtractor` has already
            # applied.
            x = x * _lengths(part, space, stream)[:, None]
        total = total + np.where(valid[:, None], x, 0)
        count = count + valid
    # `count` is 0 where no window has the modality: such a row is not valid.
    mean = total / np.maximum(count, 1)[:, None]
    if pool == 'embeddings':
        mean = mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)
    return mean, count > 0


def _embeddings(
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


def _lengths(features: Mapping[str, Any], space: str, stream: str) -> np.ndarray:
    """float [N]: length of the stream's embeddings before they were normalised.

    It is 1 for sentences, which are normalised one by one.
    """
    members = features['lengths'][space]
    lengths = members[_stored_name(members, stream)]
    if lengths.ndim == 1:
        return lengths
    # [N K] of sentences: `_embeddings` has already put their mean on the unit sphere.
    return np.ones(len(lengths))


def _stored_name(members: Mapping[str, Any], stream: str) -> str:
    """`text` is the annotated caption where there is one."""
    if stream == 'text' and 'text.caption' in members:
        return 'text.caption'
    return stream
