"""Classifiers on frozen features [N D]: each learns from x, y and scores every window of x_test [N W D] -> (scores [N W P], the chosen C or None).

y: int [N]; SEVERAL names those that take several labels an example too, y [N P] of 0 and 1. The scores are what is averaged over windows:
probabilities, or decision values of a support-vector machine.
"""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vatt_jax.optim import scale_by_keras_adam


def logistic(x, y, x_test, classes, config, seed):
    """Multinomial logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    make = lambda c: make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=200))
    model, strength = _best(make, x, y, config.strengths or (0.01, 0.1, 1.0), seed)
    return _columns(model.predict_proba(_rows(x_test)), model.classes_, classes, x_test), strength


def svm(x, y, x_test, classes, config, seed):
    """Linear support-vector machines, one against the rest, on the features as they are (VATT: C = 6e-5)."""
    from sklearn.svm import LinearSVC

    model, strength = _best(
        lambda c: LinearSVC(C=c, random_state=seed), x, y, config.strengths or (6e-5,), seed
    )
    values = model.decision_function(_rows(x_test))
    values = np.stack([-values, values], 1) if values.ndim == 1 else values
    return _columns(values, model.classes_, classes, x_test), strength


def head(
    x, y, x_test, classes, config, seed, *, width=128, batch=64, rate=5e-4, dropout=0.9, decay=0.1
):
    """VATT's probe: Dense(128) without activation, dropout 0.9, softmax classifier with decay · (sum of its squared weights) added to the loss;
    Keras's Adam at 5e-4, batches of 64 (an epoch's last one may be smaller), `epochs` epochs, features as they are."""
    params = _head_init(jax.random.key(seed), x.shape[1], width, classes)
    params = _head_fit(
        params,
        jax.random.key(seed + 1),
        jnp.asarray(x, jnp.float32),
        jnp.asarray(y),
        min(batch, len(x)),
        rate,
        dropout,
        decay,
        int(config.epochs),
    )
    logits = _head_logits(jax.tree.map(np.asarray, params), np.asarray(x_test, np.float32))
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True), None


def mlp(x, y, x_test, classes, config, seed, *, width=512, batch=256, rate=1e-3):
    """MMV's probe of AudioSet: one hidden layer of 512, ReLU. Softmax, or one sigmoid for each class where an example may have several. On
    standardised features; Adam at 1e-3 in batches of 256, `epochs` epochs, of which the paper says nothing."""
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler().fit(x)
    of = lambda x: np.asarray(scale.transform(x), np.float32)
    params = _head_init(jax.random.key(seed), x.shape[1], width, classes)
    params = _mlp_fit(
        params,
        jax.random.key(seed + 1),
        jnp.asarray(of(x)),
        jnp.asarray(y),
        min(batch, len(x)),
        rate,
        int(config.epochs),
    )
    logits = np.asarray(_mlp_logits(params, of(_rows(x_test))), np.float64).reshape(
        *x_test.shape[:2], classes
    )
    if y.ndim == 2:
        return 0.5 * (1 + np.tanh(0.5 * logits)), None
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True), None


SOLVERS = {'logistic': logistic, 'head': head, 'svm': svm, 'mlp': mlp}
SEVERAL = ('mlp',)


def _rows(x_test: np.ndarray) -> np.ndarray:
    return x_test.reshape(-1, x_test.shape[-1])


def _columns(values: np.ndarray, known: np.ndarray, classes: int, x_test: np.ndarray) -> np.ndarray:
    """[N W P] of values for the classes seen in training; the others never win."""
    out = np.full((len(values), classes), -np.inf)
    out[:, known] = values
    return out.reshape(*x_test.shape[:2], classes)


def _best(make, x, y, strengths, seed):
    """(fitted model, C): of several strengths the one that predicts a held-out fifth of the training part best."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import train_test_split

    with warnings.catch_warnings():
        warnings.simplefilter(
            'ignore', ConvergenceWarning
        )  # what was reached is enough to rank strengths
        best = strengths[0]
        if len(strengths) > 1:
            smallest = np.bincount(y)[np.bincount(y) > 0].min()
            stratify = y if smallest > 1 and len(y) >= 10 * len(np.unique(y)) else None
            parts = train_test_split(x, y, test_size=0.2, random_state=seed, stratify=stratify)
            best = max(
                strengths, key=lambda c: make(c).fit(parts[0], parts[2]).score(parts[1], parts[3])
            )
        return make(best).fit(x, y), best


def _head_init(key, inputs: int, width: int, classes: int):
    glorot = jax.nn.initializers.glorot_uniform()
    one, two = jax.random.split(key)
    return {
        'in': glorot(one, (inputs, width)),
        'in_bias': jnp.zeros(width),
        'out': glorot(two, (width, classes)),
        'out_bias': jnp.zeros(classes),
    }


def _head_logits(p, x):
    return (x @ p['in'] + p['in_bias']) @ p['out'] + p['out_bias']


def _mlp_logits(p, x):
    return jax.nn.relu(x @ p['in'] + p['in_bias']) @ p['out'] + p['out_bias']


@functools.partial(jax.jit, static_argnums=(4, 8))
def _head_fit(params, key, x, y, batch: int, rate, dropout, decay, epochs: int):
    def loss(p, rows, weight, key):
        hidden = x[rows] @ p['in'] + p['in_bias']
        hidden = jnp.where(
            jax.random.uniform(key, hidden.shape) < dropout, 0, hidden / (1 - dropout)
        )
        each = optax.softmax_cross_entropy_with_integer_labels(
            hidden @ p['out'] + p['out_bias'], y[rows]
        )
        return jnp.sum(each * weight) / jnp.sum(weight) + decay * jnp.sum(p['out'] ** 2)

    return _fit(params, key, loss, len(x), batch, rate, epochs)


@functools.partial(jax.jit, static_argnums=(4, 6))
def _mlp_fit(params, key, x, y, batch: int, rate, epochs: int):
    def loss(p, rows, weight, key):
        logits = _mlp_logits(p, x[rows])
        each = (
            optax.sigmoid_binary_cross_entropy(logits, y[rows]).sum(-1)
            if y.ndim == 2
            else optax.softmax_cross_entropy_with_integer_labels(logits, y[rows])
        )
        return jnp.sum(each * weight) / jnp.sum(weight)

    return _fit(params, key, loss, len(x), batch, rate, epochs)


def _fit(params, key, loss, count: int, batch: int, rate, epochs: int):
    """Keras's Adam over epochs in a new order each; an epoch's last batch may be smaller. loss(params, rows [batch], weight 0 or 1 [batch], key)."""
    steps = -(-count // batch)
    tx = scale_by_keras_adam()

    def step(carry, at):
        p, state, order, key = carry
        rows = jax.lax.dynamic_slice(order, (at * batch,), (batch,))
        direction, state = tx.update(
            jax.grad(loss)(p, jnp.maximum(rows, 0), rows >= 0, jax.random.fold_in(key, at)), state
        )
        return (jax.tree.map(lambda w, d: w - rate * d, p, direction), state, order, key), None

    def epoch(carry, key):
        one, two = jax.random.split(key)
        order = jnp.pad(
            jax.random.permutation(one, count), (0, steps * batch - count), constant_values=-1
        )
        (p, state, _, _), _ = jax.lax.scan(step, (*carry, order, two), jnp.arange(steps))
        return (p, state), None

    (params, _), _ = jax.lax.scan(epoch, (params, tx.init(params)), jax.random.split(key, epochs))
    return params
