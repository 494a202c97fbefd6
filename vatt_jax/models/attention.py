"""Attention, in one place: separate queries and keys, key mask, bias, dropout on probabilities, three implementations."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from vatt_jax.config import ConfigError
from vatt_jax.rng import Rng

IMPLEMENTATIONS = ('dense', 'xla', 'cudnn')


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None = None, bias: jax.Array | None = None,
              scale: float = 1.0, dropout: float = 0.0, rng: Rng | None = None, implementation: str = 'dense') -> jax.Array:
    """[B Nq heads kv] attending to [B Nk heads kv] -> [B Nq heads kv]; softmax in float32.

    mask: bool [B Nk] (keys) or [B Nq Nk]; False gets -1e9, so a row without any key is uniform, not NaN. bias: [1|B heads Nq Nk].
    `dense` is the definition and the only one with dropout on probabilities.
    """
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None]
    if implementation != 'dense':
        if dropout:
            raise ConfigError(f'config.model.attention={implementation!r} has no dropout on attention probabilities; set '
                              'attention_dropout=0.0 in every tower, or use dense')
        full = None if mask is None else mask[:, None]
        return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=full, scale=scale, implementation=implementation)
    logits = jnp.einsum('bqhd,bkhd->bhqk', q * jnp.asarray(scale, q.dtype), k).astype(jnp.float32)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits + jnp.where(mask[:, None], 0.0, -1e9)
    weights = jax.nn.softmax(logits, -1).astype(v.dtype)
    if dropout and rng is not None:
        weights = rng.at('probabilities').dropout(weights, dropout)
    return jnp.einsum('bhqk,bkhd->bqhd', weights, v)
