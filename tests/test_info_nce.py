"""InfoNCE with further keys as its papers define it, in NumPy float64, clip by clip."""

import jax
import numpy as np
import pytest

from vatt_jax.losses import dense, nce
from vatt_jax.losses.similarity import How

B, K, E, M = 9, 2, 5, 13
TEMPERATURE = 0.2
# Whose own key is a positive.
OF_SOME = np.arange(B) % 3 > 0


def unit(x):
    """x / |x| over the last axis."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def definition(x, y, queue, valid, positive, in_batch, own_positive):
    """Mean over clips with a positive of log Σ_all exp s - log Σ_positives exp s.

    Args:
        x: [B E], queries.
        y: [B K E], own keys.
        queue: [M E].
        valid: bool [M].
        positive: bool [B M], of the queue.
        in_batch: keys of other clips are negatives.
        own_positive: own keys are positives; bool, or [B].
    """
    is_positive = np.broadcast_to(own_positive, len(x))
    x, y, queue = unit(x), unit(y), unit(queue)
    losses = []
    for b in range(len(x)):
        own = np.exp(y[b] @ x[b] / TEMPERATURE)
        others = np.exp(np.delete(y, b, 0) @ x[b] / TEMPERATURE)
        further = np.exp(queue @ x[b] / TEMPERATURE)
        everything = own.sum() + further[valid].sum()
        if in_batch:
            everything += others.sum()
        positives = further[valid & positive[b]].sum()
        if is_positive[b]:
            positives += own.sum()
        if positives > 0:
            losses.append(np.log(everything) - np.log(positives))
    return np.mean(losses)


@pytest.fixture(scope='module')
def arrays():
    """(x, y, queue, valid, positive) in float64; some clips have no positive in the queue."""
    rng = np.random.default_rng(0)
    positive = rng.uniform(size=(B, M)) < 0.2
    positive[:2] = False
    valid = rng.uniform(size=M) < 0.8
    shapes = ((B, E), (B, K, E), (M, E))
    return *(np.float64(np.float32(rng.normal(size=s))) for s in shapes), valid, positive


@pytest.mark.parametrize('module, how', [(nce, How(block=8)), (dense, How())])
@pytest.mark.parametrize('in_batch', [True, False])
@pytest.mark.parametrize('own_positive', [True, False, OF_SOME], ids=['own', 'queue', 'both'])
def test_mined_positives_are_the_definition(arrays, module, how, in_batch, own_positive):
    """CoCLR: own key and queue alone, positives by a mask, the own key among negatives only."""
    x, y, queue, valid, positive = arrays
    options = {'in_batch': in_batch, 'own_positive': own_positive}

    def loss(x, y):
        keys = (nce.Keys(np.float32(queue), valid, positive=positive),)
        return module.info_nce(
            x, y, keys=keys, temperature=TEMPERATURE, stop_gradient=False, how=how, **options
        )

    value, (by_x, by_y) = jax.value_and_grad(loss, (0, 1))(np.float32(x), np.float32(y))
    expected = definition(x, y, queue, valid, positive, in_batch, own_positive)
    np.testing.assert_allclose(value, expected, rtol=1e-5)

    # Central differences along one random direction of each argument.
    rng = np.random.default_rng(1)
    for got, argument in ((by_x, 0), (by_y, 1)):
        direction = rng.normal(size=got.shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [x, y]
            moved[argument] = moved[argument] + step * direction
            ends.append(definition(*moved, queue, valid, positive, in_batch, own_positive))
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.sum(np.float64(got) * direction), slope, rtol=1e-4, atol=1e-6)


def test_moco_is_own_key_and_queue(arrays):
    x, y, queue, valid, _ = arrays
    nothing = np.zeros((B, M), bool)
    expected = definition(x, y, queue, valid, nothing, in_batch=False, own_positive=True)
    keys = (nce.Keys(np.float32(queue), valid),)
    for module in (nce, dense):
        value = module.info_nce(
            np.float32(x), np.float32(y), keys=keys, in_batch=False, temperature=TEMPERATURE
        )
        np.testing.assert_allclose(value, expected, rtol=1e-5)
