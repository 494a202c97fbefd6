"""Noise-contrastive losses, dense: the readable definition. Semantics are those of the global batch.

x [B E] are one modality's embeddings; y [B E] or [B K E] the other's, K candidates per clip (MIL-NCE). Both are l2-normalised here.
A clip is valid for a pair when both its sides are. What is masked gets exactly zero gradient.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

_NEVER = -1e9


def _prepare(x, y, x_valid, y_valid, y_mask):
    y = y[:, None] if y.ndim == 2 else y
    b, k = y.shape[:2]
    x_valid = jnp.ones(b, bool) if x_valid is None else x_valid
    y_valid = jnp.ones(b, bool) if y_valid is None else y_valid
    y_mask = y_valid[:, None] & (jnp.ones((b, k), bool) if y_mask is None else y_mask)
    valid = x_valid & y_mask.any(-1)
    # Masked rows are cut out before anything is computed from them, so that not even 0 · NaN reaches their gradient.
    x = jnp.where(x_valid[:, None], x, 0).astype(jnp.float32)
    y = jnp.where(y_mask[..., None], y, 0).astype(jnp.float32)
    return unit(x), unit(y), x_valid, y_mask, valid


def unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis, the squared norm floored at 1e-12 (official VATT)."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))


def _mean(loss, valid, replicas):
    """Mean over valid clips; with replicas, over each replica's valid clips first and then over replicas, as the official code does."""
    loss = jnp.where(valid, loss, 0).reshape(replicas, -1)
    count = valid.reshape(replicas, -1).sum(-1)
    return jnp.mean(loss.sum(-1) / jnp.maximum(count, 1))


def asymmetric(x, y, *, x_valid=None, y_valid=None, y_mask=None, temperature=0.07, replicas: int = 1) -> jax.Array:
    """NCE (K = 1) or MIL-NCE with one denominator for both directions (VATT paper, equations 2 and 3; MMV).

    For clip b: P = logsumexp over its own candidates of s(x_b, y_bk), D = logsumexp over {s(x_b, y_ak)} and {s(x_a, y_bk)} together, every
    clip a and candidate k, so each positive is counted twice; the loss is the mean of D - P over valid clips, float32 []. A perfect model
    tends to log 2. No valid clip: 0. x_valid, y_valid: bool [B]; y_mask: bool [B K]. replicas: see `_mean`.
    """
    x, y, x_valid, y_mask, valid = _prepare(x, y, x_valid, y_valid, y_mask)
    s = jnp.einsum('be,ake->bak', x, y, precision='highest') / temperature       # x_b against every candidate
    t = s.transpose(1, 2, 0)                                                     # candidate (b, k) against every x_a
    own = jnp.sum(x[:, None] * y, -1) / temperature                              # row-wise: a diagonal would not compile at size
    positive = jax.nn.logsumexp(jnp.where(y_mask, own, _NEVER), -1)
    s = jnp.where(y_mask[None], s, _NEVER).reshape(len(x), -1)
    t = jnp.where(y_mask[..., None] & x_valid, t, _NEVER).reshape(len(x), -1)
    return _mean(jax.nn.logsumexp(jnp.concatenate([s, t], -1), -1) - positive, valid, replicas)


def symmetric(x, y, *, x_valid=None, y_valid=None, y_mask=None, temperature=0.07, replicas: int = 1) -> jax.Array:
    """NCE or MIL-NCE with a denominator for each direction, their losses added (official VATT's symmetric variant; CLIP has half of it).

    Arguments as `asymmetric`. The infimum is 0.
    """
    x, y, x_valid, y_mask, valid = _prepare(x, y, x_valid, y_valid, y_mask)
    s = jnp.einsum('be,ake->bak', x, y, precision='highest') / temperature
    t = s.transpose(1, 2, 0)
    own = jnp.where(y_mask, jnp.sum(x[:, None] * y, -1) / temperature, _NEVER)
    positive = jax.nn.logsumexp(own, -1)
    forward = jax.nn.logsumexp(jnp.where(y_mask[None], s, _NEVER).reshape(len(x), -1), -1)
    backward = jax.nn.logsumexp(jnp.where(y_mask[..., None] & x_valid, t, _NEVER).reshape(len(x), -1), -1)
    return _mean(forward + backward - 2 * positive, valid, replicas)
