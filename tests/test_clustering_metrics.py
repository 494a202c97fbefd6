"""Clustering metrics against definitions written out."""

import itertools
import math

import chex
import numpy as np
import pytest

from vatt_jax.clustering import metrics


def mutual_information(table):
    """Sum over cells of p_ij log(p_ij / (p_i p_j)), in nats."""
    total = table.sum()
    rows = table.sum(1)
    columns = table.sum(0)
    terms = []
    for (i, j), count in np.ndenumerate(table):
        # 0 log 0 = 0
        if count:
            terms.append(count / total * math.log(count * total / (rows[i] * columns[j])))
    return sum(terms)


def entropy(counts):
    """-Sum of p log p over what occurs, in nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


@pytest.fixture(scope='module')
def labels():
    """Clusters and classes of 60 samples that agree on three fifths, but for their numbering."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 4, 60)
    clusters = np.where(rng.uniform(size=60) < 0.6, (classes + 1) % 4, rng.integers(0, 4, 60))
    return clusters, classes


def test_nmi_is_its_definition(labels):
    # NMI = 2 MI / (H(clusters) + H(classes))
    clusters, classes = labels
    table = metrics.contingency(clusters, classes)
    chex.assert_shape(table, (4, 4))
    expected = 2 * mutual_information(table) / (entropy(table.sum(1)) + entropy(table.sum(0)))
    got = metrics.agreement(clusters, classes)['NMI']
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_ami_is_mutual_information_above_chance(labels):
    # AMI = (MI - E[MI]) / ((H(clusters) + H(classes)) / 2 - E[MI])
    clusters, classes = labels
    table = metrics.contingency(clusters, classes)
    mean_entropy = (entropy(table.sum(1)) + entropy(table.sum(0))) / 2
    # The expectation of MI under random relabelling, estimated by relabelling.
    rng = np.random.default_rng(1)
    by_chance = []
    for _ in range(800):
        relabelled = metrics.contingency(rng.permutation(clusters), classes)
        by_chance.append(mutual_information(relabelled))
    chance = np.mean(by_chance)
    expected = (mutual_information(table) - chance) / (mean_entropy - chance)
    got = metrics.agreement(clusters, classes)['AMI']
    np.testing.assert_allclose(got, expected, atol=0.01)


def test_ari_counts_pairs_that_are_together_in_both(labels):
    # ARI = (both - E) / ((a + b) / 2 - E),  E = a b / pairs
    clusters, classes = labels
    first, second = np.array(list(itertools.combinations(range(60), 2))).T
    same_cluster = clusters[first] == clusters[second]
    same_class = classes[first] == classes[second]
    both = (same_cluster & same_class).sum()
    a = same_cluster.sum()
    b = same_class.sum()
    chance = a * b / len(first)
    got = metrics.agreement(clusters, classes)['ARI']
    np.testing.assert_allclose(got, (both - chance) / ((a + b) / 2 - chance), rtol=1e-10)


def test_agreement_is_symmetric(labels):
    clusters, classes = labels
    there = metrics.agreement(clusters, classes)
    back = metrics.agreement(classes, clusters)
    assert there == pytest.approx(back)


def test_hungarian_is_the_best_of_all_matchings(labels):
    clusters, classes = labels
    accuracies = []
    for class_of_cluster in itertools.permutations(range(4)):
        accuracies.append(np.mean(np.array(class_of_cluster)[clusters] == classes))
    best = max(accuracies)
    accuracy, class_of_cluster = metrics.hungarian(clusters, classes)
    assert accuracy == pytest.approx(best)
    assert accuracy == pytest.approx(np.mean(class_of_cluster[clusters] == classes))
    assert accuracy > 0.5
    # Classes may have gaps in their numbers.
    assert metrics.hungarian(clusters, classes * 7 + 3)[0] == pytest.approx(best)


def test_hungarian_leaves_a_cluster_over_where_there_are_more_than_classes():
    clusters = np.array([0, 0, 1, 2, 2, 2])
    classes = np.array([5, 5, 5, 9, 9, 9])
    accuracy, class_of_cluster = metrics.hungarian(clusters, classes)
    assert accuracy == pytest.approx(5 / 6)
    assert class_of_cluster.tolist() == [5, -1, 9]


def test_purity_and_entropy_by_hand():
    clusters = np.array([0, 0, 0, 0, 3, 3, 5])
    classes = np.array([1, 1, 1, 0, 0, 1, 2])
    got = metrics.purity(clusters, classes)
    entropies = [-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), math.log(2), 0]
    assert got['mean_entropy'] == pytest.approx(np.mean(entropies))
    assert got['mean_max_purity'] == pytest.approx((0.75 + 0.5 + 1) / 3)
    assert got['clusters_used'] == 3


def test_few_shot_and_majority_matchings_by_hand():
    clusters = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    classes = np.array([2, 0, 0, 0, 1, 1, 0, 0])
    confidence = np.array([9.0, 5, 4, 3, 8, 1, 7, 2])
    _, class_of_cluster = metrics.few_shot(clusters, classes, confidence, 1)
    assert class_of_cluster.tolist() == [2, 1]
    # A tie in cluster 1: the surest sample's class.
    accuracy, class_of_cluster = metrics.few_shot(clusters, classes, confidence, 10)
    assert class_of_cluster.tolist() == [0, 1]
    assert accuracy == pytest.approx(5 / 8)
    accuracy, class_of_cluster = metrics.majority(clusters, classes)
    assert class_of_cluster.tolist() == [0, 0]
    assert accuracy == pytest.approx(5 / 8)


def test_clusters_that_are_the_classes_are_perfect_by_every_metric():
    clusters = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    confidence = np.array([9.0, 5, 4, 3, 8, 1, 7, 2])
    expected = {
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
    assert metrics.evaluate(clusters, clusters, confidence) == pytest.approx(expected)


def test_unknown_labels_are_refused():
    with pytest.raises(ValueError, match='negative labels'):
        metrics.evaluate(np.array([0, 1]), np.array([0, -1]))
