"""Classification losses, computed in float32 (in float64 on logits of that)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vatt_jax.losses.arguments import check_replicas, check_shape


def softmax_cross_entropy(
    logits: jax.Array, labels: jax.Array, *, weight: jax.Array | None = None, smoothing: float = 0.0
) -> jax.Array:
    """Computes the weighted mean cross entropy over rows.

    Args:
      logits: [B P].
      labels: int [B].
      weight: [B] >= 0 (None: ones; all zero: loss 0).
      smoothing: a, where the target is (1 - a) one-hot + a / P (VATT paper, fine-tuning).

    Returns:
      float32 [].

    Raises:
      ValueError: The shapes do not fit.
    """
    check_shape(labels, logits.shape[:1], 'labels')
    if weight is not None:
        check_shape(weight, logits.shape[:1], 'weight')
    log_probs = jax.nn.log_softmax(_at_least_float32(logits), -1)  # [B P]
    # A sum against a one-hot row, not a gather: its gradient needs no scatter.
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=log_probs.dtype)
    label_log_prob = jnp.sum(one_hot * log_probs, -1)  # [B]
    loss = -((1 - smoothing) * label_log_prob + smoothing * log_probs.mean(-1))
    if weight is None:
        weight = jnp.ones(loss.shape, loss.dtype)
    weight = jnp.asarray(weight).astype(loss.dtype)
    # Mean over rows that count; the weights' own scale stays (class balancing). The select keeps a
    # NaN of a row that does not count out of the sum.
    total = jnp.sum(jnp.where(weight > 0, loss, 0) * weight)
    return total / jnp.maximum(jnp.sum(weight > 0), 1)


def balanced_binary_cross_entropy(
    logits: jax.Array, targets: jax.Array, *, weight: jax.Array | None = None, replicas: int = 1
) -> jax.Array:
    """Computes a multi-label loss in which rare classes count more.

    It is that of the official VATT's AudioSet fine-tuning. Row b: w_b · sum over classes of the
    binary cross entropy, with w_b the mean of 1/n_c over its own classes, n_c the class's share of
    the batch in examples. Mean over the rows that count; a row without any class weighs nothing.

    Args:
      logits: [B P].
      targets: [B P] in [0, 1] (mixed ones are fractions).
      weight: [B] bool or 0/1, rows that count (None: all).
      replicas: If above 1, n_c and the mean are of each of so many equal parts of the batch, and
        the parts are averaged (the official code on so many devices).

    Returns:
      float32 [].

    Raises:
      ValueError: The shapes do not fit.
    """
    check_shape(targets, logits.shape, 'targets')
    if weight is not None:
        check_shape(weight, logits.shape[:1], 'weight')
    check_replicas(replicas, len(logits))
    logits = _at_least_float32(logits)
    targets = jnp.asarray(targets, logits.dtype)
    if weight is None:
        weight = jnp.ones(len(logits), logits.dtype)
    weight = jnp.asarray(weight).astype(logits.dtype)
    targets = jnp.where(weight[:, None] > 0, targets, 0)
    targets = targets.reshape(replicas, -1, targets.shape[-1])  # [replicas B/replicas P]
    weight = weight.reshape(replicas, -1)
    logits = logits.reshape(targets.shape)

    # Binary cross entropy of a logit x and target t: max(x, 0) - x t + log(1 + exp(-|x|)), which
    # cannot overflow.
    each = jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    cross_entropy = jnp.sum(each, -1)

    class_count = targets.sum(1, keepdims=True)  # n_c
    # Where nothing is counted the divisor is 1 as well: a NaN in the branch not taken would reach
    # the gradient.
    inverse = jnp.where(class_count > 0, targets / jnp.where(class_count > 0, class_count, 1), 0)
    rarity = jnp.sum(inverse, -1)
    num_classes = targets.sum(-1)  # of each row
    row_weight = jnp.where(num_classes > 0, rarity / jnp.where(num_classes > 0, num_classes, 1), 0)
    total = jnp.sum(jnp.where(weight > 0, row_weight * cross_entropy, 0), -1)  # [replicas]
    return jnp.mean(total / jnp.maximum(jnp.sum(weight > 0, -1), 1))


def _at_least_float32(x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
