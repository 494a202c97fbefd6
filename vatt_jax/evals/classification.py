"""Scores of a head that was trained with the model (fine-tuning)."""

from __future__ import annotations

import numpy as np

from vatt_jax.config import ConfigError, choose, with_defaults
from vatt_jax.evals import statistics
from vatt_jax.evals.base import Result, View, over_windows

POOLS = ('logits', 'probabilities')


class Classification:
    """Scores on a split, from the objective's own predictions: top-1 and top-5 where a clip has one class, mAP, AUC and d' where it may have
    several (the label is multi-hot). Clips without the label or without the modality that the head reads are left out.

    windows, crops: of each example, see `base.over_windows`; the logits, or the probabilities, are averaged over them (VATT: logits, 4 windows and
    3 crops of video, 4 windows of sound).
    """

    DEFAULTS = {
        'type': 'classification',
        'label': 'class',
        'split': 'test',
        'limit': 100_000,
        'baseline': True,
        'windows': 1,
        'crops': 1,
        'pool': 'logits',
    }

    def __init__(self, config, where: str = 'config.evals'):
        self.config = with_defaults(config, self.DEFAULTS, where)
        choose(self.config.pool, POOLS, f'{where}.pool')

    def run(self, view: View) -> Result:
        c = self.config
        parts = over_windows(view, c.split, c.windows, c.crops, limit=c.limit)
        f = parts[0]
        if c.label not in f['predictions']:
            raise ConfigError(
                f'the classification evaluator wants predictions of {c.label!r}; the objective makes '
                f'{", ".join(f["predictions"]) or "none"}'
            )
        y = f['labels'][c.label]
        several = y.ndim > 1
        pooled = {'logits': lambda x: x, 'probabilities': _sigmoid if several else _softmax}[c.pool]
        scores = np.mean([pooled(p['predictions'][c.label].astype(np.float64)) for p in parts], 0)
        use = (y > 0).any(-1) if several else y >= 0
        for stream in view.encoder.objective.streams() or ():
            use = use & f['valid'][stream]
        if not use.any():
            raise ConfigError(
                f'classification: none of {len(y)} clips of split {c.split!r} has the label {c.label!r} and its modality'
            )
        scores, y = scores[use], y[use]
        if several:
            return Result(*statistics.multi_label(scores, y, view.seed))
        order = np.argsort(-scores, -1, kind='stable')
        scalars, artifacts = {}, {}
        for name, k in (('accuracy', 1), ('top5', 5)):
            right = (order[:, :k] == y[:, None]).any(-1)
            scalars[name] = float(right.mean())
            artifacts[f'{name}/interval'] = statistics.bootstrap(right, seed=view.seed)
            artifacts[f'{name}/chance'] = min(1.0, k / scores.shape[-1])
        return Result(scalars, artifacts)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))
