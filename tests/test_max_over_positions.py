"""The blockwise contrast of maps and vectors against loops in NumPy: value, gradient, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import typecheck
from vatt_jax.losses.blockwise import How
from vatt_jax.losses.max_over_positions import dense, max_over_positions
from vatt_jax.parallel import sharding

TEMPERATURE = 0.3


def arrays(num_clips=11, grid=(2, 3), width=5):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_clips, *grid, width))
    y = rng.normal(size=(num_clips, width))
    x_valid = rng.uniform(size=num_clips) < 0.8
    y_valid = rng.uniform(size=num_clips) < 0.8
    return x, y, x_valid, y_valid


def definition(x, y, x_valid, y_valid):
    """The loss, and its gradient by unit positions and unit sounds, one score after another."""
    num_clips, width = y.shape
    positions = x.reshape(num_clips, -1, width)
    positions = positions / np.linalg.norm(positions, axis=-1, keepdims=True)
    sounds = y / np.linalg.norm(y, axis=-1, keepdims=True)
    scores = np.full((num_clips, num_clips), -np.inf)
    best = np.zeros((num_clips, num_clips), int)
    for i in range(num_clips):
        for j in range(num_clips):
            if x_valid[i] and y_valid[j]:
                heat = [float(position @ sounds[j]) / TEMPERATURE for position in positions[i]]
                best[i, j] = int(np.argmax(heat))
                scores[i, j] = max(heat)
    pairs = [i for i in range(num_clips) if x_valid[i] and y_valid[i]]
    loss = 0.0
    by_score = np.zeros((num_clips, num_clips))
    for i in pairs:
        row, column = np.exp(scores[i]), np.exp(scores[:, i])
        loss += (np.log(row.sum()) + np.log(column.sum())) / 2 - scores[i, i]
        by_score[i] += row / row.sum() / 2
        by_score[:, i] += column / column.sum() / 2
        by_score[i, i] -= 1
    dx, dy = np.zeros_like(positions), np.zeros_like(sounds)
    for i in range(num_clips):
        for j in range(num_clips):
            weight = by_score[i, j] / len(pairs) / TEMPERATURE
            dx[i, best[i, j]] += weight * sounds[j]
            dy[j] += weight * positions[i, best[i, j]]
    return loss / len(pairs), through_unit(dx, positions, x), through_unit(dy, sounds, y)


def through_unit(gradient, units, raw):
    """The gradient by what was put on the unit sphere."""
    along = (gradient * units).sum(-1, keepdims=True)
    length = np.linalg.norm(raw.reshape(units.shape), axis=-1, keepdims=True)
    return ((gradient - along * units) / length).reshape(raw.shape)


def value_and_gradients(function, x, y, x_valid, y_valid, how=None):
    def loss(x, y):
        masks = {'x_valid': jnp.asarray(x_valid), 'y_valid': jnp.asarray(y_valid)}
        return function(x, y, **masks, temperature=TEMPERATURE, how=how or How())

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, y)


@pytest.mark.parametrize('function, block', [(dense, 0), (max_over_positions, 4)])
def test_is_its_definition(function, block):
    inputs = arrays()
    expected = definition(*inputs)
    with jax.enable_x64(True):
        value, gradients = value_and_gradients(function, *inputs, how=How(block=block))
    for got, wanted in zip((value, *gradients), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)


def test_eight_devices_are_one():
    x, y, x_valid, y_valid = arrays()
    expected, *expected_gradients = definition(x, y, x_valid, y_valid)
    # 11 clips do not divide into 8 shares.
    mesh = sharding.make_mesh({'replica': 2, 'fsdp': 2, 'model': 2, 'seq': 1})
    inputs = (x.astype(np.float32), y.astype(np.float32), x_valid, y_valid)
    with jax.set_mesh(mesh):
        value, gradients = value_and_gradients(max_over_positions, *inputs, how=How(block=3))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)


def test_what_is_not_there_has_no_gradient_and_equal_positions_share_it():
    x, y, _, _ = arrays(6)
    x[1], y[2] = np.nan, np.nan
    x_valid, y_valid = np.arange(6) != 1, np.arange(6) != 2
    # The positions of clip 0 are all alike.
    x[0] = x[0, 0, 0]
    value, (dx, dy) = value_and_gradients(max_over_positions, x, y, x_valid, y_valid)
    assert np.isfinite(value)
    assert not dx[1].any() and not dy[2].any()
    # Clips without their other half are still negatives.
    assert dx[2].any() and dy[1].any()
    np.testing.assert_allclose(dx[0], np.broadcast_to(dx[0, :1, :1], dx[0].shape), rtol=1e-5)
    nothing, (dx, dy) = value_and_gradients(
        max_over_positions, x, y, np.zeros(6, bool), np.zeros(6, bool)
    )
    assert nothing == 0 and not np.any(dx) and not np.any(dy)


def test_memory_is_linear_in_the_batch():
    def memory(num_clips):
        x, y, x_valid, y_valid = (jnp.asarray(a) for a in arrays(num_clips, (16,), 4))

        def loss(x, y):
            return max_over_positions(x, y, x_valid=x_valid, y_valid=y_valid, how=How(block=32))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, y).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # One matrix of the scores alone would take 16 MiB.
    assert memory(2048) < 2.5 * memory(1024) < 2**23


@pytest.mark.parametrize(
    'x, y, temperature, message',
    [
        ((4, 5), (4, 5), 0.1, r'expected maps x \[B \*grid E\]'),
        ((4, 2, 5), (4, 6), 0.1, r'got x \(4, 2, 5\) and y \(4, 6\)'),
        ((4, 2, 5), (4, 5), 0.0, 'temperature: expected a positive number'),
    ],
)
def test_mistakes_are_named(x, y, temperature, message):
    with typecheck.off(), pytest.raises(ValueError, match=message):
        max_over_positions(jnp.ones(x), jnp.ones(y), temperature=temperature)
