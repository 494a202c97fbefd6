"""Small parts with one declaration each of shape, axes and initialiser."""
from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vatt_jax.sharding import as_rows, logical


class Dense(nn.Module):
    """x [... I] -> [... O]; kernel [I O]."""
    features: int
    axes: tuple[str | None, str | None]
    bias: bool = True
    init_scale: float = 1.0      # on the glorot-uniform initial values
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x):
        init = jax.nn.initializers.variance_scaling(self.init_scale ** 2, 'fan_avg', 'uniform')
        kernel = self.param('kernel', logical(init, *self.axes), (x.shape[-1], self.features), jnp.float32)
        y = (as_rows(x.astype(self.dtype)) @ kernel.astype(self.dtype)).reshape(*x.shape[:-1], self.features)
        if self.bias:
            y = y + self.param('bias', logical(jax.nn.initializers.zeros, self.axes[1]), (self.features,), jnp.float32).astype(self.dtype)
        return y


class LayerNorm(nn.Module):
    """Over the last axis, in float32. rms: no mean subtraction and no bias (T5)."""
    rms: bool = False
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        y = x.astype(jnp.float32)
        if not self.rms:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        y = y * self.param('scale', logical(jax.nn.initializers.ones, 'embed'), (width,), jnp.float32)
        if not self.rms:
            y = y + self.param('bias', logical(jax.nn.initializers.zeros, 'embed'), (width,), jnp.float32)
        return y.astype(x.dtype)


class BatchNorm(nn.Module):
    """Synchronised batch norm over the valid rows of the global batch: momentum 0.9, eps 1e-5, biased variance (VATT's head).

    Under jit the mean over a sharded batch *is* the global mean; no cross-device code is needed. With no valid row the running
    statistics stay and normalise.
    """
    momentum: float = 0.9
    eps: float = 1e-5
    scale_init: float = 1.0

    @nn.compact
    def __call__(self, x, valid, train: bool):
        width = x.shape[-1]
        mean = self.variable('batch_stats', 'mean', jnp.zeros, (width,), jnp.float32)
        var = self.variable('batch_stats', 'var', jnp.ones, (width,), jnp.float32)
        scale = self.param('scale', logical(jax.nn.initializers.constant(self.scale_init), 'joint'), (width,), jnp.float32)
        bias = self.param('bias', logical(jax.nn.initializers.zeros, 'joint'), (width,), jnp.float32)
        x = x.astype(jnp.float32)
        m, v = mean.value, var.value
        if train:
            weight = valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim)).astype(jnp.float32)
            weight = jnp.broadcast_to(weight, (*x.shape[:-1], 1))
            axes = tuple(range(x.ndim - 1))
            count = weight.sum()
            batch_mean = (x * weight).sum(axes) / jnp.maximum(count, 1)
            batch_var = ((x - batch_mean) ** 2 * weight).sum(axes) / jnp.maximum(count, 1)
            some = count > 0
            m, v = jnp.where(some, batch_mean, m), jnp.where(some, batch_var, v)
            if not self.is_initializing():
                keep = jnp.where(some, self.momentum, 1.0)
                mean.value = keep * mean.value + (1 - keep) * batch_mean
                var.value = keep * var.value + (1 - keep) * batch_var
        return (x - m) * jax.lax.rsqrt(v + self.eps) * scale + bias
