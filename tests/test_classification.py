"""Fine-tuning losses and objective against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vatt_jax import objectives
from vatt_jax.config import ConfigError
from vatt_jax.losses import classification
from vatt_jax.objectives.base import Spec
from vatt_jax.objectives.classification import mix
from vatt_jax.rng import Rng

B, P = 6, 5


def definition(logits, y, rows):
    """Clip by clip, class by class: -mean over rows of (mean over own classes of 1/n_c) · sum_c BCE."""
    n = [sum(y[b, c] for b in range(len(y)) if rows[b]) for c in range(y.shape[1])]
    losses = []
    for b in range(len(y)):
        if not rows[b]:
            continue
        bce = np.sum(
            y[b] * np.logaddexp(0, -logits[b]) + (1 - y[b]) * np.logaddexp(0, logits[b])
        )  # -log p, -log (1 - p)
        own = y[b].sum()
        weight = sum(y[b, c] / n[c] for c in range(y.shape[1]) if y[b, c] > 0) / own if own else 0.0
        losses.append(weight * bce)
    return np.mean(losses) if losses else 0.0


def case(seed=0, fractions=False):
    noise = np.random.default_rng(seed)
    y = (noise.uniform(size=(B, P)) < 0.4).astype(float)
    y[1] = 0
    if fractions:
        y = 0.3 * y + 0.7 * np.roll(y, -1, 0)
    rows = np.ones(B, bool)
    rows[4] = False
    return noise.normal(size=(B, P)) * 3, y, rows


@pytest.mark.parametrize('fractions', [False, True])
def test_balanced_loss_is_its_definition(fractions):
    logits, y, rows = case(fractions=fractions)
    loss = classification.balanced_binary_cross_entropy
    np.testing.assert_allclose(
        loss(logits, y, weight=jnp.array(rows)), definition(logits, y, rows), rtol=1e-5
    )
    parts = [definition(logits[i : i + 3], y[i : i + 3], rows[i : i + 3]) for i in (0, 3)]
    got = loss(logits, y, weight=jnp.array(rows), replicas=2)
    np.testing.assert_allclose(got, np.mean(parts), rtol=1e-5)
    assert abs(np.mean(parts) - definition(logits, y, rows)) > 1e-3
    assert float(loss(logits, y, weight=jnp.zeros(B))) == 0


def smoothed(logits, label, rows, smoothing):
    """-mean over rows of sum over classes of ((1 - a) y + a / P) log p."""
    target = (1 - smoothing) * np.eye(P)[label] + smoothing / P
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.mean(-(target * log_p).sum(-1)[rows])


def test_gradients_of_the_losses_against_finite_differences_in_float64():
    """Differences of the definitions, not of the losses; logits of the usual size and of one where a sigmoid in float32 is 0 or 1."""
    for scale in (1, 8):
        logits, y, rows = case(1)
        logits, label = scale * logits, y.argmax(-1)
        forms = {
            'balanced': (
                classification.balanced_binary_cross_entropy,
                y,
                {},
                lambda z: definition(z, y, rows),
            ),  # noqa: B023
            'halves': (
                classification.balanced_binary_cross_entropy,
                y,
                {'replicas': 2},
                lambda z: np.mean(
                    [definition(z[i : i + 3], y[i : i + 3], rows[i : i + 3]) for i in (0, 3)]
                ),
            ),  # noqa: B023
            'softmax': (
                classification.softmax_cross_entropy,
                label,
                {'smoothing': 0.1},
                lambda z: smoothed(z, label, rows, 0.1),
            ),
        }  # noqa: B023
        for name, (form, target, options, want) in forms.items():
            with jax.enable_x64(True):
                f = lambda z: form(z, jnp.array(target), weight=jnp.array(rows), **options)  # noqa: B023
                value, got = jax.device_get(jax.jit(jax.value_and_grad(f))(jnp.array(logits)))
            assert value.dtype == got.dtype == np.float64 and abs(
                value - want(logits)
            ) < 1e-12 * max(1, abs(value)), name
            step = 1e-5
            for at in np.ndindex(B, P):
                shift = np.zeros((B, P))
                shift[at] = step
                assert (
                    abs(got[at] - (want(logits + shift) - want(logits - shift)) / (2 * step)) < 1e-8
                ), (name, at)
            assert not got[4].any()


def test_smoothing_is_its_definition():
    logits, _, rows = case(2)
    label = np.arange(B) % P
    got = classification.softmax_cross_entropy(logits, label, weight=jnp.array(rows), smoothing=0.1)
    np.testing.assert_allclose(got, smoothed(logits, label, rows, 0.1), rtol=1e-5)


def test_mixup_mixes_neighbours_by_a_beta_share():
    scipy = pytest.importorskip('scipy.stats')
    n = 4000
    x = jnp.arange(n, dtype=jnp.float32)[:, None]
    rows = jnp.ones(n, bool).at[7].set(False)
    batch = {'audio': {'data': x, 'valid': rows}, 'labels': {'class': jnp.arange(n) % 3}}
    mixed = objective(stream='audio', form='sigmoid', mixup=5).mix_examples(
        batch, Rng.create(0, 0, jnp.arange(n))
    )
    share = np.asarray(
        jnp.arange(1, n) - mixed['audio']['data'][:-1, 0]
    )  # data = s·i + (1-s)·(i+1) = i + 1 - s
    assert share[7] == 1 and share[6] == 1
    assert scipy.kstest(np.delete(share, [6, 7]), scipy.beta(5, 5).cdf).pvalue > 1e-3
    label = mix(jax.nn.one_hot(jnp.arange(n) % 3, 3), jnp.asarray(np.append(share, 1), jnp.float32))
    np.testing.assert_allclose(label[0], [share[0], 1 - share[0], 0], atol=1e-5)


def objective(**fields):
    return objectives.build(ConfigDict({'name': 'classification', 'label': 'class', **fields}))


def spec(width=400, classes=50, data=(2, 64)):
    class Out:
        encoded = {
            'audio': type('E', (), {'pooled': jax.ShapeDtypeStruct((2, width), 'float32')}),
            'video': type('E', (), {'pooled': jax.ShapeDtypeStruct((2, width), 'float32')}),
        }

    return Spec(
        None,
        Out,
        {'audio': {'data': jax.ShapeDtypeStruct(data, 'float32')}},
        10,
        {'class': classes},
    )


def test_classifiers_start_as_published():
    from flax.linen import meta

    params, _ = objective(stream='audio', form='sigmoid').init(jax.random.key(0), spec())
    params = meta.unbox(params)
    np.testing.assert_allclose(1 / (1 + np.exp(-params['bias'])), 1 / 50, rtol=1e-5)
    limit = np.sqrt(6 / 450)
    assert np.abs(params['kernel']).max() <= limit and np.abs(params['kernel']).max() > 0.99 * limit
    params, _ = objective(stream='video').init(jax.random.key(0), spec())
    params = meta.unbox(params)
    assert not params['bias'].any() and abs(params['kernel'].std() / np.sqrt(2 / 450) - 1) < 0.05


def test_what_cannot_be_mixed_is_said():
    with pytest.raises(ConfigError, match='config.objective.mixup: expected an audio stream'):
        objective(stream='video', mixup=5)
    with pytest.raises(ConfigError, match='makes this model read spectrograms'):
        objective(stream='audio', form='sigmoid', mixup=5).init(
            jax.random.key(0), spec(data=(2, 9, 8))
        )
