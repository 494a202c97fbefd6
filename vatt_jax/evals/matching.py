"""Matching: does a model tell a clip's own words or sound from those of another clip?"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vatt_jax.config import ConfigError, choose
from vatt_jax.evals import statistics
from vatt_jax.evals.base import Evaluator, FeatureView, Result
from vatt_jax.objectives.matching import MATCH, MATCHING, MISMATCH

STREAMS = ('video', 'audio', 'text')


class Matching(Evaluator):
    """Scores of `matching` or `region_pretraining`, of clips as they are and mismatched.

    Mismatched: with a stream of another clip.

    `accuracy`: share of clips that score higher as they are than mismatched; ties are half.
    `binary_accuracy`: share of the pairs of both kinds that are called what they are, without
    comparison. Chance is one half for both. Examples are records, so that the other clip is always
    of another one; clips that lack a stream of the objective are left out.
    """

    DEFAULTS = {
        'type': 'matching',
        'split': 'test',
        'limit': 512,
        # The stream that is another clip's: video, audio or text.
        'stream': 'text',
        'baseline': True,
    }

    def __init__(self, config: Any, where: str = 'config.evals') -> None:
        super().__init__(config, where)
        choose(self.config.stream, STREAMS, f'{where}.stream')

    def run(self, view: FeatureView) -> Result:
        c = self.config
        own, is_used = self._scores(view, '')
        other, is_mismatched = self._scores(view, f'other_{c.stream}')
        is_used = is_used & is_mismatched
        if not is_used.any():
            raise ConfigError(
                f'{self.where}: none of {len(is_used)} clips of split {c.split!r} has all streams '
                'of the objective and another clip beside it'
            )
        own, other = own[is_used], other[is_used]
        is_nearer = (own > other) + 0.5 * (own == other)
        # Two decisions a clip, which are not independent: the interval is over clips.
        is_right = 0.5 * ((own > 0).astype(float) + (other <= 0))
        scalars: dict[str, float] = {}
        artifacts: dict[str, Any] = {}
        for name, correct in (('accuracy', is_nearer), ('binary_accuracy', is_right)):
            scalars[name] = float(correct.mean())
            artifacts[f'{name}/interval'] = statistics.bootstrap(correct, seed=view.seed)
            artifacts[f'{name}/chance'] = 0.5
        return Result(scalars, artifacts)

    def _scores(
        self, view: FeatureView, change: str
    ) -> tuple[Float[np.ndarray, ' N'], Bool[np.ndarray, ' N']]:
        """How far each clip is called a match, above 0 for yes; which clips have all streams."""
        c = self.config
        features = view.features(c.split, by='records', limit=c.limit, change=change)
        if MATCHING not in features['predictions']:
            raise ConfigError(
                f"{self.where}: expected config.objective.name='matching' or 'region_pretraining', "
                'whose classifier is evaluated here; leave this evaluator out'
            )
        logits = features['predictions'][MATCHING].astype(np.float64)  # [N 2]
        is_used = np.ones(len(logits), bool)
        for stream in view.encoder.objective.streams():
            is_used = is_used & features['valid'][stream]
        return logits[:, MATCH] - logits[:, MISMATCH], is_used
