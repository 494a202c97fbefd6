"""Clustering metrics against definitions written out, and the k-means of the cross-modal objectives."""

import itertools
import math

import numpy as np
import pytest

from vatt_jax.clustering import metrics


def mutual_information(table):
    n = table.sum()
    return sum(
        c / n * math.log(c * n / (table[i].sum() * table[:, j].sum()))
        for (i, j), c in np.ndenumerate(table)
        if c
    )


def entropy(counts):
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


@pytest.fixture(scope='module')
def labels():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 4, 60)
    clusters = np.where(rng.uniform(size=60) < 0.6, (classes + 1) % 4, rng.integers(0, 4, 60))
    return clusters, classes


def test_information(labels):
    clusters, classes = labels
    table = metrics.contingency(clusters, classes)
    got = metrics.agreement(clusters, classes)
    mi, h = mutual_information(table), entropy(table.sum(1)) + entropy(table.sum(0))
    np.testing.assert_allclose(got['NMI'], 2 * mi / h, rtol=1e-10)
    # the expectation of MI under random relabelling, estimated by relabelling
    rng = np.random.default_rng(1)
    chance = np.mean(
        [
            mutual_information(metrics.contingency(rng.permutation(clusters), classes))
            for _ in range(800)
        ]
    )
    np.testing.assert_allclose(got['AMI'], (mi - chance) / (h / 2 - chance), atol=0.01)
    pairs = list(itertools.combinations(range(60), 2))
    same = np.array([[clusters[i] == clusters[j], classes[i] == classes[j]] for i, j in pairs])
    both, a, b = (same.all(1)).sum(), same[:, 0].sum(), same[:, 1].sum()
    expected = a * b / len(pairs)
    np.testing.assert_allclose(got['ARI'], (both - expected) / ((a + b) / 2 - expected), rtol=1e-10)
    assert metrics.agreement(clusters, classes) == pytest.approx(
        metrics.agreement(classes, clusters)
    )


def test_hungarian_is_the_best_of_all_matchings(labels):
    clusters, classes = labels
    best = max(np.mean(np.array(p)[clusters] == classes) for p in itertools.permutations(range(4)))
    got, names = metrics.hungarian(clusters, classes)
    assert (
        got == pytest.approx(best)
        and got == pytest.approx(np.mean(names[clusters] == classes))
        and got > 0.5
    )
    # classes with gaps in their numbers, and more clusters than classes
    assert metrics.hungarian(clusters, classes * 7 + 3)[0] == pytest.approx(best)
    split, names = metrics.hungarian(np.array([0, 0, 1, 2, 2, 2]), np.array([5, 5, 5, 9, 9, 9]))
    assert split == pytest.approx(5 / 6) and names.tolist() == [5, -1, 9]


def test_purity_and_entropy_by_hand():
    clusters, classes = np.array([0, 0, 0, 0, 3, 3, 5]), np.array([1, 1, 1, 0, 0, 1, 2])
    got = metrics.purity(clusters, classes)
    h = [-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), math.log(2), 0]
    assert got['mean_entropy'] == pytest.approx(np.mean(h)) and got[
        'mean_max_purity'
    ] == pytest.approx((0.75 + 0.5 + 1) / 3)
    assert got['clusters_used'] == 3


def test_matching_protocols():
    clusters = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    classes = np.array([2, 0, 0, 0, 1, 1, 0, 0])
    confidence = np.array([9.0, 5, 4, 3, 8, 1, 7, 2])
    assert metrics.few_shot(clusters, classes, confidence, 1)[1].tolist() == [2, 1]
    accuracy, names = metrics.few_shot(clusters, classes, confidence, 10)
    assert names.tolist() == [0, 1] and accuracy == pytest.approx(
        5 / 8
    )  # tie in cluster 1: the surest sample's class
    accuracy, names = metrics.majority(clusters, classes)
    assert names.tolist() == [0, 0] and accuracy == pytest.approx(5 / 8)
    assert metrics.evaluate(clusters, clusters, confidence) == pytest.approx(
        {
            'NMI': 1,
            'AMI': 1,
            'ARI': 1,
            'mean_entropy': 0,
            'mean_max_purity': 1,
            'clusters_used': 2,
            'accuracy': 1,
            'majority': 1,
            'shots_1': 1,
            'shots_10': 1,
        }
    )


def test_unknown_labels_are_refused():
    with pytest.raises(ValueError, match='negative labels'):
        metrics.evaluate(np.array([0, 1]), np.array([0, -1]))
