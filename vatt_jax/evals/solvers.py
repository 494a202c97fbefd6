"""Classifiers on frozen features: each learns from x, y and scores every window of x_test.

A solver takes (x [N D], y, x_test [M W D], num_classes, config, seed), where y is int [N]; SEVERAL
names those that take several labels an example too, y [N P] of 0 and 1. It returns (scores [M W P],
the chosen regularisation C or None). The scores are what is averaged over windows: probabilities,
or decision values of a support-vector machine.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Shaped

from vatt_jax.evals import statistics
from vatt_jax.optim import scale_by_keras_adam

Scores = tuple[np.ndarray, float | None]

# Regularisation strengths that a solver chooses among where its config entry names none. VATT's
# support-vector machine has one.
DEFAULT_STRENGTHS: dict[str, tuple[float, ...]] = {
    'logistic': (0.01, 0.1, 1.0),
    'svm': (6e-5,),
}


def strengths_of(solver: str, strengths: Sequence[float]) -> tuple[float, ...]:
    """Returns the strengths that a solver chooses among: those given, else its own, if any."""
    return tuple(strengths) or DEFAULT_STRENGTHS.get(solver, ())


def logistic(
    x: Float[np.ndarray, 'N D'],
    y: Shaped[np.ndarray, ' N'],
    x_test: Float[np.ndarray, 'M W D'],
    num_classes: int,
    config: Any,
    seed: int,
) -> Scores:
    """Multinomial logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def make_model(strength: float) -> Any:
        # A pipeline, so that the scaler is fitted on the learning part of each split alone.
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200))

    # C is the inverse of the penalty's weight: small values regularise more.
    model, strength = _fit_best(make_model, x, y, strengths_of('logistic', config.strengths), seed)
    probs = model.predict_proba(_rows(x_test))  # [M·W classes seen]
    return _by_class(probs, model.classes_, num_classes, x_test), strength


def svm(
    x: Float[np.ndarray, 'N D'],
    y: Shaped[np.ndarray, ' N'],
    x_test: Float[np.ndarray, 'M W D'],
    num_classes: int,
    config: Any,
    seed: int,
) -> Scores:
    """Linear support-vector machines, one against the rest, on the features as they are.

    VATT: C = 6e-5.
    """
    from sklearn.svm import LinearSVC

    def make_model(strength: float) -> Any:
        # The seed matters: its coordinate descent visits examples in random order.
        return LinearSVC(C=strength, random_state=seed)

    model, strength = _fit_best(make_model, x, y, strengths_of('svm', config.strengths), seed)
    values = model.decision_function(_rows(x_test))
    if values.ndim == 1:  # of two classes scikit-learn gives the second one's value only
        values = np.stack([-values, values], 1)
    return _by_class(values, model.classes_, num_classes, x_test), strength


def head(
    x: Float[np.ndarray, 'N D'],
    y: Shaped[np.ndarray, ' N'],
    x_test: Float[np.ndarray, 'M W D'],
    num_classes: int,
    config: Any,
    seed: int,
    *,
    width: int = 128,
    batch: int = 64,
    rate: float = 5e-4,
    # The share that is dropped.
    dropout: float = 0.9,
    decay: float = 0.1,
) -> Scores:
    """VATT's probe: Dense(128) without activation, dropout 0.9, softmax classifier.

    decay · (sum of the classifier's squared weights) is added to the loss. Keras's Adam at 5e-4,
    batches of 64 (an epoch's last one may be smaller), `epochs` epochs, features as they are.
    """
    params = _head_init(jax.random.key(seed), x.shape[1], width, num_classes)
    params = _head_fit(
        params,
        jax.random.key(seed + 1),
        jnp.asarray(x, jnp.float32),
        jnp.asarray(y),
        # Otherwise a tiny set would be computed as one batch of mostly padding.
        min(batch, len(x)),
        rate,
        dropout,
        decay,
        int(config.epochs),
    )
    # In NumPy, on the host: the test set need not fit on the device.
    logits = _head_logits(jax.tree.map(np.asarray, params), np.asarray(x_test, np.float32))
    return statistics.softmax(logits), None


def mlp(
    x: Float[np.ndarray, 'N D'],
    y: Shaped[np.ndarray, 'N ...'],
    x_test: Float[np.ndarray, 'M W D'],
    num_classes: int,
    config: Any,
    seed: int,
    *,
    width: int = 512,
    batch: int = 256,
    rate: float = 1e-3,
) -> Scores:
    """MMV's probe of AudioSet: one hidden layer of 512, ReLU.

    Softmax, or one sigmoid for each class where an example may have several. On standardised
    features; Adam at 1e-3 in batches of 256, `epochs` epochs, of which the paper says nothing.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)

    def standardise(features: np.ndarray) -> np.ndarray:
        return np.asarray(scaler.transform(features), np.float32)

    params = _head_init(jax.random.key(seed), x.shape[1], width, num_classes)
    params = _mlp_fit(
        params,
        jax.random.key(seed + 1),
        jnp.asarray(standardise(x)),
        jnp.asarray(y),
        min(batch, len(x)),
        rate,
        int(config.epochs),
    )
    # scikit-learn takes two dimensions only, so windows are rows here.
    logits = np.asarray(_mlp_logits(params, standardise(_rows(x_test))), np.float64)
    logits = logits.reshape(*x_test.shape[:2], num_classes)  # [M W P]
    if y.ndim == 2:
        return statistics.sigmoid(logits), None
    return statistics.softmax(logits), None


def normed_linear(
    x: Float[np.ndarray, 'N D'],
    y: Shaped[np.ndarray, ' N'],
    x_test: Float[np.ndarray, 'M W D'],
    num_classes: int,
    config: Any,
    seed: int,
    *,
    batch: int = 128,
    rate: float = 1e-4,
) -> Scores:
    """AVID's probe: batch norm and a linear layer.

    Adam at 1e-4, a tenth of it after half of the `epochs` and a hundredth after three quarters, in
    batches of 128 that are normalised by their own statistics; windows to test on, by those of all
    that is learnt from, which running statistics would tend to since the features are frozen.
    """
    num_inputs = x.shape[1]
    # PyTorch's default of linear layers: uniform within 1/sqrt(fan in) of 0.
    bound = num_inputs**-0.5
    kernel_key, bias_key, key = jax.random.split(jax.random.key(seed), 3)
    shape = (num_inputs, num_classes)
    params = {
        'scale': jnp.ones(num_inputs),
        'shift': jnp.zeros(num_inputs),
        'kernel': jax.random.uniform(kernel_key, shape, jnp.float32, -bound, bound),
        'bias': jax.random.uniform(bias_key, (num_classes,), jnp.float32, -bound, bound),
    }
    epochs = int(config.epochs)
    drops = np.searchsorted([epochs / 2, epochs * 3 / 4], np.arange(epochs), side='right')
    params = _normed_fit(
        params,
        key,
        jnp.asarray(x, jnp.float32),
        jnp.asarray(y),
        min(batch, len(x)),
        jnp.asarray(rate * 0.1**drops, jnp.float32),
    )
    # float32 sums over many rows lose digits.
    mean, var = x.mean(0, dtype=np.float64), x.var(0, dtype=np.float64)
    # On the host: the test set need not fit on the device.
    params = jax.tree.map(np.asarray, params)
    statistics_of_all = (mean.astype(np.float32), var.astype(np.float32))
    logits = _normed_logits(params, np.asarray(x_test, np.float32), *statistics_of_all)
    return statistics.softmax(logits), None


SOLVERS: dict[str, Callable[..., Scores]] = {
    'logistic': logistic,
    'head': head,
    'svm': svm,
    'mlp': mlp,
    'normed_linear': normed_linear,
}
# Solvers that take several labels an example.
SEVERAL = ('mlp',)
NORM_EPS = 1e-5  # added to variances, PyTorch's


def _rows(x_test: np.ndarray) -> np.ndarray:
    """[M W D] -> [M·W D]."""
    return x_test.reshape(-1, x_test.shape[-1])


def _by_class(
    values: np.ndarray, known_classes: np.ndarray, num_classes: int, x_test: np.ndarray
) -> np.ndarray:
    """[M W P] of values for the classes seen in training; the others never win."""
    # Columns of scikit-learn follow `classes_`, the sorted classes seen in training. A mean over
    # windows of -inf stays -inf.
    scores = np.full((len(values), num_classes), -np.inf)
    scores[:, known_classes] = values
    return scores.reshape(*x_test.shape[:2], num_classes)


def _fit_best(
    make_model: Callable[[float], Any],
    x: np.ndarray,
    y: np.ndarray,
    strengths: Sequence[float],
    seed: int,
) -> tuple[Any, float]:
    """Fit a model with the best of several regularisation strengths.

    The best one predicts a held-out fifth of the training part best; the model then learns
    from all of it.

    Returns:
      (fitted model, C).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import train_test_split

    with warnings.catch_warnings():
        # What was reached is enough to rank strengths.
        warnings.simplefilter('ignore', ConvergenceWarning)
        best = strengths[0]
        if len(strengths) > 1:
            counts = np.bincount(y)
            smallest = counts[counts > 0].min()
            # scikit-learn refuses to stratify classes of one example, or into parts too small.
            can_stratify = smallest > 1 and len(y) >= 10 * len(np.unique(y))
            x_train, x_held_out, y_train, y_held_out = train_test_split(
                x,
                y,
                test_size=0.2,
                random_state=seed,
                stratify=y if can_stratify else None,
            )

            def held_out_accuracy(strength: float) -> float:
                model = make_model(strength).fit(x_train, y_train)
                return model.score(x_held_out, y_held_out)

            # The first of equals: with ascending strengths the most regularised one.
            best = max(strengths, key=held_out_accuracy)
        return make_model(best).fit(x, y), best


def _head_init(key: jax.Array, num_inputs: int, width: int, num_classes: int) -> dict[str, Any]:
    """Parameters of two dense layers, as Keras draws them."""
    glorot = jax.nn.initializers.glorot_uniform()
    # glorot_uniform and zeros are the defaults of keras.layers.Dense.
    in_key, out_key = jax.random.split(key)
    return {
        'in': glorot(in_key, (num_inputs, width)),
        'in_bias': jnp.zeros(width),
        'out': glorot(out_key, (width, num_classes)),
        'out_bias': jnp.zeros(num_classes),
    }


def _head_logits(params: Any, x: Any) -> Any:
    hidden = x @ params['in'] + params['in_bias']
    return hidden @ params['out'] + params['out_bias']


def _mlp_logits(params: Any, x: Any) -> Any:
    hidden = jax.nn.relu(x @ params['in'] + params['in_bias'])
    return hidden @ params['out'] + params['out_bias']


# Static: `batch` and `epochs` give shapes and lengths of scans. The whole training is one program,
# with the features on the device.
@functools.partial(jax.jit, static_argnums=(4, 8))
def _head_fit(
    params: Any,
    key: Any,
    x: Any,
    y: Any,
    batch: int,
    rate: Any,
    dropout: Any,
    decay: Any,
    epochs: int,
) -> Any:
    def loss(p: Any, rows: Any, weight: Any, key: Any) -> Any:
        hidden = x[rows] @ p['in'] + p['in_bias']  # [batch width]
        is_dropped = jax.random.uniform(key, hidden.shape) < dropout
        # Inverted dropout: nothing is scaled in evaluation.
        hidden = jnp.where(is_dropped, 0, hidden / (1 - dropout))
        logits = hidden @ p['out'] + p['out_bias']  # [batch P]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y[rows])
        # Keras's kernel_regularizer of the last layer: part of the loss, so Adam rescales its
        # gradient too; not the decoupled decay of AdamW. The bias is left out.
        penalty = decay * jnp.sum(p['out'] ** 2)
        # The mean over the examples of a smaller last batch, as Keras takes it.
        return jnp.sum(losses * weight) / jnp.sum(weight) + penalty

    return _fit(params, key, loss, len(x), batch, rate, epochs)


# Static: `batch` and `epochs`, as above.
@functools.partial(jax.jit, static_argnums=(4, 6))
def _mlp_fit(params: Any, key: Any, x: Any, y: Any, batch: int, rate: Any, epochs: int) -> Any:
    def loss(p: Any, rows: Any, weight: Any, key: Any) -> Any:
        logits = _mlp_logits(p, x[rows])
        if y.ndim == 2:
            losses = optax.sigmoid_binary_cross_entropy(logits, y[rows]).sum(-1)
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y[rows])
        return jnp.sum(losses * weight) / jnp.sum(weight)

    return _fit(params, key, loss, len(x), batch, rate, epochs)


def _normed_logits(params: Any, x: Any, mean: Any, var: Any) -> Any:
    normalised = (x - mean) / (var + NORM_EPS) ** 0.5
    return (normalised * params['scale'] + params['shift']) @ params['kernel'] + params['bias']


# Static: `batch`, as above.
@functools.partial(jax.jit, static_argnums=4)
def _normed_fit(params: Any, key: Any, x: Any, y: Any, batch: int, rates: Any) -> Any:
    def loss(p: Any, rows: Any, weight: Any, key: Any) -> Any:
        features = x[rows]  # [batch D]
        share = (weight / jnp.sum(weight))[:, None]
        mean = jnp.sum(share * features, 0)
        var = jnp.sum(share * (features - mean) ** 2, 0)
        logits = _normed_logits(p, features, mean, var)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y[rows])
        return jnp.sum(losses * weight) / jnp.sum(weight)

    return _fit(params, key, loss, len(x), batch, rates, len(rates), optax.scale_by_adam())


def _fit(
    params: Any,
    key: Any,
    loss: Callable[..., Any],
    count: int,
    batch: int,
    rate: Any,
    epochs: int,
    optimizer: Any = None,
) -> Any:
    """Adam over epochs in a new order each; an epoch's last batch may be smaller.

    Args:
      params: where to start.
      key: of orders and losses.
      loss: loss(params, rows [batch], weight 0 or 1 [batch], key).
      count: number of examples.
      batch: examples of one step.
      rate: learning rate, or one for each pass.
      epochs: number of passes.
      optimizer: None: Keras's Adam.
    """
    steps = -(-count // batch)  # rounded up
    num_padding = steps * batch - count
    optimizer = optimizer or scale_by_keras_adam()

    def step(carry: Any, number: Any) -> Any:
        p, state, order, key, rate = carry
        # `number` is traced, where `order[a:b]` would need static bounds.
        rows = jax.lax.dynamic_slice(order, (number * batch,), (batch,))
        step_key = jax.random.fold_in(key, number)
        # Rows of -1 fill the last batch; they weigh nothing.
        gradients = jax.grad(loss)(p, jnp.maximum(rows, 0), rows >= 0, step_key)
        direction, state = optimizer.update(gradients, state)
        p = jax.tree.map(lambda w, d: w - rate * d, p, direction)
        return (p, state, order, key, rate), None

    def epoch(carry: Any, key_and_rate: Any) -> Any:
        key, rate = key_and_rate
        order_key, loss_key = jax.random.split(key)
        order = jax.random.permutation(order_key, count)
        # A scan needs batches of one shape.
        order = jnp.pad(order, (0, num_padding), constant_values=-1)
        start = (*carry, order, loss_key, rate)
        (p, state, *_), _ = jax.lax.scan(step, start, jnp.arange(steps))
        return (p, state), None

    # Nested scans: the size of the program does not grow with epochs or batches.
    start = (params, optimizer.init(params))
    rates = jnp.broadcast_to(jnp.asarray(rate, jnp.float32), (epochs,))
    (params, _), _ = jax.lax.scan(epoch, start, (jax.random.split(key, epochs), rates))
    return params
