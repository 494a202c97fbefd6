"""NCE and MIL-NCE against their definitions, written out in NumPy float64."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vatt_jax import sharding
from vatt_jax.losses import nce


def case(seed, b, k, e=5, missing=0.3):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(b, e)), rng.normal(size=(b, k, e))
    return (x, y, rng.uniform(size=b) > missing, rng.uniform(size=b) > missing, rng.uniform(size=(b, k)) > missing)


def definition(x, y, x_valid, y_valid, y_mask, temperature, symmetric, replicas=1):
    """Clip by clip, candidate by candidate (VATT paper, equations 2 and 3)."""
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    y = y / np.linalg.norm(y, axis=-1, keepdims=True)
    b, k = y.shape[:2]
    usable = y_mask & y_valid[:, None]
    losses, valid = np.zeros(b), np.zeros(b, bool)
    for i in range(b):
        own = [np.exp(x[i] @ y[i, j] / temperature) for j in range(k) if usable[i, j]]
        if not own or not x_valid[i]:
            continue
        valid[i] = True
        forward = sum(np.exp(x[i] @ y[a, j] / temperature) for a in range(b) for j in range(k) if usable[a, j])
        backward = sum(np.exp(x[a] @ y[i, j] / temperature) for a in range(b) for j in range(k) if usable[i, j] and x_valid[a])
        if symmetric:
            losses[i] = np.log(forward) + np.log(backward) - 2 * np.log(sum(own))
        else:
            losses[i] = np.log(forward + backward) - np.log(sum(own))
    parts = zip(np.split(losses, replicas), np.split(valid, replicas))
    return np.mean([l[v].sum() / max(1, v.sum()) for l, v in parts])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_value_is_the_definition_with_missing_clips_and_masked_candidates(seed, b, k, symmetric):
    x, y, xv, yv, mask = case(seed, b, k)
    form = nce.symmetric if symmetric else nce.asymmetric
    got = form(jnp.array(x), jnp.array(y), x_valid=xv, y_valid=yv, y_mask=jnp.array(mask), temperature=0.2)
    np.testing.assert_allclose(got, definition(x, y, xv, yv, mask, 0.2, symmetric), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('form', [nce.asymmetric, nce.symmetric])
def test_replicas_average_each_replica_first(form):
    x, y, xv, yv, mask = case(3, 8, 2)
    got = form(jnp.array(x), jnp.array(y), x_valid=xv, y_valid=yv, y_mask=jnp.array(mask), temperature=0.2, replicas=4)
    want = definition(x, y, xv, yv, mask, 0.2, form is nce.symmetric, 4)
    np.testing.assert_allclose(got, want, rtol=2e-5)
    assert abs(want - definition(x, y, xv, yv, mask, 0.2, form is nce.symmetric, 1)) > 1e-3


@pytest.mark.parametrize('form', [nce.asymmetric, nce.symmetric])
def test_masked_rows_get_exactly_no_gradient_even_when_they_hold_nan(form):
    x, y, xv, yv, mask = case(5, 6, 2)
    xv[0], yv[1], mask[2, 1] = False, False, False
    x[~xv], y[~yv] = np.nan, np.nan
    y[~mask] = np.nan
    gx, gy = jax.grad(lambda x, y: form(x, y, x_valid=xv, y_valid=yv, y_mask=jnp.array(mask)), (0, 1))(jnp.array(x), jnp.array(y))
    assert np.isfinite(gx).all() and np.isfinite(gy).all()
    assert (np.asarray(gx)[~xv] == 0).all() and (np.asarray(gy)[~(mask & yv[:, None])] == 0).all()
    assert np.abs(gx).sum() > 0 and np.abs(gy).sum() > 0


@pytest.mark.parametrize('form', [nce.asymmetric, nce.symmetric])
def test_no_valid_clip_gives_zero_loss_and_zero_gradient(form):
    x, y, *_ = case(7, 4, 2)
    value, grad = jax.value_and_grad(lambda x: form(x, jnp.array(y), x_valid=np.zeros(4, bool)))(jnp.array(x))
    assert float(value) == 0 and not np.asarray(grad).any()


def test_a_perfect_model_tends_to_log_two_asymmetric_and_zero_symmetric():
    x = jnp.eye(6)
    np.testing.assert_allclose(nce.asymmetric(x, x, temperature=0.02), np.log(2), rtol=1e-5)
    np.testing.assert_allclose(nce.symmetric(x, x, temperature=0.02), 0, atol=1e-5)


def test_sharded_over_eight_devices_it_is_the_same_global_loss():
    x, y, xv, yv, mask = case(9, 16, 2)
    x, y, mask = jnp.array(x, jnp.float32), jnp.array(y, jnp.float32), jnp.array(mask)
    f = jax.value_and_grad(lambda x, y, xv, yv, mask: nce.asymmetric(x, y, x_valid=xv, y_valid=yv, y_mask=mask), (0, 1))
    alone = jax.jit(f)(x, y, xv, yv, mask)
    mesh = sharding.make_mesh({'replica': 8, 'fsdp': 1, 'model': 1, 'seq': 1})
    with jax.set_mesh(mesh):
        rows = sharding.batch_sharding(mesh)
        spread = jax.jit(f)(*(jax.device_put(a, rows) for a in (x, y, xv, yv, mask)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), alone, jax.device_get(spread))
