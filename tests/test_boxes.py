"""Boxes of heat maps, and measures of them, against definitions one pixel after another."""

import numpy as np
import pytest

from vatt_jax.detection import boxes


def smooth_map(seed, shape=(13, 17)):
    heat = np.random.default_rng(seed).normal(size=shape)
    return boxes.upsample(boxes.upsample(heat, 5, 6), *shape)


def flood(mask):
    """Connected components as sets of (y, x), by walking."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask))}
    found = []
    while left:
        todo, component = [left.pop()], set()
        while todo:
            y, x = todo.pop()
            component.add((y, x))
            for neighbour in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if neighbour in left:
                    left.remove(neighbour)
                    todo.append(neighbour)
        found.append(component)
    return found


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('beta', [0.0, 0.3, 0.7])
def test_boxes_are_those_of_the_largest_components(seed, beta):
    heat = smooth_map(seed)
    threshold = beta * heat.max() + (1 - beta) * heat.mean()
    components = flood(heat > threshold)

    def score(component):
        return max(heat[place] for place in component)

    components.sort(key=lambda component: (-len(component), -score(component)))
    found = boxes.find_boxes(heat, beta, most=2)
    assert len(found.boxes) == min(2, len(components))
    for box, got_score, component in zip(found.boxes, found.scores, components):
        ys, xs = [y for y, _ in component], [x for _, x in component]
        expected = [min(ys) / 13, min(xs) / 17, (max(ys) + 1) / 13, (max(xs) + 1) / 17]
        np.testing.assert_allclose(box, expected)
        assert got_score == score(component)


def test_a_flat_map_has_no_box():
    found = boxes.find_boxes(np.full((4, 4), 0.25))
    assert found.boxes.shape == (0, 4) and found.scores.shape == (0,)


def test_upsampling_is_linear_between_centres():
    got = boxes.upsample(np.array([[0.0, 4.0]]), 2, 4)
    np.testing.assert_allclose(got, [[0, 1, 3, 4]] * 2)
    heat = np.random.default_rng(0).normal(size=(2, 3, 5))
    np.testing.assert_allclose(boxes.upsample(heat, 3, 5), heat)


def test_measures_are_their_definitions():
    rng = np.random.default_rng(0)
    edges = rng.integers(0, 20, (2, 6, 2, 2))
    corners = np.concatenate([edges.min(2), edges.max(2) + 1], -1)  # [2 6 4]
    for i in range(6):
        for j in range(6):
            one, other = np.zeros((21, 21), bool), np.zeros((21, 21), bool)
            for mask, (y0, x0, y1, x1) in ((one, corners[0, i]), (other, corners[1, j])):
                mask[y0:y1, x0:x1] = True
            expected = (one & other).sum() / (one | other).sum()
            shares = corners / 21
            got = boxes.box_iou(shares[0, i : i + 1], shares[1, j : j + 1])
            np.testing.assert_allclose(got, [[expected]], atol=1e-9)
            masks = [boxes.mask_of(shares[k, n : n + 1], 21, 21) for k, n in ((0, i), (1, j))]
            np.testing.assert_allclose(boxes.consensus_iou(*masks), expected)
    assert boxes.consensus_iou(np.zeros((2, 2), bool), np.zeros((2, 2), bool)) == 0
    # All at one value v: the curve is 1 up to v, and falls to 0 within a step of 0.05.
    np.testing.assert_allclose(boxes.success_area(np.full(3, 0.5)), 0.525)
    np.testing.assert_allclose(boxes.success_area(np.array([0.0, 1.0])), (1 + 0.025) / 2)


@pytest.mark.parametrize('box, is_hit', [([0, 0.5, 0.25, 0.75], True), ([0.25, 0.5, 1, 1], False)])
def test_a_map_points_where_it_is_highest(box, is_hit):
    heat = np.zeros((4, 4))
    heat[0, 2] = 1
    assert boxes.points_at(heat, np.array([box], float)) == is_hit
