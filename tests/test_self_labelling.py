"""Objectives that make their own labels: through the common loop, and piece by piece against definitions in NumPy."""

import itertools
import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.metrics import normalized_mutual_info_score

import data_pipelines
from tests import tiny
from tests.test_sinkhorn import column_means, converged, log_softmax, swav
from tests.test_train import losses, run, state_of, stop_at
from vatt_jax import evals, objectives
from vatt_jax.clustering.kmeans import cluster_rows, kmeans
from vatt_jax.config import ConfigError
from vatt_jax.evals import gallery
from vatt_jax.evals.base import Result
from vatt_jax.evals.clustering import Clustering
from vatt_jax.objectives import TrainingRecords
from vatt_jax.objectives.self_labelling import schedule
from vatt_jax.parallel import sharding
from vatt_jax.reporting import report
from vatt_jax.rng import Rng

FIELDS = {
    'self_labelling': {
        'views': ('video', 'audio'),
        'clusters': 4,
        'heads': 2,
        'groups': 2,
        'hidden': 8,
        'dropout': 0.1,
        'prior': 'gaussian',
        'refreshes': 4,
    },
    'online_codes': {
        'views': ('video', 'video.second', 'audio'),
        'assign': ('video', 'audio'),
        'clusters': 5,
        'hidden': 8,
        'width': 6,
        'queue': 24,
        'freeze': 1,
    },
    'kmeans_labels': {
        'views': ('video', 'audio'),
        'targets': 'both',
        'clusters': 4,
        'every': 3,
        'iterations': 3,
    },
}


def config(name, **fields):
    c = tiny.config(steps=5)
    if 'video.second' in FIELDS[name]['views']:
        c.data.views = (('video.second', {'kind': 'clip'}),)
    del c.model.towers['text']
    for tower in c.model.towers.values():
        tower.layers = 1
    c.model.head = ConfigDict({'name': 'none'})
    c.objective = ConfigDict({'name': name, **FIELDS[name], **fields})
    return c


@pytest.fixture
def quick_compilation():
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.mark.parametrize(
    'name',
    [
        'self_labelling',
        *[pytest.param(n, marks=pytest.mark.slow) for n in ('online_codes', 'kmeans_labels')],
    ],
)
def test_killed_and_continued_is_uninterrupted(name, tmp_path, quick_compilation):
    """Parameters, labels, potentials, queue, and what the refreshes told."""
    want = run(tmp_path / 'whole', config(name))
    with stop_at(3):
        run(tmp_path / 'cut', config(name))
    got = run(tmp_path / 'cut', config(name))
    assert (
        got['digests'] == want['digests']
        and got['order'] == want['order']
        and want['skipped_steps'] == 0
    )
    assert losses(tmp_path / 'cut') == losses(tmp_path / 'whole')
    lines = [
        [json.loads(x) for x in (tmp_path / f / 'metrics.jsonl').read_text().splitlines()]
        for f in ('whole', 'cut')
    ]
    told = [[x for x in part if any(k.startswith('refresh/') for k in x)] for part in lines]
    assert told[0] == told[1]
    state, _, columns = state_of(tmp_path / 'whole', config(name))
    if name == 'self_labelling':
        assert [x['step'] for x in told[0]] == [0, 1, 3] and all(
            x['refresh/converged'] == 1 for x in told[0]
        )
        assert 'refresh/NMI_to_last' in told[0][1] and 'refresh/NMI_to_last' not in told[0][0]
        assert (
            columns['label'].shape == (64, 2)
            and (columns['label'] >= 0).all()
            and int(state.objective['refreshes']) == 3
        )
        assert (columns['label'][:, 0] != columns['label'][:, 1]).any() and (
            np.asarray(state.objective['loss']) > 0
        ).all()
    if name == 'online_codes':
        np.testing.assert_allclose(
            np.linalg.norm(state.params['objective']['prototypes'], axis=0), 1, rtol=1e-5
        )
        assert (np.asarray(state.objective['queue']['audio']['filled']) == 2).all()
    if name == 'kmeans_labels':
        assert set(columns) == {'cluster.video', 'cluster.audio'} and set(
            state.params['objective']['video']
        ) == {'video', 'audio'}
        np.testing.assert_allclose(
            [x.sum() for x in state.objective['frequency'].values()], 1, rtol=1e-5
        )


# ---- refreshes, on features that are given


def built(features, **fields):
    """(objective, params, state) of self-labelling for features {view: [n D]}, on the host."""
    objective = objectives.build(
        ConfigDict({'name': 'self_labelling', 'views': tuple(features), 'clusters': 5, **fields})
    )
    shapes = {
        v: types.SimpleNamespace(pooled=jax.ShapeDtypeStruct(x.shape, 'float32'))
        for v, x in features.items()
    }
    spec = objectives.Spec(
        None, types.SimpleNamespace(encoded=shapes), None, len(next(iter(features.values()))), {}
    )
    return objective, *jax.tree.map(
        np.array, jax.jit(lambda key: nn.meta.unbox(objective.init(key, spec)))(jax.random.key(3))
    )


def relabelling(features, records=None, columns=None, step=0, mesh=1, change=None, **fields):
    """(objective, parameters before, RefreshResult) of one refresh on features {view: [n D]}. change(params, state): what to set before, in place."""
    objective, params, state = built(features, **fields)
    if change is not None:
        change(params, state)
    n = len(next(iter(features.values())))
    rows = {
        **features,
        **{f'{v}/valid': np.ones(n, bool) for v in features},
        'index': np.arange(n),
        **(records or {}),
    }
    with jax.set_mesh(sharding.make_mesh({'replica': mesh})):
        got = objective.refresh(
            None,
            params,
            state,
            step,
            TrainingRecords(n, columns or {}, lambda fn, augment=True, draw=0: rows),
        )
    return objective, params, got


def two_views(n=600, seed=0):
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 5, n)
    return {
        v: (np.eye(5)[kind] @ rng.standard_normal((5, d)) * 2 + rng.standard_normal((n, d))).astype(
            np.float32
        )
        for v, d in (('video', 7), ('audio', 4))
    }


@pytest.mark.parametrize('mesh', [1, 8])
def test_labels_are_the_transport_of_the_mean_log_probability(mesh):
    """Against the definition in float64. A third of the records has no sound, one has nothing at all and one cannot be read."""
    features = two_views()
    n = len(features['video'])
    sound, seen = np.arange(n) % 3 != 0, np.arange(n) != 6
    records = {
        k: x[:-1]
        for k, x in {
            **features,
            'audio/valid': sound & seen,
            'video/valid': seen,
            'index': np.arange(n),
        }.items()
    }
    _, params, got = relabelling(
        features, records, mesh=mesh, prior='zipf', spread=0.5, align=False, tolerance=1e-6
    )
    logits = [
        features[v].astype(np.float64) @ params[v]['0']['kernel'] + params[v]['0']['bias']
        for v in features
    ]
    log_p = np.where(
        sound[:, None],
        (log_softmax(logits[0]) + log_softmax(logits[1])) / 2,
        log_softmax(logits[0]),
    )[:-1][seen[:-1]]
    share = (1.0 + np.arange(5)) ** -0.5
    share = share / share.sum()
    mass = column_means(20 * log_p, 0)
    prior = np.empty(5)
    prior[np.argsort(-mass)] = share  # the largest size to the cluster with most mass
    want = (20 * log_p + converged(20 * log_p, prior)).argmax(1)
    label = got.columns['label'][:, 0]
    assert label[6] == -1 and label[-1] == -1 and label.shape == (n,)
    np.testing.assert_array_equal(label[:-1][seen[:-1]], want)
    np.testing.assert_allclose(np.bincount(want, minlength=5) / len(want), prior, atol=0.02)
    assert (
        got.metrics['residual'] <= 1e-6
        and 'NMI_to_last' not in got.metrics
        and 'cost' not in got.metrics
    )


def test_heads_that_differ_by_their_numbering_are_aligned():
    """Both views see the same features through the same head, numbered otherwise: alignment finds the numbering exactly."""
    x = two_views()['video']
    order = np.array([3, 0, 4, 1, 2])

    def change(params, state):
        params['video']['0']['kernel'] *= 8
        for part in ('kernel', 'bias'):
            params['audio']['0'][part] = params['video']['0'][part][..., order]

    _, params, got = relabelling({'video': x, 'audio': x}, change=change)
    for part in ('kernel', 'bias'):
        np.testing.assert_array_equal(got.params['audio']['0'][part], params['video']['0'][part])
        np.testing.assert_array_equal(got.params['video']['0'][part], params['video']['0'][part])
    _, params, got = relabelling(
        {'video': x, 'audio': x},
        change=lambda p, s: (change(p, s), s.update(refreshes=np.int32(1))),
    )
    np.testing.assert_array_equal(
        got.params['audio']['0']['kernel'], params['audio']['0']['kernel']
    )  # never again after the first


def test_a_refresh_starts_from_the_last_one():
    features = two_views(3000)
    _, _, first = relabelling(features, clusters=40, strength=40.0)
    drift = {
        v: x + 0.03 * np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
        for v, x in features.items()
    }

    def change(params, state):
        params.update(first.params), state.update(first.state)

    _, _, again = relabelling(
        drift, columns=first.columns, change=change, clusters=40, strength=40.0
    )
    _, _, anew = relabelling(
        drift, columns=first.columns, change=change, clusters=40, strength=40.0, warm=False
    )
    logits = [
        drift[v].astype(np.float64) @ first.params[v]['0']['kernel'] + first.params[v]['0']['bias']
        for v in drift
    ]
    label = again.columns['label'][:, 0]
    np.testing.assert_allclose(
        again.metrics['cost'],
        -np.mean([log_softmax(x)[np.arange(3000), label] for x in logits]),
        rtol=1e-4,
    )
    assert again.metrics['passes'] < anew.metrics['passes'] / 2
    assert (
        again.metrics['converged'] == anew.metrics['converged'] == 1
        and int(again.state['refreshes']) == 2
    )
    assert np.mean(again.columns['label'] != anew.columns['label']) < 0.01
    moved = np.mean(again.columns['label'] != first.columns['label'])
    assert (
        again.metrics['changed'] == pytest.approx(moved)
        and 0 < moved < 0.5
        and 0.5 < again.metrics['NMI_to_last'] < 1
    )


def test_gaussian_sizes_and_the_published_ones():
    objective, _, _ = relabelling(two_views(), prior='gaussian', spread=0.3)
    sizes = np.array([0.7, 1.2, 1.0, 1.4, 0.7], np.float32)
    mass = np.array([0.1, 0.4, 0.05, 0.15, 0.3])
    kept, shares = objective.prior(sizes, lambda: mass)
    np.testing.assert_allclose(shares, np.array([0.7, 1.4, 0.7, 1.0, 1.2]) / 5, rtol=1e-6)
    np.testing.assert_array_equal(kept, sizes)
    objective.config.published_prior = True
    kept, shares = objective.prior(sizes, lambda: mass)
    np.testing.assert_array_equal(
        kept, np.array([1.2, 0.7, 0.7, 1.0, 1.4], np.float32)
    )  # moved to the clusters in the mass's order, not sorted
    np.testing.assert_allclose(
        shares, (1 / kept) / (1 / kept).sum(), rtol=1e-6
    )  # and the largest size has the smallest share
    # the published mass: sums of the product of both views' probabilities
    features = two_views()
    _, params, got = relabelling(
        features,
        prior='gaussian',
        spread=0.3,
        published_prior=True,
        align=False,
        change=lambda p, s: s['sizes'].__setitem__(0, sizes),
    )
    log_p = sum(
        log_softmax(
            features[v].astype(np.float64) @ params[v]['0']['kernel'] + params[v]['0']['bias']
        )
        for v in features
    )
    want = np.empty(5)
    want[np.argsort(np.exp(log_p).sum(0))] = sizes
    np.testing.assert_allclose(got.state['sizes'][0], want, rtol=1e-6)
    counts = np.bincount(got.columns['label'][:, 0], minlength=5) / 600
    np.testing.assert_allclose(counts, (1 / want) / (1 / want).sum(), atol=0.02)
    draws = [np.asarray(objective.sizes(jax.random.key(i))) for i in range(200)]
    np.testing.assert_allclose([np.std(draws), np.mean(draws)], [0.3, 1], atol=0.05)


def test_the_published_schedule():
    """200 epochs of 1000 steps: the first refreshes at epochs 0, 0.2, 0.57, 1.06, 1.62, 2.27, 2.98; 99 of 100, about every 3 epochs at the end."""
    steps = sorted(schedule(200_000, 100, 1.5))
    np.testing.assert_allclose(
        np.array(steps[:7]) / 1000, [0, 0.203, 0.574, 1.055, 1.624, 2.27, 2.984], atol=2e-3
    )
    assert len(steps) == 99 and 2900 < steps[-1] - steps[-2] < 3100
    assert sorted(schedule(6, 6, 1.5)) == [0, 1, 2, 3, 5] and sorted(schedule(6, 5, 1.0, 10)) == [
        10,
        12,
        13,
        15,
    ]
    assert sorted(schedule(20, 11, 3.0)) == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        11,
        15,
    ]  # times 0.02, 0.16 and 0.54 fall into one step
    assert sorted(schedule(3, 100, 2.0)) == [0, 1, 2]  # more refreshes than steps: one in each


@pytest.mark.parametrize('unit', [False, True])
def test_loss_is_the_mean_over_views_and_heads(unit):
    """Views that are missing and records without a label count for nothing; before the first refresh there is nothing to learn."""
    rng = np.random.default_rng(0)
    views = ('video', 'video.second', 'audio')
    x = {v: rng.standard_normal((16, 5)).astype(np.float32) for v in views}
    valid = {v: np.arange(16) % n != 0 for v, n in zip(views, (5, 7, 3))}
    label = rng.integers(-1, 4, (16, 3)).astype(np.int32)
    objective, params, state = built(
        {v: x[v] for v in views}, clusters=4, heads=3, unit_logits=unit
    )
    encoded = {v: types.SimpleNamespace(pooled=x[v]) for v in views}
    batch = {v: {'data': np.zeros(16), 'valid': valid[v]} for v in views} | {
        'valid': np.arange(16) != 1
    }

    @jax.jit
    def both(params, state):
        call = lambda b: objective.compute_loss(
            None, {'batch_stats': {}}, params, state, x, b, rng_of(16)
        )
        return [
            (out.value, out.state, out.apply_update)
            for out in map(call, ({**batch, 'columns': {'label': label}}, batch))
        ], objective.predict(params, state, encoded)

    (got, before), predicted = both(params, state)
    log_p = {
        (v, i): log_softmax(
            x[v].astype(np.float64) @ params[v.split('.')[0]][str(i)]['kernel']
            + params[v.split('.')[0]][str(i)]['bias']
        )
        for v in views
        for i in range(3)
    }
    want = []
    for (v, i), p in log_p.items():
        if unit:
            z = (
                x[v].astype(np.float64) @ params[v.split('.')[0]][str(i)]['kernel']
                + params[v.split('.')[0]][str(i)]['bias']
            )
            p = log_softmax(z / np.linalg.norm(z, axis=1, keepdims=True))
        use = (label[:, i] >= 0) & valid[v] & batch['valid']
        want.append(-p[use, label[use, i]].mean())
    np.testing.assert_allclose(got[0], np.mean(want), rtol=1e-5)
    np.testing.assert_allclose(got[1]['loss'], np.reshape(want, (3, 3)).mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        predicted['cluster/1'], sum(log_p[v, 1] for v in views), rtol=1e-4, atol=1e-4
    )
    assert (
        bool(got[2])
        and not bool(before[2])
        and float(before[0]) == 0
        and int(before[1]['seen']) == 1
    )


def test_passes_of_a_refresh_see_other_clips_each_time():
    data = data_pipelines.open(config('self_labelling'))
    boxes = [
        next(data.one_pass('train', 16, by='records', augment=True, draw=d))['video']
        for d in ('0/0', '0/0', '0/1', '4/0', '')
    ]
    same = lambda a, b: (a['box'] == b['box']).all() and (a['start'] == b['start']).all()
    assert same(boxes[0], boxes[1]) and not any(same(boxes[0], b) for b in boxes[2:])


def test_mistakes_are_sentences():
    build = lambda **f: objectives.build(ConfigDict({'name': 'self_labelling', **f}))
    for fields, words in (
        (
            {'groups': 3, 'heads': 2},
            'groups: expected at most one group per head, got 3 for 2 heads',
        ),
        ({'prior': 'normal'}, 'choose one of uniform'),
        ({'shares': (0.5, 0.5, 0.0), 'clusters': 3}, r'shares: prior\[2\]=0.0'),
        ({'shares': (0.5, 0.5)}, 'expected one share for each of the 24 clusters, got 2'),
        ({'views': ()}, 'views: expected at least one stream, got none'),
    ):
        with pytest.raises(ConfigError, match=words):
            build(**fields)
    with pytest.raises(ConfigError, match='expected views of two modalities'):
        objectives.build(
            ConfigDict(
                {'name': 'kmeans_labels', 'views': ('video', 'video.second'), 'targets': 'other'}
            )
        )
    with pytest.raises(ConfigError, match='expected at least two views'):
        objectives.build(ConfigDict({'name': 'online_codes', 'views': ('video',)}))


# ---- online codes


def test_online_codes_are_swavs_swapped_prediction():
    """Loss of two views and a queue, by the published order of operations in NumPy; rows without a view count for nothing."""
    objective = objectives.build(
        ConfigDict(
            {
                'name': 'online_codes',
                'views': ('a', 'b'),
                'clusters': 6,
                'hidden': 0,
                'width': 4,
                'queue': 10,
                'freeze': 5,
            }
        )
    )
    rng = np.random.default_rng(0)
    norm = lambda x, axis=-1: x / np.linalg.norm(x, axis=axis, keepdims=True)
    z = {v: norm(rng.standard_normal((8, 4))) for v in 'ab'}
    old = {v: norm(rng.standard_normal((10, 4))) for v in 'ab'}
    valid = {'a': np.arange(8) != 2, 'b': np.arange(8) != 5}
    prototypes = norm(rng.standard_normal((4, 6)), 0)
    # heads that pass features on
    params = {
        'projection': {
            v: {'kernel': np.eye(4, dtype=np.float32), 'bias': np.zeros(4, np.float32)}
            for v in 'ab'
        },
        'prototypes': jnp.asarray(prototypes, jnp.float32),
    }
    pooled = {v: jnp.asarray(3 * x, jnp.float32) for v, x in z.items()}
    batch = {v: {'data': jnp.zeros(8), 'valid': jnp.asarray(valid[v])} for v in 'ab'} | {
        'valid': jnp.ones(8, bool)
    }
    state = {
        'norm': {'a': {}, 'b': {}},
        'seen': jnp.int32(7),
        'queue': {
            v: {'features': jnp.asarray(x, jnp.float32), 'filled': jnp.full(10, 2.0)}
            for v, x in old.items()
        },
    }

    @jax.jit
    def value_and_grad(params, state):
        def value(params):
            out = objective.compute_loss(
                None, {'batch_stats': {}}, params, state, pooled, batch, rng_of(8)
            )
            return out.value, out.state

        return jax.value_and_grad(value, has_aux=True)(params)

    (got, new), grads = value_and_grad(params, state)
    want = []
    for a, v in (('a', 'b'), ('b', 'a')):
        code = np.zeros((8, 6))
        code[valid[a]] = swav(np.concatenate([z[a][valid[a]], old[a]]) @ prototypes, 0.05)[
            : valid[a].sum()
        ]
        use = valid[a] & valid[v]
        want.append(-(code * log_softmax(z[v] @ prototypes / 0.1))[use].sum(1).mean())
    np.testing.assert_allclose(got, np.mean(want), rtol=1e-5)
    np.testing.assert_allclose(
        new['queue']['a']['features'], np.concatenate([z['a'], old['a'][:2]]), rtol=1e-5, atol=1e-6
    )
    assert new['queue']['a']['filled'].tolist() == [2, 2, 1, 2, 2, 2, 2, 2, 2, 2]
    # a queue that is not full yet changes nothing
    part = jax.tree.map(lambda x: x, state)
    for v in 'ab':
        part['queue'][v]['filled'] = part['queue'][v]['filled'].at[-1].set(0)
    alone = np.mean(
        [
            -(
                np.where(valid[a][:, None], _codes(z[a], valid[a], prototypes), 0)
                * log_softmax(z[v] @ prototypes / 0.1)
            )[valid[a] & valid[v]]
            .sum(1)
            .mean()
            for a, v in (('a', 'b'), ('b', 'a'))
        ]
    )
    np.testing.assert_allclose(value_and_grad(params, part)[0][0], alone, rtol=1e-5)
    _, frozen = value_and_grad(params, {**state, 'seen': jnp.int32(4)})
    assert (
        float(jnp.abs(grads['prototypes']).max()) > 0
        and float(jnp.abs(frozen['prototypes']).max()) == 0
    )
    assert float(jnp.abs(frozen['projection']['a']['kernel']).max()) > 0


def _codes(z, valid, prototypes):
    out = np.zeros((len(z), prototypes.shape[1]))
    out[valid] = swav(z[valid] @ prototypes, 0.05)
    return out


def rng_of(n):
    return Rng.create(0, 0, np.arange(n))


# ---- k-means


def test_kmeans_finds_clusters_on_any_mesh_and_padding_weighs_nothing():
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 4, 203)
    x = (10 * np.eye(4)[kind] + rng.standard_normal((203, 4))).astype(np.float32)
    key = jax.random.key(0)
    labels, centroids = kmeans(
        key, jnp.concatenate([x, jnp.full((50, 4), 100.0)]), 4, 10, jnp.arange(253) < 203
    )
    assert (
        all(len(set(np.asarray(labels[:203])[kind == k])) == 1 for k in range(4))
        and len(set(np.asarray(labels[:203]))) == 4
    )
    np.testing.assert_allclose(
        np.sort(np.asarray(centroids).sum(1)),
        np.sort([x[kind == k].mean(0).sum() for k in range(4)]),
        rtol=1e-4,
    )
    for devices in (1, 8):
        got = cluster_rows(key, x, 4, 10, sharding.make_mesh({'replica': devices}))
        assert (
            got.shape == (203,)
            and all(len(set(got[kind == k])) == 1 for k in range(4))
            and len(set(got)) == 4
        )


@pytest.mark.parametrize(
    'targets, want',
    [
        ('own', {'video': ('video',), 'audio': ('audio',)}),
        ('other', {'video': ('audio',), 'audio': ('video',)}),
        ('both', {'video': ('video', 'audio'), 'audio': ('audio', 'video')}),
        ('joint', {'video': ('joint',), 'audio': ('joint',)}),
    ],
)
def test_who_predicts_whose_clusters(targets, want):
    """The clusters of what shows one split of the records and sounds like another."""
    objective = objectives.build(
        ConfigDict({'name': 'kmeans_labels', 'targets': targets, 'clusters': 2})
    )
    assert objective.targets == want
    n = np.arange(60)
    show, sound = n % 2, n // 30
    rows = {
        'video': np.eye(2)[show],
        'audio': np.eye(2)[sound],
        'video/valid': n > 2,
        'audio/valid': n < 59,
        'index': n,
    }
    params = {
        v: {t: {'kernel': np.zeros((2, 2)), 'bias': np.zeros(2)} for t in ts}
        for v, ts in want.items()
    }
    with jax.set_mesh(sharding.make_mesh({'replica': 1})):
        got = objective.refresh(None, params, None, 0, TrainingRecords(61, {}, lambda fn: rows))
    split = lambda column, by, use: len({*zip(column[:60][use], by[use])}) == 2
    for name, column in got.columns.items():
        assert column.shape == (61,) and column[60] == -1
        there = {
            'cluster.video': n > 2,
            'cluster.audio': n < 59,
            'cluster.joint': (n > 2) & (n < 59),
        }[name]
        assert ((column[:60] >= 0) == there).all()
        if name != 'cluster.joint':
            assert split(column, show if name == 'cluster.video' else sound, there)


def test_clusters_depend_on_the_seed():
    """Points without clusters of their own: where k-means starts decides."""
    objective = objectives.build(ConfigDict({'name': 'kmeans_labels', 'clusters': 4}))
    points = np.random.default_rng(0).normal(size=(200, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    rows = {'index': np.arange(200)}
    for view in ('video', 'audio'):
        rows |= {view: points, f'{view}/valid': np.ones(200, bool)}
    params = {
        view: {
            target: {'kernel': np.zeros((3, 4)), 'bias': np.zeros(4)}
            for target in objective.targets[view]
        }
        for view in objective.targets
    }

    def column(seed):
        records = TrainingRecords(200, {}, lambda fn: rows, seed)
        with jax.set_mesh(sharding.make_mesh({'replica': 1})):
            columns = objective.refresh(None, params, None, 3, records).columns
        return np.concatenate(list(columns.values()))

    np.testing.assert_array_equal(column(5), column(5))
    assert not np.array_equal(column(0), column(5))
    column(-1)  # any integer is a seed


# ---- evaluation


def test_clusters_are_evaluated_against_classes_and_other_clusters(tmp_path):
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 90)
    good = np.log(0.8 * np.eye(3)[(classes + 1) % 3] + 0.2 / 3)
    bad = np.log(rng.dirichlet(np.ones(3), 90))
    labels = np.where(np.arange(90) < 6, -1, classes)
    features = {
        'labels': {'class': labels},
        'valid': {'video': np.arange(90) != 10},
        'index': np.arange(90),
        'pooled': {'video': np.eye(3)[classes] + 0.01},
        'predictions': {'cluster/0': bad, 'cluster/1': good},
    }
    objective = types.SimpleNamespace(
        streams=lambda: ('video',),
        running_losses=lambda state: {'cluster/0': 0.1, 'cluster/1': 0.5},
    )
    encoder = types.SimpleNamespace(
        objective=objective, heads=(None, None), mesh=sharding.make_mesh({'replica': 1})
    )

    class Given(evals.FeatureView):
        def features(self, split, **request):
            return features

    view = Given.__new__(Given)
    view.encoder, view.seed = encoder, 0
    view.data = types.SimpleNamespace(info={'labels': {'class': ['a', 'b', 'c']}})
    got = Clustering({'type': 'clustering'}).run(view)
    assert (
        got.scalars['NMI'] == pytest.approx(1)
        and got.scalars['accuracy'] == 1
        and got.artifacts['examples'] == 83
    )
    assert (
        got.artifacts['best'] == 'cluster/1' and got.artifacts['chosen'] == 'cluster/0'
    )  # the oracle's head, and that of the lowest loss
    assert got.scalars['chosen/NMI'] < 0.5 and got.artifacts['confusion'].trace() == 83
    for c in got.artifacts['surest']:
        assert (
            len(set(classes[c['clips']])) == 1
            and c['name'].split('(')[1][0] == 'abc'[classes[c['clips'][0]]]
        )
    assert got.scalars['NMI_between_heads'] == pytest.approx(
        got.scalars['chosen/NMI']
    )  # to the head that is the classes
    assert got.artifacts['NMI/chance'] < 0.1 and got.artifacts['ARI/chance'] == pytest.approx(
        0, abs=0.05
    )
    assert 1 / 3 <= got.artifacts['accuracy/chance'] < 0.5 and got.artifacts[
        'mean_entropy/chance'
    ] == pytest.approx(np.log(3), abs=0.06)
    got = Clustering({'type': 'clustering', 'of': 'features'}).run(view)
    assert got.scalars['accuracy'] == 1 and 'NMI_between_heads' not in got.scalars
    some = np.arange(0, 90, 2)[::-1]  # another evaluation saw other clips, in another order
    evals.save(
        {'kmeans': Result({}, {'labels': bad.argmax(1)[some], 'clips': some})}, tmp_path / 'other'
    )
    against = Clustering(
        {'type': 'clustering', 'against': (('other', f'{tmp_path}/other:kmeans'),)}
    ).run(view)
    both = (labels >= 0) & (np.arange(90) != 10) & (np.arange(90) % 2 == 0)
    assert against.scalars['NMI_to/other'] == pytest.approx(
        normalized_mutual_info_score(classes[both], bad.argmax(1)[both])
    )
    for where, words in (
        (f'{tmp_path}/other:x', "has no clusters of 'x'; it has those of kmeans"),
        ('none:x', 'there is no none/arrays.npz'),
    ):
        with pytest.raises(ConfigError, match=words):
            Clustering({'type': 'clustering', 'against': (('other', where),)}).run(view)
    features['predictions'] = {}
    with pytest.raises(ConfigError, match="of='features'"):
        Clustering({'type': 'clustering'}).run(view)
    with pytest.raises(ConfigError, match="label 'kind' is not among"):
        Clustering({'type': 'clustering', 'label': 'kind'}).run(view)


def test_report_shows_the_surest_clips_of_clusters(tmp_path):
    data = data_pipelines.open(config('self_labelling'))
    surest = [
        {'name': 'cluster 3 (a <ring>), 9 clips', 'clips': [5, 2]},
        {'name': 'cluster 1 (no class), 2 clips', 'clips': [40]},
    ]
    entries = dict.fromkeys(('kmeans', 'clusters'), {'type': 'clustering'})
    gallery.clusters(
        tmp_path / 'clusters.npz',
        {'kmeans': Result({}), 'clusters': Result({}, {'surest': surest})},
        entries,
        data,
        16,
    )
    with np.load(tmp_path / 'clusters.npz') as stored:
        assert sorted(stored.files) == ['entries', 'frames/2', 'frames/40', 'frames/5']
        *_, third = itertools.islice(data.one_pass('train', 16), 3)
        np.testing.assert_array_equal(stored['frames/40'], third['video']['data'][8])
    page = report._clusters(types.SimpleNamespace(evaluation_folder=tmp_path))
    assert page.count('<img') == 3 and 0 < page.index('cluster 3 (a &lt;ring&gt;)') < page.index(
        'cluster 1 (no class)'
    )
    assert (
        'surest of, for the largest clusters (clusters)' in page
        and report._clusters(types.SimpleNamespace(evaluation_folder=tmp_path / 'none')) == ''
    )
