"""Names of clusters against brute force over all of them."""

import itertools
import json

import numpy as np
import pytest

from vatt_jax.config import ConfigError
from vatt_jax.detection import coco, naming


@pytest.mark.parametrize('shape', [(4, 4), (3, 5), (5, 3)])
def test_hungarian_is_the_best_of_all_assignments(shape):
    rng = np.random.default_rng(0)
    for _ in range(5):
        counts = rng.integers(0, 9, shape)
        names = naming.hungarian(counts)
        named = names[names >= 0]
        assert len(set(named)) == len(named)
        got = sum(counts[k, c] for k, c in enumerate(names) if c >= 0)
        best = 0
        # Every way to give each cluster a class of its own, or none.
        options = [*range(shape[1]), *[-1] * shape[0]]
        for chosen in set(itertools.permutations(options, shape[0])):
            best = max(best, sum(counts[k, c] for k, c in enumerate(chosen) if c >= 0))
        assert got == best


def test_a_pair_that_never_met_is_no_name():
    counts = np.array([[5, 0], [3, 0]])
    assert naming.hungarian(counts).tolist() == [0, -1]
    assert naming.argmax(counts).tolist() == [0, 0]
    assert naming.argmax(np.array([[0, 0], [1, 1]])).tolist() == [-1, 0]


def test_manual():
    names = naming.manual({'b': 'flute'}, ['a', 'b'], ['harp', 'flute'])
    assert names.tolist() == [-1, 1]
    with pytest.raises(ConfigError, match='choose one of harp, flute'):
        naming.manual({'b': 'drum'}, ['a', 'b'], ['harp', 'flute'])
    with pytest.raises(ConfigError, match='the cluster'):
        naming.manual({'z': 'harp'}, ['a', 'b'], ['harp', 'flute'])


@pytest.mark.parametrize('shots', [1, 3, 10])
def test_few_shot_is_the_vote_of_the_nearest(shots):
    rng = np.random.default_rng(shots)
    features = rng.normal(size=(60, 3))
    cluster, label = rng.integers(0, 5, 60), rng.integers(-1, 4, 60)
    cluster[cluster == 3] = 2  # a cluster without examples
    distance = naming.distance_to_centroids(features, cluster)
    names = naming.few_shot(distance, cluster, label, shots, 5)
    for number in range(5):
        rows = [n for n in range(60) if cluster[n] == number]
        if not rows:
            assert names[number] == -1
            continue
        centroid = sum(features[n] for n in rows) / len(rows)
        nearest = sorted(rows, key=lambda n: np.sqrt(((features[n] - centroid) ** 2).sum()))
        votes = [label[n] for n in nearest[:shots] if label[n] >= 0]
        # max() keeps the first of equals, which is the class of the nearest.
        expected = max(votes, key=votes.count) if votes else -1
        assert names[number] == expected


def document():
    """Two pictures; in the first a harp and a flute, in the second two harps, one of a crowd."""
    boxes = [(0, 1, [0, 0, 10, 10]), (0, 2, [20, 0, 10, 10])]
    boxes += [(1, 1, [5, 5, 10, 10]), (1, 1, [40, 40, 20, 20])]
    annotations = []
    for number, (image, category, box) in enumerate(boxes, 1):
        annotations.append(coco.make_annotation(number, image, category, box, number == 4))
    return {
        'images': [coco.make_image(n, f'{n}.png', 64, 64) for n in range(2)],
        'annotations': annotations,
        'categories': coco.make_categories(['harp', 'flute']),
    }


def results():
    """Clusters 10, 20 and 30, numbered 0, 1 and 2."""
    found = [
        (0, 10, [0, 0, 10, 11], 0.9),
        (0, 20, [0, 0, 10, 10], 0.4),  # less sure of the same box
        (0, 20, [20, 0, 10, 10], 0.8),
        (1, 20, [5, 5, 10, 10], 0.7),
        (1, 30, [40, 40, 20, 20], 0.9),  # of the crowd
        (1, 30, [0, 40, 10, 10], 0.9),  # of nothing
    ]
    keys = ('image_id', 'category_id', 'bbox', 'score')
    return [dict(zip(keys, row)) for row in found]


NUMBERS = {10: 0, 20: 1, 30: 2}


def test_matches_are_the_surest_detections_of_true_boxes():
    matches = naming.match(document(), results(), NUMBERS)
    assert matches.cluster.tolist() == [0, 1, 1]
    assert matches.label.tolist() == [0, 1, 0]
    assert matches.score.tolist() == [0.9, 0.8, 0.7]
    counts = naming.contingency(matches.cluster, matches.label, (3, 2))
    assert counts.tolist() == [[1, 0], [1, 1], [0, 0]]
    nothing = naming.match(document(), [], NUMBERS)
    assert len(nothing.cluster) == 0


@pytest.mark.parametrize(
    'method, expected',
    [
        ('hungarian', [0, 1, -1]),
        ('argmax', [0, 0, -1]),
        ('few_shot', [0, 1, -1]),
        ('manual', [-1, -1, 1]),
    ],
)
def test_the_four_ways(method, expected):
    matches = naming.match(document(), results(), NUMBERS)
    names = naming.find_names(
        method, matches, ['x', 'y', 'z'], ['harp', 'flute'], mapping={'z': 'flute'}
    )
    assert names.tolist() == expected
    renamed = naming.rename(results(), NUMBERS, names, [1, 2])
    kept = [r for r in results() if expected[NUMBERS[r['category_id']]] >= 0]
    assert len(renamed) == len(kept)
    for before, after in zip(kept, renamed):
        assert after['category_id'] == expected[NUMBERS[before['category_id']]] + 1
        assert after['bbox'] == before['bbox']


def test_the_command(tmp_path, capsys):
    pytest.importorskip('pycocotools', reason='the extra detection is not installed')
    coco.write(tmp_path / 'true.json', document())
    (tmp_path / 'found.json').write_text(json.dumps(results()))
    files = [str(tmp_path / 'true.json'), str(tmp_path / 'found.json')]
    naming.main([*files, '--out', str(tmp_path / 'named.json')])
    printed = capsys.readouterr().out
    assert 'cluster 10: harp\ncluster 20: flute\ncluster 30: -\n' in printed
    # Harp: one of two boxes that count; flute found, after a wrong one that is less sure.
    assert 'ap50: 75.2' in printed
    named = json.loads((tmp_path / 'named.json').read_text())
    assert {result['category_id'] for result in named} == {1, 2}
    # Near the centroids of features.
    np.savez(
        tmp_path / 'features.npz',
        features=np.eye(3),
        cluster=np.array([0, 1, 2]),
        label=np.array([1, 0, -1]),
    )
    naming.main([*files, '--method=few_shot', f'--features={tmp_path}/features.npz'])
    assert 'cluster 10: flute\ncluster 20: harp\ncluster 30: -\n' in capsys.readouterr().out
