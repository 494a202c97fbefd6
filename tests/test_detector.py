"""The detector's losses, targets and suppression against definitions in NumPy, place by place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import typecheck
from vatt_jax.config import ConfigError
from vatt_jax.detection import model, suppression, targets
from vatt_jax.losses import detection as losses
from vatt_jax.objectives.detection import Detection

GRID, LEVELS = (3, 4), (1, 0, -1)
P = 3


def iou(a, b):
    """Intersection over union of two boxes, in Python's floats."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    both = width * height
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / either


def random_boxes(rng, *shape, smallest=0.05):
    """Corners inside the unit square."""
    low = rng.uniform(0, 0.7, (*shape, 2))
    high = low + rng.uniform(smallest, 0.3, (*shape, 2))
    return np.concatenate([low, high], axis=-1)


@pytest.fixture(scope='module')
def rng():
    return np.random.default_rng(0)


# ---- losses


@pytest.mark.parametrize('gamma', [0.0, 2.0])
def test_focal_loss_is_its_formula(gamma, rng):
    logits = rng.normal(0, 3, (5, P))
    is_one = rng.uniform(size=(5, P)) < 0.3
    p = 1 / (1 + np.exp(-logits))
    expected = np.where(
        is_one,
        -0.25 * (1 - p) ** gamma * np.log(p),
        -0.75 * p**gamma * np.log(1 - p),
    )
    got = losses.sigmoid_focal_loss(jnp.float32(logits), jnp.asarray(is_one), 0.25, gamma)
    np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_focal_loss_of_sure_logits_is_finite():
    gradient = jax.grad(lambda x: losses.sigmoid_focal_loss(x, jnp.array([1, 0])).sum())
    for logits in ([80.0, -80.0], [-80.0, 80.0]):
        assert np.isfinite(gradient(jnp.array(logits))).all()


def test_generalised_iou():
    # Half of each, one beside the other with a gap of one, and the same box.
    a = jnp.array([[0, 0, 2, 1], [0, 0, 1, 1], [1, 2, 3, 4]], jnp.float32)
    b = jnp.array([[1, 0, 3, 1], [2, 0, 3, 1], [1, 2, 3, 4]], jnp.float32)
    np.testing.assert_allclose(losses.generalised_iou(a, b), [1 / 3, -1 / 3, 1], rtol=1e-6)
    gradient = jax.grad(lambda x: losses.generalised_iou(x, b[1]))(a[1])
    # Of boxes apart, the side that is nearest wants to come nearer.
    assert gradient[2] > 0


def test_iou_of_pairs(rng):
    a, b = random_boxes(rng, 4), random_boxes(rng, 5)
    got = losses.intersection_over_union(jnp.float32(a)[:, None], jnp.float32(b))
    expected = [[iou(x, y) for y in b] for x in a]
    np.testing.assert_allclose(got, expected, atol=1e-6)


# ---- targets


def test_places_of_levels():
    where = model.places(GRID, LEVELS)
    # 6 by 8, 3 by 4, and of 3 by 4 halved, rounded up: 2 by 2.
    assert np.bincount(where.level).tolist() == [48, 12, 4]
    np.testing.assert_allclose(where.centre[0], [1 / 16, 1 / 12])
    np.testing.assert_allclose(where.centre[48 + 5], [1.5 / 4, 1.5 / 3], rtol=1e-6)
    np.testing.assert_allclose(where.cell[-1], [0.5, 0.5])


def definition_of_targets(where, boxes, classes, valid, ignored, rules):
    """(class, box, centre-ness, counted) of each place of one picture, one after another."""
    found = []
    cells = [where.cell[where.level == level].max() for level in range(len(LEVELS))]
    for (x, y), cell, level in zip(where.centre, where.cell, where.level):
        best, is_unsure = None, False
        lower = rules.reach * cells[level - 1] if level else -np.inf
        upper = rules.reach * cells[level] if level < len(LEVELS) - 1 else np.inf
        for n, (x0, y0, x1, y1) in enumerate(boxes):
            left, top, right, bottom = x - x0, y - y0, x1 - x, y1 - y
            if not valid[n] or min(left, top, right, bottom) <= 0:
                continue
            if ignored[n]:
                is_unsure = True
                continue
            is_central = (
                abs(x - (x0 + x1) / 2) <= rules.radius * cell[0]
                and abs(y - (y0 + y1) / 2) <= rules.radius * cell[1]
            )
            if not is_central or not lower < max(left, top, right, bottom) <= upper:
                continue
            area = (x1 - x0) * (y1 - y0)
            if best is None or area < best[0]:
                across = min(left, right) / max(left, right)
                along = min(top, bottom) / max(top, bottom)
                best = (area, n, (across * along) ** 0.5)
        if best is None:
            found.append((-1, None, 0.0, not is_unsure))
        else:
            found.append((classes[best[1]], boxes[best[1]], best[2], True))
    return found


@pytest.fixture(scope='module')
def scene(rng):
    """(places, boxes, classes, valid, ignored) of pictures with crowds and padding."""
    where = model.places(GRID, LEVELS)
    boxes = random_boxes(rng, 3, 6).astype(np.float32)
    boxes[:, 0] = [0.05, 0.1, 0.9, 0.95]  # one that only the coarsest level finds
    boxes[2, 1] = boxes[2, 2]  # two of one place
    classes = rng.integers(0, P, (3, 6)).astype(np.int32)
    valid = np.ones((3, 6), bool)
    valid[1, 3:] = False
    ignored = np.zeros((3, 6), bool)
    ignored[:, 4] = True
    return where, boxes, classes, valid, ignored


def assign(where, boxes, classes, valid, ignored, rules):
    """The targets of arrays of NumPy."""
    on_device = [jnp.asarray(x) for x in (boxes, classes, valid, ignored)]
    return targets.assign(where, *on_device, rules)


@pytest.mark.parametrize('rules', [targets.Rules(), targets.Rules(radius=0.8, reach=1.5)])
def test_targets_are_the_definition(scene, rules):
    where, boxes, classes, valid, ignored = scene
    got = jax.device_get(assign(*scene, rules))
    num_positive = 0
    for row in range(len(boxes)):
        expected = definition_of_targets(
            where, boxes[row], classes[row], valid[row], ignored[row], rules
        )
        for place, (kind, box, centreness, counted) in enumerate(expected):
            assert got.classes[row, place] == kind
            assert got.counted[row, place] == counted
            if kind >= 0:
                num_positive += 1
                np.testing.assert_array_equal(got.boxes[row, place], box)
            np.testing.assert_allclose(got.centreness[row, place], centreness, atol=1e-5)
    assert num_positive > 10
    assert not got.counted.all()


def test_loss_is_the_sum_over_places(scene, rng):
    assigned = assign(*scene, targets.Rules())
    shape = assigned.classes.shape
    logits = rng.normal(size=(*shape, P))
    predicted = random_boxes(rng, *shape)
    centre = rng.normal(size=shape)
    predictions = model.Predictions(
        jnp.float32(logits), jnp.float32(predicted), jnp.float32(centre)
    )
    settings = {'alpha': 0.25, 'gamma': 2.0, 'box_weight': 0.5, 'centre_weight': 2.0}
    value, metrics = targets.detection_loss(predictions, assigned, settings)
    assigned = jax.device_get(assigned)

    class_sum = box_sum = centre_sum = weights = 0.0
    for index in np.ndindex(shape):
        kind, weight = assigned.classes[index], float(assigned.centreness[index])
        if assigned.counted[index]:
            for c in range(P):
                p = 1 / (1 + np.exp(-logits[index][c]))
                if c == kind:
                    class_sum -= 0.25 * (1 - p) ** 2 * np.log(p)
                else:
                    class_sum -= 0.75 * p**2 * np.log(1 - p)
        if kind >= 0:
            a, b = predicted[index], assigned.boxes[index].astype(float)
            hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
            union /= 1 + iou(a, b)
            box_sum += weight * (1 - iou(a, b) + (hull - union) / hull)
            weights += weight
            q = 1 / (1 + np.exp(-centre[index]))
            centre_sum -= weight * np.log(q) + (1 - weight) * np.log(1 - q)
    count = (assigned.classes >= 0).sum()
    expected = class_sum / count + 0.5 * box_sum / weights + 2 * centre_sum / count
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics['positive_places'], count / shape[0])


def test_pictures_without_boxes_teach_background_alone():
    where = model.places(GRID, LEVELS)
    empty = np.zeros((1, 2, 4), np.float32)
    none = np.zeros((1, 2), bool)
    assigned = assign(where, empty, np.zeros((1, 2), np.int32), none, none, targets.Rules())
    assert (np.asarray(assigned.classes) == -1).all() and np.asarray(assigned.counted).all()

    def loss(x):
        predictions = model.Predictions(x, jnp.zeros((1, 64, 4)), jnp.zeros((1, 64)))
        settings = {'alpha': 0.25, 'gamma': 2.0, 'box_weight': 1.0, 'centre_weight': 1.0}
        return targets.detection_loss(predictions, assigned, settings)[0]

    gradient = jax.grad(loss)(jnp.zeros((1, 64, P)))
    assert np.isfinite(gradient).all() and (np.asarray(gradient) > 0).all()


# ---- suppression


def definition_of_suppression(boxes, scores, classes, overlap):
    """The classical loop over a list that shrinks."""
    kept = np.zeros(len(boxes), bool)
    left = [n for n in range(len(boxes)) if scores[n] > 0]
    while left:
        first, *left = left
        kept[first] = True
        left = [
            n
            for n in left
            if classes[n] != classes[first] or iou(boxes[n], boxes[first]) <= overlap
        ]
    return kept


@pytest.fixture(scope='module')
def suppress():
    return jax.jit(suppression.suppress, static_argnums=3)


def test_suppression_is_the_definition(suppress, rng):
    for _ in range(10):
        centre = rng.uniform(0.3, 0.6, (30, 2))
        size = rng.uniform(0.1, 0.3, (30, 2))
        boxes = np.concatenate([centre - size, centre + size], axis=-1).astype(np.float32)
        boxes[7] = boxes[3]
        scores = np.sort(rng.integers(0, 12, 30) / 12)[::-1].astype(np.float32)  # ties and zeros
        classes = rng.integers(0, 2, 30)
        got = suppress(boxes, scores, classes, 0.5)
        expected = definition_of_suppression(boxes, scores, classes, 0.5)
        np.testing.assert_array_equal(got, expected)
        assert 1 < expected.sum() < 30


def test_what_was_dropped_drops_nothing(suppress):
    # A row of boxes, each of which meets the next: the second goes, so that the third stays.
    boxes = np.array([[0, 0, 3, 1], [1, 0, 4, 1], [2, 0, 5, 1]], np.float32)
    scores = np.array([0.9, 0.8, 0.7], np.float32)
    got = suppress(boxes, scores, np.zeros(3, int), 0.4)
    assert np.asarray(got).tolist() == [True, False, True]


def test_decoding_has_fixed_sizes():
    """Two objects, the second with two sure places; what is left over is padding."""
    logits = np.full((1, 5, P), -20, np.float32)
    logits[0, 0, 1] = 4
    logits[0, 2, 0], logits[0, 3, 0] = 3, 2
    boxes = np.zeros((1, 5, 4), np.float32)
    boxes[0] = [-0.1, 0, 0.5, 0.5]
    boxes[0, 2:4] = [[0.5, 0.5, 0.9, 0.9], [0.5, 0.5, 0.9, 0.88]]
    centre = np.full((1, 5), 20, np.float32)
    predictions = model.Predictions(*map(jnp.asarray, (logits, boxes, centre)))
    for detections in (2, 40):
        found = suppression.decode(predictions, 10, detections, 0.6, 0.05)
        assert found.boxes.shape == (1, detections, 4)
        assert found.classes[0, :2].tolist() == [1, 0]
        np.testing.assert_allclose(found.scores[0, 0], (1 / (1 + np.exp(-4))) ** 0.5, rtol=1e-5)
        # Cut at the picture's edge.
        np.testing.assert_allclose(found.boxes[0, :2], [[0, 0, 0.5, 0.5], [0.5, 0.5, 0.9, 0.9]])
        assert (np.asarray(found.classes[0, 2:]) == -1).all()
        assert (np.asarray(found.scores[0, 2:]) == 0).all()


# ---- the module and the objective


def test_heads_begin_calm_and_boxes_lie_about_their_places():
    detector = model.Detector(P, width=8, convs=1, levels=LEVELS)
    features = jax.random.normal(jax.random.key(0), (2, *GRID, 5))
    params = detector.init(jax.random.key(1), features)
    out = jax.jit(detector.apply)(params, features)
    assert out.class_logits.shape == (2, 64, P) and out.centre_logits.shape == (2, 64)
    np.testing.assert_allclose(jax.nn.sigmoid(out.class_logits), 0.01, atol=0.005)
    where = model.places(GRID, LEVELS)
    middle = (out.boxes[..., :2] + out.boxes[..., 2:]) / 2
    np.testing.assert_allclose(middle, np.broadcast_to(where.centre, middle.shape), atol=0.1)


@pytest.mark.parametrize(
    'fields, words',
    [
        ({'width': 20}, 'config.objective.width: expected a multiple of 8, got 20'),
        ({'levels': (0, 1)}, 'config.objective.levels: expected consecutive numbers'),
        ({'levels': ()}, 'config.objective.levels'),
        ({'overlap': 2.0}, 'config.objective.overlap=2: expected a number from 0 to 1'),
    ],
)
def test_mistakes_in_the_objective(fields, words):
    with typecheck.off(), pytest.raises(ConfigError) as caught:
        Detection({'name': 'detection', **fields})
    assert words in str(caught.value)
