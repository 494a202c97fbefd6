"""VATT's distinctive pieces, each alone, against a definition in NumPy float64 written from its description: to 1e-5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from vatt_jax.losses import dense, nce
from vatt_jax.losses.similarity import How
from vatt_jax.models import embeddings
from vatt_jax.models.attention import attention
from vatt_jax.models.common_space import CommonSpaces
from vatt_jax.models.transformer import Encoder
from vatt_jax.optim import scale_by_keras_adam
from vatt_jax.rng import Rng

D = 8


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def placed(sizes, grid, kept=None, transposed=False, seed=0):
    """(module's output without dropout, its parameters in float64, the tokens it was given)."""
    noise = np.random.default_rng(seed)
    names = 'abc'[: len(sizes)]
    params = {f'{n}_positions': noise.normal(size=(s, D)) for n, s in zip(names, sizes)}
    params['norm'] = {'scale': noise.normal(size=D), 'bias': noise.normal(size=D)}
    x = noise.normal(size=(2, int(np.prod(grid)) if kept is None else len(kept), D))
    module = embeddings.Positions(sizes, tuple(names), D, transposed=transposed)
    got = module.apply(
        {'params': jax.tree.map(jnp.float32, params)},
        jnp.float32(x),
        grid,
        kept,
        Rng.create(0, 0, jnp.arange(2)),
        False,
    )
    return got, params, x


def normed(params, rows):
    rows = rows - rows.mean(-1, keepdims=True)
    return (
        rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6) * params['norm']['scale']
        + params['norm']['bias']
    )


def test_positions_are_normalised_before_they_are_added():
    kept = np.array([7, 0, 3, 11])
    got, p, x = placed((2, 3, 2), (2, 3, 2), kept)
    rows = np.stack(
        [
            p['a_positions'][i] + p['b_positions'][j] + p['c_positions'][k]
            for i in range(2)
            for j in range(3)
            for k in range(2)
        ]
    )
    close(got, x + normed(p, rows)[kept])
    got, _, x = placed((2, 3, 2), (2, 3, 2))
    close(got, x + normed(p, rows))


def test_spectrogram_tokens_get_transposed_places():
    """Token i = t·S + s, places numbered i mod T and i div T."""
    got, p, x = placed((4, 3), (4, 3), transposed=True)
    close(
        got,
        x
        + normed(
            p, np.stack([p['a_positions'][i % 4] + p['b_positions'][i // 4] for i in range(12)])
        ),
    )


@pytest.mark.parametrize('n,m', [(8, 12), (16, 7), (14, 14), (6, 7)])
def test_spline_is_the_polyharmonic_one(n, m):
    """Cubic radial functions at i/n plus a straight line, read at j/m, beyond the last knot too: SciPy's, coded apart."""
    scipy = pytest.importorskip('scipy.interpolate')
    table = np.random.default_rng(0).normal(size=(n, D))
    want = scipy.RBFInterpolator(np.arange(n)[:, None] / n, table, kernel='cubic', degree=1)(
        np.arange(m)[:, None] / m
    )
    np.testing.assert_allclose(embeddings.spline_matrix(n, m) @ table, want, atol=1e-6)


def test_tables_of_another_grid_are_resized_axis_by_axis_before_the_norm():
    scipy = pytest.importorskip('scipy.interpolate')
    got, p, x = placed((4, 3), (2, 5))
    fit = lambda table, m: scipy.RBFInterpolator(
        np.arange(len(table))[:, None] / len(table), table, kernel='cubic', degree=1
    )(np.arange(m)[:, None] / m)
    a, b = fit(p['a_positions'], 2), fit(p['b_positions'], 5)
    close(got, x + normed(p, np.stack([a[i] + b[j] for i in range(2) for j in range(5)])))


def test_attention_of_t5_is_not_scaled_and_masks_keys():
    noise = np.random.default_rng(1)
    q, k, v = noise.normal(size=(3, 2, 5, 2, 4))
    bias, mask = noise.normal(size=(1, 2, 5, 5)), np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
    for scale in (1.0, 0.5):
        got = attention(
            *(jnp.float32(a) for a in (q, k, v)),
            mask=jnp.array(mask),
            bias=jnp.float32(bias),
            scale=scale,
        )
        for b in range(2):
            for h in range(2):
                s = (q[b, :, h] @ k[b, :, h].T * scale + bias[0, h])[:, mask[b]]
                p = np.exp(s - s.max(-1, keepdims=True))
                close(got[b, :, h], p / p.sum(-1, keepdims=True) @ v[b, mask[b], h])


def bucket(distance):
    """Of key minus query, 32 buckets up to a distance of 64: 0-7 exact, 8-15 in steps of a factor 8^(1/8); 16 more for keys behind the query."""
    a = abs(distance)
    far = next((8 + k for k in range(7, -1, -1) if a >= 8 * 8 ** (k / 8)), None)
    return (a if a < 8 else far) + 16 * (distance > 0)


def test_relative_bias_of_t5():
    """An encoder whose queries and keys are zero mixes values by the softmax of the bias alone; 90 tokens, so that all buckets are met."""
    n, heads, kv = 90, 2, 3
    noise = np.random.default_rng(5)
    encoder = Encoder(
        1, D, 4, heads, kv, bias=False, rms=True, scaled=False, buckets=32, max_distance=64
    )
    x, mask, rng = (
        noise.normal(size=(2, n, D)),
        np.arange(n) < np.array([[90], [70]]),
        Rng.create(0, 0, jnp.arange(2)),
    )
    shapes = meta.unbox(
        jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.float32(x), None, rng, False))
    )['params']
    p = jax.tree.map(lambda a: noise.normal(size=a.shape), shapes)
    for name in ('query', 'key', 'mlp_out'):
        p['layers'][name]['kernel'] *= 0
    got = jax.jit(
        lambda p: encoder.apply({'params': p}, jnp.float32(x), jnp.array(mask), rng, False, True)
    )(jax.tree.map(jnp.float32, p))
    rms = lambda a, scale: a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6) * scale
    layer = jax.tree.map(lambda a: a[0], p['layers'])
    rows = np.array([[bucket(k - q) for k in range(n)] for q in range(n)])
    assert set(rows.ravel()) == set(range(32)) - {16}
    for b in range(2):
        s = np.where(mask[b], p['relative_bias'][rows].transpose(2, 0, 1), -1e9)
        s = np.exp(s - s.max(-1, keepdims=True))
        v = np.einsum(
            'nd,dhk->hnk', rms(x[b], layer['attention_norm']['scale']), layer['value']['kernel']
        )
        y = x[b] + np.einsum(
            'hqn,hnk,hkd->qd', s / s.sum(-1, keepdims=True), v, layer['out']['kernel']
        )
        close(got[b], rms(y, p['final_norm']['scale']))


def joint_denominator(x, y, valid, replicas, temperature=0.07):
    """The release's default loss: for each clip of a replica, candidates of all replicas in one denominator for both directions."""
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
    x, y, n = unit(x), unit(y), len(x) // replicas
    s = np.einsum('be,ale->bal', x, y) / temperature
    log_sum = lambda a: a.max() + np.log(np.exp(a - a.max()).sum())
    losses = []
    for r in range(replicas):
        mine = range(r * n, r * n + n)
        total = 0.0
        for b in mine:
            first = np.where(
                valid[:, None], s[b], -1e9
            )  # x_b against every y, those of invalid clips left out
            second = s[:, b] if valid[b] else np.full_like(s[:, b], -1e9)  # every x against y_b
            count = valid[list(mine)].sum()
            total += (
                (log_sum(np.concatenate([first.ravel(), second.ravel()])) - log_sum(s[b, b]))
                * valid[b]
                * (n / count if count else 0)
            )
        losses.append(total / n)
    return np.mean(losses)


def test_joint_denominator_with_masks_and_two_replicas():
    """Value to 1e-9 and gradients against finite differences of the definition, in float64."""
    noise = np.random.default_rng(2)
    x, y, valid = (
        noise.normal(size=(6, 4)),
        noise.normal(size=(6, 2, 4)),
        np.array([1, 0, 1, 1, 1, 1], bool),
    )
    with jax.enable_x64(True):
        f = jax.jit(
            jax.value_and_grad(
                lambda x, y: nce.asymmetric(
                    x,
                    y,
                    y_valid=jnp.array(valid),
                    temperature=0.07,
                    replicas=2,
                    how=How(dtype='float64'),
                ),
                (0, 1),
            )
        )
        value, grads = f(jnp.array(x), jnp.array(y))
    np.testing.assert_allclose(value, joint_denominator(x, y, valid, 2), rtol=1e-9)
    assert abs(joint_denominator(x, y, valid, 2) - joint_denominator(x, y, valid, 1)) > 1e-3
    step = 1e-6
    for which, (array, got) in enumerate(zip((x, y), grads)):
        for at in np.ndindex(*array.shape):
            ends = []
            for sign in (1, -1):
                moved = [x.copy(), y.copy()]
                moved[which][at] += sign * step
                ends.append(joint_denominator(*moved, valid, 2))
            assert abs(got[at] - (ends[0] - ends[1]) / (2 * step)) < 1e-6 * max(1, abs(got[at])), (
                which,
                at,
            )


def test_joint_head():
    """One space: ReLU, a matrix without bias and batch norm for each modality, in training and after it; sentences are rows of the batch."""
    noise = np.random.default_rng(9)
    head = CommonSpaces({'name': 'joint', 'joint': 5})
    pooled = {
        'video': noise.normal(size=(6, 4)),
        'audio': noise.normal(size=(6, 3)),
        'text': noise.normal(size=(6, 2, 7)),
    }
    narrow, valid = jax.tree.map(jnp.float32, pooled), {m: jnp.ones(6, bool) for m in pooled}
    shapes = meta.unbox(jax.eval_shape(lambda: head.init(jax.random.key(0), narrow, valid, False)))
    v = jax.tree.map(lambda a: np.abs(noise.normal(size=a.shape)), shapes)
    run = jax.jit(
        lambda v, train: head.apply(v, narrow, valid, train, mutable=['batch_stats']),
        static_argnums=1,
    )
    for train in (False, True):
        got, new = run(jax.tree.map(jnp.float32, v), train)
        for m, x in pooled.items():
            p, s = v['params'][f'{m}_norm'], v['batch_stats'][f'{m}_norm']
            y = np.maximum(x, 0) @ v['params'][f'{m}_joint']['kernel']
            rows = y.reshape(-1, 5)
            mean, var = (rows.mean(0), rows.var(0)) if train else (s['mean'], s['var'])
            close(got['joint'][m], (y - mean) / np.sqrt(var + 1e-5) * p['scale'] + p['bias'])
            keep = 0.9 if train else 1.0
            close(
                new['batch_stats'][f'{m}_norm']['mean'],
                keep * s['mean'] + (1 - keep) * rows.mean(0),
            )
            close(
                new['batch_stats'][f'{m}_norm']['var'], keep * s['var'] + (1 - keep) * rows.var(0)
            )


def two_denominators(x, y, x_valid, y_valid, replicas, temperature=0.07):
    """The release's symmetric loss: a denominator for each direction over the clips of all replicas, each mask with its own scale."""
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
    s, n = np.einsum('be,ale->bal', unit(x), unit(y)), len(x) // replicas
    log_sum = lambda a: a.max() + np.log(np.exp(a - a.max()).sum())
    total = 0.0
    for r in range(replicas):
        mine = slice(r * n, r * n + n)
        scale = [v * n / max(1, v[mine].sum()) for v in (x_valid, y_valid)]
        for b in range(mine.start, mine.stop):
            own = log_sum(s[b, b] / temperature)
            text = log_sum(
                ((s[b] - 1e9 * ~y_valid[:, None]) / temperature).ravel()
            )  # the masks before the temperature
            video = log_sum(((s[:, b] - 1e9 * ~x_valid[:, None]) / temperature).ravel())
            total += (text + video - 2 * own) * scale[0][b] * scale[1][b] / n
    return total / replicas


@pytest.mark.parametrize('module', [nce, dense])
def test_symmetric_loss_with_both_masks_and_two_replicas(module):
    noise = np.random.default_rng(6)
    x, y = noise.normal(size=(6, 4)), noise.normal(size=(6, 2, 4))
    every = np.ones(6, bool)
    for x_valid, y_valid in (
        ([1, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]),
        (every, [1, 1, 0, 0, 1, 1]),
        (every, [0, 0, 0, 1, 1, 1]),
    ):
        x_valid, y_valid = np.array(x_valid, bool), np.array(y_valid, bool)
        for replicas in (1, 2):
            f = lambda each: module.symmetric(
                jnp.float32(x),
                jnp.float32(y),
                x_valid=jnp.array(x_valid),
                y_valid=jnp.array(y_valid),  # noqa: B023
                replicas=replicas,
                each_mask=each,
            )  # noqa: B023
            want = two_denominators(x, y, x_valid, y_valid, replicas)
            close(f(True), want)
            assert (
                bool(np.isclose(f(False), want, rtol=1e-3)) == x_valid.all()
            )  # without it: the mean over clips that have both


def test_keras_adam():
    """eps outside the bias correction; gradients from large to as small as eps, where it matters most."""
    noise, tx = np.random.default_rng(3), scale_by_keras_adam(0.9, 0.999, 1e-7)
    state, m, v = tx.init({'w': jnp.zeros(4)}), np.zeros(4), np.zeros(4)
    for t in range(1, 8):
        g = np.float64(np.float32(noise.normal(size=4) * 10.0**-t))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        got, state = tx.update({'w': jnp.float32(g)}, state)
        np.testing.assert_allclose(
            got['w'], np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-7), rtol=1e-5
        )
