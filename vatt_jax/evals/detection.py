"""How well a detector finds and names the boxes of pictures: AP30, AP50, AP50:95."""

from __future__ import annotations

from typing import Any

import numpy as np

from vatt_jax.config import ConfigError, choose
from vatt_jax.detection import coco, finding, naming
from vatt_jax.detection.average_precision import AveragePrecision, average_precision
from vatt_jax.evals.base import REMEDY, Evaluator, FeatureView, Result

# Pictures whose boxes the report shows: the best and the worst.
SHOWN = 8


class Detection(Evaluator):
    """Average precision by COCO's rules (pycocotools, extra `detection`).

    With `naming` the detector's classes are clusters, which first get the names of true classes
    (detection.naming). `AP50/any_class` and `found/…` are of boxes alone, whatever their classes
    (detection.finding). Artifacts: AP of every class, and detections of some pictures.
    """

    DEFAULTS = {
        'type': 'detection',
        'split': 'test',
        'limit': 100_000,
        # '': the classes of the detector are those of the true boxes. Else one of naming.METHODS.
        'naming': '',
        # few_shot: labelled examples of each cluster, its surest detections.
        'shots': 1,
        # manual: ((cluster, class), ...).
        'names': (),
        # The split by which names are found; '': the same.
        'naming_split': '',
        'baseline': False,
    }

    def __init__(self, config: Any, where: str = 'config.evals') -> None:
        super().__init__(config, where)
        if self.config.naming:
            choose(self.config.naming, naming.METHODS, f'{where}.naming')

    def check(self, data: Any, outputs: Any) -> None:
        super().check(data, outputs)
        if not hasattr(data, 'boxes'):
            raise ConfigError(f'{self.where}: the data have no boxes; {REMEDY}')
        c = self.config
        for split in {c.split, c.naming_split or c.split}:
            names = coco.class_names(data.boxes(split))
            if not c.naming and names != data.info['labels']['object']:
                raise ConfigError(
                    f'{self.where}.naming: the true boxes of split {split!r} have other classes '
                    f'than those of training; expected one of {", ".join(naming.METHODS)}'
                )

    def run(self, view: FeatureView) -> Result:
        c = self.config
        truth = self._truth(view, c.split)
        clusters = view.data.info['labels']['object']
        if not c.naming:
            results = self._results(view, c.split, None)
            return self._result(view, truth, results, results)
        numbers = dict(zip(range(len(clusters)), range(len(clusters)), strict=True))
        identifiers = list(numbers)
        labelled = c.naming_split or c.split
        matches = naming.match(
            self._truth(view, labelled), self._results(view, labelled, identifiers), numbers
        )
        class_names = coco.class_names(truth)
        names = naming.find_names(c.naming, matches, clusters, class_names, c.shots, dict(c.names))
        class_identifiers = sorted(category['id'] for category in truth['categories'])
        found = self._results(view, c.split, identifiers)
        results = naming.rename(found, numbers, names, class_identifiers)
        # Clusters without a name find things too.
        result = self._result(view, truth, results, found)
        result.artifacts['names'] = {
            cluster: class_names[name] if name >= 0 else ''
            for cluster, name in zip(clusters, names.tolist(), strict=True)
        }
        return result

    def _result(
        self,
        view: FeatureView,
        truth: coco.Document,
        results: list[dict[str, Any]],
        found: list[dict[str, Any]],
    ) -> Result:
        """Numbers, and the pictures of the report with their pixels.

        Args:
            view: of the evaluation.
            truth: true boxes.
            results: detections of true classes.
            found: the same of any class or cluster.
        """
        result = _result(truth, results, average_precision(truth, results))
        boxes = average_precision(*finding.without_classes(truth, found))
        result.scalars['AP50/any_class'] = boxes.means()['ap50']
        for kind, share in finding.found_shares(truth, found).items():
            result.scalars[f'found/{kind}'] = share
        # AP of guesses is next to nothing, so the table has no chance level to show.
        result.artifacts['shown'] = list(result.scalars)
        pictures = result.artifacts['pictures']
        if pictures:
            pixels = [view.data.picture(self.config.split, shown['place']) for shown in pictures]
            result.artifacts['pixels'] = np.stack(pixels)  # [n S S 3]
        return result

    def _truth(self, view: FeatureView, split: str) -> coco.Document:
        """The true boxes of the pictures that are looked at."""
        document = view.data.boxes(split)
        images = document['images'][: self.config.limit]
        shown = {image['id'] for image in images}
        annotations = [box for box in document['annotations'] if box['image_id'] in shown]
        return {**document, 'images': images, 'annotations': annotations}

    def _results(
        self, view: FeatureView, split: str, identifiers: list[int] | None
    ) -> list[dict[str, Any]]:
        """The detections of a split, in COCO's form."""
        features = view.features(split, limit=self.config.limit)
        predictions = features['predictions']
        if 'boxes' not in predictions:
            raise ConfigError(f'{self.where}: the objective makes no detections; {REMEDY}')
        # Pictures that could not be read have none.
        is_read = features['valid']['video'][:, None]
        document = view.data.boxes(split)
        return coco.results_of(
            document,
            predictions['boxes'],
            np.where(is_read, predictions['scores'], 0),
            predictions['classes'],
            identifiers,
        )


def _result(
    truth: coco.Document, results: list[dict[str, Any]], precision: AveragePrecision
) -> Result:
    """Scalars, AP by class and what the report shows."""
    by_class = {}
    for number, name in enumerate(coco.class_names(truth)):
        by_class[name] = {
            'AP50': _or_none(precision.ap50[number]),
            'AP30': _or_none(precision.ap30[number]),
            'AP50:95': _or_none(precision.ap50_95[number]),
        }
    means = precision.means()
    scalars = {'AP50': means['ap50'], 'AP30': means['ap30'], 'AP50:95': means['ap50_95']}
    artifacts = {
        'by_class': by_class,
        'pictures': shown_pictures(truth, results),
    }
    return Result(scalars, artifacts)


def _or_none(value: float) -> float | None:
    # JSON has no NaN.
    return None if np.isnan(value) else round(float(value), 4)


def shown_pictures(
    truth: coco.Document, results: list[dict[str, Any]], count: int = SHOWN
) -> list[dict[str, Any]]:
    """Pictures with their true and found boxes, the worst first.

    A picture is as bad as the share of its true boxes without a detection of their class (IoU 0.5),
    and of its detections (of score 0.3 or more) without a true box.

    Args:
        truth: true boxes.
        results: detections, of the same classes.
        count: pictures, half of them the worst and half the best.
    """
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for result in results:
        by_image.setdefault(result['image_id'], []).append(result)
    numbers = coco.class_numbers(truth)
    names = coco.class_names(truth)
    pictures = []
    for place, own_boxes in enumerate(coco.by_image(truth)):
        image = truth['images'][place]
        sure = [found for found in by_image.get(image['id'], []) if found['score'] >= 0.3]
        true_boxes, labels, _ = coco.boxes_of(own_boxes, numbers)
        found_boxes, kinds, _ = coco.boxes_of(sure, numbers)
        pictures.append(
            {
                'place': place,
                'file': image['file_name'],
                'size': [image['width'], image['height']],
                'faults': _faults(true_boxes, labels, found_boxes, kinds),
                'true': [_drawn(box, names[kind]) for box, kind in zip(true_boxes, labels)],
                'found': [
                    _drawn(box, names[kind], found['score'])
                    for box, kind, found in zip(found_boxes, kinds, sure)
                ],
            }
        )
    pictures.sort(key=lambda picture: -picture['faults'])
    half = count // 2
    if len(pictures) <= count:
        return pictures
    return [*pictures[:half], *pictures[-(count - half) :]]


def _faults(
    true_boxes: np.ndarray, labels: np.ndarray, found_boxes: np.ndarray, kinds: np.ndarray
) -> float:
    """Share of boxes, true and found, without one of the other kind; 0 without any."""
    total = len(labels) + len(kinds)
    if not total:
        return 0.0
    meets = coco.overlaps(true_boxes, found_boxes) >= naming.OVERLAP
    meets &= labels[:, None] == kinds[None]
    met = meets.any(axis=1).sum() + meets.any(axis=0).sum()
    return float(1 - met / total)


def _drawn(box: np.ndarray, name: str, score: float | None = None) -> dict[str, Any]:
    """A box for the report: corners in pixels, name and score."""
    drawn: dict[str, Any] = {'box': [round(float(value), 1) for value in box], 'name': name}
    if score is not None:
        drawn['score'] = round(float(score), 3)
    return drawn
