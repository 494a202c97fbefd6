"""DPC and MemDPC: blocks, aggregation, prediction and their loss, beside NumPy in float64."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vatt_jax.config import ConfigError
from vatt_jax.models.future_prediction import FuturePredictor
from vatt_jax.objectives import Spec
from vatt_jax.objectives.dense_prediction import (
    DensePrediction,
    accuracy_in_clip,
    cut_blocks,
    dense_nce,
)
from vatt_jax.rng import Rng

B, N, H, W, D, M = 3, 5, 2, 3, 4, 6
DPC = {'blocks': N, 'frames': 1, 'stride': 1, 'dropout': 0.0, 'curriculum': ((0, 2),)}
MEMDPC = {**DPC, 'memory': M, 'bidirectional': True}


def rng_of(examples=B):
    return Rng.create(0, 0, jnp.arange(examples, dtype=jnp.uint32))


def spec_of(frames):
    encoded = {'video': types.SimpleNamespace(pooled=np.zeros((B, D)))}
    outputs = types.SimpleNamespace(encoded=encoded)
    batch = {'video': {'data': np.zeros((B, frames, 8, 8, 3))}}
    return Spec(model=None, outputs=outputs, batch=batch, size=B, labels={})


def params_of(objective):
    """Random parameters of the shapes that `init` makes, biases too."""
    params = nn.meta.unbox(objective.init(jax.random.key(0), spec_of(N))[0])
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda x: draw.normal(size=x.shape, scale=0.5).astype(np.float32), params)


# ---- The definition: one position of one clip after another.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def linear(p, x):
    return x @ p['kernel'][0, 0].astype(np.float64) + p['bias']


def gru_step(p, x, state):
    both = np.concatenate([x, state])
    update, reset = sigmoid(linear(p['update'], both)), sigmoid(linear(p['reset'], both))
    proposed = np.tanh(linear(p['out'], np.concatenate([x, state * reset])))
    return state * (1 - update) + proposed * update


def predict_next(params, state):
    output = linear(params['output'], np.maximum(linear(params['hidden'], state), 0))
    if 'slots' not in params:
        return output
    weights = np.exp(output - output.max())
    return weights / weights.sum() @ params['slots'].astype(np.float64)


def predict_position(params, gru, observed, steps):
    """Features [n D] of a position in observed blocks -> [P D] of those that follow."""
    state = np.zeros(D)
    for x in observed:
        state = gru_step(gru, np.maximum(x, 0), state)
    predicted = []
    for _ in range(steps):
        predicted.append(predict_next(params, state))
        state = gru_step(gru, np.maximum(predicted[-1], 0), state)
    return np.stack(predicted)


def cross_entropy(predicted, targets):
    """Of all rows [clip block position, D], each with its own key as the class."""
    scores = predicted.reshape(-1, D) @ targets.reshape(-1, D).T
    top = scores.max(1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(scores - top).sum(1))
    return (log_sum - np.diag(scores)).mean()


def define_loss(params, maps, steps):
    """The loss of valid clips, maps [B N h w D] in float64."""
    value = 0.0
    orders = {'forward': maps, 'backward': maps[:, ::-1]}
    for direction in ('forward', 'backward'):
        if direction not in params:
            continue
        blocks = orders[direction]
        targets = blocks[:, -steps:]
        predicted = np.zeros_like(targets)
        for b, i, j in np.ndindex(len(maps), H, W):
            observed = blocks[b, :-steps, i, j]
            predicted[b, :, i, j] = predict_position(params, params[direction], observed, steps)
        value += cross_entropy(predicted, targets)
    return value


def loss_of(objective, params, maps, valid, step=0):
    batch = {'video': {'valid': jnp.array(valid)}}
    state = {'step': jnp.int32(step)}
    pooled = {'video/map': maps}
    variables = {'batch_stats': {}}
    return objective.compute_loss(None, variables, params, state, pooled, batch, rng_of())


@pytest.mark.parametrize('fields', [DPC, MEMDPC], ids=['dpc', 'memdpc'])
def test_value_and_gradient_are_those_of_the_definition(fields):
    objective = DensePrediction(fields)
    params = params_of(objective)
    draw = np.random.default_rng(2)
    maps = draw.normal(size=(B, N, H, W, D))
    valid = np.array([True, False, True])
    # Not even NaN of a clip that is not there shows.
    given = jnp.float32(np.where(valid[:, None, None, None, None], maps, np.nan))

    def value_of(params, maps):
        return loss_of(objective, params, maps, valid).value

    value, grads = jax.jit(jax.value_and_grad(value_of, (0, 1)))(params, given)
    np.testing.assert_allclose(value, define_loss(params, maps[valid], 2), rtol=1e-5)
    np.testing.assert_array_equal(grads[1][1], 0)

    # The derivative along a random direction of everything at once.
    def double(x):
        return np.asarray(x, np.float64)

    along = jax.tree.map(lambda x: draw.normal(size=x.shape), (params, maps))

    def value_at(distance):
        moved = jax.tree.map(lambda x, d: double(x) + distance * d, (params, maps), along)
        return define_loss(moved[0], moved[1][valid], 2)

    expected = (value_at(1e-5) - value_at(-1e-5)) / 2e-5
    products = jax.tree.map(
        lambda g, d: np.sum(np.nan_to_num(double(g)) * d), (grads[0], grads[1]), along
    )
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), expected, rtol=1e-4)


def test_predictions_of_the_past_are_in_the_order_of_time():
    """A clip played backwards, with the aggregators exchanged, has its predictions exchanged."""
    predictor = FuturePredictor(D, M, bidirectional=True, dropout=0.0)
    maps = jnp.float32(np.random.default_rng(0).normal(size=(B, N, H, W, D)))
    params = params_of(DensePrediction(MEMDPC))
    swapped = {**params, 'forward': params['backward'], 'backward': params['forward']}
    found = predictor.apply({'params': params}, maps, 2, rng_of(), True)
    reversed_ = predictor.apply({'params': swapped}, maps[:, ::-1], 2, rng_of(), True)
    np.testing.assert_allclose(found['backward'], reversed_['forward'][:, ::-1], atol=1e-6)
    np.testing.assert_allclose(found['forward'], reversed_['backward'][:, ::-1], atol=1e-6)


def test_dropout_is_of_training_and_of_each_clip():
    predictor = FuturePredictor(D, dropout=0.5)
    maps = jnp.ones((B, N, H, W, D))
    params = params_of(DensePrediction(DPC))

    def predict(rng, train):
        return predictor.apply({'params': params}, maps, 1, rng, train)['forward']

    trained = predict(rng_of(), True)
    assert not np.allclose(trained[0], trained[1])
    np.testing.assert_array_equal(predict(rng_of(), False)[0], predict(rng_of(), False)[1])
    others = rng_of().replace(examples=jnp.array([7, 1, 0], jnp.uint32))
    np.testing.assert_array_equal(predict(others, True)[1:], trained[np.array([1, 0])])


def test_the_curriculum_predicts_more_later():
    objective = DensePrediction({**DPC, 'curriculum': ((0, 1), (3, 2))})
    params = params_of(objective)
    maps = np.random.default_rng(3).normal(size=(B, N, H, W, D))
    for step, steps in ((0, 1), (2, 1), (3, 2), (9, 2)):
        loss = loss_of(objective, params, jnp.float32(maps), np.ones(B, bool), step)
        np.testing.assert_allclose(loss.value, define_loss(params, maps, steps), rtol=1e-5)
        assert loss.metrics['predicted_blocks'] == steps
    assert objective.after_update(None, None, {}, 2)[2] == {'step': 3}


def test_blocks_begin_one_stride_after_another():
    clips = jnp.arange(16.0).reshape(2, 8, 1, 1, 1)
    blocks = cut_blocks(clips, blocks=3, frames=4, stride=2)
    expected = [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    np.testing.assert_array_equal(blocks[0, ..., 0, 0, 0], expected)
    np.testing.assert_array_equal(blocks[1, ..., 0, 0, 0], np.array(expected) + 8)


def test_accuracy_asks_for_other_times_and_places_of_the_clip():
    targets = 5 * jnp.eye(4).reshape(1, 2, 2, 1, 4)
    both = jnp.concatenate([targets, targets])
    # The second clip is right but for its last position, which it takes for the first.
    predicted = both.at[1, 1, 1, 0].set(targets[0, 0, 0, 0])
    valid = jnp.ones(2, bool)
    np.testing.assert_allclose(accuracy_in_clip(predicted, both, valid), 7 / 8)
    np.testing.assert_allclose(accuracy_in_clip(predicted, both, valid.at[1].set(False)), 1)


def test_negatives_are_those_of_all_devices():
    draw = np.random.default_rng(4)
    x, y = (draw.normal(size=(8, 2, 2, 2, D)).astype(np.float32) for _ in range(2))
    valid = np.arange(8) != 5
    mesh = jax.make_mesh((8,), ('replica',), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P('replica'))
        placed = jax.device_put((x, y, valid), rows)
        value = jax.jit(dense_nce)(*placed)
    np.testing.assert_allclose(value, cross_entropy(x[valid], y[valid]), rtol=1e-5)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'stream': 'audio'}, "stream: expected one of video, flow .* got 'audio'"),
        ({'kernel': 2}, 'kernel: expected an odd number, got 2'),
        ({'curriculum': ((0, 5),)}, 'blocks to predict=5: expected a number from 1 to 4'),
        ({'curriculum': (3,)}, 'curriculum: expected .first step, blocks to predict'),
        ({'curriculum': ((5, 1),)}, r'stages from step 0 on, in order, got \[5\]'),
        ({'frames': 2}, 'clips of 6 frames .5 blocks of 2, one every 1., got 5'),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        DensePrediction({**DPC, **fields}).init(jax.random.key(0), spec_of(N))
