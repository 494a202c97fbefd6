"""Classification losses, computed in float32 (in float64 on logits of that)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def softmax_cross_entropy(
    logits: jax.Array, labels: jax.Array, *, weight: jax.Array | None = None, smoothing: float = 0.0
) -> jax.Array:
    """float32 []: mean over rows, weighted. logits [B P], labels int [B], weight [B] >= 0 (None: ones; all zero: loss 0).

    smoothing a: the target is (1 - a) one-hot + a / P (VATT paper, fine-tuning).
    """
    log_p = jax.nn.log_softmax(_wide(logits), -1)
    # one_hot of a label out of range (-1: none) is all zeros: such rows need weight 0.
    # A sum against a one-hot row, not a gather: its gradient needs no scatter.
    hit = jnp.sum(jax.nn.one_hot(labels, logits.shape[-1], dtype=log_p.dtype) * log_p, -1)
    # -sum_k t_k log p_k with t = (1 - a) one-hot + a / P.  [B]
    loss = -((1 - smoothing) * hit + smoothing * log_p.mean(-1))
    weight = jnp.ones(loss.shape, loss.dtype) if weight is None else weight.astype(loss.dtype)
    # Mean over rows that count; the weights' own scale is kept (class balancing).
    return jnp.sum(jnp.where(weight > 0, loss, 0) * weight) / jnp.maximum(jnp.sum(weight > 0), 1)


def balanced_binary_cross_entropy(
    logits: jax.Array, targets: jax.Array, *, weight: jax.Array | None = None, replicas: int = 1
) -> jax.Array:
    """float32 []: multi-label loss in which rare classes count more (official VATT, AudioSet fine-tuning). logits, targets [B P], targets in
    [0, 1] (mixed ones are fractions); weight [B] bool or 0/1: rows that count (None: all).

    Row b: w_b · sum over classes of the binary cross entropy, with w_b the mean of 1/n_c over its own classes, n_c the class's share of the
    batch in examples. Mean over the rows that count; a row without any class weighs nothing. replicas > 1: n_c and the mean are of each of
    so many equal parts of the batch, and the parts are averaged (the official code on so many devices).
    """
    # Shapes below: R replicas, B / R rows of each, P classes.
    logits = _wide(logits)
    targets = jnp.asarray(targets, logits.dtype)
    weight = jnp.ones(len(logits), logits.dtype) if weight is None else weight.astype(logits.dtype)
    # Rows that do not count must not make a class look frequent either.
    targets = jnp.where(weight[:, None] > 0, targets, 0).reshape(replicas, -1, targets.shape[-1])
    weight, logits = weight.reshape(replicas, -1), logits.reshape(targets.shape)
    # -t log σ(z) - (1 - t) log(1 - σ(z)) in the form that overflows for no z.  [R B/R]
    each = jnp.sum(
        jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits))), -1
    )
    seen = targets.sum(1, keepdims=True)  # [R 1 P], n_c
    # The inner where keeps a class that nobody has from dividing by 0.
    rare = jnp.sum(jnp.where(seen > 0, targets / jnp.where(seen > 0, seen, 1), 0), -1)
    own = targets.sum(-1)  # [R B/R], classes of a row
    row = jnp.where(own > 0, rare / jnp.where(own > 0, own, 1), 0) * each
    return jnp.mean(
        jnp.sum(jnp.where(weight > 0, row, 0), -1) / jnp.maximum(jnp.sum(weight > 0, -1), 1)
    )


def _wide(x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
