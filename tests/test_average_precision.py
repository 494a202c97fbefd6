"""Average precision by pycocotools against its definition in NumPy, detection by detection."""

import numpy as np
import pytest

from vatt_jax.detection import coco
from vatt_jax.detection.average_precision import COCO_THRESHOLDS, LOOSE, average_precision

pytest.importorskip('pycocotools', reason='the extra detection is not installed')


def share(detection, box, is_crowd):
    """IoU of two boxes x, y, w, h; with a crowd the share of the detection that lies in it."""
    x, y, w, h = detection
    X, Y, W, H = box
    both = max(min(x + w, X + W) - max(x, X), 0) * max(min(y + h, Y + H) - max(y, Y), 0)
    return both / (w * h) if is_crowd else both / (w * h + W * H - both)


def outcomes_of_picture(boxes, detections, threshold):
    """[(score, is right, counts)] of the detections of one picture and class, surest first."""
    taken, found = set(), []
    # Boxes that count come first, so that a crowd takes only what none of them can.
    order = sorted(range(len(boxes)), key=lambda n: boxes[n].get('iscrowd', 0))
    for detection in sorted(detections, key=lambda d: -d['score']):
        best, best_share = None, threshold
        for n in order:
            is_crowd = bool(boxes[n].get('iscrowd', 0))
            if n in taken and not is_crowd:
                continue
            if best is not None and not boxes[best].get('iscrowd', 0) and is_crowd:
                break
            overlap = share(detection['bbox'], boxes[n]['bbox'], is_crowd)
            if overlap >= best_share:
                best, best_share = n, overlap
        counts = best is None or not boxes[best].get('iscrowd', 0)
        taken.add(best)
        found.append((detection['score'], best is not None, counts))
    return found


def definition(truth, results, category, threshold):
    """AP of one class: mean, over 101 recalls, of the best precision at that recall or above."""
    outcomes, num_boxes = [], 0
    for image in truth['images']:
        boxes = [
            b
            for b in truth['annotations']
            if b['image_id'] == image['id'] and b['category_id'] == category
        ]
        detections = [
            d for d in results if d['image_id'] == image['id'] and d['category_id'] == category
        ]
        num_boxes += sum(not b.get('iscrowd', 0) for b in boxes)
        outcomes += outcomes_of_picture(boxes, detections, threshold)
    if not num_boxes:
        return np.nan
    # Equally sure ones in the order of the pictures.
    outcomes = [o for o in sorted(outcomes, key=lambda o: -o[0]) if o[2]]
    precisions, recalls, right = [], [], 0
    for number, (_, is_right, _) in enumerate(outcomes, 1):
        right += is_right
        precisions.append(right / number)
        recalls.append(right / num_boxes)
    total = 0.0
    for recall in np.linspace(0, 1, 101):
        reached = [p for p, r in zip(precisions, recalls) if r >= recall]
        total += max(reached, default=0.0)
    return total / 101


def check(truth, results):
    got = average_precision(truth, results)
    for number, category in enumerate(sorted(c['id'] for c in truth['categories'])):
        by_threshold = [definition(truth, results, category, t) for t in (LOOSE, *COCO_THRESHOLDS)]
        np.testing.assert_allclose(got.ap30[number], by_threshold[0], atol=1e-9)
        np.testing.assert_allclose(got.ap50[number], by_threshold[1], atol=1e-9)
        np.testing.assert_allclose(got.ap50_95[number], np.mean(by_threshold[1:]), atol=1e-9)
    return got


def document(boxes, categories=(3, 5, 9), num_images=3):
    """boxes: (picture, category, [x, y, w, h], is crowd)."""
    annotations = []
    for number, (image, category, box, is_crowd) in enumerate(boxes):
        # Ids from 0 on, which pycocotools alone would take for no match.
        annotations.append(coco.make_annotation(number, image, category, box, is_crowd))
    return {
        'images': [coco.make_image(n, f'{n}.png', 100, 100) for n in range(num_images)],
        'annotations': annotations,
        'categories': [{'id': i, 'name': str(i)} for i in categories],
    }


def detection(image, category, box, score):
    return {'image_id': image, 'category_id': category, 'bbox': box, 'score': score}


def test_random_boxes():
    """Many pictures and classes, equal scores, crowds, a class without boxes."""
    rng = np.random.default_rng(1)
    boxes, results = [], []
    for image in range(12):
        for _ in range(rng.integers(0, 5)):
            box = [*rng.uniform(0, 60, 2), *rng.uniform(8, 40, 2)]
            category = int(rng.choice([3, 5]))
            boxes.append((image, category, box, rng.uniform() < 0.15))
            for _ in range(rng.integers(0, 4)):
                near = (np.array(box) + rng.normal(0, 2.5, 4)).clip(1).tolist()
                kind = category if rng.uniform() < 0.8 else 9
                results.append(detection(image, kind, near, float(rng.integers(1, 6) / 8)))
    got = check(document(boxes, num_images=12), results)
    assert 0.1 < got.ap50[0] < 0.9 and np.isnan(got.ap50[2])
    means = got.means()
    assert means['ap50'] == pytest.approx(got.ap50[:2].mean())


WHOLE = [10.0, 10.0, 20.0, 20.0]


@pytest.mark.parametrize(
    'boxes, results, expected',
    [
        # Found once; the second detection of it is wrong, but comes last.
        ([(0, 3, WHOLE, False)], [(0, 3, WHOLE, 0.9), (0, 3, WHOLE, 0.8)], 1.0),
        # A surer one is wrong.
        ([(0, 3, WHOLE, False)], [(0, 3, [60, 60, 9, 9], 0.9), (0, 3, WHOLE, 0.8)], 0.5),
        # Equally sure, in another picture that comes first: half right when the box is found.
        ([(1, 3, WHOLE, False)], [(1, 3, WHOLE, 0.5), (0, 3, WHOLE, 0.5)], 0.5),
        # Of a group any number may be found, and none must be.
        (
            [(0, 3, WHOLE, False), (1, 3, [0, 0, 80, 80], True)],
            [(1, 3, WHOLE, 0.9), (1, 3, [40, 40, 20, 20], 0.8), (0, 3, WHOLE, 0.7)],
            1.0,
        ),
        # One of two boxes: recall ends at a half, 51 of 101 points.
        ([(0, 3, WHOLE, False), (1, 3, WHOLE, False)], [(0, 3, WHOLE, 0.9)], 51 / 101),
        # Right place, wrong class.
        ([(0, 3, WHOLE, False)], [(0, 5, WHOLE, 0.9)], 0.0),
        ([(0, 3, WHOLE, False)], [], 0.0),
    ],
)
def test_constructed_cases(boxes, results, expected):
    got = check(document(boxes), [detection(*result) for result in results])
    assert got.ap50[0] == pytest.approx(expected)


def test_a_loose_box_counts_at_the_loose_threshold_alone():
    # Boxes of the same size, moved by half their width: IoU 1/3.
    moved = [20.0, 10.0, 20.0, 20.0]
    got = check(document([(0, 3, WHOLE, False)]), [detection(0, 3, moved, 0.9)])
    assert (got.ap30[0], got.ap50[0]) == (pytest.approx(1), 0)


def test_without_boxes_there_is_no_ap():
    got = average_precision(document([]), [detection(0, 3, WHOLE, 0.9)])
    assert np.isnan(got.ap50).all() and np.isnan(got.means()['ap50_95'])
    # Crowds alone are none either.
    got = average_precision(document([(0, 3, WHOLE, True)]), [])
    assert np.isnan(got.ap30).all()


def test_detections_come_back_in_pixels():
    truth = document([])
    truth['images'][1].update(width=80, height=40)
    corners = np.zeros((3, 2, 4))
    corners[1, 0] = [0.25, 0.25, 0.5, 0.75]
    scores = np.zeros((3, 2))
    scores[1, 0] = 0.5
    (found,) = coco.results_of(truth, corners, scores, np.zeros((3, 2), int))
    # Fractions of the square of 80 pixels; the picture ends at 40.
    assert found == detection(1, 3, [20.0, 20.0, 20.0, 20.0], 0.5)
