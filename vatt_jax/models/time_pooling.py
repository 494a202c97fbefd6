"""A small transformer over moments of a clip that gives one vector (STiCA's pooling of time)."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vatt_jax.config import ConfigError
from vatt_jax.models.layers import Dense, LayerNorm

EPS = 1e-12  # of the published layer norms


class TimePooling(nn.Module):
    """Layers of self-attention and a feed-forward part, each normalised after its sum.

    The output is that of the first moment, as published. There are no positions, and what is
    averaged by attention are the inputs themselves, in parts of the width: no projection to values,
    none of the result.

    Attributes:
        layers: 0: the mean over moments.
        heads: of each layer; they divide the width.
        mlp: hidden width of the feed-forward part.
    """

    layers: int = 2
    heads: int = 4
    mlp: int = 2048

    @nn.compact
    def __call__(self, x: Float[Array, 'N T D']) -> Float[Array, 'N D']:
        if not self.layers:
            return x.mean(1)
        width = x.shape[-1]
        if width % self.heads:
            raise ConfigError(
                f'config.objective.heads: expected a divisor of the width of {width} features, got '
                f'{self.heads}.'
            )

        def dense(x: jax.Array, features: int, name: str) -> jax.Array:
            return Dense(features, ('embed', None), init='bert', name=name)(x)

        for layer in range(self.layers):
            query = dense(x, width, f'layer_{layer}_query')
            key = dense(x, width, f'layer_{layer}_key')
            attended = _attend(query, key, x, self.heads)
            x = LayerNorm(eps=EPS, name=f'layer_{layer}_norm_1')(x + attended)
            hidden = jax.nn.gelu(dense(x, self.mlp, f'layer_{layer}_in'), approximate=False)
            y = x + dense(hidden, width, f'layer_{layer}_out')
            x = LayerNorm(eps=EPS, name=f'layer_{layer}_norm_2')(y)
        return x[:, 0]


def _attend(
    query: Float[Array, 'N T D'],
    key: Float[Array, 'N T D'],
    value: Float[Array, 'N T D'],
    heads: int,
) -> Float[Array, 'N T D']:
    """Softmax attention; each head sees its part of the width."""
    *leading, width = query.shape
    shape = (*leading, heads, width // heads)
    query, key, value = (x.reshape(shape) for x in (query, key, value))
    scores = jnp.einsum('nthd,nshd->nhts', query, key) / math.sqrt(width // heads)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum('nhts,nshd->nthd', weights, value).reshape(*leading, width)
