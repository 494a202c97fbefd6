"""Contrastive losses: blockwise, gathered, in a ring and dense against their definitions, written out in NumPy float64."""
import functools
import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from vatt_jax import sharding
from vatt_jax.losses import dense, nce, similarity
from vatt_jax.losses.similarity import How

FORMS = ('asymmetric', 'symmetric', 'clip', 'mil_nce', 'siglip', 'nt_xent', 'info_nce')
SINGLE = ('nt_xent',)  # one candidate per clip


def definition(form, x, y, x_valid, y_mask, temperature, *, bias=-10.0, replicas=1, queue=None):
    """float64 []: clip by clip, from the papers' formulas. x [B E], y [B K E], y_mask [B K]; queue: (data [M E], valid, own) for info_nce."""
    unit = (lambda a: a) if form == 'mil_nce' else (lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True))
    x, y = unit(x), unit(y)
    b = len(x)
    s = np.einsum('be,ake->bak', x, y) / temperature
    losses, valid = np.zeros(b), x_valid & y_mask.any(1)
    for i in np.flatnonzero(valid):
        own = logsumexp(s[i, i, y_mask[i]])
        forward = s[i][y_mask]                         # x_i against every usable candidate
        backward = s[x_valid][:, i, y_mask[i]]         # i's usable candidates against every usable x
        if form in ('asymmetric', 'mil_nce'):          # MMV, MIL-NCE: one sum over both directions
            losses[i] = logsumexp(np.concatenate([forward, backward.ravel()])) - own
        elif form in ('symmetric', 'clip'):
            losses[i] = (logsumexp(forward) + logsumexp(backward) - 2 * own) / (2 if form == 'clip' else 1)
        elif form == 'siglip':                         # SigLIP, equation 1
            for a in range(b):
                for k in np.flatnonzero(y_mask[a]):
                    z = 1 if a == i else -1
                    losses[i] += np.logaddexp(0, -z * (s[i, a, k] + bias))
        elif form == 'nt_xent':                        # SimCLR, equation 1, for both views
            mine = [j for j in range(b) if j != i]
            u, v = x @ x.T / temperature, y[:, 0] @ y[:, 0].T / temperature
            first = np.concatenate([forward, [u[i, j] for j in mine if x_valid[j]]])
            second = np.concatenate([backward.ravel(), [v[i, j] for j in mine if y_mask[j, 0]]])
            losses[i] = (logsumexp(first) + logsumexp(second)) / 2 - own
        elif form == 'info_nce':
            data, there, source = queue
            extra = x[i] @ unit(data).T / temperature
            hit = extra[there & (source == i)]
            losses[i] = logsumexp(np.concatenate([forward, extra[there]])) - logsumexp(np.concatenate([s[i, i, y_mask[i]], hit]))
    parts = zip(np.split(losses, replicas), np.split(valid, replicas))
    return np.mean([l[v].sum() / max(1, v.sum()) for l, v in parts])


def slopes(f, *arrays, step=1e-5):
    """Central differences of f by every element of its arrays, float64."""
    out = []
    for n, a in enumerate(arrays):
        g = np.zeros(np.shape(a))
        for index in np.ndindex(*g.shape):
            ends = []
            for sign in (1, -1):
                moved = [np.array(v, np.float64) for v in arrays]
                moved[n][index] += sign * step
                ends.append(f(*moved))
            g[index] = (ends[0] - ends[1]) / (2 * step)
        out.append(g)
    return out


B, E, M = 10, 6, 16
BLOCKS = How(block=8)


def case(name, k, seed=0):
    """x, y, x_valid, y_mask, temperature, queue: float32 values in float64 arrays."""
    rng = np.random.default_rng(seed)
    x, y, data = rng.normal(size=(B, E)), rng.normal(size=(B, k, E)), rng.normal(size=(M, E))
    x_valid, y_mask, there, temperature = np.ones(B, bool), np.ones((B, k), bool), np.ones(M, bool), 0.2
    if name == 'cold':
        temperature = 0.01
    elif name == 'similar':
        x, y, data = (1 + 0.01 * a for a in (x, y, data))
    elif name == 'dominant':
        x[3], temperature = y[3, 0], 0.01
        x[4:] = -x[3] + 0.1 * x[4:]
    elif name == 'masked':
        x_valid, y_mask, there = rng.uniform(size=B) > .3, rng.uniform(size=(B, k)) > .3, rng.uniform(size=M) > .3
    elif name == 'one clip':
        x_valid[:], y_mask[:], there[:] = np.arange(B) == 2, np.arange(B)[:, None] == 2, False
    elif name == 'nothing':
        x_valid[:], y_mask[::2] = False, False
    else:
        assert name == 'random'
    single = [np.float64(np.float32(a)) for a in (x, y, data)]
    return *single[:2], x_valid, y_mask, float(np.float32(temperature)), (single[2], there, rng.integers(0, B, M))


CASES = ('random', 'cold', 'similar', 'dominant', 'masked', 'one clip', 'nothing')


@functools.cache
def compiled(module, form, how, replicas=1):
    """(value, gradients by x, y, temperature) of the loss under test, one compilation for all cases of a form."""
    def loss(x, y, temperature, x_valid, y_mask, queue):
        more = {}
        if form == 'info_nce':
            more = {'keys': (nce.Keys(queue[0], queue[1], own=queue[2]),), 'ids': jnp.arange(len(x)), 'stop_gradient': False}
        return getattr(module, form)(x, y, x_valid=x_valid, y_mask=y_mask, temperature=temperature, replicas=replicas, how=how, **more)
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def single(*values):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32) if np.asarray(a).dtype == np.float64 else jnp.asarray(a), values)


def inputs(form, name):
    x, y, x_valid, y_mask, temperature, queue = case(name, 1 if form in SINGLE else 2)
    return x, y, temperature * (20 if form == 'mil_nce' else 1), x_valid, y_mask, queue  # raw dot products are larger than cosines


@functools.cache
def truth(form, name):
    x, y, temperature, x_valid, y_mask, queue = inputs(form, name)
    f = lambda x, y, t: definition(form, x, y, x_valid, y_mask, t, queue=queue)
    return f(x, y, temperature), slopes(f, x, y, temperature)


def check(module, form, how, names=CASES, mesh=None):
    f = compiled(module, form, how) if mesh is None else compiled.__wrapped__(module, form, how)
    for name in names:
        args = inputs(form, name)
        value, grads = f(*single(*args))
        want, wants = truth(form, name)
        # Relative 1e-5; where a result is a small difference of large terms, no more than what rounding a score of 1 / temperature costs.
        t, eps = args[2], np.finfo(np.float32).eps
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=eps / t, err_msg=f'{form} {name}')
        for what, got, wanted, floor in zip('xyt', grads, wants, (2 * eps / t, 2 * eps / t, 4 * eps / t ** 2)):
            error = np.linalg.norm(np.asarray(got, np.float64) - wanted)
            assert error <= 1e-5 * np.linalg.norm(wanted) + floor, f'{form}, {name}, gradient by {what}: {error} of {np.linalg.norm(wanted)}'


@pytest.mark.parametrize('form', [pytest.param(f, marks=pytest.mark.slow) if f == 'clip' else f for f in FORMS])  # half of symmetric
def test_blockwise_value_and_gradients_are_the_definition(form):
    check(nce, form, BLOCKS)


@pytest.mark.parametrize('form', FORMS)
def test_dense_value_and_gradients_are_the_definition(form):
    check(dense, form, How())


@pytest.mark.parametrize('form', ['asymmetric', 'siglip', 'nt_xent'])
def test_one_block_whose_scores_are_kept_is_the_definition(form):
    check(nce, form, How())


@pytest.fixture
def mesh():
    """All four axes: loss rows are spread over the model axis too."""
    m = sharding.make_mesh({'replica': 2, 'fsdp': 2, 'model': 2, 'seq': 1})
    with jax.set_mesh(m):
        yield m


@pytest.mark.parametrize('form, how', [('asymmetric', How('gather')), ('info_nce', How('gather', 8)), ('asymmetric', How('ring')),
                                       ('siglip', How('ring', 8)), ('info_nce', How('ring'))])
def test_on_eight_devices_it_is_the_definition(mesh, form, how):
    """Ten clips on eight devices: padded rows are nowhere to be seen."""
    check(nce, form, how, ('random', 'masked', 'nothing'), mesh)


@pytest.mark.slow
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('how', [How('gather'), How('gather', 8), How('ring'), How('ring', 8)])
def test_every_loss_on_eight_devices(mesh, form, how):
    check(nce, form, how, CASES, mesh)


def test_ring_of_several_blocks_with_every_row_counted(mesh):
    """Several blocks per device, the last one padded: what travels behind the keys comes home to its own block."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8 * 21, 4)), rng.normal(size=(8 * 21, 4))
    s = x @ y.T
    rows, columns = logsumexp(s, 1), logsumexp(s, 0)
    a, b = rng.normal(size=len(x)), rng.normal(size=len(x))

    @jax.jit
    def f(x, y):
        out, pull = jax.vjp(lambda x, y: similarity.log_sum_exp(x, y, how=How('ring', 8))[:2], x, y)
        return out, pull(single(a, b))
    out, grads = f(*single(x, y))
    np.testing.assert_allclose(out[0], rows, rtol=1e-5)
    np.testing.assert_allclose(out[1], columns, rtol=1e-5)
    w = np.exp(s - rows[:, None]) * a[:, None] + np.exp(s - columns) * b
    for got, want in zip(grads, (w @ y, w.T @ x)):
        assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.sampled_from([0, 8, 16]))
def test_sums_over_sets_of_any_shape(seed, m, n, e, block):
    """Rows, columns, positives, exclusions and masks, sizes that no block divides."""
    rng = np.random.default_rng(seed)
    x, y, scale = rng.normal(size=(m, e)), rng.normal(size=(n, e)), rng.uniform(0.1, 30)
    xv, yv = rng.uniform(size=m) > .2, rng.uniform(size=n) > .2
    ids = [rng.integers(0, 3, size) for size in (m, n, m, n)]
    f = jax.jit(functools.partial(similarity.log_sum_exp, how=How(block=block)))
    got = f(*single(x, y), scale, x_valid=xv, y_valid=yv, apart=ids[:2], own=ids[2:])
    s = np.float64(np.float32(x)) @ np.float64(np.float32(y)).T * scale
    apart = ids[0][:, None] == ids[1]
    own = ids[2][:, None] == ids[3]
    log_sum = lambda mask, axis: np.where(mask.any(axis), logsumexp(np.where(mask, s, -1e30), axis), similarity.NEVER)
    np.testing.assert_allclose(got.rows[xv], log_sum(yv[None] & ~apart, 1)[xv], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got.columns[yv], log_sum(xv[:, None] & ~apart, 0)[yv], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got.positives[xv], log_sum(yv[None] & ~apart & own, 1)[xv], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('how', [How(), BLOCKS])
def test_keys_without_gradient_get_none_and_rows_keep_theirs(how):
    x, y, *_ = case('random', 1)
    x, y = single(x, y[:, 0])
    f = lambda stop: jax.grad(lambda x, y: jnp.sum(similarity.log_sum_exp(x, y, columns=False, stop_gradient=stop, how=how).rows ** 2), (0, 1))(x, y)
    (gx, gy), (wx, wy) = f(True), f(False)
    np.testing.assert_allclose(gx, wx, rtol=1e-6)
    assert not np.asarray(gy).any() and np.asarray(wy).any()


def test_bfloat16_embeddings_are_summed_in_float32():
    """Against the definition on the rounded embeddings: the value to float32's precision, the gradients to bfloat16's."""
    how = How(block=8, dtype='bfloat16')
    x, y, xv, mask, _, _ = case('masked', 2)
    x, y = (np.float64(np.asarray(jnp.asarray(nce.unit(jnp.asarray(a, jnp.float32)), jnp.bfloat16), np.float32)) for a in (x, y))
    f = jax.jit(jax.value_and_grad(lambda x, y: nce.asymmetric(x, y, x_valid=xv, y_mask=mask, temperature=0.1, normalise=False, how=how), (0, 1)))
    value, grads = f(*single(x, y))
    wanted = lambda x, y: definition('mil_nce', x, y, xv, mask, 1.0)  # raw dot products; the temperature goes into x
    scaled = lambda x, y: wanted(x / 0.1, y)
    np.testing.assert_allclose(value, scaled(x, y), rtol=1e-5)
    for got, want in zip(grads, slopes(scaled, x, y)):
        assert np.linalg.norm(np.asarray(got, np.float64) - want) < 1e-2 * np.linalg.norm(want)


def test_near_convergence_bfloat16_gradients_still_point_the_right_way():
    """A pull and a push that cancel to a thousandth are joined before they are rounded."""
    how = How(block=8, dtype='bfloat16')
    got = jax.jit(jax.grad(lambda x: nce.clip(x, jnp.eye(16), temperature=0.1, normalise=False, how=how)))(jnp.eye(16))
    p = np.exp(10 * np.eye(16)) / (np.exp(10.) + 15)  # both directions' softmax
    want = (p - np.eye(16)) / 16 * 10
    assert np.linalg.norm(np.asarray(got, np.float64) - want) < 1e-2 * np.linalg.norm(want)


def test_memory_grows_with_the_batch_not_with_its_square():
    """Temporary memory of value and gradient, from the compiler."""
    def temporary(module, rows):
        shape = jax.ShapeDtypeStruct((rows, 128), jnp.float32)
        f = jax.jit(jax.value_and_grad(lambda x, y: module.symmetric(x, y, normalise=False), (0, 1)))
        return f.lower(shape, shape).compile().memory_analysis().temp_size_in_bytes
    four, eight = temporary(nce, 4096), temporary(nce, 8192)
    assert eight < 2.2 * four and temporary(dense, 8192) > 20 * eight


@pytest.mark.parametrize('form', ['asymmetric', 'nt_xent'])
def test_replicas_average_each_replica_first(form):
    x, y, t, xv, mask, queue = inputs(form, 'masked')
    value, _ = compiled(nce, form, BLOCKS, replicas=5)(*single(x, y, t, xv, mask, queue))
    np.testing.assert_allclose(value, definition(form, x, y, xv, mask, t, replicas=5), rtol=2e-5)
    assert abs(value - definition(form, x, y, xv, mask, t)) > 1e-3


@pytest.mark.parametrize('module', [nce, dense])
@pytest.mark.parametrize('form', ['asymmetric', 'siglip', 'nt_xent'])
def test_masked_rows_get_exactly_no_gradient_even_when_they_hold_nan(module, form):
    x, y, t, xv, mask, queue = inputs(form, 'masked')
    x[~xv], y[~mask] = np.nan, np.nan
    value, (gx, gy, gt) = compiled(module, form, BLOCKS if module is nce else How())(*single(x, y, t, xv, mask, queue))
    assert np.isfinite(value) and np.isfinite(gx).all() and np.isfinite(gy).all() and np.isfinite(gt)
    assert (np.asarray(gx)[~xv] == 0).all() and (np.asarray(gy)[~mask] == 0).all()
    assert np.abs(gx).sum() > 0 and np.abs(gy).sum() > 0


def test_a_perfect_model_tends_to_log_two_asymmetric_and_zero_symmetric():
    both = jax.jit(lambda x: (nce.asymmetric(x, x, temperature=0.02), nce.symmetric(x, x, temperature=0.02)))(jnp.eye(6))
    np.testing.assert_allclose(both[0], np.log(2), rtol=1e-5)
    np.testing.assert_allclose(both[1], 0, atol=1e-5)


def test_what_does_not_fit_is_refused_in_a_sentence():
    x, y = jnp.ones((4, 3)), jnp.ones((4, 2, 3))
    traced = lambda f, *args, **options: jax.eval_shape(lambda: f(*args, **options))
    with pytest.raises(ValueError, match='this loss knows one candidate per clip, and there are 2'):
        traced(nce.nt_xent, x, y)
    with pytest.raises(ValueError, match='replicas=3 does not divide the batch of 4'):
        traced(nce.asymmetric, x, y, replicas=3)
    with pytest.raises(ValueError, match=r"method='rign': choose one of auto, gather, ring"):
        traced(nce.asymmetric, x, y, how=How('rign'))
    with pytest.raises(ValueError, match=r'x \(4, 3\), y \(5, 3\)'):
        traced(nce.asymmetric, x, jnp.ones((5, 3)))


@pytest.mark.slow
@pytest.mark.parametrize('form', FORMS)
def test_float64_gradients_are_finite_differences(form):
    with jax.enable_x64(True):
        for name in ('random', 'masked', 'cold'):
            value, grads = compiled.__wrapped__(nce, form, BLOCKS)(*inputs(form, name))
            want, wanted = truth(form, name)
            np.testing.assert_allclose(value, want, rtol=1e-10)
            for a, b in zip(grads, wanted):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize('method', ['gather', 'ring'])
def test_two_processes_compute_the_same_loss(method):
    child = textwrap.dedent('''
        import sys, jax, numpy as np
        process, port, method = int(sys.argv[1]), sys.argv[2], sys.argv[3]
        jax.config.update('jax_platforms', 'cpu'); jax.config.update('jax_num_cpu_devices', 4)
        jax.distributed.initialize(f'127.0.0.1:{port}', 2, process, initialization_timeout=120)
        import jax.numpy as jnp
        from vatt_jax import sharding
        from vatt_jax.losses import nce
        from vatt_jax.losses.similarity import How
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(16, 6)).astype(np.float32), rng.normal(size=(16, 2, 6)).astype(np.float32)
        mesh = sharding.make_mesh({'replica': 4, 'fsdp': 2})
        mine = slice(8 * process, 8 * process + 8)
        with jax.set_mesh(mesh):
            rows = sharding.batch_sharding(mesh)
            x, y = (jax.make_array_from_process_local_data(rows, a[mine]) for a in (x, y))
            f = jax.jit(jax.value_and_grad(lambda x, y: nce.asymmetric(x, y, temperature=0.2, how=How(method)), (0, 1)))
            value, (gx, gy) = f(x, y)
            norms = [float(jax.jit(jnp.linalg.norm)(g)) for g in (gx, gy)]
        print('RESULT', repr([float(value), *norms]), flush=True)
        jax.distributed.shutdown()''')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith(('XLA_', 'JAX_'))} | {'PYTHONPATH': os.getcwd()}
    processes = [subprocess.Popen([sys.executable, '-c', child, str(i), str(port), method], env=env, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT) for i in range(2)]
    try:
        outputs = [p.communicate(timeout=500)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    lines = [line[7:] for o in outputs for line in o.splitlines() if line.startswith('RESULT')]
    assert len(lines) == 2, outputs
    rng = np.random.default_rng(0)
    x, y = (np.float64(rng.normal(size=shape).astype(np.float32)) for shape in ((16, 6), (16, 2, 6)))
    f = lambda x, y: definition('asymmetric', x, y, np.ones(16, bool), np.ones((16, 2), bool), 0.2)
    want = [f(x, y), *(np.linalg.norm(g) for g in slopes(f, x, y))]
    for line in lines:
        np.testing.assert_allclose(eval(line), want, rtol=1e-5)
