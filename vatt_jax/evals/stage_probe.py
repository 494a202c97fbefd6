"""A classifier on each of several stages of a tower, as AVID evaluates."""

from __future__ import annotations

from typing import Any

from vatt_jax.config import ConfigError, check_range
from vatt_jax.evals.base import REMEDY, FeatureView, Result
from vatt_jax.evals.linear_probe import LinearProbe
from vatt_jax.inference.feature_extractor import Stage
from vatt_jax.inputs.batch import modality_of

# The number by which the best stage is chosen, whichever the label has.
SCORES = ('accuracy', 'mAP')


class StageProbe(LinearProbe):
    """A linear probe for each stage of a convolutional tower, and which of them is best.

    The best is found on the clips that are tested on, as in what AVID's authors publish, so its
    score is a little too high for one of a probe chosen beforehand.
    """

    DEFAULTS = {
        **LinearProbe.DEFAULTS,
        'type': 'stage_probe',
        # Numbers of the tower's stages (models/towers/stages.py), from 1.
        'stages': (1, 2, 3, 4),
        # Of a stage's features, at most: the maximum over time, and over as many bins of space as
        # go into it. AVID: 12 × 12, 8 × 8, 6 × 6 and 4 × 4 bins of 64 to 512 channels.
        'stage_width': 9216,
        'solver': 'normed_linear',
        'epochs': 12,
    }

    def __init__(self, config: Any, where: str = 'config.evals') -> None:
        super().__init__(config, where)
        c = self.config
        check_range(c.stage_width, 1, float('inf'), f'{where}.stage_width')
        if not c.stages or len(set(c.stages)) != len(c.stages):
            raise ConfigError(
                f'{where}.stages: expected numbers of stages, each once, got {tuple(c.stages)}.'
            )

    def check(self, data: Any, outputs: Any) -> None:
        super().check(data, outputs)
        c = self.config
        stages: set[int] = set()
        for stream, encoded in outputs.encoded.items():
            if modality_of(stream) == modality_of(c.stream):
                stages.update(encoded.stages)
        if not set(c.stages) <= stages:
            raise ConfigError(
                f'{self.where}.stages: expected some of those of the {modality_of(c.stream)} '
                f'tower, {tuple(sorted(stages)) or "which has none"}, got {tuple(c.stages)}; '
                f'{REMEDY}'
            )

    def run(self, view: FeatureView) -> Result:
        c = self.config
        # All in one request: the data are read and encoded once.
        stages = tuple(Stage(c.stream, number, c.stage_width) for number in c.stages)
        results = {}
        for stage in stages:
            # One after the other: a classifier of each needs its features on the device.
            results[f'stage_{stage.number}'] = super().run(_StageView(view, stages, stage))
        return _joined(results)


class _StageView(FeatureView):
    """A view in which the features of a stage are those that a tower pools."""

    def __init__(self, view: FeatureView, stages: tuple[Stage, ...], stage: Stage) -> None:
        # Nothing is computed or remembered here, so that all stages share what `view` computes.
        self._view, self._stages, self._stage = view, stages, stage
        self.data, self.seed = view.data, view.seed

    def features(self, split: str, **request: Any) -> dict[str, Any]:
        features = self._view.features(split, stages=self._stages, **request)
        pooled = {self._stage.stream: features['stages'][self._stage.name]}
        return {**features, 'pooled': pooled}


def _joined(results: dict[str, Result]) -> Result:
    """The results of all stages as one, with the best stage's beside them."""
    joined = Result({})
    for name, result in results.items():
        joined.scalars.update({f'{name}/{key}': value for key, value in result.scalars.items()})
        for key, value in result.artifacts.items():
            if key.startswith(SCORES):  # with intervals and chance
                joined.artifacts[f'{name}/{key}'] = value

    first = next(iter(results.values()))
    score = next(key for key in SCORES if key in first.scalars)
    best = max(results, key=lambda name: results[name].scalars[score])
    joined.scalars['best_stage'] = float(best.removeprefix('stage_'))
    joined.scalars[f'best_stage/{score}'] = results[best].scalars[score]
    for key in ('train', 'test', 'unlabelled'):
        joined.artifacts[key] = first.artifacts[key]
    joined.remarks += first.remarks
    joined.remarks.append(
        f'{best} is the best of {len(results)} by {score}, chosen on the clips that are tested on: '
        f'best_stage/{score} is a little too high, the numbers of single stages are not'
    )
    return joined
