"""How well clusters agree with classes, or with other clusters.

Definitions are those of the SeLaVi evaluation code; entropies are in nats.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Integer

COUNTED_AT_ONCE = 1 << 20  # samples


def contingency(
    clusters: Integer[np.ndarray, '...'],
    classes: Integer[np.ndarray, '...'],
    shape: tuple[int, int] | None = None,
) -> Int[np.ndarray, 'P C']:
    """Count the samples of each cluster and class.

    Args:
      clusters: Cluster of each sample, not negative. [M]
      classes: Class of each sample, not negative. [M]
      shape: Numbers of clusters and classes; by default one more than the largest of each. With
        it there may be no sample at all.

    Returns:
      int64 counts: [p, c] is the number of samples of cluster p and class c.

    Raises:
      ValueError: For labels that do not go together, or negative ones.
    """
    clusters, classes = np.asarray(clusters), np.asarray(classes)
    is_too_short = shape is None and not len(clusters)
    if clusters.shape != classes.shape or clusters.ndim != 1 or is_too_short:
        raise ValueError(
            'expected clusters and classes to be vectors of the same, positive length, got shapes '
            f'{clusters.shape} and {classes.shape}.'
        )
    # NumPy would take a negative index from the end and count it as the last class.
    if min(clusters.min(initial=0), classes.min(initial=0)) < 0:
        raise ValueError('negative labels (unknown) must be left out before clusters are compared.')
    if shape is None:
        # int: small types of labels have no room for one more.
        shape = (int(clusters.max()) + 1, int(classes.max()) + 1)
    table = np.zeros(shape, np.int64)
    # In blocks, of which NumPy makes indices of 16 bytes a sample.
    for begin in range(0, len(clusters), COUNTED_AT_ONCE):
        block = slice(begin, begin + COUNTED_AT_ONCE)
        # `table[clusters, classes] += 1` would count pairs that repeat only once.
        np.add.at(table, (clusters[block], classes[block]), 1)
    return table


def nmi(clusters: Integer[np.ndarray, ' M'], classes: Integer[np.ndarray, ' M']) -> float:
    """Normalised mutual information, 2 MI / (H(clusters) + H(classes)); symmetric."""
    # Of the counts, which are few: of the samples scikit-learn would make several copies in int64.
    return nmi_of_counts(contingency(clusters, classes))


def nmi_of_counts(table: Int[np.ndarray, 'P C']) -> float:
    """`nmi` of the samples that `contingency` counted."""
    # Imported where they are used: both are slow to load.
    from scipy import stats
    from sklearn import metrics

    sizes = (table.sum(0), table.sum(1))
    if all((size > 0).sum() == 1 for size in sizes):
        return 1.0  # one cluster and one class: 0 / 0 otherwise
    information = metrics.mutual_info_score(None, None, contingency=table)
    entropy = sum(stats.entropy(size) for size in sizes)
    return float(2 * max(information, 0) / entropy)


def agreement(
    clusters: Integer[np.ndarray, ' M'], classes: Integer[np.ndarray, ' M']
) -> dict[str, float]:
    """NMI, AMI and ARI of two labelings; all are symmetric.

    NMI = 2 MI / (H(clusters) + H(classes)). AMI, the same above chance, is normalised by the
    arithmetic mean too. scikit-learn's functions are these definitions exactly.
    """
    from sklearn import metrics

    ami = metrics.adjusted_mutual_info_score(classes, clusters, average_method='arithmetic')
    ari = metrics.adjusted_rand_score(classes, clusters)
    return {
        'NMI': nmi(clusters, classes),
        'AMI': float(ami),
        'ARI': float(ari),
    }


def purity(
    clusters: Integer[np.ndarray, ' M'], classes: Integer[np.ndarray, ' M']
) -> dict[str, float]:
    """How mixed the classes inside clusters are.

    Both means are *unweighted* over the clusters that are not empty, as published: a cluster of one
    sample counts as much as one of a thousand, and many small clusters look pure.

    Returns:
      'mean_entropy' of the classes inside a cluster, in nats; 'mean_max_purity', the share of the
      largest class inside a cluster; 'clusters_used', the number of clusters that are not empty.
    """
    table = contingency(clusters, classes)
    used = table[table.sum(1) > 0]  # [U C], U clusters that are not empty
    share = used / used.sum(1, keepdims=True)  # p(class | cluster)
    # H = -sum_c p_c log p_c, where 0 log 0 = 0. `np.where` computes both branches: the floor keeps
    # log 0 and its warning out of the one that is not used.
    terms = np.where(share > 0, share * np.log(np.maximum(share, 1e-300)), 0)
    entropy = -terms.sum(1)
    return {
        'mean_entropy': float(entropy.mean()),
        'mean_max_purity': float(share.max(1).mean()),
        'clusters_used': float(len(share)),
    }


def hungarian(
    clusters: Integer[np.ndarray, ' M'], classes: Integer[np.ndarray, ' M']
) -> tuple[float, Int[np.ndarray, ' P']]:
    """Accuracy under the best one-to-one matching of clusters and classes.

    Only classes that occur take part, renumbered 0 … C-1, as published. The published code requires
    as many clusters as classes. Here either may be more numerous, and samples of unmatched clusters
    are errors.

    Returns:
      The accuracy, and the class of each cluster, -1 for clusters left over.
    """
    from scipy.optimize import linear_sum_assignment

    present, dense = np.unique(classes, return_inverse=True)  # [C], [M]
    table = contingency(clusters, dense)
    rows, columns = linear_sum_assignment(table, maximize=True)
    num_correct = table[rows, columns].sum()
    class_of_cluster = np.full(len(table), -1)
    # Back from the dense numbers to the classes' own.
    class_of_cluster[rows] = present[columns]
    return float(num_correct / len(dense)), class_of_cluster


def majority(
    clusters: Integer[np.ndarray, ' M'], classes: Integer[np.ndarray, ' M']
) -> tuple[float, Int[np.ndarray, ' P']]:
    """Accuracy if every cluster takes its most frequent class (many to one).

    Returns:
      The accuracy, and the class of each cluster, -1 for empty ones; ties go to the lower class.
    """
    table = contingency(clusters, classes)
    num_correct = table.max(1).sum()
    # `argmax` takes the first of equal counts, and 0 in an empty row.
    class_of_cluster = np.where(table.sum(1) > 0, table.argmax(1), -1)
    return float(num_correct / len(clusters)), class_of_cluster


def few_shot(
    clusters: Integer[np.ndarray, ' M'],
    classes: Integer[np.ndarray, ' M'],
    confidence: Float[np.ndarray, ' M'],
    shots: int,
) -> tuple[float, Int[np.ndarray, ' P']]:
    """Accuracy if only the most confident samples of each cluster are labelled, and vote.

    Args:
      clusters: Cluster of each sample.
      classes: Class of each sample.
      confidence: Of each sample in its cluster, larger is surer. Ties go to the earlier sample.
      shots: Number of samples of each cluster that are labelled.

    Returns:
      The accuracy, and the class of each cluster, -1 for empty ones. Tied votes go to the class of
      the most confident of the samples.
    """
    clusters, classes = np.asarray(clusters), np.asarray(classes)
    confidence = np.asarray(confidence)
    class_of_cluster = np.full(clusters.max() + 1, -1)
    for cluster in np.unique(clusters):
        members = np.flatnonzero(clusters == cluster)
        # A stable sort of the negative, so that ties stay in order: reversing an ascending sort
        # would put the later sample first.
        order = np.argsort(-confidence[members], kind='stable')
        votes = classes[members[order[:shots]]]
        values, first, counts = np.unique(votes, return_index=True, return_counts=True)
        # The last key of a lexsort is the primary one: most votes, then the earliest vote, which is
        # the most confident one.
        ranking = np.lexsort((first, -counts))
        class_of_cluster[cluster] = values[ranking[0]]
    is_correct = class_of_cluster[clusters] == classes
    return float(is_correct.mean()), class_of_cluster


def evaluate(
    clusters: Integer[np.ndarray, ' M'],
    classes: Integer[np.ndarray, ' M'],
    confidence: Float[np.ndarray, ' M'] | None = None,
) -> dict[str, float]:
    """Compute all of the above.

    Args:
      clusters: Cluster of each sample.
      classes: Class of each sample.
      confidence: Of each sample in its cluster; without it there is no 'shots_…'.

    Returns:
      Numbers in [0, 1] by name, but for 'mean_entropy' in nats and the count 'clusters_used'.
    """
    scores = agreement(clusters, classes) | purity(clusters, classes)
    scores['accuracy'], _ = hungarian(clusters, classes)
    scores['majority'], _ = majority(clusters, classes)
    if confidence is not None:
        for shots in (1, 10):
            scores[f'shots_{shots}'], _ = few_shot(clusters, classes, confidence, shots)
    return scores
