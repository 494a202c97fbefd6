"""A detector on a tower's map, trained on boxes: true ones, or those found by localisation.

docs/detector.md has the method, and how it differs from the published Faster R-CNN.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vatt_jax.config import ConfigError, check_range, with_defaults
from vatt_jax.detection import targets
from vatt_jax.detection.model import GROUP_CHANNELS, Detector, places
from vatt_jax.detection.suppression import decode
from vatt_jax.objectives.base import Encoding, Loss, Objective, Spec, select_streams
from vatt_jax.objectives.forward import map_of, run_towers
from vatt_jax.rng import Rng

DEFAULTS = {
    'name': 'detection',
    'stream': 'video',
    # Which of the data's labels names the classes of boxes.
    'label': 'object',
    # Of the pyramid and the heads; hidden layers of each head.
    'width': 64,
    'convs': 2,
    # Levels of the pyramid, finest first: 2^level times as fine as the tower's map.
    'levels': (1, 0, -1),
    # Which places find which boxes (detection.targets.Rules).
    'radius': 1.5,
    'reach': 4.0,
    # Of the focal loss, and weights of the other two beside it.
    'alpha': 0.25,
    'gamma': 2.0,
    'box_weight': 1.0,
    'centre_weight': 1.0,
    # Detections: candidates for suppression, detections of a picture, IoU of two boxes of one
    # object, smallest score.
    'candidates': 200,
    'detections': 50,
    'overlap': 0.6,
    'min_score': 0.05,
}
# Field -> smallest and largest value.
RANGES = {
    'width': (GROUP_CHANNELS, math.inf),
    'convs': (0, math.inf),
    'radius': (0, math.inf),
    'reach': (0, math.inf),
    'alpha': (0, 1),
    'gamma': (0, math.inf),
    'box_weight': (0, math.inf),
    'centre_weight': (0, math.inf),
    'candidates': (1, math.inf),
    'detections': (1, math.inf),
    'overlap': (0, 1),
    # A detection of score 0 would be taken for padding.
    'min_score': (1e-6, 1),
}


class Detection(Objective):
    """Focal loss of classes, GIoU of boxes and centre-ness at the places of a pyramid (FCOS).

    Pictures are clips that show nothing else; of several frames of a map the mean is taken.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        c = self.config
        for field, (low, high) in RANGES.items():
            check_range(c[field], low, high, f'config.objective.{field}')
        if c.width % GROUP_CHANNELS:
            raise ConfigError(
                f'config.objective.width: expected a multiple of {GROUP_CHANNELS}, got {c.width}.'
            )
        levels = tuple(c.levels)
        if not levels or list(levels) != list(range(levels[0], levels[0] - len(levels), -1)):
            raise ConfigError(
                'config.objective.levels: expected consecutive numbers, the finest level first, '
                f'such as (1, 0, -1), got {levels}.'
            )

    def streams(self) -> tuple[str, ...]:
        return (self.config.stream,)

    def map_streams(self) -> tuple[str, ...]:
        return (self.config.stream,)

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        c = self.config
        if c.label not in spec.labels or 'boxes' not in spec.batch:
            raise ConfigError(
                'config.objective: detection expects pictures with boxes, and the data have none; '
                "set config.data.source='coco' (docs/detector.md)"
            )
        encoded = spec.outputs.encoded[c.stream]
        if not encoded.grid:
            raise ConfigError(
                f'config.model.towers.{c.stream}: expected a tower that makes a map of the picture'
            )
        # Towers pool their last map, or a token beside it: both are as wide as the map.
        shape = (1, *encoded.grid[-2:], encoded.pooled.shape[-1])
        detector = self._detector(spec.labels[c.label])
        return detector.init(key, jnp.zeros(shape))['params'], {}

    def _detector(self, num_classes: int) -> Detector:
        c = self.config
        return Detector(num_classes, c.width, c.convs, tuple(c.levels))

    def _apply(self, params: Any, feature_map: jax.Array) -> tuple[Any, tuple[int, int]]:
        """Predictions of a map [B T h w D], and its (h, w)."""
        pictures = feature_map.astype(jnp.float32).mean(axis=1)  # [B h w D]
        num_classes = params['classes']['bias'].shape[0]
        predictions = self._detector(num_classes).apply({'params': params}, pictures)
        rows, columns = pictures.shape[1:3]
        return predictions, (rows, columns)

    def encode(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Encoding:
        stream = self.config.stream
        streams = select_streams(batch, self.streams())
        features, batch_stats = run_towers(model, variables, streams, rng, maps=(stream,))
        # The map alone: what is kept of microbatches should be no more than what is read.
        return Encoding({map_of(stream): features[map_of(stream)]}, batch_stats, state)

    def compute_loss(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        pooled: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: Any,
    ) -> Loss:
        c = self.config
        predictions, grid = self._apply(params, pooled[map_of(c.stream)])
        where = places(grid, tuple(c.levels))
        boxes = batch['boxes']
        assigned = targets.assign(
            where,
            boxes['corners'],
            boxes['class'],
            boxes['valid'],
            boxes['ignored'],
            targets.Rules(c.radius, c.reach),
        )
        # A picture that could not be read says nothing about background either.
        is_shown = batch[c.stream]['valid'][:, None]
        assigned = dataclasses.replace(assigned, counted=assigned.counted & is_shown)
        value, metrics = targets.detection_loss(predictions, assigned, c)
        return Loss(value, metrics, variables['batch_stats'], state)

    def predict(self, params: Any, state: Any, encoded: Mapping[str, Any]) -> dict[str, jax.Array]:
        """'boxes' [B M 4] in fractions of the picture, 'scores' [B M], 'classes' int32 [B M]."""
        c = self.config
        # Whoever asks without maps wants no detections.
        if c.stream not in encoded or encoded[c.stream].tokens is None:
            return {}
        tokens = encoded[c.stream].tokens
        feature_map = tokens.reshape(len(tokens), *encoded[c.stream].grid, -1)
        predictions, _ = self._apply(params, feature_map)
        found = decode(predictions, c.candidates, c.detections, c.overlap, c.min_score)
        return dict(found._asdict())
