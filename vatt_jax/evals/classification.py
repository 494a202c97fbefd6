"""Accuracy of a head that was trained with the model (fine-tuning)."""
from __future__ import annotations

import numpy as np

from vatt_jax.config import ConfigError, with_defaults
from vatt_jax.evals import statistics
from vatt_jax.evals.base import Result, View


class Classification:
    """Top-1 and top-5 on a split, from the objective's own predictions. Clips without the label or without the modality that the head
    reads are left out."""

    DEFAULTS = {'type': 'classification', 'label': 'class', 'split': 'test', 'limit': 100_000, 'baseline': True}

    def __init__(self, config, where: str = 'config.evals'):
        self.config = with_defaults(config, self.DEFAULTS, where)

    def run(self, view: View) -> Result:
        c = self.config
        f = view.features(c.split, limit=c.limit)
        if c.label not in f['predictions']:
            raise ConfigError(f'the classification evaluator wants predictions of {c.label!r}; the objective makes '
                              f'{", ".join(f["predictions"]) or "none"}')
        logits, y = f['predictions'][c.label], f['labels'][c.label]
        use = y >= 0
        for stream in view.encoder.objective.streams() or ():
            use = use & f['valid'][stream]
        if not use.any():
            raise ConfigError(f'classification: none of {len(y)} clips of split {c.split!r} has the label {c.label!r} and its modality')
        logits, y = logits[use], y[use]
        order = np.argsort(-logits, -1, kind='stable')
        scalars, artifacts = {}, {}
        for name, k in (('accuracy', 1), ('top5', 5)):
            right = (order[:, :k] == y[:, None]).any(-1)
            scalars[name] = float(right.mean())
            artifacts[f'{name}/interval'] = statistics.bootstrap(right, seed=view.seed)
            artifacts[f'{name}/chance'] = min(1.0, k / logits.shape[-1])
        return Result(scalars, artifacts)
