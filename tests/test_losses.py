"""Contrastive losses: blockwise, gathered, in a ring and dense against their definitions, written out in NumPy float64.

Losses are called outside of jit where many cases share shapes: then their two programs, sums and derivative, are compiled once for all.
"""

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

from vatt_jax.losses import dense, nce, similarity
from vatt_jax.losses.similarity import NEVER, How
from vatt_jax.parallel import sharding

FORMS = ('asymmetric', 'symmetric', 'clip', 'mil_nce', 'siglip', 'nt_xent', 'info_nce')
quick_jit = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)  # compiling takes longer than running here
SINGLE = ('nt_xent',)  # one candidate per clip


def log_sum(s):
    """Over the last axis, which is not empty."""
    top = s.max(-1, keepdims=True)
    return top[..., 0] + np.log(np.exp(s - top).sum(-1))


def definition(
    form, x, y, x_valid, y_mask, temperature, *, bias=-10.0, replicas=1, queue=None, raw=False
):
    """float64 []: clip by clip, from the papers' formulas. x [B E], y [B K E], y_mask [B K]; queue: (data [M E], valid, own) for info_nce.

    x, y and temperature may have a further first axis: that many losses at once.
    """
    unit = (
        (lambda a: a)
        if raw or form == 'mil_nce'
        else (lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True))
    )
    x, y, t = unit(x), unit(y), np.asarray(temperature)
    b = y_mask.shape[0]
    s = np.einsum('...be,...ake->...bak', x, y) / t[..., None, None, None]
    valid, none = x_valid & y_mask.any(1), np.zeros(s.shape[:-3])
    losses = [none] * b
    for i in np.flatnonzero(valid):
        own = log_sum(s[..., i, i, :][..., y_mask[i]])
        forward = s[..., i, :, :][..., y_mask]  # x_i against every usable candidate
        backward = s[..., x_valid, i, :][..., y_mask[i]].reshape(
            *s.shape[:-3], -1
        )  # i's usable candidates against every usable x
        if form in ('asymmetric', 'mil_nce'):  # MMV, MIL-NCE: one sum over both directions
            losses[i] = log_sum(np.concatenate([forward, backward], -1)) - own
        elif form in ('symmetric', 'clip'):
            losses[i] = (log_sum(forward) + log_sum(backward) - 2 * own) / (
                2 if form == 'clip' else 1
            )
        elif form == 'siglip':  # SigLIP, equation 1
            z = np.broadcast_to(np.where(np.arange(b) == i, 1, -1)[:, None], y_mask.shape)[y_mask]
            losses[i] = np.logaddexp(0, -z * (forward + bias)).sum(-1)
        elif form == 'nt_xent':  # SimCLR, equation 1, for both views
            others = np.arange(b) != i
            u, v = (
                np.einsum('...e,...be->...b', a[..., i, :], a) / t[..., None]
                for a in (x, y[..., 0, :])
            )
            first = np.concatenate([forward, u[..., others & x_valid]], -1)
            second = np.concatenate([backward, v[..., others & y_mask[:, 0]]], -1)
            losses[i] = (log_sum(first) + log_sum(second)) / 2 - own
        elif form == 'info_nce':
            data, there, source = queue
            extra = x[..., i, :] @ unit(data).T / t[..., None]
            mine = np.concatenate(
                [s[..., i, i, :][..., y_mask[i]], extra[..., there & (source == i)]], -1
            )
            losses[i] = log_sum(np.concatenate([forward, extra[..., there]], -1)) - log_sum(mine)
    parts = zip(np.split(np.stack(losses, -1), replicas, -1), np.split(valid, replicas))
    return np.mean([l[..., v].sum(-1) / max(1, v.sum()) for l, v in parts], 0)


def slopes(f, *arrays, step=1e-5):
    """Central differences of f by every element of its arrays, float64; f takes many sets of them at once, along a further first axis."""
    out = []
    for n, a in enumerate(arrays):
        size = np.size(a)
        moved = [np.repeat(np.asarray(v, np.float64)[None], 2 * size, 0) for v in arrays]
        moved[n].reshape(2 * size, size)[...] += step * np.concatenate(
            [np.eye(size), -np.eye(size)]
        )
        up, down = np.split(f(*moved), 2)
        out.append(((up - down) / (2 * step)).reshape(np.shape(a)))
    return out


B, E, M = 10, 6, 16
BLOCKS = How(block=8)


def case(name, k, seed=0):
    """x, y, x_valid, y_mask, temperature, queue: float32 values in float64 arrays."""
    rng = np.random.default_rng(seed)
    x, y, data = rng.normal(size=(B, E)), rng.normal(size=(B, k, E)), rng.normal(size=(M, E))
    x_valid, y_mask, there, temperature = (
        np.ones(B, bool),
        np.ones((B, k), bool),
        np.ones(M, bool),
        0.2,
    )
    if name == 'cold':
        temperature = 0.01
    elif name == 'similar':
        x, y, data = (1 + 0.01 * a for a in (x, y, data))
    elif name == 'dominant':
        x[3], temperature = y[3, 0], 0.01
        x[4:] = -x[3] + 0.1 * x[4:]
    elif name == 'masked':
        x_valid, y_mask, there = (
            rng.uniform(size=B) > 0.3,
            rng.uniform(size=(B, k)) > 0.3,
            rng.uniform(size=M) > 0.3,
        )
    elif name == 'one clip':
        x_valid[:], y_mask[:], there[:] = np.arange(B) == 2, np.arange(B)[:, None] == 2, False
    elif name == 'nothing':
        x_valid[:], y_mask[::2] = False, False
    else:
        assert name == 'random'
    single = [np.float64(np.float32(a)) for a in (x, y, data)]
    return (
        *single[:2],
        x_valid,
        y_mask,
        float(np.float32(temperature)),
        (single[2], there, rng.integers(0, B, M)),
    )


CASES = ('random', 'cold', 'similar', 'dominant', 'masked', 'one clip', 'nothing')


def gradients(module, form, how, replicas=1):
    """(value, gradients by x, y, temperature) of the loss under test, a function of `inputs`."""

    def loss(x, y, temperature, x_valid, y_mask, queue):
        more = {}
        if form == 'info_nce':
            more = {
                'keys': (nce.Keys(queue[0], queue[1], own=queue[2]),),
                'ids': jnp.arange(len(x)),
                'stop_gradient': False,
            }
        return getattr(module, form)(
            x,
            y,
            x_valid=x_valid,
            y_mask=y_mask,
            temperature=temperature,
            replicas=replicas,
            how=how,
            **more,
        )

    return jax.value_and_grad(loss, (0, 1, 2))


def single(*values):
    return jax.tree.map(
        lambda a: (
            jnp.asarray(a, jnp.float32) if np.asarray(a).dtype == np.float64 else jnp.asarray(a)
        ),
        values,
    )


def inputs(form, name):
    x, y, x_valid, y_mask, temperature, queue = case(name, 1 if form in SINGLE else 2)
    return (
        x,
        y,
        temperature * (20 if form == 'mil_nce' else 1),
        x_valid,
        y_mask,
        queue,
    )  # raw dot products are larger than cosines


@functools.cache
def truth(form, name):
    x, y, temperature, x_valid, y_mask, queue = inputs(form, name)
    f = lambda x, y, t: definition(form, x, y, x_valid, y_mask, t, queue=queue)
    return f(x, y, temperature), slopes(f, x, y, temperature)


def check(f, form, names=CASES):
    for name in names:
        args = inputs(form, name)
        value, grads = f(*single(*args))
        want, wants = truth(form, name)
        # Relative 1e-5; where a result is a small difference of large terms, no more than what rounding the largest score costs.
        t, eps = args[2], np.finfo(np.float32).eps
        if form == 'mil_nce':
            eps *= max(1, np.nanmax(np.abs(args[0] @ args[1].reshape(-1, args[1].shape[-1]).T)))
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=eps / t, err_msg=f'{form} {name}')
        for what, got, wanted, floor in zip(
            'xyt', grads, wants, (2 * eps / t, 2 * eps / t, 4 * eps / t**2)
        ):
            error = np.linalg.norm(np.asarray(got, np.float64) - wanted)
            assert error <= 1e-5 * np.linalg.norm(wanted) + floor, (
                f'{form}, {name}, gradient by {what}: {error} of {np.linalg.norm(wanted)}'
            )


@pytest.mark.parametrize('form', FORMS)
def test_blockwise_value_and_gradients_are_the_definition(form):
    check(gradients(nce, form, BLOCKS), form)


@pytest.mark.parametrize('form', FORMS)
def test_dense_value_and_gradients_are_the_definition(form):
    check(gradients(dense, form, How()), form)


@pytest.mark.slow
def test_compiled_as_a_whole_it_is_the_definition():
    """As in training; one block, whose scores are kept for the derivative."""
    check(jax.jit(gradients(nce, 'asymmetric', How())), 'asymmetric')


@pytest.fixture
def mesh():
    """All four axes: loss rows are spread over the model axis too."""
    m = sharding.make_mesh({'replica': 2, 'fsdp': 2, 'model': 2, 'seq': 1})
    with jax.set_mesh(m):
        yield m


@pytest.mark.parametrize('method', ['gather', pytest.param('ring', marks=pytest.mark.slow)])
def test_on_eight_devices_it_is_the_definition(mesh, method):
    """Ten clips on eight devices: padded rows are nowhere to be seen."""
    check(
        quick_jit(gradients(nce, 'asymmetric', How(method))),
        'asymmetric',
        ('random', 'masked', 'nothing'),
    )


@pytest.mark.slow
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('how', [How('gather'), How('gather', 8), How('ring'), How('ring', 8)])
def test_every_loss_on_eight_devices(mesh, form, how):
    check(quick_jit(gradients(nce, form, how)), form)


@functools.cache
def sums(kind, how, mesh=None):
    """(sums of rows, columns, positives; gradients by x, y, scale for cotangents g), compiled once per shape."""

    def f(x, y, scale, x_valid, y_valid, apart, own, g):
        def total(x, y, scale):
            if kind == 'sigmoid':
                return (
                    similarity.sigmoid_sum(
                        x, y, scale, -1.0, own=own, x_valid=x_valid, y_valid=y_valid, how=how
                    ),
                )
            return tuple(
                similarity.log_sum_exp(
                    x, y, scale, x_valid=x_valid, y_valid=y_valid, apart=apart, own=own, how=how
                )
            )

        out, pull = jax.vjp(total, x, y, scale)
        return out, pull(tuple(g[: len(out)]))

    return quick_jit(f)


def check_sums(kind, how, m, n, e, masked, seed, mesh=None):
    """Random embeddings, exclusions, positives and, if masked, masks, against float64."""
    rng = np.random.default_rng(seed)
    x, y, scale = (
        np.float64(np.float32(a))
        for a in (rng.normal(size=(m, e)), rng.normal(size=(n, e)), rng.uniform(0.1, 30))
    )
    x_valid, y_valid = (rng.uniform(size=size) > (0.2 if masked else -1) for size in (m, n))
    apart, own = ([rng.integers(0, 4, size) for size in (m, n)] for _ in range(2))
    s = x @ y.T * scale
    mine, there = own[0][:, None] == own[1], apart[0][:, None] != apart[1]
    if kind == 'sigmoid':
        masks, axes, valid = [np.broadcast_to(y_valid, s.shape)], [1], [x_valid]
    else:
        masks = [there & y_valid, there & x_valid[:, None], there & y_valid & mine]
        axes, valid = [1, 0, 1], [x_valid, y_valid, x_valid]
    g = [rng.normal(size=len(v)) * v for v in valid]  # the sums of what is not valid mean nothing
    wants, w = [], np.zeros_like(s)
    for mask, axis, by in zip(masks, axes, g):
        if kind == 'sigmoid':
            z = np.where(mine, -1, 1)
            each = np.logaddexp(0, z * (s - 1)) * mask
            wants.append(each.sum(1))
            w += mask * z / (1 + np.exp(-z * (s - 1))) * by[:, None]
        else:
            with np.errstate(over='ignore', divide='ignore'):
                top = np.where(mask, s, -1e300).max(axis, keepdims=True)
                e = np.where(mask, np.exp(s - top), 0)
                total = e.sum(axis, keepdims=True)
                wants.append(np.where(total > 0, top + np.log(total), NEVER).squeeze(axis))
            w += e / np.where(total > 0, total, 1) * np.expand_dims(by, axis)
    got, grads = sums(kind, how, mesh)(
        *single(x, y, scale),
        *((x_valid, y_valid) if masked else (None, None)),
        apart,
        own,
        single(*g),
    )
    assert len(got) == len(wants)
    for what, a, want, v in zip(('rows', 'columns', 'positives'), got, wants, valid):
        np.testing.assert_allclose(np.asarray(a)[v], want[v], rtol=1e-5, atol=1e-4, err_msg=what)
    x, y = x * x_valid[:, None], y * y_valid[:, None]
    size = np.linalg.norm
    rounding = np.finfo(np.float32).eps * (1 + np.abs(s).max()) * size(w)
    for what, a, want, factor in zip(
        'xys',
        grads,
        (w @ y * scale, w.T @ x * scale, np.sum(w * (x @ y.T))),
        (scale * size(y), scale * size(x), size(x @ y.T)),
        strict=True,
    ):
        error = size(np.asarray(a, np.float64) - want)
        assert error <= 1e-5 * size(want) + 3 * rounding * factor, (
            f'gradient by {what}: {error} of {size(want)}'
        )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(
        [(1, 1, 1, True, 0), (5, 12, 4, True, 0), (23, 9, 3, False, 8), (7, 40, 5, True, 16)]
    ),
)
def test_sums_over_sets_of_odd_shapes(seed, shape):
    """Rows, columns, positives, exclusions and masks, sizes that no block divides; few shapes, as each is compiled."""
    *shape, block = shape
    check_sums('softmax', How(block=block), *shape, seed)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from([0, 8, 16]),
    st.sampled_from(['softmax', 'sigmoid']),
    st.booleans(),
)
def test_sums_over_sets_of_any_shape(seed, m, n, e, block, kind, masked):
    check_sums(kind, How(block=block), m, n, e, masked, seed)


@pytest.mark.parametrize(
    'kind, method, masked',
    [
        ('softmax', 'gather', True),
        ('softmax', 'ring', False),
        ('sigmoid', 'ring', True),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in [
                ('softmax', 'gather', False),
                ('softmax', 'ring', True),
                ('sigmoid', 'gather', True),
            ]
        ),
    ],
)
def test_sums_on_eight_devices(mesh, kind, method, masked):
    """Several blocks of rows and of keys on each, the last ones padded: what travels behind the keys comes home to its own block."""
    for seed in range(3):
        check_sums(kind, How(method, 8), 8 * 10 - 3, 8 * 21 - 5, 4, masked, seed, mesh)


@pytest.mark.parametrize('how', [How(), BLOCKS])
def test_keys_without_gradient_get_none_and_rows_keep_theirs(how):
    x, y, *_ = case('random', 1)
    x, y = single(x, y[:, 0])
    f = lambda stop: jax.grad(
        lambda x, y: jnp.sum(
            similarity.log_sum_exp(x, y, columns=False, stop_gradient=stop, how=how).rows ** 2
        ),
        (0, 1),
    )(x, y)
    (gx, gy), (wx, wy) = f(True), f(False)
    np.testing.assert_allclose(gx, wx, rtol=1e-6)
    assert not np.asarray(gy).any() and np.asarray(wy).any()


@quick_jit
def rough(x, y, x_valid, y_mask):
    """Value and gradients of CLIP's loss in bfloat16; x, y [16 16] are already units."""
    how = How(block=8, dtype='bfloat16')
    loss = lambda x, y: nce.clip(
        x, y, x_valid=x_valid, y_mask=y_mask, temperature=0.1, normalise=False, how=how
    )
    return jax.value_and_grad(loss, (0, 1))(x, y)


def test_bfloat16_embeddings_are_summed_in_float32():
    """Against the definition on the rounded embeddings: the value to float32's precision, the gradients to bfloat16's."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(16, 16)) for _ in 'xy')
    x, y = (
        np.float64((a / np.linalg.norm(a, axis=1, keepdims=True)).astype(jnp.bfloat16))
        for a in (x, y)
    )
    xv, mask = rng.uniform(size=16) > 0.3, rng.uniform(size=(16, 1)) > 0.3
    value, grads = rough(*single(x, y), xv, mask)
    want = lambda x, y: definition('clip', x, y[..., None, :], xv, mask, 0.1, raw=True)
    np.testing.assert_allclose(value, want(x, y), rtol=1e-5)
    for got, wanted in zip(grads, slopes(want, x, y)):
        assert np.linalg.norm(np.asarray(got, np.float64) - wanted) < 1e-2 * np.linalg.norm(wanted)


def test_near_convergence_bfloat16_gradients_still_point_the_right_way():
    """A pull and a push that cancel to a thousandth are joined before they are rounded."""
    _, (got, _) = rough(jnp.eye(16), jnp.eye(16), np.ones(16, bool), np.ones((16, 1), bool))
    p = np.exp(10 * np.eye(16)) / (np.exp(10.0) + 15)  # both directions' softmax
    want = (p - np.eye(16)) / 16 * 10
    assert np.linalg.norm(np.asarray(got, np.float64) - want) < 1e-2 * np.linalg.norm(want)


def test_memory_grows_with_the_batch_not_with_its_square():
    """Temporary memory of value and gradient, from the compiler."""

    def temporary(module, rows):
        shape = jax.ShapeDtypeStruct((rows, 128), jnp.float32)
        f = quick_jit(
            jax.value_and_grad(lambda x, y: module.symmetric(x, y, normalise=False), (0, 1))
        )
        return f.lower(shape, shape).compile().memory_analysis().temp_size_in_bytes

    four, eight = temporary(nce, 4096), temporary(nce, 8192)
    assert eight < 2.2 * four and temporary(dense, 8192) > 20 * eight


@pytest.mark.parametrize('form', ['asymmetric', 'nt_xent'])
def test_replicas_average_each_replica_first(form):
    x, y, t, xv, mask, queue = inputs(form, 'masked')
    value, _ = gradients(nce, form, BLOCKS, replicas=5)(*single(x, y, t, xv, mask, queue))
    np.testing.assert_allclose(value, definition(form, x, y, xv, mask, t, replicas=5), rtol=2e-5)
    assert abs(value - definition(form, x, y, xv, mask, t)) > 1e-3


@pytest.mark.parametrize('module', [nce, dense])
@pytest.mark.parametrize('form', ['asymmetric', 'siglip', 'nt_xent'])
def test_masked_rows_get_exactly_no_gradient_even_when_they_hold_nan(module, form):
    x, y, t, xv, mask, queue = inputs(form, 'masked')
    x[~xv], y[~mask] = np.nan, np.nan
    value, (gx, gy, gt) = gradients(module, form, BLOCKS if module is nce else How())(
        *single(x, y, t, xv, mask, queue)
    )
    assert (
        np.isfinite(value) and np.isfinite(gx).all() and np.isfinite(gy).all() and np.isfinite(gt)
    )
    assert (np.asarray(gx)[~xv] == 0).all() and (np.asarray(gy)[~mask] == 0).all()
    assert np.abs(gx).sum() > 0 and np.abs(gy).sum() > 0


def test_a_perfect_model_tends_to_log_two_asymmetric_and_zero_symmetric():
    both = quick_jit(
        lambda x: (nce.asymmetric(x, x, temperature=0.02), nce.symmetric(x, x, temperature=0.02))
    )(jnp.eye(6))
    np.testing.assert_allclose(both[0], np.log(2), rtol=1e-5)
    np.testing.assert_allclose(both[1], 0, atol=1e-5)


def test_what_does_not_fit_is_refused_in_a_sentence():
    x, y = jnp.ones((4, 3)), jnp.ones((4, 2, 3))
    traced = lambda f, *args, **options: jax.eval_shape(lambda: f(*args, **options))
    with pytest.raises(ValueError, match='expected one candidate per clip, got 2'):
        traced(nce.nt_xent, x, y)
    with pytest.raises(ValueError, match='replicas=3 does not divide the batch of 4'):
        traced(nce.asymmetric, x, y, replicas=3)
    with pytest.raises(ValueError, match=r"method='rign': choose one of auto, gather, ring"):
        traced(nce.asymmetric, x, y, how=How('rign'))
    with pytest.raises(ValueError, match=r'got x \(4, 3\) and y \(5, 3\)'):
        traced(nce.asymmetric, x, jnp.ones((5, 3)))
    queue = nce.Keys(jnp.ones((7, 3)), apart=jnp.arange(7))
    with pytest.raises(ValueError, match='expected ids, .*, got None'):
        traced(nce.info_nce, x, x, keys=(queue,))


@pytest.mark.slow
@pytest.mark.parametrize('form', FORMS)
def test_float64_gradients_are_finite_differences(form):
    with jax.enable_x64(True):
        for name in ('random', 'masked', 'cold'):
            value, grads = gradients(nce, form, BLOCKS)(*inputs(form, name))
            want, wanted = truth(form, name)
            np.testing.assert_allclose(value, want, rtol=1e-10)
            for a, b in zip(grads, wanted):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize('method', ['gather', 'ring'])
def test_two_processes_compute_the_same_loss(method):
    child = textwrap.dedent("""
        import sys, jax, numpy as np
        process, port, method = int(sys.argv[1]), sys.argv[2], sys.argv[3]
        jax.config.update('jax_platforms', 'cpu'); jax.config.update('jax_num_cpu_devices', 4)
        jax.distributed.initialize(f'127.0.0.1:{port}', 2, process, initialization_timeout=120)
        import jax.numpy as jnp
        from vatt_jax.parallel import sharding
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
        jax.distributed.shutdown()""")
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith(('XLA_', 'JAX_'))} | {
        'PYTHONPATH': os.getcwd()
    }
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', child, str(i), str(port), method],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=500)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    lines = [line[7:] for o in outputs for line in o.splitlines() if line.startswith('RESULT')]
    assert len(lines) == 2, outputs
    rng = np.random.default_rng(0)
    x, y = (
        np.float64(rng.normal(size=shape).astype(np.float32)) for shape in ((16, 6), (16, 2, 6))
    )
    f = lambda x, y: definition('asymmetric', x, y, np.ones(16, bool), np.ones((16, 2), bool), 0.2)
    want = [f(x, y), *(np.linalg.norm(g) for g in slopes(f, x, y))]
    for line in lines:
        np.testing.assert_allclose(eval(line), want, rtol=1e-5)
