"""Hidden words beside regions: how many does a model tell right, with the picture and without?"""

from __future__ import annotations

from typing import Any

import numpy as np

from vatt_jax.config import ConfigError
from vatt_jax.evals import statistics
from vatt_jax.evals.base import Evaluator, FeatureView, Result
from vatt_jax.objectives.region_pretraining.objective import REGION_WORDS


class RegionWords(Evaluator):
    """Accuracy at hidden words of the objective `region_pretraining`.

    `accuracy`: share of hidden words that are told right, beside the picture. `accuracy_without`:
    the same words with all regions masked out, which is what the sentence alone says. `gain`: their
    difference. Of each clip the first sentence is read; the words that are hidden are the same at
    every evaluation. Intervals are over clips, whose words are not independent.
    """

    DEFAULTS = {'type': 'region_words', 'split': 'test', 'limit': 512, 'baseline': True}

    def run(self, view: FeatureView) -> Result:
        c = self.config
        features = view.features(c.split, by='records', limit=c.limit)
        if REGION_WORDS not in features['predictions']:
            raise ConfigError(
                f"{self.where}: expected config.objective.name='region_pretraining', whose hidden "
                'words are evaluated here; leave this evaluator out'
            )
        counts = features['predictions'][REGION_WORDS].astype(np.float64)  # [N 3]
        counts = counts[counts[:, 0] > 0]
        if not len(counts):
            raise ConfigError(
                f'{self.where}: none of the clips of split {c.split!r} has a sentence and regions'
            )
        scalars: dict[str, float] = {}
        artifacts: dict[str, Any] = {'words': int(counts[:, 0].sum())}
        for name, right in (
            ('accuracy', counts[:, 1]),
            ('accuracy_without', counts[:, 2]),
            ('gain', counts[:, 1] - counts[:, 2]),
        ):
            pairs = np.stack([right, counts[:, 0]], axis=-1)  # [N 2]
            scalars[name] = float(_ratio(pairs))
            artifacts[f'{name}/interval'] = statistics.bootstrap(pairs, _ratio, seed=view.seed)
        return Result(scalars, artifacts)


def _ratio(pairs: np.ndarray, axis: int = 0) -> Any:
    """Sum of the first numbers over the sum of the second ones, along an axis."""
    total = pairs.sum(axis)
    return total[..., 0] / total[..., 1]
