"""VATT's distinctive pieces, each alone, against a definition in NumPy float64: to 1e-5.

The definitions are written from descriptions, with and without compilation.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax.linen import meta

from vatt_jax.losses import dense, nce
from vatt_jax.losses.similarity import How
from vatt_jax.models import embeddings
from vatt_jax.models.attention import attention
from vatt_jax.models.common_space import CommonSpaces
from vatt_jax.models.transformer import Encoder
from vatt_jax.optim import scale_by_keras_adam
from vatt_jax.rng import Rng

D = 8  # width of tokens


def close(got, expected):
    """Equal to 1e-5, shapes included."""
    chex.assert_equal_shape([got, expected])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def softmax(logits):
    """Softmax over the last axis."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def log_sum_exp(logits):
    """log Σ exp of all entries."""
    return logits.max() + np.log(np.exp(logits - logits.max()).sum())


def unit(x):
    """Rows divided by their length."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def to_float32(tree):
    """The tree with float32 JAX leaves."""
    return jax.tree.map(jnp.float32, tree)


# ---- positions
def normed(params, rows):
    """Layer norm of positions [N D]."""
    rows = rows - rows.mean(-1, keepdims=True)
    scaled = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * params['norm']['scale'] + params['norm']['bias']


class PositionsTest(chex.TestCase):
    def add_positions(self, sizes, grid, kept=None, transposed=False):
        """(output without dropout, parameters in float64, the tokens it was given)."""
        noise = np.random.default_rng(0)
        axes = ('a', 'b', 'c')[: len(sizes)]
        params = {}
        for axis, size in zip(axes, sizes):
            params[f'{axis}_positions'] = noise.normal(size=(size, D))
        params['norm'] = {'scale': noise.normal(size=D), 'bias': noise.normal(size=D)}
        tokens = int(np.prod(grid)) if kept is None else len(kept)
        x = noise.normal(size=(2, tokens, D))
        module = embeddings.Positions(sizes, axes, D, transposed=transposed)
        rng = Rng.create(0, 0, jnp.arange(2))

        @self.variant
        def apply(params, x):
            return module.apply({'params': params}, x, grid, kept, rng, False)

        return apply(to_float32(params), jnp.float32(x)), params, x

    @chex.variants(with_jit=True, without_jit=True)
    def test_positions_are_normalised_before_they_are_added(self):
        """y = x + LN(a_i + b_j + c_k)."""
        grid = (2, 3, 2)
        kept = np.array([7, 0, 3, 11])
        got, params, x = self.add_positions(grid, grid, kept)
        rows = []
        for i, j, k in np.ndindex(*grid):
            rows.append(
                params['a_positions'][i] + params['b_positions'][j] + params['c_positions'][k]
            )
        rows = np.stack(rows)
        close(got, x + normed(params, rows)[kept])

        got, _, x = self.add_positions(grid, grid)
        close(got, x + normed(params, rows))

    @chex.variants(with_jit=True, without_jit=True)
    def test_spectrogram_tokens_get_transposed_positions(self):
        """Token i = t·S + s, positions numbered i mod T and i div T."""
        got, params, x = self.add_positions((4, 3), (4, 3), transposed=True)
        rows = []
        for token in range(12):
            rows.append(params['a_positions'][token % 4] + params['b_positions'][token // 4])
        close(got, x + normed(params, np.stack(rows)))

    @chex.variants(with_jit=True, without_jit=True)
    def test_tables_of_another_grid_are_resized_axis_by_axis_before_the_norm(self):
        got, params, x = self.add_positions((4, 3), (2, 5))
        a = polyharmonic_spline(params['a_positions'], 2)
        b = polyharmonic_spline(params['b_positions'], 5)
        rows = []
        for i, j in np.ndindex(2, 5):
            rows.append(a[i] + b[j])
        close(got, x + normed(params, np.stack(rows)))


def polyharmonic_spline(table, length):
    """Cubic radial functions at i/n plus a straight line, read at j/m: SciPy's, coded apart."""
    scipy = pytest.importorskip('scipy.interpolate')
    knots = np.arange(len(table))[:, None] / len(table)
    spline = scipy.RBFInterpolator(knots, table, kernel='cubic', degree=1)
    return spline(np.arange(length)[:, None] / length)


@pytest.mark.parametrize('knots, length', [(8, 12), (16, 7), (14, 14), (6, 7)])
def test_spline_is_the_polyharmonic_one(knots, length):
    """Beyond the last knot too."""
    table = np.random.default_rng(0).normal(size=(knots, D))
    matrix = embeddings.spline_matrix(knots, length)
    chex.assert_shape(matrix, (length, knots))
    np.testing.assert_allclose(matrix @ table, polyharmonic_spline(table, length), atol=1e-6)


# ---- attention
class AttentionTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(('unscaled', 1.0), ('scaled', 0.5))
    def test_attention_of_t5_masks_keys_and_is_scaled_only_where_asked(self, scale):
        """softmax(scale · q kᵀ + bias) v, over the keys of the mask."""
        noise = np.random.default_rng(1)
        query, key, value = noise.normal(size=(3, 2, 5, 2, 4))
        bias = noise.normal(size=(1, 2, 5, 5))
        mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)

        @self.variant
        def apply(query, key, value, mask, bias):
            return attention(query, key, value, mask=mask, bias=bias, scale=scale)

        got = apply(*to_float32((query, key, value)), jnp.array(mask), jnp.float32(bias))
        chex.assert_shape(got, query.shape)
        chex.assert_type(got, jnp.float32)
        for b, h in np.ndindex(2, 2):
            logits = query[b, :, h] @ key[b, :, h].T * scale + bias[0, h]
            weights = softmax(logits[:, mask[b]])
            close(got[b, :, h], weights @ value[b, mask[b], h])


def bucket(distance):
    """Bucket of key minus query, 32 buckets up to a distance of 64.

    0-7 exact, 8-15 in steps of a factor 8^(1/8); 16 more for keys behind the query.
    """
    behind = 16 if distance > 0 else 0
    distance = abs(distance)
    if distance < 8:
        return behind + distance
    step = 7
    while distance < 8 * 8 ** (step / 8):
        step -= 1
    return behind + 8 + step


def test_relative_bias_of_t5():
    """An encoder whose queries and keys are zero mixes values by the softmax of the bias alone.

    90 tokens, so that all buckets occur.
    """
    length, heads, head_width = 90, 2, 3
    noise = np.random.default_rng(5)
    encoder = Encoder(
        1, D, 4, heads, head_width, bias=False, rms=True, scaled=False, buckets=32, max_distance=64
    )
    x = noise.normal(size=(2, length, D))
    mask = np.arange(length) < np.array([[90], [70]])
    rng = Rng.create(0, 0, jnp.arange(2))

    def init():
        return encoder.init(jax.random.key(0), jnp.float32(x), None, rng, False)

    shapes = meta.unbox(jax.eval_shape(init))['params']
    params = jax.tree.map(lambda like: noise.normal(size=like.shape), shapes)
    for name in ('query', 'key', 'mlp_out'):
        params['layers'][name]['kernel'] *= 0

    @jax.jit
    def apply(params):
        return encoder.apply({'params': params}, jnp.float32(x), jnp.array(mask), rng, False, True)

    got = apply(to_float32(params))
    chex.assert_shape(got, x.shape)
    chex.assert_type(got, jnp.float32)

    def rms_norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    layer = jax.tree.map(lambda stacked: stacked[0], params['layers'])
    rows = np.zeros((length, length), int)
    for query, key in np.ndindex(length, length):
        rows[query, key] = bucket(key - query)
    assert set(rows.ravel()) == set(range(32)) - {16}
    bias = params['relative_bias'][rows].transpose(2, 0, 1)
    for b in range(2):
        weights = softmax(np.where(mask[b], bias, -1e9))
        scaled = rms_norm(x[b], layer['attention_norm']['scale'])
        value = np.einsum('nd,dhk->hnk', scaled, layer['value']['kernel'])
        y = x[b] + np.einsum('hqn,hnk,hkd->qd', weights, value, layer['out']['kernel'])
        close(got[b], rms_norm(y, params['final_norm']['scale']))


# ---- losses
def joint_denominator(x, y, valid, replicas, temperature=0.07):
    """The release's default loss, both directions of a pair in one denominator.

    For each clip b of a replica, candidates of all replicas, s = x yᵀ / temperature:
        -log Σ_l exp s(b, b, l) / Σ_{c, l} (exp s(b, c, l) + exp s(c, b, l)).
    """
    x, y = unit(x), unit(y)
    clips = len(x) // replicas  # of a replica
    logits = np.einsum('be,ale->bal', x, y) / temperature
    losses = []
    for replica in range(replicas):
        mine = range(replica * clips, replica * clips + clips)
        count = valid[list(mine)].sum()
        weight = clips / count if count else 0
        total = 0.0
        for b in mine:
            # x_b against every y, those of invalid clips left out; every x against y_b
            x_to_y = np.where(valid[:, None], logits[b], -1e9)
            y_to_x = logits[:, b] if valid[b] else np.full_like(logits[:, b], -1e9)
            denominator = log_sum_exp(np.concatenate([x_to_y.ravel(), y_to_x.ravel()]))
            total += (denominator - log_sum_exp(logits[b, b])) * valid[b] * weight
        losses.append(total / clips)
    return np.mean(losses)


def test_joint_denominator_with_masks_and_two_replicas():
    """Value to 1e-9 and gradients against finite differences of the definition, in float64."""
    noise = np.random.default_rng(2)
    x = noise.normal(size=(6, 4))
    y = noise.normal(size=(6, 2, 4))
    valid = np.array([1, 0, 1, 1, 1, 1], bool)

    def loss(x, y):
        return nce.asymmetric(
            x, y, y_valid=jnp.array(valid), temperature=0.07, replicas=2, how=How(dtype='float64')
        )

    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(loss, (0, 1)))
        value, grads = jax.tree.map(np.asarray, run(jnp.array(x), jnp.array(y)))
    chex.assert_rank(value, 0)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, (x, y))
    expected = joint_denominator(x, y, valid, 2)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    assert abs(expected - joint_denominator(x, y, valid, 1)) > 1e-3

    step = 1e-6

    def moved_loss(which, at, by):
        moved = [x.copy(), y.copy()]
        moved[which][at] += by
        return joint_denominator(*moved, valid, 2)

    for which, grad in enumerate(grads):
        for at in np.ndindex(*grad.shape):
            difference = moved_loss(which, at, step) - moved_loss(which, at, -step)
            error = abs(grad[at] - difference / (2 * step))
            assert error < 1e-6 * max(1, abs(grad[at])), (which, at)


def two_denominators(x, y, x_valid, y_valid, replicas, temperature=0.07):
    """The release's symmetric loss: a denominator for each direction, clips of all replicas.

    Each mask has its own scale: clips of the replica over valid ones.
    """
    logits = np.einsum('be,ale->bal', unit(x), unit(y))
    clips = len(x) // replicas  # of a replica
    total = 0.0
    for replica in range(replicas):
        mine = slice(replica * clips, replica * clips + clips)
        x_weights = x_valid * clips / max(1, x_valid[mine].sum())
        y_weights = y_valid * clips / max(1, y_valid[mine].sum())
        for b in range(mine.start, mine.stop):
            positives = log_sum_exp(logits[b, b] / temperature)
            # the masks before the temperature
            to_y = log_sum_exp((logits[b] - 1e9 * ~y_valid[:, None]) / temperature)
            to_x = log_sum_exp((logits[:, b] - 1e9 * ~x_valid[:, None]) / temperature)
            total += (to_y + to_x - 2 * positives) * x_weights[b] * y_weights[b] / clips
    return total / replicas


class SymmetricLossTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(('nce', nce), ('dense', dense))
    def test_symmetric_loss_with_both_masks_and_two_replicas(self, module):
        noise = np.random.default_rng(6)
        x = noise.normal(size=(6, 4))
        y = noise.normal(size=(6, 2, 4))

        def symmetric(x, y, x_valid, y_valid, replicas, each_mask):
            return module.symmetric(
                x, y, x_valid=x_valid, y_valid=y_valid, replicas=replicas, each_mask=each_mask
            )

        loss = self.variant(static_argnums=(4, 5))(symmetric)
        masks = (
            ([1, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]),
            ([1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]),
            ([1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]),
        )
        for x_mask, y_mask in masks:
            x_valid, y_valid = np.array(x_mask, bool), np.array(y_mask, bool)
            operands = (*to_float32((x, y)), jnp.array(x_valid), jnp.array(y_valid))
            for replicas in (1, 2):
                expected = two_denominators(x, y, x_valid, y_valid, replicas)
                got = loss(*operands, replicas, True)
                chex.assert_rank(got, 0)
                chex.assert_type(got, jnp.float32)
                close(got, expected)
                # without each_mask: the mean over clips that have both
                over_both = loss(*operands, replicas, False)
                assert np.isclose(over_both, expected, rtol=1e-3) == x_valid.all()


# ---- the joint head
def test_joint_head():
    """One space: ReLU, a matrix without bias and batch norm for each modality.

    In training and after it; sentences are rows of the batch.
    """
    noise = np.random.default_rng(9)
    head = CommonSpaces({'name': 'joint', 'joint': 5})
    pooled = {
        'video': noise.normal(size=(6, 4)),
        'audio': noise.normal(size=(6, 3)),
        'text': noise.normal(size=(6, 2, 7)),
    }
    inputs = to_float32(pooled)
    valid = {modality: jnp.ones(6, bool) for modality in pooled}

    def init():
        return head.init(jax.random.key(0), inputs, valid, False)

    shapes = meta.unbox(jax.eval_shape(init))
    variables = jax.tree.map(lambda like: np.abs(noise.normal(size=like.shape)), shapes)
    params, stats = variables['params'], variables['batch_stats']

    def apply(variables, train):
        return head.apply(variables, inputs, valid, train, mutable=['batch_stats'])

    run = jax.jit(apply, static_argnums=1)
    for train in (False, True):
        spaces, new = run(to_float32(variables), train)
        chex.assert_trees_all_equal_shapes_and_dtypes(new['batch_stats'], shapes['batch_stats'])
        assert list(spaces) == ['joint']
        assert set(spaces['joint']) == set(pooled)
        for modality, x in pooled.items():
            y = np.maximum(x, 0) @ params[f'{modality}_joint']['kernel']
            rows = y.reshape(-1, 5)
            norm, before = params[f'{modality}_norm'], stats[f'{modality}_norm']
            mean, var = before['mean'], before['var']
            if train:
                mean, var = rows.mean(0), rows.var(0)
            expected = (y - mean) / np.sqrt(var + 1e-5) * norm['scale'] + norm['bias']
            close(spaces['joint'][modality], expected)
            momentum = 0.9 if train else 1.0
            after = new['batch_stats'][f'{modality}_norm']
            close(after['mean'], momentum * before['mean'] + (1 - momentum) * rows.mean(0))
            close(after['var'], momentum * before['var'] + (1 - momentum) * rows.var(0))


# ---- the optimizer
class KerasAdamTest(chex.TestCase):
    def setUp(self):
        super().setUp()
        chex.clear_trace_counter()  # chex counts over all variants of a test

    @chex.variants(with_jit=True, without_jit=True)
    def test_keras_adam(self):
        """sqrt(1 - b₂ᵗ) / (1 - b₁ᵗ) · m / (sqrt(v) + eps): eps outside the bias correction.

        Gradients from large to as small as eps, where it matters most.
        """
        noise = np.random.default_rng(3)
        optimizer = scale_by_keras_adam(0.9, 0.999, 1e-7)
        params = {'w': jnp.zeros(4)}
        state = optimizer.init(params)
        # the state has the same types after a step: no step is traced again
        update = self.variant(chex.assert_max_traces(optimizer.update, n=1))
        m, v = np.zeros(4), np.zeros(4)
        for t in range(1, 8):
            g = np.float64(np.float32(noise.normal(size=4) * 10.0**-t))
            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * g * g
            correction = np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            expected = correction * m / (np.sqrt(v) + 1e-7)

            before = state
            updates, state = update({'w': jnp.float32(g)}, state)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
            np.testing.assert_allclose(updates['w'], expected, rtol=1e-5)
