"""Shares of objects that are found, whatever they are called."""

import numpy as np
import pytest

from vatt_jax.detection import coco
from vatt_jax.detection.average_precision import average_precision
from vatt_jax.detection.finding import found_shares, without_classes

# Places of boxes that do not touch.
A, B, C = [0, 0, 10, 10], [20, 0, 10, 10], [40, 0, 10, 10]


def truth(*pictures):
    """Pictures of (box, whether it sounds, whether it is a crowd)."""
    document = {'images': [], 'annotations': [], 'categories': coco.make_categories(['x', 'y'])}
    for number, boxes in enumerate(pictures, 1):
        document['images'].append(coco.make_image(number, f'{number}.png', 60, 60))
        for box, sounds, is_crowd in boxes:
            count = len(document['annotations']) + 1
            made = coco.make_annotation(count, number, 1, box, is_crowd, sounds=sounds)
            document['annotations'].append(made)
    return document


def detection(picture, box, score, category=1):
    return {'image_id': picture, 'category_id': category, 'bbox': box, 'score': score}


TWO = truth([(A, True, False), (B, False, False)], [(A, True, False), (C, False, True)])


def test_boxes_are_counted_by_what_is_heard():
    # The second picture: a crowd is neither found nor missed, so one box and one detection.
    results = [detection(1, A, 0.9), detection(1, B, 0.2, 2), detection(2, A, 0.3)]
    assert found_shares(TWO, results) == {'all': 1, 'sounding': 1, 'silent': 1, 'several': 1}
    results = [detection(1, A, 0.9), detection(2, C, 0.3)]
    assert found_shares(TWO, results) == {'all': 1 / 3, 'sounding': 0.5, 'silent': 0, 'several': 0}
    assert found_shares(TWO, []) == {'all': 0, 'sounding': 0, 'silent': 0, 'several': 0}


def test_as_many_detections_count_as_there_are_boxes():
    # The right one is the third of two.
    results = [detection(1, A, 0.9), detection(1, C, 0.5), detection(1, B, 0.4)]
    assert found_shares(TWO, results)['silent'] == 0
    # Two classes that claim one object are one detection.
    results = [detection(1, A, 0.9), detection(1, A, 0.8, 2), detection(1, B, 0.4)]
    assert found_shares(TWO, results)['silent'] == 1


def test_a_detection_shows_one_box():
    """Two boxes that overlap by 2/3, and a detection between them: only one of both is found."""
    boxes = truth([([0, 0, 10, 10], True, False), ([2, 0, 10, 10], False, False)])
    assert found_shares(boxes, [detection(1, [1, 0, 10, 10], 0.9)])['all'] == 0.5


def test_average_precision_without_classes():
    pytest.importorskip('pycocotools')
    results = [detection(1, A, 0.9, 2), detection(1, B, 0.8, 1), detection(1, A, 0.7, 1)]
    boxes, kept = without_classes(TWO, results)
    assert [result['bbox'] for result in kept] == [A, B]
    # Two of three boxes (the crowd does not count), without a mistake: recall 2/3 of 101 points.
    np.testing.assert_allclose(average_precision(boxes, kept).ap50, [67 / 101])
