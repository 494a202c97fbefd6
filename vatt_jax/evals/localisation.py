"""Localisation without a detector: do boxes of heat maps hold the object that is heard?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from vatt_jax.config import ConfigError, check_range
from vatt_jax.detection import boxes as measures
from vatt_jax.detection.true_objects import inside, objects_at
from vatt_jax.evals import statistics
from vatt_jax.evals.base import REMEDY, Evaluator, FeatureView, Result
from vatt_jax.objectives.localisation import HEAT

# Pictures of which the report shows the worst and the best, how many it shows, and their pixels to
# a side.
LOOKED_AT, SHOWN, SHOWN_SIDE = 64, 12, 128
# Boxes that a model's must beat: the middle of every picture, and one that is drawn.
CENTRE, RANDOM = 'centre_box', 'random_box'


class Overlap(NamedTuple):
    """How well one picture's object is found: IoU of boxes, cIoU of pixels, whether it is hit."""

    box: float
    pixels: float
    is_hit: bool


class Sounding(NamedTuple):
    """Pictures in which something is heard.

    Attributes:
        places: in the pass.
        maps: name -> [N h w].
        true_boxes: of what is heard, in what the model sees.
    """

    places: list[int]
    maps: dict[str, Float[np.ndarray, 'N h w']]
    true_boxes: list[Float[np.ndarray, 'n 4']]


class Localisation(Evaluator):
    """Shares of pictures in which the object that is heard is found.

    For the maps `heat` (of picture and sound) and `saliency` (of the picture alone), and for a
    centre box and a random one: `<name>/IoU`, the box reaches `overlap` with a true one;
    `<name>/cIoU`, so do the pixels above the threshold with those of all true boxes; `<name>/AUC`,
    the area under the latter's success curve; `<name>/pointing`, the maximum of the map, or the
    middle of the box, lies in a true box. Of the network before training (the report's
    baseline), `saliency` says what can be had for nothing. `<name>/beta` is the threshold.

    True boxes are `ground_truth` of the data (detection.true_objects). Pictures in which nothing is
    heard are left out.
    """

    DEFAULTS = {
        'type': 'localisation',
        'split': 'test',
        'limit': 1 << 20,
        'stream': 'video',
        # β of the threshold: β · maximum + (1 - β) · mean.
        'beta': 0.5,
        # A split by whose pictures every map gets a β of its own, the one of `betas` whose boxes
        # have the highest mean IoU; '': `beta` for all.
        'beta_split': '',
        'betas': (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
        # From which IoU on an object is found.
        'overlap': 0.5,
        # Sides of the centre box, as shares of the picture's.
        'centre': 0.5,
        # Pixels to a side of the map that boxes are taken of.
        'size': 64,
        'baseline': True,
    }

    def __init__(self, config: Any, where: str = 'config.evals') -> None:
        super().__init__(config, where)
        c = self.config
        for beta in (c.beta, *c.betas):
            check_range(beta, 0, 1, f'{where}.beta')
        if not c.betas:
            raise ConfigError(f'{where}.betas: expected numbers from 0 to 1, got none')
        check_range(c.overlap, 0, 1, f'{where}.overlap')
        check_range(c.centre, 0, 1, f'{where}.centre')
        check_range(c.size, 1, 1 << 14, f'{where}.size')

    def check(self, data: Any, outputs: Any) -> None:
        super().check(data, outputs)
        split = self.config.beta_split
        if split and not data.size(split, 'segments'):
            raise ConfigError(
                f'{self.where}.beta_split={split!r}: the data have no such split; {REMEDY}'
            )

    def run(self, view: FeatureView) -> Result:
        c = self.config
        seen = self._sounding(view, c.split)
        betas = dict.fromkeys(seen.maps, c.beta)
        if c.beta_split:
            labelled = self._sounding(view, c.beta_split)
            betas = {name: self._best_beta(labelled, name) for name in seen.maps}
        found = {}
        for name, maps in seen.maps.items():
            pairs = zip(maps, seen.true_boxes, strict=True)
            found[name] = [self._overlaps(heat, true, betas[name]) for heat, true in pairs]
        rng = np.random.default_rng(view.seed)
        margin = (1 - c.centre) / 2
        middle = np.array([[margin, margin, 1 - margin, 1 - margin]])
        found[CENTRE] = [self._box_overlaps(middle, true) for true in seen.true_boxes]
        found[RANDOM] = [self._box_overlaps(_random_box(rng), true) for true in seen.true_boxes]
        result = self._result(found, view.seed)
        result.scalars.update({f'{name}/beta': beta for name, beta in betas.items()})
        if HEAT in seen.maps:
            result.artifacts.update(self._shown(view, seen, found[HEAT], betas[HEAT]))
        return result

    def _shown(
        self, view: FeatureView, seen: Sounding, overlaps: Sequence[Overlap], beta: float
    ) -> dict[str, Any]:
        """Pictures of the report with their maps and boxes, the worst first, then the best.

        Of several processes each looks at pictures of its own.
        """
        pixels = self._pixels(view)
        known = [row for row, place in enumerate(seen.places) if place in pixels]
        known.sort(key=lambda row: overlaps[row].box)
        if len(known) > SHOWN:
            known = [*known[: SHOWN // 2], *known[-SHOWN // 2 :]]
        if not known:
            return {}
        shown = []
        for row in known:
            found = self._found(seen.maps[HEAT][row], beta)
            boxes = {'true': seen.true_boxes[row].tolist(), 'found': found.boxes.tolist()}
            shown.append({**boxes, 'iou': round(overlaps[row].box, 4)})
        return {
            'heat_pictures': shown,
            'heat_pixels': np.stack([pixels[seen.places[row]] for row in known]),  # [n S S 3]
            'heat_values': seen.maps[HEAT][known],  # [n h w]
        }

    def _pixels(self, view: FeatureView) -> dict[int, UInt8[np.ndarray, 'S S 3']]:
        """Place in the pass -> what the model sees of its picture, of the first pictures."""
        c = self.config
        limit = min(c.limit, LOOKED_AT)
        pixels = {}
        for batch in view.data.one_pass(
            c.split, view.batch_size, process=view.process, by='segments', limit=limit
        ):
            stream = batch[c.stream]
            for row in np.flatnonzero(batch['valid'] & stream['valid']):
                # Of several frames, the first.
                pixels[int(batch['position'][row])] = _seen(
                    stream['data'][row, 0], stream['box'][row]
                )
        return pixels

    def _best_beta(self, seen: Sounding, name: str) -> float:
        """The threshold whose boxes have the highest mean IoU; of equal ones the first."""
        means = []
        for beta in self.config.betas:
            pairs = zip(seen.maps[name], seen.true_boxes, strict=True)
            means.append(np.mean([self._overlaps(heat, true, beta).box for heat, true in pairs]))
        return float(self.config.betas[int(np.argmax(means))])

    def _result(self, found: Mapping[str, Sequence[Overlap]], seed: int) -> Result:
        scalars: dict[str, float] = {}
        artifacts: dict[str, Any] = {}
        for name, overlaps in found.items():
            box_ious, pixel_ious, is_hit = np.array(overlaps, float).T  # [N] each
            is_found = (box_ious >= self.config.overlap).astype(float)
            scalars[f'{name}/IoU'] = float(is_found.mean())
            scalars[f'{name}/cIoU'] = float((pixel_ious >= self.config.overlap).mean())
            scalars[f'{name}/AUC'] = measures.success_area(pixel_ious)
            scalars[f'{name}/pointing'] = float(is_hit.mean())
            artifacts[f'{name}/pointing/interval'] = statistics.bootstrap(is_hit, seed=seed)
            artifacts[f'{name}/IoU/interval'] = statistics.bootstrap(is_found, seed=seed)
        artifacts['pictures'] = len(next(iter(found.values())))
        # Boxes of no model stand beside; there is no other chance level.
        artifacts['shown'] = list(scalars)
        return Result(scalars, artifacts)

    def _sounding(self, view: FeatureView, split: str) -> Sounding:
        """The pictures of a split in which something is heard."""
        c = self.config
        features = view.features(split, limit=c.limit, maps=(c.stream,))
        maps = features.get('heat_maps', {})
        if not maps:
            raise ConfigError(
                f'{self.where}: the objective makes no heat maps of {c.stream!r}; leave this '
                "evaluator out, or train config.objective.name='localisation'"
            )
        inputs = view.encoder.config.model.inputs
        sound_seconds = inputs.audio.samples / inputs.audio.rate
        texts = view.data.texts(split, by='segments')
        rows, places, true_boxes = [], [], []
        for row, place in enumerate(features['index']):
            # JSON, as records hold it.
            truth = json.loads(texts[place].get('ground_truth') or '{}')
            if not features['valid'][c.stream][row] or 'sounds' not in truth:
                continue
            start = float(features['start'][c.stream][row])
            heard = objects_at(truth, start, sound_seconds).heard()
            if len(heard.boxes):
                rows.append(row)
                places.append(int(place))
                true_boxes.append(inside(heard.boxes, features['crop'][c.stream][row]))
        if not rows:
            raise ConfigError(
                f'{self.where}: no picture of split {split!r} has boxes of an object that is '
                'heard (ground_truth with boxes, fps and sounds)'
            )
        # Of several frames, the first.
        return Sounding(places, {name: heat[rows, 0] for name, heat in maps.items()}, true_boxes)

    def _overlaps(
        self, heat: Float[np.ndarray, 'h w'], true: Float[np.ndarray, 'N 4'], beta: float
    ) -> Overlap:
        large = self._upsampled(heat)
        by_box = measures.box_iou(self._found(heat, beta).boxes, true).max(initial=0.0)
        pixels = measures.above_threshold(large, beta)
        by_pixel = measures.consensus_iou(pixels, self._mask(true))
        return Overlap(float(by_box), by_pixel, measures.points_at(large, true))

    def _found(self, heat: Float[np.ndarray, 'h w'], beta: float) -> measures.Found:
        return measures.find_boxes(self._upsampled(heat), beta)

    def _upsampled(self, heat: Float[np.ndarray, 'h w']) -> Float[np.ndarray, 'S S']:
        return measures.upsample(heat.astype(np.float64), self.config.size, self.config.size)

    def _box_overlaps(
        self, box: Float[np.ndarray, '1 4'], true: Float[np.ndarray, 'N 4']
    ) -> Overlap:
        by_pixel = measures.consensus_iou(self._mask(box), self._mask(true))
        y, x = (box[0, :2] + box[0, 2:]) / 2
        is_hit = ((true[:, :2] <= [y, x]) & (true[:, 2:] > [y, x])).all(1).any()
        return Overlap(float(measures.box_iou(box, true).max()), by_pixel, bool(is_hit))

    def _mask(self, boxes: Float[np.ndarray, 'N 4']) -> np.ndarray:
        return measures.mask_of(boxes, self.config.size, self.config.size)


def _seen(
    picture: UInt8[np.ndarray, 'H W 3'], crop: Float[np.ndarray, ' 4']
) -> UInt8[np.ndarray, 'S S 3']:
    """What the model sees of a picture, at the size that the report shows."""
    import PIL.Image

    height, width = picture.shape[:2]
    y0, x0, y1, x1 = np.round(crop * [height, width, height, width]).astype(int)
    square = PIL.Image.fromarray(picture[y0:y1, x0:x1])
    return np.asarray(square.resize((SHOWN_SIDE, SHOWN_SIDE)))


def _random_box(rng: np.random.Generator) -> Float[np.ndarray, '1 4']:
    """Two corners anywhere in the picture."""
    return np.sort(rng.uniform(size=(2, 2)), axis=0).reshape(1, 4)
