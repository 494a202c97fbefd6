"""Heads on pooled features that several objectives train: small, shared by the views of a modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vatt_jax.config import ConfigError
from vatt_jax.models.layers import BatchNorm
from vatt_jax.parallel.sharding import logical
from vatt_jax.rng import Rng


class Head(nn.Module):
    """[B D] -> (hidden [B W], outputs [B O]) float32: dropout, linear, batch norm, relu, dropout, linear (SeLaVi's head); hidden 0: dropout and the
    last layer alone, and `hidden` is what came in. Initial values: uniform, at most 1/sqrt(fan in), as in the published code."""

    outputs: int
    hidden: int = 0
    dropout: float = 0.0
    bias: bool = True

    @nn.compact
    def __call__(self, x, valid, rng: Rng, train: bool):
        init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
        rate = self.dropout if train else 0.0
        x = x.astype(jnp.float32)
        if self.hidden:
            kernel = self.param(
                'hidden', logical(init, 'embed', None), (x.shape[-1], self.hidden), jnp.float32
            )
            x = jax.nn.relu(
                BatchNorm(name='norm')(rng.at('in').dropout(x, rate) @ kernel, valid, train)
            )
        kernel = self.param(
            'kernel', logical(init, 'embed', 'classes'), (x.shape[-1], self.outputs), jnp.float32
        )
        bound = x.shape[-1] ** -0.5
        bias = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        y = rng.at('out').dropout(x, rate) @ kernel
        return x, y + self.param(
            'bias', logical(bias, 'classes'), (self.outputs,), jnp.float32
        ) if self.bias else y


def init(head: Head, key: jax.Array, width: int) -> tuple[Any, Any]:
    """(parameters, batch statistics, {} if none) for features of this width."""
    out = head.init(
        key,
        jnp.zeros((1, width)),
        jnp.ones(1, bool),
        Rng.create(0, 0, jnp.zeros(1, jnp.uint32)),
        False,
    )
    return out['params'], out.get('batch_stats', {})


def apply(
    head: Head,
    params,
    stats,
    pooled: Mapping[str, jax.Array],
    valid: Mapping[str, jax.Array],
    rng: Rng,
    train: bool,
):
    """({view: (hidden, outputs)}, new batch statistics) for the views {view: [B D]} of one modality: one pass, one set of batch statistics."""
    names = list(pooled)
    rows = len(pooled[names[0]])
    x, ok = jnp.concatenate([pooled[v] for v in names]), jnp.concatenate([valid[v] for v in names])
    rng = rng.replace(
        examples=jnp.concatenate([rng.at(v).bits(()) for v in names])
        if len(names) > 1
        else rng.examples
    )
    (hidden, out), new = head.apply(
        {'params': params, 'batch_stats': stats}, x, ok, rng, train, mutable=['batch_stats']
    )
    part = lambda y, i: y[i * rows : (i + 1) * rows]
    return {v: (part(hidden, i), part(out, i)) for i, v in enumerate(names)}, new.get(
        'batch_stats', stats
    )


def unit(x: jax.Array, axis: int = -1) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis, keepdims=True), 1e-12))


def by_modality(views: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """modality -> its views, in the order given."""
    out: dict[str, tuple[str, ...]] = {}
    for v in views:
        out[v.split('.')[0]] = out.get(v.split('.')[0], ()) + (v,)
    return out


def width_of(spec, view: str) -> int:
    """D of the view's pooled feature; ConfigError for text, of which a clip has several."""
    shape = spec.outputs.encoded[view].pooled.shape
    if len(shape) != 2:
        raise ConfigError(
            f'config.objective.views: {view!r} has {shape[1]} candidates for each clip; a view with one feature per clip is wanted'
        )
    return shape[-1]
