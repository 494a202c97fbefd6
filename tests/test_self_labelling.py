"""Objectives that make their own labels.

Through the common loop, and piece by piece against definitions in NumPy.
"""

import functools
import itertools
import json
import types

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.metrics import normalized_mutual_info_score

import data_pipelines
from tests import runs, tiny
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
from vatt_jax.reporting import clips
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
    """A config that trains an objective in five steps, with towers of one layer."""
    c = tiny.config(steps=5)
    if 'video.second' in FIELDS[name]['views']:
        c.data.views = (('video.second', {'kind': 'clip'}),)
    del c.model.towers['text']
    for tower in c.model.towers.values():
        tower.layers = 1
    c.model.head = ConfigDict({'name': 'none'})
    c.objective = ConfigDict({'name': name, **FIELDS[name], **fields})
    return c


def build(name, **fields):
    """An objective with some fields set."""
    return objectives.build(ConfigDict({'name': name, **fields}))


def refreshes(folder):
    """The lines that a run's refreshes logged, without what time alone decides."""
    lines = runs.log_lines(folder)
    return [line for line in lines if any(name.startswith('refresh/') for name in line)]


def check_self_labelling(state, columns, logged):
    """Three refreshes labelled every record, each head by itself."""
    assert [line['step'] for line in logged] == [0, 1, 3]
    assert all(line['refresh/converged'] == 1 for line in logged)
    assert 'refresh/NMI_to_last' not in logged[0]
    assert 'refresh/NMI_to_last' in logged[1]
    chex.assert_shape(columns['label'], (64, 2))
    assert (columns['label'] >= 0).all()
    assert (columns['label'][:, 0] != columns['label'][:, 1]).any()
    assert int(state.objective['refreshes']) == 3
    assert (np.asarray(state.objective['loss']) > 0).all()


def check_online_codes(state, columns, logged):
    """Prototypes are units, and the queue is full."""
    norms = np.linalg.norm(state.params['objective']['prototypes'], axis=0)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
    assert (np.asarray(state.objective['queue']['audio']['filled']) == 2).all()


def check_kmeans_labels(state, columns, logged):
    """Both views were clustered, and each predicts both."""
    assert set(columns) == {'cluster.video', 'cluster.audio'}
    assert set(state.params['objective']['video']) == {'video', 'audio'}
    totals = [frequency.sum() for frequency in state.objective['frequency'].values()]
    np.testing.assert_allclose(totals, 1, rtol=1e-5)


@pytest.mark.parametrize(
    'name, check',
    [
        pytest.param('self_labelling', check_self_labelling, marks=pytest.mark.slow),
        pytest.param('online_codes', check_online_codes, marks=pytest.mark.slow),
        pytest.param('kmeans_labels', check_kmeans_labels, marks=pytest.mark.slow),
    ],
)
def test_killed_and_continued_is_uninterrupted(name, check, tmp_path):
    """Parameters, labels, potentials, queue, and what the refreshes logged."""
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    expected = run(whole, config(name))
    with stop_at(3):
        run(cut, config(name))
    got = run(cut, config(name))
    assert got['digests'] == expected['digests']
    assert got['order'] == expected['order']
    assert expected['skipped_steps'] == 0
    assert losses(cut) == losses(whole)
    assert refreshes(cut) == refreshes(whole)

    state, _, columns = state_of(whole, config(name))
    cut_state, _, cut_columns = state_of(cut, config(name))
    chex.assert_trees_all_equal(cut_state.params, state.params)
    chex.assert_trees_all_equal(cut_state.objective, state.objective)
    chex.assert_trees_all_equal(dict(cut_columns), dict(columns))
    chex.assert_tree_all_finite(state.params)
    check(state, columns, refreshes(whole))


# ---- refreshes, on features that are given


def built(features, **fields):
    """(objective, params, state) of self-labelling for features {view: [n D]}, on the host."""
    fields = {'clusters': 5, **fields}
    objective = build('self_labelling', views=tuple(features), **fields)
    encoded = {}
    for view, x in features.items():
        encoded[view] = types.SimpleNamespace(pooled=jax.ShapeDtypeStruct(x.shape, 'float32'))
    output = types.SimpleNamespace(encoded=encoded)
    spec = objectives.Spec(None, output, None, number_of_rows(features), {})

    @jax.jit
    def init(key):
        return nn.meta.unbox(objective.init(key, spec))

    params, state = jax.tree.map(np.array, init(jax.random.key(3)))
    return objective, params, state


def number_of_rows(features):
    """n of features {view: [n D]}."""
    return len(next(iter(features.values())))


def relabelling(features, records=None, columns=None, step=0, mesh=1, change=None, **fields):
    """One refresh of self-labelling on features that are given.

    Args:
        features: {view: [n D]}.
        records: what the pass over the training set returns instead, beside or above them.
        columns: of the last refresh.
        step: of the refresh.
        mesh: number of devices.
        change: `change(params, state)` sets in place what they are before.
        **fields: of the objective's config.

    Returns:
        (objective, parameters before, RefreshResult).
    """
    objective, params, state = built(features, **fields)
    if change is not None:
        change(params, state)
    n = number_of_rows(features)
    rows = {**features, 'index': np.arange(n)}
    for view in features:
        rows[f'{view}/valid'] = np.ones(n, bool)
    rows.update(records or {})
    training = TrainingRecords(n, columns or {}, lambda fn, augment=True, draw=0: rows)
    with jax.set_mesh(sharding.make_mesh({'replica': mesh})):
        got = objective.refresh(None, params, state, step, training)
    chex.assert_trees_all_equal_shapes_and_dtypes(got.params, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(got.state, state)
    chex.assert_tree_all_finite(got.params)
    chex.assert_shape(got.columns['label'], (n, objective.config.heads))
    return objective, params, got


def logits_of(features, params, head='0'):
    """float64 logits {view: [n P]} of a head."""
    logits = {}
    for view, x in features.items():
        layer = params[view.split('.')[0]][head]
        logits[view] = x.astype(np.float64) @ layer['kernel'] + layer['bias']
    return logits


def two_views(n=600, seed=0):
    """Features of two views whose rows belong to five groups, the same in both."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 5, n)
    features = {}
    for view, width in (('video', 7), ('audio', 4)):
        centres = np.eye(5)[group] @ rng.standard_normal((5, width)) * 2
        features[view] = (centres + rng.standard_normal((n, width))).astype(np.float32)
    return features


@pytest.mark.parametrize('mesh', [1, 8])
def test_labels_are_the_transport_of_the_mean_log_probability(mesh):
    """Against the definition in float64: argmax of 20 log p + g, with exact potentials g.

    A third of the records has no sound, one has nothing at all and one cannot be read.
    """
    features = two_views()
    n = number_of_rows(features)
    has_sound = np.arange(n) % 3 != 0
    has_anything = np.arange(n) != 6
    records = {
        **features,
        'audio/valid': has_sound & has_anything,
        'video/valid': has_anything,
        'index': np.arange(n),
    }
    readable = {name: values[:-1] for name, values in records.items()}
    _, params, got = relabelling(
        features, readable, mesh=mesh, prior='zipf', spread=0.5, align=False, tolerance=1e-6
    )

    logits = logits_of(features, params)
    of_video, of_audio = log_softmax(logits['video']), log_softmax(logits['audio'])
    log_p = np.where(has_sound[:, None], (of_video + of_audio) / 2, of_video)
    labelled = has_anything.copy()
    labelled[-1] = False
    z = 20 * log_p[labelled]
    share = (1.0 + np.arange(5)) ** -0.5
    share = share / share.sum()
    # The largest size goes to the cluster with most mass.
    prior = np.empty(5)
    prior[np.argsort(-column_means(z, 0))] = share
    expected = (z + converged(z, prior)).argmax(1)

    label = got.columns['label'][:, 0]
    np.testing.assert_array_equal(label[labelled], expected)
    assert (label[~labelled] == -1).all()
    np.testing.assert_allclose(np.bincount(expected, minlength=5) / len(expected), prior, atol=0.02)
    assert got.metrics['residual'] <= 1e-6
    assert 'NMI_to_last' not in got.metrics
    assert 'cost' not in got.metrics


def number_otherwise(params, state):
    """Both views get the same confident head, with its clusters in another order."""
    order = np.array([3, 0, 4, 1, 2])
    params['video']['0']['kernel'] *= 8
    for part in ('kernel', 'bias'):
        params['audio']['0'][part] = params['video']['0'][part][..., order]


def test_heads_that_differ_by_their_numbering_are_aligned():
    """Both views see the same features: alignment finds the numbering exactly."""
    x = two_views()['video']
    _, params, got = relabelling({'video': x, 'audio': x}, change=number_otherwise)
    chex.assert_trees_all_equal(got.params['audio']['0'], params['video']['0'])
    chex.assert_trees_all_equal(got.params['video']['0'], params['video']['0'])


def test_heads_are_aligned_at_the_first_refresh_alone():
    def after_the_first(params, state):
        number_otherwise(params, state)
        state['refreshes'] = np.int32(1)

    x = two_views()['video']
    _, params, got = relabelling({'video': x, 'audio': x}, change=after_the_first)
    chex.assert_trees_all_equal(got.params, params)


def test_a_refresh_starts_from_the_last_one():
    features = two_views(3000)
    refresh = functools.partial(relabelling, clusters=40, strength=40.0)
    _, _, first = refresh(features)
    drift = {}
    for view, x in features.items():
        noise = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
        drift[view] = x + 0.03 * noise

    def continue_from_first(params, state):
        params.update(first.params)
        state.update(first.state)

    refresh = functools.partial(refresh, drift, columns=first.columns, change=continue_from_first)
    _, _, again = refresh()
    _, _, anew = refresh(warm=False)

    label = again.columns['label'][:, 0]
    costs = []
    for logits in logits_of(drift, first.params).values():
        costs.append(-log_softmax(logits)[np.arange(3000), label])
    np.testing.assert_allclose(again.metrics['cost'], np.mean(costs), rtol=1e-4)
    assert again.metrics['converged'] == 1
    assert anew.metrics['converged'] == 1
    assert again.metrics['passes'] < anew.metrics['passes'] / 2
    assert int(again.state['refreshes']) == 2
    assert np.mean(again.columns['label'] != anew.columns['label']) < 0.01
    changed = np.mean(again.columns['label'] != first.columns['label'])
    assert again.metrics['changed'] == pytest.approx(changed)
    assert 0 < changed < 0.5
    assert 0.5 < again.metrics['NMI_to_last'] < 1


SIZES = np.array([0.7, 1.2, 1.0, 1.4, 0.7], np.float32)
MASS = np.array([0.1, 0.4, 0.05, 0.15, 0.3])


def test_gaussian_sizes_go_to_clusters_in_the_order_of_their_mass():
    objective, _, _ = built(two_views(), prior='gaussian', spread=0.3)
    sizes, shares = objective.prior(SIZES, lambda: MASS)
    np.testing.assert_array_equal(sizes, SIZES)
    np.testing.assert_allclose(shares, np.array([0.7, 1.4, 0.7, 1.0, 1.2]) / 5, rtol=1e-6)


def test_gaussian_sizes_have_mean_one_and_the_spread_that_is_set():
    objective, _, _ = built(two_views(), prior='gaussian', spread=0.3)
    draws = [np.asarray(objective.sizes(jax.random.key(seed))) for seed in range(200)]
    chex.assert_equal_shape([*draws, SIZES])
    np.testing.assert_allclose([np.std(draws), np.mean(draws)], [0.3, 1], atol=0.05)


def test_published_sizes_are_moved_and_inverted():
    objective, _, _ = built(two_views(), prior='gaussian', spread=0.3, published_prior=True)
    sizes, shares = objective.prior(SIZES, lambda: MASS)
    # Moved to the clusters in the mass's order, not sorted …
    np.testing.assert_array_equal(sizes, np.array([1.2, 0.7, 0.7, 1.0, 1.4], np.float32))
    # … and the largest size has the smallest share.
    np.testing.assert_allclose(shares, (1 / sizes) / (1 / sizes).sum(), rtol=1e-6)


def test_the_published_mass_is_the_sum_of_the_product_of_both_views_probabilities():
    def set_sizes(params, state):
        state['sizes'][0] = SIZES

    features = two_views()
    _, params, got = relabelling(
        features,
        prior='gaussian',
        spread=0.3,
        published_prior=True,
        align=False,
        change=set_sizes,
    )
    log_p = sum(log_softmax(logits) for logits in logits_of(features, params).values())
    expected = np.empty(5)
    expected[np.argsort(np.exp(log_p).sum(0))] = SIZES
    np.testing.assert_allclose(got.state['sizes'][0], expected, rtol=1e-6)
    shares = np.bincount(got.columns['label'][:, 0], minlength=5) / 600
    np.testing.assert_allclose(shares, (1 / expected) / (1 / expected).sum(), atol=0.02)


def test_the_published_schedule():
    """200 epochs of 1000 steps.

    The first refreshes come at epochs 0, 0.2, 0.57, 1.06, 1.62, 2.27 and 2.98; 99 of 100 are left,
    about 3 epochs apart at the end.
    """
    steps = sorted(schedule(200_000, 100, 1.5))
    first_epochs = np.array(steps[:7]) / 1000
    expected = [0, 0.203, 0.574, 1.055, 1.624, 2.27, 2.984]
    np.testing.assert_allclose(first_epochs, expected, atol=2e-3)
    assert len(steps) == 99
    assert 2900 < steps[-1] - steps[-2] < 3100


@pytest.mark.parametrize(
    'arguments, expected',
    [
        ((6, 6, 1.5), [0, 1, 2, 3, 5]),
        ((6, 5, 1.0, 10), [10, 12, 13, 15]),
        # Times 0.02, 0.16 and 0.54 fall into one step.
        ((20, 11, 3.0), [0, 1, 2, 3, 4, 5, 6, 7, 11, 15]),
        # More refreshes than steps: one in each.
        ((3, 100, 2.0), [0, 1, 2]),
    ],
)
def test_short_schedules(arguments, expected):
    assert sorted(schedule(*arguments)) == expected


# ---- the loss of self-labelling


@pytest.mark.parametrize('unit', [False, True])
def test_loss_is_the_mean_over_views_and_heads(unit):
    """Views that are missing and records without a label count for nothing.

    Before the first refresh there is nothing to learn.
    """
    rng = np.random.default_rng(0)
    views = ('video', 'video.second', 'audio')
    x = {view: rng.standard_normal((16, 5)).astype(np.float32) for view in views}
    valid = {
        'video': np.arange(16) % 5 != 0,
        'video.second': np.arange(16) % 7 != 0,
        'audio': np.arange(16) % 3 != 0,
    }
    label = rng.integers(-1, 4, (16, 3)).astype(np.int32)
    objective, params, state = built(x, clusters=4, heads=3, unit_logits=unit)
    encoded = {view: types.SimpleNamespace(pooled=x[view]) for view in views}
    batch = {view: {'data': np.zeros(16), 'valid': valid[view]} for view in views}
    batch['valid'] = np.arange(16) != 1

    @jax.jit
    def loss(params, state, batch):
        out = objective.compute_loss(None, {'batch_stats': {}}, params, state, x, batch, rng_of(16))
        return out.value, out.state, out.apply_update

    @jax.jit
    def predict(params, state):
        return objective.predict(params, state, encoded)

    labelled_batch = {**batch, 'columns': {'label': label}}
    value, new_state, apply_update = loss(params, state, labelled_batch)
    chex.assert_shape(value, ())
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)

    # -mean over labelled, valid rows of log p(label), by view and head
    expected = np.zeros((3, 3))
    for head in range(3):
        for row, (view, z) in enumerate(logits_of(x, params, str(head)).items()):
            if unit:
                z = z / np.linalg.norm(z, axis=1, keepdims=True)
            counts = (label[:, head] >= 0) & valid[view] & batch['valid']
            expected[row, head] = -log_softmax(z)[counts, label[counts, head]].mean()
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(new_state['loss'], expected.mean(0), rtol=1e-5)
    assert bool(apply_update)

    value, new_state, apply_update = loss(params, state, batch)
    assert float(value) == 0
    assert not bool(apply_update)
    assert int(new_state['seen']) == 1

    predicted = predict(params, state)
    log_p = sum(log_softmax(z) for z in logits_of(x, params, '1').values())
    np.testing.assert_allclose(predicted['cluster/1'], log_p, rtol=1e-4, atol=1e-4)


def test_passes_of_a_refresh_see_other_clips_each_time():
    data = data_pipelines.open(config('self_labelling'))

    def windows(draw):
        batches = data.one_pass('train', 16, by='records', augment=True, draw=draw)
        video = next(batches)['video']
        return {'box': video['box'], 'start': video['start']}

    first = windows('0/0')
    chex.assert_trees_all_equal(windows('0/0'), first)
    for draw in ('0/1', '4/0', ''):
        other = windows(draw)
        chex.assert_trees_all_equal_shapes_and_dtypes(other, first)
        with pytest.raises(AssertionError):
            chex.assert_trees_all_equal(other, first)


@pytest.mark.parametrize(
    'fields, message',
    [
        (
            {'name': 'self_labelling', 'groups': 3, 'heads': 2},
            'groups: expected at most one group per head, got 3 for 2 heads',
        ),
        (
            {'name': 'self_labelling', 'prior': 'normal'},
            'choose one of uniform',
        ),
        (
            {'name': 'self_labelling', 'shares': (0.5, 0.5, 0.0), 'clusters': 3},
            r'shares: prior\[2\]=0.0',
        ),
        (
            {'name': 'self_labelling', 'shares': (0.5, 0.5)},
            'expected one share for each of the 24 clusters, got 2',
        ),
        (
            {'name': 'self_labelling', 'views': ()},
            'views: expected at least one stream, got none',
        ),
        (
            {'name': 'kmeans_labels', 'views': ('video', 'video.second'), 'targets': 'other'},
            'expected views of two modalities',
        ),
        (
            {'name': 'online_codes', 'views': ('video',)},
            'expected at least two views',
        ),
    ],
)
def test_a_mistake_in_the_config_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        objectives.build(ConfigDict(fields))


# ---- online codes


def unit(x, axis=-1):
    """x / |x| over an axis."""
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


def swapped_prediction(z, valid, prototypes, queue=None):
    """SwAV: each view predicts the other's codes, -mean over clips with both of Σ q log p.

    Codes are those of a view's valid rows and, behind them, of the queue.
    """
    losses = []
    for a, v in (('a', 'b'), ('b', 'a')):
        rows = z[a][valid[a]]
        if queue is not None:
            rows = np.concatenate([rows, queue[a]])
        codes = np.zeros((len(z[a]), prototypes.shape[1]))
        codes[valid[a]] = swav(rows @ prototypes, 0.05)[: valid[a].sum()]
        log_p = log_softmax(z[v] @ prototypes / 0.1)
        losses.append(-(codes * log_p)[valid[a] & valid[v]].sum(1).mean())
    return np.mean(losses)


class TestOnlineCodes:
    """Two views of eight clips, a queue of ten and heads that pass features on."""

    valid = {'a': np.arange(8) != 2, 'b': np.arange(8) != 5}

    def values(self):
        """Embeddings and queues {view: [n 4]}, and prototypes [4 6], in float64."""
        rng = np.random.default_rng(0)
        z = {view: unit(rng.standard_normal((8, 4))) for view in 'ab'}
        queue = {view: unit(rng.standard_normal((10, 4))) for view in 'ab'}
        prototypes = unit(rng.standard_normal((4, 6)), 0)
        return z, queue, prototypes

    def params(self):
        _, _, prototypes = self.values()
        identity = {'kernel': np.eye(4, dtype=np.float32), 'bias': np.zeros(4, np.float32)}
        return {
            'projection': {'a': identity, 'b': identity},
            'prototypes': jnp.asarray(prototypes, jnp.float32),
        }

    def state(self, seen=7, last_filled=2.0):
        _, queue, _ = self.values()
        queues = {}
        for view, features in queue.items():
            filled = jnp.full(10, 2.0).at[-1].set(last_filled)
            queues[view] = {'features': jnp.asarray(features, jnp.float32), 'filled': filled}
        return {'norm': {'a': {}, 'b': {}}, 'seen': jnp.int32(seen), 'queue': queues}

    @pytest.fixture(scope='class')
    def value_and_grad(self):
        """((value, new state), gradients) of the loss, a compiled function of the state."""
        fields = {'clusters': 6, 'hidden': 0, 'width': 4, 'queue': 10, 'freeze': 5}
        objective = build('online_codes', views=('a', 'b'), **fields)
        z, _, _ = self.values()
        pooled = {view: jnp.asarray(3 * x, jnp.float32) for view, x in z.items()}
        batch = {'valid': jnp.ones(8, bool)}
        for view, valid in self.valid.items():
            batch[view] = {'data': jnp.zeros(8), 'valid': jnp.asarray(valid)}

        def loss(params, state):
            out = objective.compute_loss(
                None, {'batch_stats': {}}, params, state, pooled, batch, rng_of(8)
            )
            return out.value, out.state

        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))

        def of_state(state):
            params = self.params()
            (value, new_state), gradients = compiled(params, state)
            chex.assert_shape(value, ())
            chex.assert_trees_all_equal_shapes_and_dtypes(gradients, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
            chex.assert_tree_all_finite((value, gradients, new_state))
            return (value, new_state), gradients

        return of_state

    def test_the_loss_is_swavs_swapped_prediction_with_the_queue(self, value_and_grad):
        (value, _), gradients = value_and_grad(self.state())
        z, queue, prototypes = self.values()
        expected = swapped_prediction(z, self.valid, prototypes, queue)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert float(jnp.abs(gradients['prototypes']).max()) > 0

    def test_a_queue_that_is_not_full_yet_changes_nothing(self, value_and_grad):
        (value, _), _ = value_and_grad(self.state(last_filled=0.0))
        z, _, prototypes = self.values()
        expected = swapped_prediction(z, self.valid, prototypes)
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_the_batch_enters_the_queue_in_front(self, value_and_grad):
        (_, state), _ = value_and_grad(self.state())
        z, queue, _ = self.values()
        np.testing.assert_allclose(
            state['queue']['a']['features'],
            np.concatenate([z['a'], queue['a'][:2]]),
            rtol=1e-5,
            atol=1e-6,
        )
        # The clip without the view is marked as such.
        assert state['queue']['a']['filled'].tolist() == [2, 2, 1, 2, 2, 2, 2, 2, 2, 2]

    def test_prototypes_are_frozen_at_first(self, value_and_grad):
        _, gradients = value_and_grad(self.state(seen=4))
        frozen = gradients['prototypes']
        chex.assert_trees_all_equal(frozen, jnp.zeros_like(frozen))
        assert float(jnp.abs(gradients['projection']['a']['kernel']).max()) > 0


def rng_of(n):
    """The root of random bits for n examples."""
    return Rng.create(0, 0, np.arange(n))


# ---- k-means


def assert_same_partition(labels, groups):
    """Rows have the same label exactly where they are of the same group."""
    pairs = set(zip(np.asarray(labels).tolist(), groups.tolist(), strict=True))
    assert len(pairs) == len(set(groups.tolist())) == len(set(np.asarray(labels).tolist()))


def groups_far_apart():
    """float32 [203 4] and the group of each row, one of four."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 4, 203)
    x = 10 * np.eye(4)[group] + rng.standard_normal((203, 4))
    return x.astype(np.float32), group


def test_kmeans_gives_padding_no_weight():
    x, group = groups_far_apart()
    padded = jnp.concatenate([x, jnp.full((50, 4), 100.0)])
    labels, centroids = kmeans(jax.random.key(0), padded, 4, 10, jnp.arange(253) < 203)
    chex.assert_shape([labels, centroids], [(253,), (4, 4)])
    assert_same_partition(labels[:203], group)
    means = [x[group == g].mean(0).sum() for g in range(4)]
    np.testing.assert_allclose(np.sort(np.asarray(centroids).sum(1)), np.sort(means), rtol=1e-4)


@pytest.mark.parametrize('devices', [1, 8])
def test_kmeans_finds_groups_on_any_mesh(devices):
    x, group = groups_far_apart()
    mesh = sharding.make_mesh({'replica': devices})
    labels = cluster_rows(jax.random.key(0), x, 4, 10, mesh)
    chex.assert_shape(labels, (203,))
    chex.assert_type(labels, np.int32)
    assert_same_partition(labels, group)


@pytest.mark.parametrize(
    'targets, expected',
    [
        ('own', {'video': ('video',), 'audio': ('audio',)}),
        ('other', {'video': ('audio',), 'audio': ('video',)}),
        ('both', {'video': ('video', 'audio'), 'audio': ('audio', 'video')}),
        ('joint', {'video': ('joint',), 'audio': ('joint',)}),
    ],
)
def test_who_predicts_whose_clusters(targets, expected):
    """The clusters of what shows one split of the records and sounds like another."""
    objective = build('kmeans_labels', targets=targets, clusters=2)
    assert objective.targets == expected

    index = np.arange(60)
    show, sound = index % 2, index // 30
    has_video, has_audio = index > 2, index < 59
    rows = {
        'video': np.eye(2)[show],
        'audio': np.eye(2)[sound],
        'video/valid': has_video,
        'audio/valid': has_audio,
        'index': index,
    }
    params = {}
    for view, names in expected.items():
        params[view] = {name: {'kernel': np.zeros((2, 2)), 'bias': np.zeros(2)} for name in names}
    with jax.set_mesh(sharding.make_mesh({'replica': 1})):
        got = objective.refresh(None, params, None, 0, TrainingRecords(61, {}, lambda fn: rows))

    there = {
        'cluster.video': has_video,
        'cluster.audio': has_audio,
        'cluster.joint': has_video & has_audio,
    }
    splits = {'cluster.video': show, 'cluster.audio': sound}
    for name, column in got.columns.items():
        chex.assert_shape(column, (61,))
        # The record that was not read has no cluster.
        assert column[60] == -1
        assert ((column[:60] >= 0) == there[name]).all()
        if name in splits:
            assert_same_partition(column[:60][there[name]], splits[name][there[name]])


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


class GivenFeatures(evals.FeatureView):
    """What an evaluator sees of a model, with features that are given."""

    def __init__(self, features, encoder, info):
        self.given = features
        self.encoder = encoder
        self.data = types.SimpleNamespace(info=info)
        self.seed = 0

    def features(self, split, **request):
        return self.given


class TestClusteringEvaluator:
    """Ninety clips of three classes and two heads.

    The second head is the classes, numbered otherwise; the first is noise, and has the lower loss.
    Six clips have no class and one has no video, so 83 count.
    """

    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 90)
    good = np.log(0.8 * np.eye(3)[(classes + 1) % 3] + 0.2 / 3)
    bad = np.log(rng.dirichlet(np.ones(3), 90))
    has_class = np.arange(90) >= 6
    has_video = np.arange(90) != 10

    def view(self, **features):
        """The features as an evaluator sees them, some of them replaced."""
        features = {
            'labels': {'class': np.where(self.has_class, self.classes, -1)},
            'valid': {'video': self.has_video},
            'index': np.arange(90),
            'pooled': {'video': np.eye(3)[self.classes] + 0.01},
            'predictions': {'cluster/0': self.bad, 'cluster/1': self.good},
            **features,
        }
        objective = types.SimpleNamespace(
            streams=lambda: ('video',),
            running_losses=lambda state: {'cluster/0': 0.1, 'cluster/1': 0.5},
        )
        encoder = types.SimpleNamespace(
            objective=objective, heads=(None, None), mesh=sharding.make_mesh({'replica': 1})
        )
        return GivenFeatures(features, encoder, {'labels': {'class': ['a', 'b', 'c']}})

    def run(self, **config):
        return Clustering({'type': 'clustering', **config}).run(self.view())

    def test_the_best_head_is_that_of_the_classes_and_the_chosen_one_has_the_lowest_loss(self):
        got = self.run()
        assert got.artifacts['examples'] == 83
        assert got.artifacts['best'] == 'cluster/1'
        assert got.artifacts['chosen'] == 'cluster/0'
        assert got.scalars['NMI'] == pytest.approx(1)
        assert got.scalars['accuracy'] == 1
        assert got.scalars['chosen/NMI'] < 0.5
        # The other head is the classes.
        assert got.scalars['NMI_between_heads'] == pytest.approx(got.scalars['chosen/NMI'])

    def test_the_confusion_is_diagonal_and_the_surest_clips_are_of_their_clusters_class(self):
        got = self.run()
        chex.assert_shape(got.artifacts['confusion'], (3, 3))
        assert got.artifacts['confusion'].trace() == 83
        for cluster in got.artifacts['surest']:
            (label,) = set(self.classes[cluster['clips']])
            named = cluster['name'].split('(')[1][0]
            assert named == 'abc'[label]

    def test_chance_is_reported_beside(self):
        chance = self.run().artifacts
        assert chance['NMI/chance'] < 0.1
        assert chance['ARI/chance'] == pytest.approx(0, abs=0.05)
        assert 1 / 3 <= chance['accuracy/chance'] < 0.5
        assert chance['mean_entropy/chance'] == pytest.approx(np.log(3), abs=0.06)

    def test_features_are_clustered_where_no_head_is(self):
        got = self.run(of='features')
        assert got.scalars['accuracy'] == 1
        assert 'NMI_between_heads' not in got.scalars

    def test_clusters_are_compared_with_those_of_another_evaluation(self, tmp_path):
        """It saw other clips, in another order: those of both count."""
        clips = np.arange(0, 90, 2)[::-1]
        labels = self.bad.argmax(1)
        other = Result({}, {'labels': labels[clips], 'clips': clips})
        evals.save({'kmeans': other}, tmp_path / 'other')
        got = self.run(against=(('other', f'{tmp_path}/other:kmeans'),))
        both = self.has_class & self.has_video & (np.arange(90) % 2 == 0)
        expected = normalized_mutual_info_score(self.classes[both], labels[both])
        assert got.scalars['NMI_to/other'] == pytest.approx(expected)
        with pytest.raises(ConfigError, match="has no clusters of 'x'; it has those of kmeans"):
            self.run(against=(('other', f'{tmp_path}/other:x'),))

    def test_what_is_not_there_is_named(self):
        with pytest.raises(ConfigError, match='there is no none/arrays.npz'):
            self.run(against=(('other', 'none:x'),))
        with pytest.raises(ConfigError, match="of='features'"):
            Clustering({'type': 'clustering'}).run(self.view(predictions={}))
        with pytest.raises(ConfigError, match="label 'kind' is not among"):
            self.run(label='kind')


def test_report_shows_the_surest_clips_of_clusters(tmp_path):
    data = data_pipelines.open(config('self_labelling'))
    surest = [
        {'name': 'cluster 3 (a <ring>), 9 clips', 'clips': [5, 2]},
        {'name': 'cluster 1 (no class), 2 clips', 'clips': [40]},
    ]
    results = {'kmeans': Result({}), 'clusters': Result({}, {'surest': surest})}
    entries = {'kmeans': {'type': 'clustering'}, 'clusters': {'type': 'clustering'}}
    gallery.clusters(tmp_path / 'clusters.npz', results, entries, data, 16)
    with np.load(tmp_path / 'clusters.npz') as stored:
        names = {name for name in stored.files if name.startswith('frames/')}
        assert names == {'frames/2', 'frames/40', 'frames/5'}
        assert json.loads(str(stored['entries']))['fps'] == data.config.model.inputs.video.fps
        # Clip 40 is row 8 of the third batch.
        *_, third = itertools.islice(data.one_pass('train', 16), 3)
        np.testing.assert_array_equal(stored['frames/40'], third['video']['data'][8])

    source = clips.open_source(tmp_path / 'clusters.npz')
    assert source.document['evaluator'] == 'clusters'
    assert sorted(source.indices) == ['2', '40', '5']
    # In the order of the clusters, each named as the evaluator named it.
    shown = [cluster['name'] for cluster in source.document['clusters']]
    assert shown == ['cluster 3 (a <ring>), 9 clips', 'cluster 1 (no class), 2 clips']
    assert clips.open_source(tmp_path / 'none' / 'clusters.npz') is None
