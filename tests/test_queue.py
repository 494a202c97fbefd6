"""The queue of keys against collections.deque."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vatt_jax.objectives.memory import queue as queues
from vatt_jax.parallel import sharding

E = 3
COLUMNS = {
    'key': jax.ShapeDtypeStruct((E,), jnp.float32),
    'record': jax.ShapeDtypeStruct((), jnp.int32),
}


def batch_of(first, size):
    """Rows numbered from `first` on, whose entries say their number."""
    number = np.arange(first, first + size)
    return {
        'key': jnp.asarray(number[:, None] + np.arange(E) / 10, jnp.float32),
        'record': jnp.asarray(100 + number, jnp.int32),
    }


def oldest_first(queue):
    """What the queue holds as a list of (key, record), the oldest row first."""
    queue = jax.device_get(queue)
    size = len(queue['columns']['key'])
    filled = (np.arange(size) < queue['next']) | queue['is_full']
    start = int(queue['next']) if queue['is_full'] else 0
    rows = []
    for place in (np.arange(size) + start) % size:
        if filled[place]:
            key, record = queue['columns']['key'][place], queue['columns']['record'][place]
            rows.append((*np.asarray(key).tolist(), int(record)))
    return rows


# Compiled once for each pair of sizes.
push = jax.jit(queues.push)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), size=st.sampled_from([1, 2, 5]))
def test_a_queue_is_a_deque(data, size):
    """Of any size, with batches of any size up to it and rows that do not count."""
    queue = queues.create(size, COLUMNS)
    expected = collections.deque(maxlen=size)
    pushed = 0
    for _ in range(data.draw(st.integers(1, 6))):
        num_rows = data.draw(st.integers(1, size))
        flags = data.draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows))
        rows = batch_of(pushed, num_rows)
        pushed += num_rows
        queue = push(queue, rows, jnp.array(flags))
        keys, records = np.asarray(rows['key']), np.asarray(rows['record'])
        for b in np.flatnonzero(flags):
            expected.append((*keys[b].tolist(), int(records[b])))
        assert oldest_first(queue) == list(expected)
        assert bool(queue['is_full']) == (len(expected) == size)


def test_pushes_are_in_global_order_on_any_mesh():
    """Rows spread over eight devices; the batch does not divide the queue."""
    mesh = sharding.make_mesh({'replica': 4, 'fsdp': 2})
    one = many = queues.create(21, COLUMNS)
    many = jax.device_put(many, sharding.replicated(mesh))
    rng = np.random.default_rng(0)
    for step in range(4):
        rows, valid = batch_of(8 * step, 8), jnp.asarray(rng.uniform(size=8) < 0.8)
        spread = jax.device_put((rows, valid), sharding.batch_sharding(mesh))
        with jax.set_mesh(mesh):
            many = push(many, *spread)
        one = push(one, rows, valid)
    chex.assert_trees_all_equal(jax.device_get(many), jax.device_get(one))


def test_no_gradient_flows_through_a_queue():
    queue = queues.create(4, COLUMNS)
    rows = batch_of(1, 2)

    def total(key):
        pushed = queues.push(queue, {**rows, 'key': key}, jnp.ones(2, bool))
        return pushed['columns']['key'].sum()

    assert not jax.grad(total)(rows['key']).any()


def test_what_does_not_fit_is_refused():
    queue = queues.create(4, COLUMNS)
    with pytest.raises(ValueError, match='at most 4 rows, the size of the queue, got 5'):
        queues.push(queue, batch_of(0, 5), jnp.ones(5, bool))
    with pytest.raises(ValueError, match=r"expected the columns \['key', 'record'\], got"):
        queues.push(queue, {'key': jnp.zeros((2, E))}, jnp.ones(2, bool))
