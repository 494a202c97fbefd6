"""Fine-tuning losses and objective against their definitions."""

import functools
import types

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import stats

from vatt_jax import objectives
from vatt_jax.config import ConfigError
from vatt_jax.losses import classification
from vatt_jax.objectives.base import Spec
from vatt_jax.objectives.classification import mix
from vatt_jax.rng import Rng

B, P = 6, 5


def balanced(logits, targets, valid):
    """The balanced loss, row by row and class by class, in float64.

    n_c  = Σ_b y_bc over valid rows
    w_b  = mean over b's own classes of 1 / n_c
    loss = mean over valid rows of w_b Σ_c BCE(logit_bc, y_bc)
    """
    class_count = targets[valid].sum(0)
    losses = []
    for x, y in zip(logits[valid], targets[valid]):
        # BCE: -y log p - (1 - y) log (1 - p), with p = sigmoid(x)
        bce = np.sum(y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x))
        own = y > 0
        weight = 0.0
        if own.any():
            weight = np.sum(y[own] / class_count[own]) / y.sum()
        losses.append(weight * bce)
    return np.mean(losses) if losses else 0.0


def balanced_by_halves(logits, targets, valid):
    """The balanced loss on two devices: each half of the batch by itself, then the mean."""
    halves = []
    for rows in (slice(0, 3), slice(3, 6)):
        halves.append(balanced(logits[rows], targets[rows], valid[rows]))
    return np.mean(halves)


def smoothed(logits, label, valid, smoothing):
    """Cross entropy against smoothed labels.

    Mean over valid rows of -Σ_c ((1 - a) y_c + a / P) log p_c.
    """
    target = (1 - smoothing) * np.eye(P)[label] + smoothing / P
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.mean(-(target * log_p).sum(-1)[valid])


def case(seed=0, fractions=False):
    """logits [B P], targets [B P] and valid [B]; row 1 is of no class and row 4 is not valid."""
    rng = np.random.default_rng(seed)
    targets = (rng.uniform(size=(B, P)) < 0.4).astype(float)
    targets[1] = 0
    if fractions:
        targets = 0.3 * targets + 0.7 * np.roll(targets, -1, 0)
    valid = np.ones(B, bool)
    valid[4] = False
    return rng.normal(size=(B, P)) * 3, targets, valid


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('fractions', [False, True])
def test_balanced_loss_is_its_definition(fractions, compiled):
    logits, targets, valid = case(fractions=fractions)
    loss = classification.balanced_binary_cross_entropy
    if compiled:
        loss = jax.jit(loss, static_argnames='replicas')
    got = loss(logits, targets, weight=jnp.array(valid))
    chex.assert_shape(got, ())
    chex.assert_type(got, jnp.float32)
    np.testing.assert_allclose(got, balanced(logits, targets, valid), rtol=1e-5)

    by_halves = balanced_by_halves(logits, targets, valid)
    got = loss(logits, targets, weight=jnp.array(valid), replicas=2)
    np.testing.assert_allclose(got, by_halves, rtol=1e-5)
    assert abs(by_halves - balanced(logits, targets, valid)) > 1e-3

    assert float(loss(logits, targets, weight=jnp.zeros(B))) == 0


def finite_differences(f, x, step=1e-5):
    """Central differences of a function by each element of x, in float64."""
    gradient = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[at] = step
        gradient[at] = (f(x + shift) - f(x - shift)) / (2 * step)
    return gradient


@pytest.mark.parametrize('scale', [1, 8])
@pytest.mark.parametrize('form', ['balanced', 'balanced by halves', 'smoothed'])
def test_gradients_are_finite_differences_of_the_definition_in_float64(form, scale):
    """Logits of the usual size, and of one where a sigmoid in float32 is 0 or 1."""
    logits, targets, valid = case(1)
    logits = scale * logits
    label = targets.argmax(-1)
    if form == 'balanced':
        loss = classification.balanced_binary_cross_entropy
        definition = functools.partial(balanced, targets=targets, valid=valid)
    elif form == 'balanced by halves':
        loss = functools.partial(classification.balanced_binary_cross_entropy, replicas=2)
        definition = functools.partial(balanced_by_halves, targets=targets, valid=valid)
    else:
        loss = functools.partial(classification.softmax_cross_entropy, smoothing=0.1)
        definition = functools.partial(smoothed, label=label, valid=valid, smoothing=0.1)
        targets = label

    with jax.enable_x64(True):
        value_and_grad = jax.jit(jax.value_and_grad(loss))
        value, gradient = jax.device_get(
            value_and_grad(jnp.array(logits), jnp.array(targets), weight=jnp.array(valid))
        )
    chex.assert_type([value, gradient], np.float64)
    chex.assert_equal_shape([gradient, logits])
    assert abs(value - definition(logits)) < 1e-12 * max(1, abs(value))
    expected = finite_differences(definition, logits)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-8)
    # A row that does not count has exactly no gradient.
    assert not gradient[4].any()


@pytest.mark.parametrize('form', ['balanced', 'smoothed'])
def test_a_row_that_does_not_count_may_hold_nan(form):
    logits, targets, valid = case(1)
    if form == 'balanced':
        loss = classification.balanced_binary_cross_entropy
    else:
        loss = classification.softmax_cross_entropy
        targets = targets.argmax(-1)
    spoilt = np.where(valid[:, None], logits, np.nan)
    value_and_grad = jax.value_and_grad(loss)
    value, gradient = value_and_grad(jnp.array(spoilt), targets, weight=jnp.array(valid))
    expected = value_and_grad(jnp.array(logits), targets, weight=jnp.array(valid))
    chex.assert_tree_all_finite(expected)
    # Of the rows that count: a loss does not promise a gradient to the others.
    chex.assert_trees_all_equal((value, gradient[valid]), (expected[0], expected[1][valid]))


def test_smoothing_is_its_definition():
    logits, _, valid = case(2)
    label = np.arange(B) % P
    weight = jnp.array(valid)
    got = classification.softmax_cross_entropy(logits, label, weight=weight, smoothing=0.1)
    chex.assert_shape(got, ())
    chex.assert_type(got, jnp.float32)
    np.testing.assert_allclose(got, smoothed(logits, label, valid, 0.1), rtol=1e-5)


def objective(**fields):
    """The classification objective with some fields set."""
    return objectives.build(ConfigDict({'name': 'classification', 'label': 'class', **fields}))


def test_mixup_mixes_neighbours_by_a_beta_share():
    # x'_i = s_i x_i + (1 - s_i) x_{i+1},  s_i ~ Beta(5, 5)
    n = 4000
    x = jnp.arange(n, dtype=jnp.float32)[:, None]
    valid = jnp.ones(n, bool).at[7].set(False)
    label = jnp.arange(n) % 3
    batch = {'audio': {'data': x, 'valid': valid}, 'labels': {'class': label}}
    mixup = objective(stream='audio', form='sigmoid', mixup=5)
    mixed = mixup.mix_examples(batch, Rng.create(0, 0, jnp.arange(n)))
    chex.assert_equal_shape([mixed['audio']['data'], x])
    # With x_i = i, s i + (1 - s) (i + 1) = i + 1 - s.
    share = np.asarray(jnp.arange(1, n) - mixed['audio']['data'][:-1, 0])
    # Neither a clip that is not valid nor the one before it is mixed.
    assert share[7] == 1
    assert share[6] == 1
    assert stats.kstest(np.delete(share, [6, 7]), stats.beta(5, 5).cdf).pvalue > 1e-3
    mixed_label = mix(jax.nn.one_hot(label, 3), jnp.asarray(np.append(share, 1), jnp.float32))
    chex.assert_shape(mixed_label, (n, 3))
    np.testing.assert_allclose(mixed_label[0], [share[0], 1 - share[0], 0], atol=1e-5)


def spec(width=400, classes=50, data=(2, 64)):
    """What an objective sizes itself by: pooled features of both towers, and a sound batch."""
    pooled = types.SimpleNamespace(pooled=jax.ShapeDtypeStruct((2, width), 'float32'))
    output = types.SimpleNamespace(encoded={'audio': pooled, 'video': pooled})
    batch = {'audio': {'data': jax.ShapeDtypeStruct(data, 'float32')}}
    return Spec(None, output, batch, 10, {'class': classes})


def started(**fields):
    """The classifier's parameters as they start."""
    params, _ = objective(**fields).init(jax.random.key(0), spec())
    params = nn.meta.unbox(params)
    chex.assert_shape([params['kernel'], params['bias']], [(400, 50), (50,)])
    return params


def test_the_sigmoid_classifier_starts_as_published():
    params = started(stream='audio', form='sigmoid')
    # Every class starts at probability 1 / classes.
    np.testing.assert_allclose(1 / (1 + np.exp(-params['bias'])), 1 / 50, rtol=1e-5)
    # Glorot: uniform within sqrt(6 / (inputs + outputs)).
    limit = np.sqrt(6 / 450)
    largest = np.abs(params['kernel']).max()
    assert 0.99 * limit < largest <= limit


def test_the_softmax_classifier_starts_as_published():
    params = started(stream='video')
    assert not params['bias'].any()
    # Glorot: normal with variance 2 / (inputs + outputs).
    assert abs(params['kernel'].std() / np.sqrt(2 / 450) - 1) < 0.05


def test_mixup_of_anything_but_waveforms_is_refused():
    with pytest.raises(ConfigError, match='config.objective.mixup: expected an audio stream'):
        objective(stream='video', mixup=5)
    mixup = objective(stream='audio', form='sigmoid', mixup=5)
    with pytest.raises(ConfigError, match='makes this model read spectrograms'):
        mixup.init(jax.random.key(0), spec(data=(2, 9, 8)))
