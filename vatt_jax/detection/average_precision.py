"""Average precision of detections by pycocotools (extra `detection`): AP30, AP50 and AP50:95."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from vatt_jax import extras
from vatt_jax.detection import coco

# The thresholds of COCO's own AP, and the looser one that noisy boxes are judged by.
LOOSE = 0.3
COCO_THRESHOLDS = np.linspace(0.5, 0.95, 10)
# Detections of a picture and class that count, the surest ones (COCO).
MAX_DETECTIONS = 100


@dataclasses.dataclass(frozen=True)
class AveragePrecision:
    """AP by class, in the order of `coco.class_names`; NaN of a class without boxes.

    Attributes:
        ap30: at IoU 0.3.
        ap50: at IoU 0.5.
        ap50_95: mean over IoU 0.5, 0.55, … 0.95.
    """

    ap30: Float64[np.ndarray, ' P']
    ap50: Float64[np.ndarray, ' P']
    ap50_95: Float64[np.ndarray, ' P']

    def means(self) -> dict[str, float]:
        """Name of each -> its mean over classes that have boxes; NaN if none has."""
        found = {}
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            known = values[~np.isnan(values)]
            found[field.name] = float(known.mean()) if len(known) else float('nan')
        return found


def average_precision(
    truth: coco.Document, results: Sequence[Mapping[str, Any]]
) -> AveragePrecision:
    """AP of detections, interpolated at 101 points of recall as COCO has it.

    A detection of a class is right when it overlaps a box of that class which no surer detection
    has taken. One that overlaps a crowd, and no free box, counts for nothing.

    Args:
        truth: pictures and boxes; detections in other pictures are not looked at.
        results: COCO's results: image_id, category_id, bbox, score.

    Raises:
        MissingExtra: pycocotools is not installed.
    """
    with extras.needed('detection', 'average precision'):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

    num_classes = len(truth['categories'])
    known = {image['id'] for image in truth['images']}
    results = [dict(result) for result in results if result['image_id'] in known]
    if not results or not truth['annotations']:
        return _without_detections(truth, num_classes)
    # It prints its progress and nothing that is not returned.
    with contextlib.redirect_stdout(io.StringIO()):
        true_boxes = COCO()
        true_boxes.dataset = _completed(truth)
        true_boxes.createIndex()
        evaluation = COCOeval(true_boxes, true_boxes.loadRes(results), 'bbox')
        evaluation.params.iouThrs = np.array([LOOSE, *COCO_THRESHOLDS])
        evaluation.params.maxDets = [MAX_DETECTIONS]
        # Boxes of all sizes together.
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
        evaluation.evaluate()
        evaluation.accumulate()
    # [thresholds, points of recall, classes, areas, maxDets]; -1 of classes without boxes
    precision = evaluation.eval['precision'][:, :, :, 0, 0].astype(np.float64)
    by_threshold = np.where(precision < 0, np.nan, precision).mean(axis=1)  # [thresholds P]
    return AveragePrecision(by_threshold[0], by_threshold[1], by_threshold[1:].mean(axis=0))


def _completed(truth: coco.Document) -> dict[str, Any]:
    """A copy with the fields that pycocotools reads, which others leave out."""
    annotations = []
    for number, annotation in enumerate(truth['annotations'], 1):
        width, height = annotation['bbox'][2:]
        # An id of 0 would be taken for no match; `area` decides which sizes count.
        completed = {'iscrowd': 0, 'area': width * height, **annotation, 'id': number}
        annotations.append(completed)
    return {**truth, 'annotations': annotations, 'info': {}}


def _without_detections(truth: coco.Document, num_classes: int) -> AveragePrecision:
    """0 of classes that have boxes, NaN of the others."""
    numbers = coco.class_numbers(truth)
    values = np.full(num_classes, np.nan)
    for annotation in truth['annotations']:
        if not annotation.get('iscrowd', 0):
            values[numbers[annotation['category_id']]] = 0.0
    return AveragePrecision(values, values.copy(), values.copy())
