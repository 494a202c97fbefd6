"""InfoNCE and CoCLR over several steps against their definition, in NumPy float64, by loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vatt_jax import objectives
from vatt_jax.config import ConfigError
from vatt_jax.models import Outputs
from vatt_jax.objectives.memory import queue as queues
from vatt_jax.rng import Rng

B, D, E, S, Q, STEPS = 4, 6, 5, 3, 14, 9
TEMPERATURE, MOMENTUM, NEAREST = 0.2, 0.9, 2


class Projection:
    """A model of one matrix, for the part of a step that comes after the towers."""

    def apply(self, variables, encoded, valid, train, mutable, method):
        assert method == 'project'
        assert train
        space = {name: x.pooled @ variables['params']['w'] for name, x in encoded.items()}
        return {'projection': space}, {}


def objective_of(**fields):
    config = {
        'name': 'coclr',
        'queue': Q,
        'momentum': MOMENTUM,
        'temperature': TEMPERATURE,
        'nearest': NEAREST,
        **fields,
    }
    return objectives.build(ConfigDict(config))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Definition:
    """CoCLR's fact sheet, one clip at a time.

    Attributes:
        queue: entries (key, sampler's key, record), the oldest first.
        teacher: the matrix of the momentum copy.
    """

    def __init__(self, student, mines):
        self.queue = []
        self.teacher = student.copy()
        self.mines = mines

    def loss(self, student, batch, leaves_out):
        """Mean over clips of log(all) - log(positives)."""
        losses = []
        for b in range(B):
            if not (batch['query_valid'][b] and batch['key_valid'][b]):
                continue
            query = unit(batch['query'][b] @ student)
            key = unit(batch['key'][b] @ self.teacher)
            own = np.exp(query @ key / TEMPERATURE)
            others = [np.exp(query @ entry[0] / TEMPERATURE) for entry in self.queue]
            positives = self.positives(batch, b)
            numerator = sum(others[i] for i in positives)
            if not (leaves_out and positives):
                numerator += own
            losses.append(np.log(own + sum(others)) - np.log(numerator))
        return np.mean(losses) if losses else 0.0

    def positives(self, batch, b):
        """Places of the queue that are positives of clip b."""
        if not self.mines:
            return []
        same, candidates = [], []
        for i, (_, sampled, record) in enumerate(self.queue):
            if record == batch['record'][b]:
                same.append(i)
            else:
                candidates.append((-(batch['sampled'][b] @ sampled), i))
        if len(self.queue) < Q or not batch['sampler_valid'][b]:
            return same
        return same + [i for _, i in sorted(candidates)[:NEAREST]]

    def push(self, batch):
        for b in range(B):
            enters = batch['query_valid'][b] and batch['key_valid'][b]
            if self.mines:
                enters = enters and batch['sampler_valid'][b]
            if enters:
                key = unit(batch['key'][b] @ self.teacher)
                self.queue.append((key, batch['sampled'][b], batch['record'][b]))
        self.queue = self.queue[-Q:]

    def follow(self, student):
        self.teacher = MOMENTUM * self.teacher + (1 - MOMENTUM) * student


def draw_batch(rng):
    """Pooled features of one step; records come again, and some streams are missing."""
    return {
        'query': rng.normal(size=(B, D)),
        'key': rng.normal(size=(B, D)),
        'sampled': unit(rng.normal(size=(B, S))),
        'record': rng.integers(0, 9, B),
        'query_valid': rng.uniform(size=B) < 0.9,
        'key_valid': rng.uniform(size=B) < 0.9,
        'sampler_valid': rng.uniform(size=B) < 0.8,
    }


def first_state(student, mines):
    columns = {'key': jax.ShapeDtypeStruct((E,), jnp.float32)}
    if mines:
        columns['sampled'] = jax.ShapeDtypeStruct((S,), jnp.float32)
        columns['record'] = jax.ShapeDtypeStruct((), jnp.int32)
    teacher = {'params': {'w': jnp.float32(student)}, 'batch_stats': {}}
    return {'teacher': teacher, 'queue': queues.create(Q, columns)}


def step_function(objective):
    """(loss and its gradient, new state) of one step, jitted."""

    def loss(student, state, batch):
        device_batch = {
            'valid': jnp.ones(B, bool),
            'record': batch['record'],
            'video': {'valid': batch['query_valid']},
            'video.second': {'valid': batch['key_valid']},
            'audio.second': {'valid': batch['sampler_valid']},
        }
        pooled = {
            'video': batch['query'],
            'teacher/video.second': batch['key'],
            'sampler': batch['sampled'],
        }
        variables = {'params': {'w': student}, 'batch_stats': {}}
        rng = Rng.create(0, 0, jnp.arange(B))
        found = objective.compute_loss(
            Projection(), variables, {}, state, pooled, device_batch, rng
        )
        return found.value, found

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def as_device(batch):
    floats = ('query', 'key', 'sampled')
    return {
        name: jnp.asarray(x, jnp.float32 if name in floats else None) for name, x in batch.items()
    }


@pytest.mark.parametrize(
    'mines, leave_out', [(False, 0.0), (True, 0.0), (True, 1.0)], ids=['infonce', 'own', 'left out']
)
def test_steps_are_the_definition(mines, leave_out):
    """Losses, gradients, positives, queue, teacher and what waits, from an empty queue to a full.

    float32 beside float64; one clip in ten lacks a view, one in five the sampler's modality.
    """
    fields = {'leave_out_own': leave_out}
    if mines:
        fields.update({'sampler_stream': 'audio.second', 'sampler': 'runs/other'})
    objective = objective_of(**fields)
    step = step_function(objective)
    rng = np.random.default_rng(3)
    student = rng.normal(size=(D, E))
    definition, state = Definition(student, mines), first_state(student, mines)
    num_full = 0
    for number in range(STEPS):
        batch = draw_batch(rng)
        was_full = len(definition.queue) == Q
        num_full += was_full
        (value, found), gradient = step(jnp.float32(student), state, as_device(batch))
        leaves_out = leave_out == 1.0
        expected = definition.loss(student, batch, leaves_out)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        assert bool(found.apply_update) == (was_full or not mines)

        # Central differences along a random direction: keys carry no gradient.
        direction = rng.normal(size=student.shape)
        ends = []
        for delta in (1e-5, -1e-5):
            ends.append(definition.loss(student + delta * direction, batch, leaves_out))
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(
            np.sum(np.float64(gradient) * direction), slope, rtol=1e-3, atol=1e-4
        )

        if found.apply_update:
            student = student - 0.3 * np.float64(gradient)
        _, _, state = objective.after_update({'w': jnp.float32(student)}, {}, found.state, number)
        definition.push(batch)
        definition.follow(student)
        np.testing.assert_allclose(
            state['teacher']['params']['w'], definition.teacher, rtol=1e-4, atol=1e-5
        )
        assert_same_queue(state['queue'], definition.queue)
    # Both while it filled and afterwards.
    assert 2 <= num_full < STEPS


def assert_same_queue(queue, expected):
    queue = jax.device_get(queue)
    count = len(expected)
    start = queue['next'] if count == Q else 0
    places = (start + np.arange(count)) % Q
    assert bool(queue['is_full']) == (count == Q)
    for column, entries in zip(('key', 'sampled', 'record'), zip(*expected), strict=False):
        if column in queue['columns']:
            found = queue['columns'][column][places]
            np.testing.assert_allclose(found, entries, rtol=1e-4, atol=1e-5)


def test_an_own_key_is_left_out_nine_times_in_ten():
    """One draw for the batch; a clip without other positives keeps it."""
    objective = objective_of(sampler_stream='audio.second', sampler='runs/other')
    positive = jnp.zeros((B, Q), bool).at[1:].set(True)

    def draw(step):
        rng = Rng.create(0, step, jnp.arange(B))
        return objective._own_is_positive(positive, rng)

    keeps = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(2000)))
    assert keeps[:, 0].all()
    assert (keeps[:, 1:] == keeps[:, 1:2]).all()
    # 0.1 ± 4.5 standard deviations of 2000 draws.
    assert keeps[:, 1].mean() == pytest.approx(0.1, abs=0.03)


def test_several_sentences_are_one_feature():
    """Of those that a clip has: the unit vector along the mean of theirs; zeros for none."""
    rng = np.random.default_rng(5)
    embeddings = rng.normal(size=(3, 4, E))
    mask = np.array([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)

    class Sentences:
        def outputs(self, variables, batch, streams, rng):
            assert streams == ('text.second',)
            return Outputs({}, {'vat': {'text.second': jnp.float32(embeddings)}})

    objective = objective_of(
        sampler_stream='text.second', sampler='runs/other', sampler_space='vat'
    )
    objective.frozen = {'sampler': Sentences()}
    batch = {'text.second': {'mask': jnp.asarray(mask)}}
    found = objective.sampled({}, batch, Rng.create(0, 0, jnp.arange(3)))
    for b in range(2):
        expected = unit(unit(embeddings[b][mask[b]]).mean(0))
        np.testing.assert_allclose(found[b], expected, rtol=1e-5)
    assert not found[2].any()


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'queue': 0}, r'objective\.queue: expected at least 1, got 0'),
        ({'momentum': 1.5}, r'objective\.momentum'),
        ({'temperature': 0.0}, r'objective\.temperature: expected a positive number'),
        ({'key': 'audio.second'}, 'another view of the modality of query'),
        ({'key': 'video'}, 'another view of the modality of query'),
        ({'sampler': 'runs/a'}, 'set config.objective.sampler_stream'),
        (
            {'sampler_stream': 'audio.second', 'nearest': 15},
            'at most the size of the queue, 14, got 15',
        ),
    ],
)
def test_mistakes_are_sentences(fields, message):
    with pytest.raises(ConfigError, match=message):
        objective_of(**fields)
