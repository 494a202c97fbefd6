"""Scores of a head that was trained with the model (fine-tuning)."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from vatt_jax.config import ConfigError, choose
from vatt_jax.evals import statistics
from vatt_jax.evals.base import Evaluator, FeatureView, Result, features_over_windows

POOLS = ('logits', 'probabilities')


class Classification(Evaluator):
    """Scores on a split, from the objective's own predictions.

    Top-1 and top-5 where a clip has one class; mAP, AUC and d' where it may have several (the label
    is multi-hot). Clips without the label or without the modality that the head reads are left out;
    how many have no label is said (`count_unlabelled` counts them where there may be several).
    The logits, or the probabilities, are averaged over windows and crops of each example, see
    `base.features_over_windows` (VATT: logits, 4 windows and 3 crops of video, 4 windows of sound).
    """

    DEFAULTS = {
        'type': 'classification',
        # Also the name under which the objective's `predict` gives its logits.
        'label': 'class',
        'split': 'test',
        'limit': 100_000,
        # Also evaluate the random initialisation.
        'baseline': True,
        # Of each example in time, and squares of each window in space.
        'windows': 1,
        'crops': 1,
        # What is averaged over them; one of POOLS.
        'pool': 'logits',
        # Clips with none of several labels: False: left out, as their labels may be unknown |
        # True: clips of no class, as the official metric counts them.
        'count_unlabelled': False,
    }

    def __init__(self, config: Any, where: str = 'config.evals') -> None:
        super().__init__(config, where)
        choose(self.config.pool, POOLS, f'{where}.pool')

    def run(self, view: FeatureView) -> Result:
        c = self.config
        parts = features_over_windows(view, c.split, c.windows, c.crops, limit=c.limit)
        # Labels and validity are the same in all parts, only windows differ.
        features = parts[0]
        if c.label not in features['predictions']:
            raise ConfigError(
                f'{self.where}.label: expected a label that the objective predicts '
                f'({", ".join(features["predictions"]) or "none"}), got {c.label!r}.'
            )
        targets = features['labels'][c.label]  # [N], or multi-hot [N P]
        is_multi_label = targets.ndim > 1
        # [N P] of each window and crop.
        logits = [part['predictions'][c.label].astype(np.float64) for part in parts]
        scores = np.mean([self._poolable(x, is_multi_label) for x in logits], 0)  # [N P]

        # A multi-hot row of zeros, or a class of -1: no label.
        has_label = (targets > 0).any(-1) if is_multi_label else targets >= 0
        is_used = has_label
        if is_multi_label and c.count_unlabelled:
            is_used = np.ones(len(targets), bool)
        for stream in view.encoder.objective.streams() or ():
            # The head would score the zeros that stand in for a missing modality.
            is_used = is_used & features['valid'][stream]
        if not is_used.any():
            raise ConfigError(
                f'{self.where}: none of {len(targets)} clips of split {c.split!r} has the label '
                f'{c.label!r} and its modality.'
            )
        scores, targets = scores[is_used], targets[is_used]
        if is_multi_label:
            # Only the order of clips within each class counts, so scores need not be probabilities.
            result = Result(*statistics.multi_label(scores, targets, view.seed))
        else:
            result = single_label(scores, targets, view.seed)
        result.artifacts['unlabelled'] = int((~has_label).sum())
        if result.artifacts['unlabelled']:
            result.remarks.append(self._about_unlabelled(result, len(has_label), is_multi_label))
        return result

    def _about_unlabelled(self, result: Result, num_clips: int, is_multi_label: bool) -> str:
        c = self.config
        found = f'{result.artifacts["unlabelled"]} of {num_clips} clips have no label {c.label!r}'
        if not is_multi_label:
            return f'{found} and are left out'
        if c.count_unlabelled:
            return f'{found} and count as clips of no class'
        return (
            f'{found} and are left out; count_unlabelled=True counts them as clips of no class, as '
            'the official metric does'
        )

    def _poolable(self, logits: np.ndarray, is_multi_label: bool) -> np.ndarray:
        """What is averaged over windows, [N P]."""
        if self.config.pool == 'logits':
            return logits
        if is_multi_label:
            return statistics.sigmoid(logits)
        return statistics.softmax(logits)


def single_label(scores: Float[np.ndarray, 'N P'], targets: np.ndarray, seed: int) -> Result:
    """Accuracy of scores against the one class of each example: top-1, top-5, and top-1 by class.

    `mean_class_accuracy` is the mean over the classes that have examples of the share of each
    class that is right.
    """
    num_classes = scores.shape[-1]
    # Stable: equal scores go to the lower class, whatever sort NumPy would choose.
    order = np.argsort(-scores, -1, kind='stable')
    scalars = {}
    artifacts: dict[str, Any] = {}
    for name, k in (('accuracy', 1), ('top5', 5)):
        is_correct = (order[:, :k] == targets[:, None]).any(-1)  # [N]
        scalars[name] = float(is_correct.mean())
        artifacts[f'{name}/interval'] = statistics.bootstrap(is_correct, seed=seed)
        # Of uniform guesses without repetition.
        artifacts[f'{name}/chance'] = min(1.0, k / num_classes)

    counts = np.bincount(targets, minlength=num_classes)
    num_correct = np.bincount(targets[order[:, 0] == targets], minlength=num_classes)
    has_examples = counts > 0
    accuracies = num_correct[has_examples] / counts[has_examples]
    scalars['mean_class_accuracy'] = float(accuracies.mean())
    artifacts['mean_class_accuracy/chance'] = 1 / num_classes
    return Result(scalars, artifacts)
