"""Classification losses."""
from __future__ import annotations

import jax
import jax.numpy as jnp


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array, *, weight: jax.Array | None = None, smoothing: float = 0.0) -> jax.Array:
    """float32 []: mean over rows, weighted. logits [B P], labels int [B], weight [B] >= 0 (None: ones; all zero: loss 0).

    smoothing a: the target is (1 - a) one-hot + a / P (VATT paper, fine-tuning).
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    # A sum against a one-hot row, not a gather: its gradient needs no scatter.
    hit = jnp.sum(jax.nn.one_hot(labels, logits.shape[-1]) * log_p, -1)
    loss = -((1 - smoothing) * hit + smoothing * log_p.mean(-1))
    weight = jnp.ones(loss.shape) if weight is None else weight.astype(jnp.float32)
    # Mean over rows that count; the weights' own scale is kept (class balancing).
    return jnp.sum(jnp.where(weight > 0, loss, 0) * weight) / jnp.maximum(jnp.sum(weight > 0), 1)
