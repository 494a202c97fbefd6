"""A sum of tasks: its value and gradient by definition, and what passes through to each task."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import small_nets, tiny  # noqa: F401 (registers towers)
from tests.test_train import log_lines, losses, run, state_of, stop_at
from vatt_jax import objectives
from vatt_jax.config import ConfigError
from vatt_jax.objectives import Loss, Objective, RefreshResult, Spec, TrainingRecords
from vatt_jax.objectives.temporal_order import draw_changed
from vatt_jax.rng import Rng
from vatt_jax.training import train_step

B, T, D = 6, 5, 3
TASKS = {
    'arrow': {'name': 'temporal_order', 'stream': 'video'},
    'taught': {'name': 'distillation', 'teacher': 'audio'},
    'taught_back': {'name': 'distillation', 'student': 'audio', 'teacher': 'video'},
}
WEIGHTS = {'arrow': 0.7, 'taught': 0.2, 'taught_back': 1.5}


def build(tasks=None, weights=None):
    fields = {'name': 'multi_task', 'tasks': TASKS if tasks is None else tasks}
    return objectives.build(ConfigDict({**fields, 'weights': weights or {}}))


def rng():
    return Rng.create(3, 0, jnp.arange(B, dtype=jnp.uint32))


class Towers:
    """A feature is the data, weighted by time and summed, through a matrix of the stream.

    Attributes:
        passes: the streams of each pass so far.
    """

    def __init__(self):
        self.passes = []

    def apply(self, variables, batch, train, **options):
        assert train
        streams = {name: entry for name, entry in batch.items() if 'data' in entry}
        self.passes.append(tuple(streams))
        pooled = {}
        for name, entry in streams.items():
            summed = jnp.einsum('btc,t->bc', entry['data'], jnp.arange(1.0, T + 1))
            pooled[name] = summed @ variables['params'][name]
        return pooled, {'batch_stats': {'passes': variables['batch_stats']['passes'] + 1}}


def draw_case():
    """(matrices, clips, which are valid, head), float64."""
    draw = np.random.default_rng(1)
    params = {name: draw.normal(size=(2, D)) for name in ('video', 'audio')}
    clips = {name: 0.2 * draw.normal(size=(B, T, 2)) for name in params}
    valid = {
        'video': np.array([1, 1, 1, 1, 0, 1], bool),
        'audio': np.array([1, 0, 1, 1, 1, 1], bool),
    }
    return params, clips, valid, (draw.normal(size=(D, 2)), draw.normal(size=2))


def definition(params, teachers, clips, valid, head, is_changed):
    """The weighted sum, clip by clip. `teachers`: the matrices through which no gradient flows."""
    times = np.arange(1.0, T + 1)

    def feature(name, b, matrices, backwards=False):
        clip = clips[name][b, ::-1] if backwards else clips[name][b]
        return (times @ clip) @ matrices[name]

    distance, back, entropy = [], [], []
    for b in range(B):
        if valid['video'][b] and valid['audio'][b]:
            video, audio = feature('video', b, params), feature('audio', b, params)
            distance.append(np.linalg.norm(video - feature('audio', b, teachers)))
            back.append(np.linalg.norm(audio - feature('video', b, teachers)))
        if valid['video'][b]:
            logits = feature('video', b, params, is_changed[b]) @ head[0] + head[1]
            entropy.append(np.log(np.exp(logits).sum()) - logits[int(is_changed[b])])
    parts = {'arrow': np.mean(entropy), 'taught': np.mean(distance), 'taught_back': np.mean(back)}
    return sum(WEIGHTS[name] * part for name, part in parts.items()), parts


def test_the_sum_and_its_gradient_are_those_of_the_definition():
    params, clips, valid, head = draw_case()
    objective, towers = build(weights=WEIGHTS), Towers()
    batch = {}
    for name in clips:
        batch[name] = {'data': jnp.float32(clips[name]), 'valid': jnp.array(valid[name])}
    own = {'arrow': {'kernel': jnp.float32(head[0]), 'bias': jnp.float32(head[1])}}
    own = {**own, 'taught': {}, 'taught_back': {}}
    state = {'arrow': {'norm': {}}, 'taught': {}, 'taught_back': {}}

    def loss_of(params):
        variables = {'params': params, 'batch_stats': {'passes': 0}}
        loss = objective.loss(towers, variables, own, state, batch, rng())
        return loss.value, (loss, draw_changed(rng().at('arrow')))

    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (value, (loss, is_changed)), grads = jax.device_get(step(jax.tree.map(jnp.float32, params)))
    expected, parts = definition(params, params, clips, valid, head, is_changed)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, part in parts.items():
        np.testing.assert_allclose(loss.metrics[f'{name}/loss'], part, rtol=1e-5)
    assert 0 <= loss.metrics['arrow/accuracy'] <= 1
    # Both distillations share one pass; the changed clips need another.
    assert towers.passes == [('video', 'audio'), ('video',)]
    assert loss.batch_stats == {'passes': 2}

    for name, matrix in params.items():
        numeric = np.zeros_like(matrix)
        for place in np.ndindex(matrix.shape):
            nudge = np.zeros_like(matrix)
            nudge[place] = 1e-6
            above, below = ({**params, name: matrix + sign * nudge} for sign in (1, -1))
            difference = [
                definition(moved, params, clips, valid, head, is_changed)[0]
                for moved in (above, below)
            ]
            numeric[place] = (difference[0] - difference[1]) / 2e-6
        np.testing.assert_allclose(grads[name], numeric, rtol=1e-4, atol=1e-5)


# ---- what each task gets and gives


class Noting(Objective):
    """A task whose every part says what it was given."""

    def streams(self):
        return ('audio',)

    def init(self, key, spec):
        return {'w': jnp.ones(())}, {'begun': jnp.zeros(()), 'rows': jnp.zeros(B)}

    def begin(self, model_params, batch_stats, state):
        return {**state, 'begun': model_params}

    def compute_loss(self, model, variables, params, state, pooled, batch, rng):
        assert set(pooled) == {'audio'}
        metrics = {'label': batch['columns']['label'].sum()}
        stats = {'passes': variables['batch_stats']['passes'] + 10}
        value = params['w'] * self.config.scale
        is_full = jnp.asarray(self.config.scale > 2)
        return Loss(value, metrics, stats, {**state, 'seen': value}, is_full, pooled['audio'])

    def after_update(self, model_params, params, state, step):
        return model_params + 1, {'w': params['w'] * 2}, {**state, 'step': step}

    def write_memory(self, state, writes, is_finite):
        return {**state, 'rows': writes}

    def predict(self, params, state, encoded):
        return {f'head_{self.config.scale}': params['w']}

    def embed(self, params, state, encoded):
        return {f'space_{self.config.scale}': {'audio': params['w']}}

    def running_losses(self, state):
        return {f'head_{self.config.scale}': float(self.config.scale)}


class Refreshing(Noting):
    """One that goes over the records."""

    def columns(self):
        return {'label': jax.ShapeDtypeStruct((), np.int32)}

    def refresh_due(self, step, steps):
        return step == steps // 2

    def refresh(self, variables, params, state, step, records):
        found = records.encode(features, augment=False)
        return RefreshResult(
            {'w': params['w'] + 5},
            {**state, 'step': step},
            {'label': found['x'] + records.columns['label']},
            fresh_slots=('w$', '^w'),
        )


def features(model, variables, params, batch, rng):
    return {'x': params['w'] * np.ones(2)}


class Mixing(Noting):
    mixes_examples = True


class Frozen(Noting):
    def frozen_models(self):
        return {'sampler': 'runs/other'}


class OnHost(Noting):
    def tables(self, spec):
        return {'memory': jax.ShapeDtypeStruct((D,), jnp.float32)}


class ReadsMaps(Noting):
    def map_streams(self):
        return ('video',)

    def heat_maps(self, params, state, encoded):
        return {f'heat_{params["w"]}': encoded['video']}


class OwnLoss(Noting):
    def loss(self, *args):
        raise NotImplementedError


class Everything(Noting):
    def streams(self):
        return None


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for kind in (Noting, Refreshing, Mixing, Frozen, OnHost, ReadsMaps, OwnLoss, Everything):
        monkeypatch.setitem(objectives.OBJECTIVES, kind.__name__, kind)


def toy(kind=Noting, scale=3):
    return {'name': kind.__name__, 'scale': scale}


def test_everything_passes_through():
    objective = build({'b': toy(Refreshing), 'a': toy(scale=2)}, {'a': 0.5})
    spec = Spec(model=None, outputs=None, batch={}, size=4, labels={})
    params, state = objective.init(jax.random.key(0), spec)
    assert params == {'a': {'w': 1}, 'b': {'w': 1}}
    state = objective.begin(7, None, state)
    assert state['a']['begun'] == state['b']['begun'] == 7

    pooled = {'audio': jnp.arange(B, dtype=jnp.float32)}
    batch = {'columns': {'label': jnp.arange(3)}}
    variables = {'batch_stats': {'passes': 1}}
    loss = objective.compute_loss(None, variables, params, state, pooled, batch, rng())
    assert loss.value == 0.5 * 2 + 3
    assert loss.metrics == {'a/loss': 2, 'b/loss': 3, 'a/label': 3, 'b/label': 3}
    assert loss.batch_stats == {'passes': 21}
    # `a` is still filling its memory.
    assert not loss.apply_update
    assert loss.state['b']['seen'] == 3

    model_params, params, state = objective.after_update(0, params, loss.state, 4)
    assert model_params == 2
    assert params == {'a': {'w': 2}, 'b': {'w': 2}}
    assert state['a']['step'] == state['b']['step'] == 4
    state = objective.write_memory(state, loss.writes, jnp.array(True))
    np.testing.assert_array_equal(state['a']['rows'], pooled['audio'])

    assert objective.columns() == {'label': jax.ShapeDtypeStruct((), np.int32)}
    assert [step for step in range(8) if objective.refresh_due(step, 8)] == [4]
    assert objective.predict(params, state, {}) == {'head_3': 2, 'head_2': 2}
    spaces = {'space_3': {'audio': 2}, 'space_2': {'audio': 2}}
    assert objective.embed(params, state, {}) == spaces
    assert objective.running_losses(state) == {'head_3': 3, 'head_2': 2}


def test_a_refresh_is_that_of_its_task():
    objective = build({'b': toy(Refreshing), 'a': toy(scale=2)})
    params = {'a': {'w': 1}, 'b': {'w': 2}}
    asked = []

    def encode(function, augment=True, draw=0):
        asked.append((function, augment))
        return function(None, None, params, None, None)

    records = TrainingRecords(2, {'label': np.array([10, 20])}, encode)
    for _ in range(2):
        result = objective.refresh({}, params, {'a': {}, 'b': {}}, 4, records)
    assert result.params == {'a': {'w': 1}, 'b': {'w': 7}}
    assert result.state == {'a': {}, 'b': {'step': 4}}
    np.testing.assert_array_equal(result.columns['label'], [12, 22])
    # Compiled passes are kept by function.
    assert asked[0] == asked[1] and hash(asked[0]) == hash(asked[1])
    assert not asked[0][1]
    for pattern in result.fresh_slots:
        assert train_step.optim.matches('b/w', [pattern])
        assert not train_step.optim.matches('a/w', [pattern])
        assert not train_step.optim.matches('b/v', [pattern])


def test_a_task_of_no_weight_is_left_out():
    objective = build({'a': toy(), 'b': {'name': 'temporal_order'}}, {'b': 0.0})
    assert list(objective.tasks) == ['a']
    assert objective.streams() == ('audio',)
    # It stays in the config, with all of its fields.
    assert objective.config.tasks.b.change == 'reversed'
    assert objective.config.weights.to_dict() == {'a': 1.0, 'b': 0.0}
    assert objectives.build(objective.config).config == objective.config


def test_all_streams_where_a_task_takes_all():
    objective = build({'a': toy(Everything), 'b': toy()})
    assert objective.streams() is None
    towers = Towers()
    data = {'data': jnp.zeros((B, T, 2)), 'valid': jnp.ones(B, bool)}
    variables = {'params': dict.fromkeys('xy', jnp.zeros((2, D))), 'batch_stats': {'passes': 0}}
    pooled = objective.encode(towers, variables, {}, {}, {'x': data, 'y': data}, rng()).pooled
    assert set(objective._features_of('a', pooled)) == {'x', 'y'}


def test_initial_parameters_of_a_task_are_its_own():
    """Whatever other tasks there are."""
    pooled = {name: types.SimpleNamespace(pooled=np.zeros((B, D))) for name in ('video', 'audio')}
    batch = {'video': {'data': np.zeros((B, T, 2))}}
    outputs = types.SimpleNamespace(encoded=pooled)
    spec = Spec(model=None, outputs=outputs, batch=batch, size=4, labels={})
    found = []
    for others in ({}, {'another': TASKS['taught'], 'more': TASKS['taught_back']}):
        objective = build({'arrow': TASKS['arrow'], **others})
        params, _ = objective.init(jax.random.key(0), spec)
        found.append(nn.meta.unbox(params['arrow']))
    np.testing.assert_array_equal(found[0]['kernel'], found[1]['kernel'])


REFUSED = {
    'nothing': ({}, {}, 'tasks: expected at least one task with a weight above 0, .*got none'),
    'all of weight 0': ({'a': toy()}, {'a': 0}, 'expected at least one task with a weight above 0'),
    'no objective': ({'a': 3}, {}, 'tasks.a: expected an objective with its name, .* got 3'),
    'no name': ({'a': {'scale': 1}}, {}, 'tasks.a: expected an objective with its name'),
    'unknown': ({'a': {'name': 'x'}}, {}, "objective.tasks.a.name='x': choose one of contrastive"),
    'field': (
        {'a': {'name': 'temporal_order', 'parts': 1}},
        {},
        'config.objective.tasks.a.parts=1: expected a number of at least 2',
    ),
    'name of a task': ({'a b': toy()}, {}, "expected names of letters, digits and _, .*'a b'"),
    'weight of none': ({'a': toy()}, {'b': 1.0}, r"weights.b: expected names of .*\(a\), got 'b'"),
    'negative weight': ({'a': toy()}, {'a': -0.5}, 'config.objective.weights.a=-0.5'),
    'weight of nan': ({'a': toy()}, {'a': float('nan')}, 'config.objective.weights.a=nan'),
    'word as weight': ({'a': toy()}, {'a': 'big'}, "weights.a: expected a number, got 'big'"),
    'mixing': ({'a': toy(Mixing)}, {}, r'tasks.a \(Mixing\): it mixes the clips'),
    'frozen': ({'a': toy(Frozen)}, {}, r'tasks.a \(Frozen\): it reads the model .*\(sampler\)'),
    'own loss': ({'a': toy(OwnLoss)}, {}, r'tasks.a \(OwnLoss\): it overrides loss\(\)'),
    'two refreshes': (
        {'a': toy(Refreshing), 'b': toy(Refreshing)},
        {},
        'tasks: expected at most one task that goes over all records .*got a, b',
    ),
}


@pytest.mark.parametrize('tasks, weights, message', REFUSED.values(), ids=REFUSED)
def test_what_is_refused(tasks, weights, message):
    with pytest.raises(ConfigError, match=message):
        build(tasks, weights)


def test_what_init_refuses_names_the_task():
    pooled = {'video': np.zeros((B, D)), 'audio': np.zeros((B, D + 1))}
    encoded = {name: types.SimpleNamespace(pooled=x) for name, x in pooled.items()}
    outputs = types.SimpleNamespace(encoded=encoded)
    spec = Spec(model=None, outputs=outputs, batch={}, size=4, labels={})
    with pytest.raises(ConfigError, match="objective.tasks.taught.projection: expected 'linear'"):
        build({'taught': TASKS['taught']}).init(jax.random.key(0), spec)


def test_memories_on_the_host_are_refused():
    spec = Spec(model=None, outputs=None, batch={}, size=4, labels={})
    with pytest.raises(ConfigError, match="objective.tasks.a.memory: expected 'device'"):
        build({'a': toy(OnHost)}).init(jax.random.key(0), spec)


def test_tasks_read_maps():
    objective = build({'a': toy(ReadsMaps), 'b': toy(ReadsMaps), 'c': toy()})
    assert objective.map_streams() == ('video',)
    params = {'a': {'w': 1}, 'b': {'w': 2}, 'c': {'w': 3}}
    maps = objective.heat_maps(params, {'a': {}, 'b': {}, 'c': {}}, {'video': 5})
    assert maps == {'heat_1': 5, 'heat_2': 5}


def test_one_name_of_two_tasks_is_refused():
    objective = build({'a': toy(), 'b': toy()})
    params = {'a': {'w': 1}, 'b': {'w': 1}}
    with pytest.raises(ConfigError, match="predictions of different names, got 'head_3' from both"):
        objective.predict(params, {'a': {}, 'b': {}}, {})
    with pytest.raises(ConfigError, match="spaces of different names, got 'space_3'"):
        objective.embed(params, {'a': {}, 'b': {}}, {})


# ---- as a run


def whole_config(**overrides):
    """Five kinds of tasks: a refresh, heads, a teacher and a queue, changed clips, distillation."""
    c = tiny.config(**overrides)
    net = {'width': 12, 'normed': True}
    towers = {'video': {'name': 'small_video', **net}, 'audio': {'name': 'small_audio', **net}}
    c.model.towers = ConfigDict(towers)
    c.model.head = ConfigDict({'name': 'projection', 'hidden': 8, 'projection': 8})
    tasks = {
        'labels': {'name': 'kmeans_labels', 'clusters': 4, 'views': ('video', 'audio'), 'every': 4},
        'mined': {'name': 'coclr', 'query': 'video', 'key': 'video.second', 'queue': 32},
        'shuffled': {'name': 'temporal_order', 'change': 'shuffled', 'parts': 2},
        'distilled': {'name': 'distillation', 'teacher': 'audio'},
        'codes': {
            'name': 'online_codes',
            'views': ('video', 'video.second'),
            'clusters': 6,
            'hidden': 8,
            'width': 8,
        },
    }
    c.objective = ConfigDict({'name': 'multi_task', 'tasks': tasks, 'weights': {'distilled': 0.1}})
    c.data.views = (('video.second', {'kind': 'clip'}),)
    return c


@pytest.mark.slow
def test_a_stopped_run_continues_as_if_it_had_not_been(tmp_path):
    config = whole_config(steps=6)
    assert run(tmp_path / 'whole', config)
    lines = log_lines(tmp_path / 'whole')
    for task in config.objective.tasks:
        assert all(np.isfinite(line[f'{task}/loss']) for line in lines if 'loss' in line)
    with stop_at(3):
        assert not run(tmp_path / 'cut', whole_config(steps=6))
    assert run(tmp_path / 'cut', whole_config(steps=6))
    assert losses(tmp_path / 'cut') == losses(tmp_path / 'whole')
    state, _, columns = state_of(tmp_path / 'cut', config)
    assert set(state.objective) == set(config.objective.tasks)
    assert set(columns) == {'cluster.joint'}
