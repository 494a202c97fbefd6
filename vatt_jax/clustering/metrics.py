"""How well clusters agree with classes, or with other clusters. Definitions after the SeLaVi evaluation code, in nats."""

from __future__ import annotations

import numpy as np


def contingency(
    clusters: np.ndarray, classes: np.ndarray, shape: tuple[int, int] | None = None
) -> np.ndarray:
    """int64 [P C]: samples of cluster p and class c. clusters, classes: int [M], non-negative."""
    clusters, classes = np.asarray(clusters), np.asarray(classes)
    if clusters.shape != classes.shape or clusters.ndim != 1 or not len(clusters):
        raise ValueError(
            f'clusters {clusters.shape} and classes {classes.shape}: two vectors of one, positive length are wanted'
        )
    if min(clusters.min(), classes.min()) < 0:
        raise ValueError('negative labels (unknown) must be left out before clusters are compared')
    out = np.zeros(shape or (clusters.max() + 1, classes.max() + 1), np.int64)
    np.add.at(out, (clusters, classes), 1)
    return out


def nmi(clusters: np.ndarray, classes: np.ndarray) -> float:
    """2 MI / (H(clusters) + H(classes)); symmetric."""
    from sklearn import metrics

    return float(
        metrics.normalized_mutual_info_score(classes, clusters, average_method='arithmetic')
    )


def agreement(clusters: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """NMI = 2 MI / (H(clusters) + H(classes)), AMI (arithmetic mean too) and ARI of two labelings; symmetric.

    scikit-learn's functions are these definitions exactly.
    """
    from sklearn import metrics

    return {
        'NMI': nmi(clusters, classes),
        'AMI': float(
            metrics.adjusted_mutual_info_score(classes, clusters, average_method='arithmetic')
        ),
        'ARI': float(metrics.adjusted_rand_score(classes, clusters)),
    }


def purity(clusters: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """mean_entropy: of the classes inside a cluster, natural logarithm; mean_max_purity: share of the largest class inside.

    Both are *unweighted* means over clusters that are not empty, as published: a cluster of one sample counts as much as one of a
    thousand, and many small clusters look pure.
    """
    table = contingency(clusters, classes)
    share = table[table.sum(1) > 0] / table[table.sum(1) > 0].sum(1, keepdims=True)
    entropy = -np.where(share > 0, share * np.log(np.maximum(share, 1e-300)), 0).sum(1)
    return {
        'mean_entropy': float(entropy.mean()),
        'mean_max_purity': float(share.max(1).mean()),
        'clusters_used': float(len(share)),
    }


def hungarian(clusters: np.ndarray, classes: np.ndarray) -> tuple[float, np.ndarray]:
    """(accuracy, class of each cluster [P], -1 for clusters left over) under the best one-to-one matching.

    Only classes that occur take part, renumbered 0 … C-1, as published. The published code wants as many clusters as classes; here
    either may be more numerous, and samples of unmatched clusters are errors.
    """
    from scipy.optimize import linear_sum_assignment

    present, dense = np.unique(classes, return_inverse=True)
    table = contingency(clusters, dense)
    rows, columns = linear_sum_assignment(table, maximize=True)
    names = np.full(len(table), -1)
    names[rows] = present[columns]
    return float(table[rows, columns].sum() / len(dense)), names


def majority(clusters: np.ndarray, classes: np.ndarray) -> tuple[float, np.ndarray]:
    """(accuracy, class of each cluster [P]): every cluster takes its most frequent class (many to one); ties go to the lower class."""
    table = contingency(clusters, classes)
    return float(table.max(1).sum() / len(clusters)), np.where(
        table.sum(1) > 0, table.argmax(1), -1
    )


def few_shot(
    clusters: np.ndarray, classes: np.ndarray, confidence: np.ndarray, shots: int
) -> tuple[float, np.ndarray]:
    """(accuracy, class of each cluster [P]) when only the `shots` most confident samples of each cluster are labelled, and vote.

    confidence [M]: larger is surer; ties go to the earlier sample, tied votes to the class of the most confident of them.
    """
    clusters, classes = np.asarray(clusters), np.asarray(classes)
    names = np.full(clusters.max() + 1, -1)
    for p in np.unique(clusters):
        members = np.flatnonzero(clusters == p)
        votes = classes[
            members[np.argsort(-np.asarray(confidence)[members], kind='stable')[:shots]]
        ]
        values, first, counts = np.unique(votes, return_index=True, return_counts=True)
        names[p] = values[np.lexsort((first, -counts))[0]]
    return float((names[clusters] == classes).mean()), names


def evaluate(
    clusters: np.ndarray, classes: np.ndarray, confidence: np.ndarray | None = None
) -> dict[str, float]:
    """All of the above, as name -> number in [0, 1] (mean_entropy in nats)."""
    out = {
        **agreement(clusters, classes),
        **purity(clusters, classes),
        'accuracy': hungarian(clusters, classes)[0],
        'majority': majority(clusters, classes)[0],
    }
    if confidence is not None:
        out |= {f'shots_{n}': few_shot(clusters, classes, confidence, n)[0] for n in (1, 10)}
    return out
