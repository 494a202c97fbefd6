"""Contrastive losses of what goes wrong: NaN, infinities, huge scores, masks that do not fit.

References are written out in NumPy float64.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import typecheck
from vatt_jax.losses import classification, dense, nce, similarity
from vatt_jax.losses.similarity import How
from vatt_jax.parallel import sharding

FORMS = ('asymmetric', 'symmetric', 'clip', 'mil_nce', 'siglip', 'nt_xent', 'info_nce')
B, E, M = 10, 6, 7
QUEUE = np.random.default_rng(1).normal(size=(M, E)).astype(np.float32)
# Compiling takes longer than running here.
quick_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def embeddings(seed=0):
    """float32 x and y [B E]."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, B, E)).astype(np.float32)


def loss_of(module, form, **options):
    """The loss as a function of x and y; of info_nce with a queue, of nce in blocks."""
    if form == 'info_nce':
        options['keys'] = (nce.Keys(QUEUE),)
    how = How(block=8) if module is nce else How()
    return functools.partial(getattr(module, form), how=how, **options)


# ---- 1. NaN in, NaN out


@pytest.mark.parametrize('module', [nce, dense])
@pytest.mark.parametrize('form', FORMS)
def test_nan_or_an_infinity_that_counts_makes_the_loss_nan(module, form):
    x, y = embeddings()
    loss = quick_jit(loss_of(module, form))
    assert np.isfinite(loss(x, y))
    for value in (np.nan, np.inf, -np.inf):
        for side in (0, 1):
            spoilt = [x.copy(), y.copy()]
            spoilt[side][3, 2] = value
            assert np.isnan(loss(*spoilt)), (value, side)
    assert np.isnan(loss(np.full_like(x, np.nan), y))


@pytest.mark.parametrize('module', [nce, dense])
@pytest.mark.parametrize('form', [form for form in FORMS if form != 'mil_nce'])
def test_infinities_of_raw_embeddings_too(module, form):
    """Scores of -inf have exponentials of 0, which would leave a sum in silence."""
    x, y = embeddings()
    # All scores with the second row of y are -inf.
    x[:, 0] = np.abs(x[:, 0])
    y[1, 0] = -np.inf
    assert np.isnan(quick_jit(loss_of(module, form, normalise=False))(x, y))


@pytest.mark.parametrize('module', [nce, dense])
@pytest.mark.parametrize('form', FORMS)
def test_a_temperature_that_is_nan_makes_the_loss_nan(module, form):
    loss = quick_jit(lambda x, y, temperature: loss_of(module, form, temperature=temperature)(x, y))
    assert np.isnan(loss(*embeddings(), jnp.float32(np.nan)))
    assert np.isfinite(loss(*embeddings(), jnp.float32(0.1)))


@pytest.mark.parametrize('form', ['asymmetric', 'siglip', 'nt_xent'])
def test_nan_on_one_of_eight_devices(form):
    mesh = sharding.make_mesh({'replica': 2, 'fsdp': 2, 'model': 2, 'seq': 1})
    x, y = embeddings()
    x[3] = np.nan
    with jax.set_mesh(mesh):
        for method in ('gather', 'ring'):
            loss = getattr(nce, form)
            assert np.isnan(quick_jit(functools.partial(loss, how=How(method)))(x, y)), method


def test_nan_in_the_queue():
    x, y = embeddings()
    data = QUEUE.copy()
    data[2] = np.nan
    valid = np.arange(M) != 2
    for module in (nce, dense):
        assert np.isnan(module.info_nce(x, y, keys=(nce.Keys(data),)))
        masked = module.info_nce(x, y, keys=(nce.Keys(data, valid),))
        np.testing.assert_allclose(
            masked, module.info_nce(x, y, keys=(nce.Keys(QUEUE[valid]),)), rtol=1e-6
        )


# ---- 7. Scores far from 0


def log_sum(scores, axis):
    """log Σ exp over an axis."""
    top = scores.max(axis, keepdims=True)
    return (top + np.log(np.exp(scores - top).sum(axis, keepdims=True))).squeeze(axis)


def mil_nce_definition(x, y):
    """Mean of log(F + B) - log P of raw dot products, and its gradients by x and y; float64."""
    scores = x @ y.T
    both = np.logaddexp(log_sum(scores, 1), log_sum(scores, 0))
    value = np.mean(both - np.diag(scores))
    # Of clip b: softmax over the scores of row b and of column b together, minus the own score.
    by_score = np.exp(scores - both[:, None]) + np.exp(scores - both) - np.eye(len(x))
    by_score /= len(x)
    return value, by_score @ y, by_score.T @ x


@pytest.mark.parametrize('module', [nce, dense])
@pytest.mark.parametrize('scale', [1.0, 3e4, 1e9, 1e16])
def test_no_finite_score_is_clipped(module, scale):
    x, y = scale * embeddings().astype(np.float64)
    x, y = np.float32(x), np.float32(y)
    value, gradients = quick_jit(jax.value_and_grad(loss_of(module, 'mil_nce'), (0, 1)))(x, y)
    expected, *expected_gradients = mil_nce_definition(np.float64(x), np.float64(y))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        error = np.linalg.norm(np.float64(got) - wanted)
        assert error < 2e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize('how', [How(), How(block=8)])
def test_rows_whose_scores_are_all_far_below_zero(how):
    """Some keys masked: what stands for them must be lower than any score."""
    x = np.full((12, 2), 1e6, np.float32)
    y = -np.arange(1, 13, dtype=np.float32)[:, None] * np.full((12, 2), 1e6, np.float32)
    valid = np.arange(12) % 2 == 1
    sums = similarity.log_sum_exp(x, y, y_valid=valid, how=how)
    # The largest of the keys that count is -2 · 2e12; the others are 4e12 lower and do not show.
    np.testing.assert_allclose(sums.rows, np.full(12, -4e12), rtol=1e-6)


def test_a_sum_over_nothing_is_lower_than_any_score():
    x, y = embeddings()
    sums = similarity.log_sum_exp(x, y, y_valid=np.zeros(B, bool))
    np.testing.assert_array_equal(sums.rows, np.full(B, similarity.NEVER, np.float32))
    assert similarity.NEVER < -1e37
    assert np.isfinite(np.float32(16 * similarity.NEVER))


# ---- 5 and 6. What is given fits, or is refused


@pytest.mark.parametrize('module', [nce, dense])
@pytest.mark.parametrize('form', FORMS)
def test_masks_of_numbers_are_masks(module, form):
    """Any number but 0 is True: a bitwise & with 2 would be False."""
    x, y = embeddings()
    mask = np.arange(B) % 3 != 0
    loss = loss_of(module, form)
    expected = loss(x, y, x_valid=mask, y_valid=mask, y_mask=mask[:, None])
    for number in (2, 1):
        numbers = number * mask
        with typecheck.off():
            value = loss(x, y, x_valid=numbers, y_valid=numbers, y_mask=numbers[:, None])
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize('module', [nce, dense])
def test_a_mask_of_another_shape_is_refused_not_cut_up(module):
    x, y = embeddings()
    candidates = np.stack([y, y + 1, y - 1], 1)  # [B 3 E]
    mask = np.ones((B, 3), bool)
    mask[:, 2] = np.arange(B) % 2 == 0

    def loss(**options):
        with typecheck.off():
            return module.asymmetric(x, candidates, **options)

    with pytest.raises(ValueError, match=r'y_mask: expected shape \(10, 3\), got \(3, 10\)'):
        loss(y_mask=mask.T)
    with pytest.raises(ValueError, match=r'x_valid: expected shape \(10,\), got \(10, 1\)'):
        loss(x_valid=mask[:, :1])
    with pytest.raises(ValueError, match=r'y_valid: expected shape \(10,\), got \(9,\)'):
        loss(y_valid=mask[:9, 0])
    # Of one candidate for each clip [B] and [B 1] are the same.
    for_one = [module.asymmetric(x, y, y_mask=m) for m in (mask[:, 2], mask[:, 2:])]
    np.testing.assert_array_equal(*for_one)


@pytest.mark.parametrize('module', [nce, dense])
@pytest.mark.parametrize(
    'keys, ids, message',
    [
        ({'apart': np.arange(M)}, None, 'expected ids, .* apart of keys .*, got None'),
        ({'own': np.arange(M)}, None, 'expected ids, .* own of keys .*, got None'),
        ({'own': np.arange(M)}, np.arange(9), r'ids: expected shape \(10,\), got \(9,\)'),
        ({'own': np.arange(6)}, np.arange(B), r'keys: own: expected shape \(7,\), got \(6,\)'),
        ({'valid': np.ones(6, bool)}, None, r'keys: valid: expected shape \(7,\), got \(6,\)'),
        (
            {'positive': np.ones((M, B), bool)},
            None,
            r'keys: positive: expected shape \(10, 7\), got \(7, 10\)',
        ),
        (
            {'positive': np.ones((B, M), bool), 'own': np.arange(M)},
            np.arange(B),
            'expected own or positive, got both',
        ),
        ({'data': np.ones((M, E + 1))}, None, r'expected data \[M 6\] .*, got \(7, 7\)'),
        ({'data': np.ones((0, E))}, None, r'at least one key, got \(0, 6\)'),
    ],
)
def test_keys_that_do_not_fit_are_named(module, keys, ids, message):
    x, y = embeddings()
    further = nce.Keys(**{'data': QUEUE, **keys})
    with typecheck.off(), pytest.raises(ValueError, match=message):
        module.info_nce(x, y, ids=ids, keys=(further,))


def test_ids_of_sums_fit_their_rows():
    """They would be padded with zeros in silence."""
    x, y = embeddings()
    with typecheck.off():
        with pytest.raises(ValueError, match=r'own of y: expected shape \(10,\), got \(9,\)'):
            similarity.log_sum_exp(x, y, own=(np.arange(B), np.arange(9)))
        with pytest.raises(ValueError, match=r'x_valid: expected shape \(10,\), got \(3,\)'):
            similarity.log_sum_exp(x, y, x_valid=np.ones(3, bool))


@pytest.mark.parametrize('module', [nce, dense])
@pytest.mark.parametrize(
    'options, message',
    [
        ({'replicas': 0}, 'replicas: expected a positive number, got 0'),
        ({'replicas': -2}, 'replicas: expected a positive number, got -2'),
        ({'temperature': 0.0}, r'temperature: expected a positive number, got 0\.0'),
        ({'temperature': -1}, 'temperature: expected a positive number, got -1'),
    ],
)
def test_numbers_out_of_range_are_named(module, options, message):
    for form in FORMS:
        with pytest.raises(ValueError, match=message):
            getattr(module, form)(*embeddings(), **options)


def test_a_negative_block_and_no_clips_are_named():
    x, y = embeddings()
    with pytest.raises(ValueError, match='block: expected rows of a block, .*, got -3'):
        nce.clip(x, y, how=How(block=-3))
    for module in (nce, dense):
        with pytest.raises(ValueError, match=r'at least one clip, got x \(0, 6\)'):
            module.clip(x[:0], y[:0])


# ---- Losses of classes


def test_losses_of_classes_have_the_same_habits():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 6)
    targets = np.float32(rng.uniform(size=(6, 4)) > 0.5)
    targets[:, 0] = 1
    spoilt = logits.copy()
    spoilt[2, 1] = np.nan
    softmax = classification.softmax_cross_entropy
    balanced = classification.balanced_binary_cross_entropy
    assert np.isnan(softmax(spoilt, labels))
    assert np.isnan(balanced(spoilt, targets))
    counts = np.arange(6) != 2
    chex.assert_tree_all_finite(softmax(spoilt, labels, weight=counts))
    chex.assert_tree_all_finite(balanced(spoilt, targets, weight=counts))

    with pytest.raises(ValueError, match=r'labels: expected shape \(6,\), got \(6, 1\)'):
        softmax(logits, labels[:, None])
    with pytest.raises(ValueError, match=r'weight: expected shape \(6,\), got \(6, 1\)'):
        softmax(logits, labels, weight=counts[:, None])
    with pytest.raises(ValueError, match=r'targets: expected shape \(6, 4\), got \(4, 6\)'):
        balanced(logits, targets.T)
    with pytest.raises(ValueError, match=r'weight: expected shape \(6,\), got \(3, 2\)'):
        balanced(logits, targets, weight=counts.reshape(3, 2))
    with pytest.raises(ValueError, match='replicas: expected a positive number, got 0'):
        balanced(logits, targets, replicas=0)
