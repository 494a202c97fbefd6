"""Synchrony: does a model tell a video's own sound from that of another moment or clip? (AVTS.)"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vatt_jax.config import ConfigError, check_range, choose
from vatt_jax.evals import statistics
from vatt_jax.evals.base import REMEDY, Evaluator, FeatureView, Result, check_spaces
from vatt_jax.evals.retrieval import embedding_lengths, embeddings

MEASURES = ('cosine', 'distance')
AGAINST = ('shifted', 'other')

Scores = tuple[Float[np.ndarray, ' N'], Float[np.ndarray, ' N']]


class Sync(Evaluator):
    """Share of clips whose video is nearer to its own sound than to another one (`accuracy`).

    The other sound is of another moment of the clip, or of another clip. Chance is one half, ties
    are half.

    With `threshold_split` there is a decision without comparison too (`binary_accuracy`): a video
    and a sound are called in sync where they are nearer than a threshold, the best one on that
    split. Half of the pairs are in sync, so chance is one half again.
    """

    DEFAULTS = {
        'type': 'sync',
        'split': 'test',
        'limit': 512,
        # shifted: the sound of another moment of the clip | other: that of another clip
        'against': 'shifted',
        # How far the other moment is shifted.
        'seconds': 1.0,
        # Above 0: a moment drawn at random instead, with at least so many seconds between the two
        # windows. Clips without one are left out.
        'apart': 0.0,
        # cosine, or distance of embeddings as they are (margin losses)
        'measure': 'cosine',
        # Split on which the threshold of `binary_accuracy` is chosen. '': without that number.
        'threshold_split': '',
        'space': 'va',
        'baseline': True,
    }

    def __init__(self, config: Any, where: str = 'config.evals') -> None:
        super().__init__(config, where)
        choose(self.config.measure, MEASURES, f'{where}.measure')
        choose(self.config.against, AGAINST, f'{where}.against')

    def check(self, data: Any, outputs: Any) -> None:
        super().check(data, outputs)
        c = self.config
        check_range(c.apart, 0, math.inf, f'{self.where}.apart')
        if c.threshold_split and not data.size(c.threshold_split, 'segments'):
            raise ConfigError(
                f'{self.where}.threshold_split={c.threshold_split!r}: the data have no such split; '
                f'{REMEDY}'
            )
        check_spaces([('video', 'audio', c.space)], outputs, self.where)

    def run(self, view: FeatureView) -> Result:
        match, mismatch = self._scores(view, self.config.split)
        # A model that embeds all sounds alike scores one half, not 0 or 1.
        correct = (match > mismatch) + 0.5 * (match == mismatch)
        scalars = {'accuracy': float(correct.mean())}
        artifacts: dict[str, Any] = {
            'accuracy/interval': statistics.bootstrap(correct, seed=view.seed),
            'accuracy/chance': 0.5,
        }
        if self.config.threshold_split:
            threshold = best_threshold(*self._scores(view, self.config.threshold_split))
            # Two decisions a clip, which are not independent: the interval is over clips.
            correct = 0.5 * ((match > threshold).astype(float) + (mismatch <= threshold))
            scalars['binary_accuracy'] = float(correct.mean())
            artifacts['binary_accuracy/interval'] = statistics.bootstrap(correct, seed=view.seed)
            artifacts['binary_accuracy/chance'] = 0.5
        return Result(scalars, artifacts)

    def _scores(self, view: FeatureView, split: str) -> Scores:
        """How near each clip's video is to its own sound, and to the other one; larger is nearer.

        Of the clips that have all three.
        """
        c = self.config
        views = {}
        if c.against == 'shifted':
            # An extra stream that goes through the same audio tower.
            shift = {'kind': 'shift', 'seconds': c.seconds}
            if c.apart > 0:
                shift = {'kind': 'shift', 'seconds': 'random', 'apart': c.apart}
            views['audio.shifted'] = shift
        features = view.features(split, limit=c.limit, views=views or None)
        video, video_valid = self._embeddings(features, 'video')  # [N E]
        audio, is_used = self._embeddings(features, 'audio')
        is_used = is_used & video_valid
        if c.against == 'shifted':
            other_audio, other_valid = self._embeddings(features, 'audio.shifted')
            is_used = is_used & other_valid
        if not is_used.any():
            raise ConfigError(
                f'sync: none of {len(is_used)} clips of split {split!r} has video and sound'
            )
        video, audio = video[is_used], audio[is_used]
        if c.against == 'shifted':
            other_audio = other_audio[is_used]
        else:
            # Half the split away: clips of one record follow one another.
            other_audio = np.roll(audio, len(audio) // 2, axis=0)
        return self._nearness(video, audio), self._nearness(video, other_audio)

    def _embeddings(
        self, features: Any, stream: str
    ) -> tuple[Float[np.ndarray, 'N E'], Bool[np.ndarray, ' N']]:
        x, valid = embeddings(features, self.config.space, stream)
        if self.config.measure == 'distance':
            # Features are of length 1; what was compared in training was not.
            x = x * embedding_lengths(features, self.config.space, stream)[:, None]
        return x, valid

    def _nearness(
        self, x: Float[np.ndarray, 'N E'], y: Float[np.ndarray, 'N E']
    ) -> Float[np.ndarray, ' N']:
        if self.config.measure == 'distance':
            return -np.linalg.norm(x - y, axis=-1)
        return (x * y).sum(-1)


def best_threshold(match: Float[np.ndarray, ' N'], mismatch: Float[np.ndarray, ' M']) -> float:
    """The threshold above which scores are best called a match; the lowest of equally good ones.

    Args:
      match: scores of pairs that match.
      mismatch: scores of pairs that do not.
    """
    scores = np.concatenate([match, mismatch]).astype(np.float64)
    is_match = np.concatenate([np.ones(len(match)), np.zeros(len(mismatch))])
    # Of equal scores, which no threshold can tell apart, the matches come first: a threshold
    # between them would lose matches before it finds mismatches, and is never the best.
    order = np.argsort(scores, kind='stable')
    scores, is_match = scores[order], is_match[order]
    # After the first k scores: mismatches among those are right, and matches among the rest.
    lost_matches = np.concatenate([[0], np.cumsum(is_match)])
    found_mismatches = np.concatenate([[0], np.cumsum(1 - is_match)])
    best = int(np.argmax(found_mismatches - lost_matches))
    bounds = np.concatenate([[-np.inf], scores, [np.inf]])
    # Halfway between its neighbours, which are at infinity beyond the first and the last score.
    return float((bounds[best] + bounds[best + 1]) / 2)
