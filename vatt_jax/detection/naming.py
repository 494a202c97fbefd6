"""Names for clusters: which class of the world each class of a self-supervised detector is.

    python -m vatt_jax.detection.naming data/true/test.json runs/detector/results.json \\
        --method=hungarian --out=runs/detector/named.json

Five ways (docs/detector.md): `hungarian` one class for each cluster, as many boxes right as can be;
`argmax` the class that a cluster meets most often, several clusters may share one; `manual` a map
written by hand; `few_shot` the vote of 1, 10 … labelled examples near the centroid of each cluster.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.optimize
from jaxtyping import Float, Int, Int64

from vatt_jax.command_line import expand_home
from vatt_jax.config import ConfigError, choose
from vatt_jax.detection import coco, finding
from vatt_jax.detection.average_precision import average_precision

METHODS = ('hungarian', 'argmax', 'manual', 'few_shot')
# A cluster without a name: it met no class, or there were more clusters than classes.
UNNAMED = -1
# IoU from which a detection shows a true box.
OVERLAP = 0.5

Names = Int64[np.ndarray, ' K']  # class of each cluster, or UNNAMED


@dataclasses.dataclass(frozen=True)
class Matches:
    """Detections that show a true box, a row for each.

    Attributes:
        cluster: of the detection.
        label: class of the true box.
        score: of the detection.
    """

    cluster: Int64[np.ndarray, ' n']
    label: Int64[np.ndarray, ' n']
    score: Float[np.ndarray, ' n']


def match(
    truth: coco.Document,
    results: Sequence[Mapping[str, Any]],
    clusters: Mapping[Any, int],
    overlap: float = OVERLAP,
) -> Matches:
    """The surest detection of each true box that overlaps it so much, whatever its cluster.

    Args:
        truth: true boxes; crowds are left out.
        results: COCO's results, whose category_id is a cluster's.
        clusters: category_id of a cluster -> its number.
        overlap: IoU, at least.
    """
    by_image: dict[Any, list[Mapping[str, Any]]] = {}
    for result in results:
        by_image.setdefault(result['image_id'], []).append(result)
    numbers = coco.class_numbers(truth)
    found = []
    for image, own_boxes in zip(truth['images'], coco.by_image(truth), strict=True):
        detections = by_image.get(image['id'], [])
        if not detections:
            continue
        corners, labels, is_crowd = coco.boxes_of(own_boxes, numbers)
        found_boxes = np.array([result['bbox'] for result in detections], np.float64)
        detected = coco.to_corners(found_boxes)
        scores = np.array([result['score'] for result in detections])
        is_shown = coco.overlaps(corners, detected) >= overlap  # [boxes detections]
        for row in np.flatnonzero(is_shown.any(axis=1) & ~is_crowd):
            best = int(np.where(is_shown[row], scores, -np.inf).argmax())
            cluster = clusters[detections[best]['category_id']]
            found.append((cluster, labels[row], scores[best]))
    columns = list(zip(*found)) or [(), (), ()]
    return Matches(
        np.array(columns[0], np.int64),
        np.array(columns[1], np.int64),
        np.array(columns[2], np.float64),
    )


def contingency(
    cluster: Int[np.ndarray, ' n'], label: Int[np.ndarray, ' n'], shape: tuple[int, int]
) -> Int64[np.ndarray, 'K P']:
    """How often each of K clusters meets each of P classes; rows of unknown class do not count.

    Args:
        cluster: of each example.
        label: class of each example, -1 where it is unknown.
        shape: (K, P).
    """
    counts = np.zeros(shape, np.int64)
    is_known = label >= 0
    np.add.at(counts, (cluster[is_known], label[is_known]), 1)
    return counts


def hungarian(counts: Int[np.ndarray, 'K P']) -> Names:
    """One cluster for each class and one class for each cluster, with the largest sum of counts.

    A pair that never met is no name, even where the solution has it.
    """
    names = np.full(len(counts), UNNAMED, np.int64)
    clusters, classes = scipy.optimize.linear_sum_assignment(counts, maximize=True)
    has_met = counts[clusters, classes] > 0
    names[clusters[has_met]] = classes[has_met]
    return names


def argmax(counts: Int[np.ndarray, 'K P']) -> Names:
    """The class that each cluster meets most often; of equal ones the first."""
    if not counts.size:
        return np.full(len(counts), UNNAMED, np.int64)
    return np.where(counts.max(axis=1) > 0, counts.argmax(axis=1), UNNAMED).astype(np.int64)


def manual(
    mapping: Mapping[str, str], cluster_names: Sequence[str], class_names: Sequence[str]
) -> Names:
    """Names written by hand; clusters that are left out have none.

    Args:
        mapping: name of a cluster -> name of a class.
        cluster_names: of the K clusters.
        class_names: of the P classes.

    Raises:
        ConfigError: there is no such cluster or class.
    """
    names = np.full(len(cluster_names), UNNAMED, np.int64)
    for cluster, name in mapping.items():
        choose(cluster, cluster_names, 'names: the cluster')
        choose(name, class_names, f'names[{cluster!r}]')
        names[cluster_names.index(cluster)] = class_names.index(name)
    return names


def few_shot(
    distance: Float[np.ndarray, ' n'],
    cluster: Int[np.ndarray, ' n'],
    label: Int[np.ndarray, ' n'],
    shots: int,
    num_clusters: int,
) -> Names:
    """The vote of the nearest examples of each cluster, which somebody has labelled.

    Args:
        distance: of each example from the centroid of its cluster, or minus its confidence.
        cluster: of each example.
        label: the class that somebody says it is, -1 for none of them: it is asked, and has no
            vote.
        shots: examples of each cluster that are labelled; equally near ones in their order.
        num_clusters: K.

    Returns:
        The class with the most votes; of equal ones that of the nearest example.
    """
    names = np.full(num_clusters, UNNAMED, np.int64)
    for number in range(num_clusters):
        rows = np.flatnonzero(cluster == number)
        nearest = rows[np.argsort(distance[rows], kind='stable')[:shots]]
        votes = label[nearest]
        votes = votes[votes >= 0]
        if len(votes):
            counts = (votes[:, None] == votes[None]).sum(axis=1)  # of each voter's own class
            names[number] = votes[counts.argmax()]
    return names


def distance_to_centroids(
    features: Float[np.ndarray, 'n D'], cluster: Int[np.ndarray, ' n']
) -> Float[np.ndarray, ' n']:
    """Euclidean distance of each example from the mean of its cluster."""
    distance = np.zeros(len(features))
    for number in np.unique(cluster):
        rows = cluster == number
        centroid = features[rows].mean(axis=0)
        distance[rows] = np.linalg.norm(features[rows] - centroid, axis=1)
    return distance


def find_names(
    method: str,
    matches: Matches,
    cluster_names: Sequence[str],
    class_names: Sequence[str],
    shots: int = 1,
    mapping: Mapping[str, str] | None = None,
) -> Names:
    """Names by any of METHODS; examples of `few_shot` are the surest detections.

    Args:
        method: one of METHODS.
        matches: detections that show a true box.
        cluster_names: of the K clusters.
        class_names: of the P classes.
        shots: of `few_shot`.
        mapping: of `manual`.

    Raises:
        ConfigError: there is no such method, cluster or class.
    """
    choose(method, METHODS, 'naming')
    if method == 'manual':
        return manual(mapping or {}, list(cluster_names), list(class_names))
    if method == 'few_shot':
        return few_shot(-matches.score, matches.cluster, matches.label, shots, len(cluster_names))
    shape = (len(cluster_names), len(class_names))
    counts = contingency(matches.cluster, matches.label, shape)
    return hungarian(counts) if method == 'hungarian' else argmax(counts)


def rename(
    results: Sequence[Mapping[str, Any]],
    clusters: Mapping[Any, int],
    names: Names,
    class_identifiers: Sequence[Any],
) -> list[dict[str, Any]]:
    """The results with the class of each cluster; those of clusters without a name are left out.

    Args:
        results: COCO's results, whose category_id is a cluster's.
        clusters: category_id of a cluster -> its number.
        names: of the clusters.
        class_identifiers: category_id of each class.
    """
    renamed = []
    for result in results:
        name = int(names[clusters[result['category_id']]])
        if name != UNNAMED:
            renamed.append({**result, 'category_id': class_identifiers[name]})
    return renamed


# ---- the command


def main(argv: list[str]) -> None:
    """The command of this file."""
    flags = _parser().parse_args(expand_home(argv))
    truth = coco.read(flags.truth)
    results, clusters = _read_results(pathlib.Path(flags.results))
    class_names = coco.class_names(truth)
    class_identifiers = sorted(category['id'] for category in truth['categories'])
    if flags.features:
        names = _names_near_centroids(flags, clusters)
    else:
        mapping = json.loads(flags.names) if flags.names else None
        # Names that are found elsewhere are not fitted to what is measured.
        labelled = coco.read(flags.labelled) if flags.labelled else truth
        matches = match(labelled, results, {i: n for n, i in enumerate(clusters)})
        names = find_names(
            flags.method, matches, list(clusters.values()), class_names, flags.shots, mapping
        )
    for cluster, name in zip(clusters.values(), names):
        print(f'{cluster}: {class_names[name] if name != UNNAMED else "-"}')
    numbers = {identifier: number for number, identifier in enumerate(clusters)}
    renamed = rename(results, numbers, names, class_identifiers)
    if flags.out:
        pathlib.Path(flags.out).write_text(json.dumps(renamed))
    for measure, value in _measures(truth, results, renamed).items():
        print(f'{measure}: {100 * value:.1f}')


def _measures(
    truth: coco.Document, results: list[dict[str, Any]], renamed: list[dict[str, Any]]
) -> dict[str, float]:
    """AP of the classes, and what is found whatever it is called (detection.finding)."""
    measures = average_precision(truth, renamed).means()
    boxes = average_precision(*finding.without_classes(truth, results))
    measures['ap50 any class'] = boxes.means()['ap50']
    for kind, share in finding.found_shares(truth, results).items():
        measures[f'found {kind}'] = share
    return measures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m vatt_jax.detection.naming', description=__doc__.splitlines()[0]
    )
    parser.add_argument('truth', help='COCO json with true boxes')
    parser.add_argument('results', help='COCO json of results, or pseudo-boxes with scores')
    parser.add_argument('--method', choices=METHODS, default='hungarian')
    parser.add_argument('--shots', type=int, default=1, help='few_shot: examples of a cluster')
    parser.add_argument('--names', help='manual: json {"cluster": "class", …}')
    parser.add_argument('--labelled', help='COCO json by which names are found, else truth')
    parser.add_argument(
        '--features',
        help='few_shot: npz of features [n D], cluster [n] and label [n] (-1 for none) of '
        'examples, the nearest of which to the centroids are labelled',
    )
    parser.add_argument('--out', help='json to write: the results with classes')
    return parser


def _read_results(path: pathlib.Path) -> tuple[list[dict[str, Any]], dict[Any, str]]:
    """(results, {category_id of a cluster: its name}) of results or of pseudo-boxes."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f'{path}: expected a json of detections, got {error}') from error
    if isinstance(content, dict):
        coco.check(content, str(path))
        categories = sorted(content['categories'], key=lambda category: category['id'])
        results = [{'score': 1.0, **box} for box in content['annotations']]
        return results, {category['id']: category['name'] for category in categories}
    found = sorted({result['category_id'] for result in content})
    return content, {identifier: f'cluster {identifier}' for identifier in found}


def _names_near_centroids(flags: argparse.Namespace, clusters: Mapping[Any, str]) -> Names:
    """Names by the examples of --features."""
    with np.load(flags.features) as stored:
        features, cluster, label = stored['features'], stored['cluster'], stored['label']
    distance = distance_to_centroids(features, cluster)
    return few_shot(distance, cluster, label, flags.shots, len(clusters))


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f'error: {error}')
