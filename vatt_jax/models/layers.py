"""Small parts with one declaration each of shape, axes and initialiser."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vatt_jax.config import choose
from vatt_jax.parallel.sharding import as_rows, logical

# Initial values of kernels. glorot: Keras's default, VATT's. fan_in: Haiku's default, MMV's (a normal cut at two deviations and not rescaled).
# kaiming: He et al. (2015), fan-out, of PyTorch's ResNets.
INITS = {
    'glorot': jax.nn.initializers.glorot_uniform(),
    'fan_in': lambda key, shape, dtype=jnp.float32: jax.nn.initializers.truncated_normal(
        math.prod(shape[:-1]) ** -0.5
    )(key, shape, dtype),
    'kaiming': jax.nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
}
# Kinds of batch norm: what is added to the variance, how much of the running statistics a step keeps, and what enters these.
NORMS = {
    'plain': {'eps': 1e-5, 'momentum': 0.9, 'debiased': False, 'unbiased': False},  # VATT's heads
    # MMV: running statistics are the weighted mean of those of the batches so far, not of these and the initial 0 and 1
    'debiased': {'eps': 1e-5, 'momentum': 0.9, 'debiased': True, 'unbiased': False},
    'torch': {
        'eps': 1e-5,
        'momentum': 0.9,
        'debiased': False,
        'unbiased': True,
    },  # running variance with n - 1
    'xdc': {
        'eps': 1e-3,
        'momentum': 0.1,
        'debiased': False,
        'unbiased': True,
    },  # the same as XDC's released towers set it
}


class Dense(nn.Module):
    """x [... I] -> [... O]; kernel [I O]."""

    features: int
    axes: tuple[str | None, str | None]
    bias: bool = True
    init_scale: float = 1.0  # on the initial values of the kernel
    init: str = 'glorot'  # entry of INITS
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x):
        init = lambda *args: self.init_scale * INITS[self.init](*args)
        kernel = self.param(
            'kernel', logical(init, *self.axes), (x.shape[-1], self.features), jnp.float32
        )
        y = (as_rows(x.astype(self.dtype)) @ kernel.astype(self.dtype)).reshape(
            *x.shape[:-1], self.features
        )
        if self.bias:
            y = y + self.param(
                'bias',
                logical(jax.nn.initializers.zeros, self.axes[1]),
                (self.features,),
                jnp.float32,
            ).astype(self.dtype)
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
        y = y * self.param(
            'scale', logical(jax.nn.initializers.ones, 'embed'), (width,), jnp.float32
        )
        if not self.rms:
            y = y + self.param(
                'bias', logical(jax.nn.initializers.zeros, 'embed'), (width,), jnp.float32
            )
        return y.astype(x.dtype)


class BatchNorm(nn.Module):
    """Synchronised batch norm over the valid rows of the global batch, with the biased variance.

    Under jit the mean over a sharded batch *is* the global mean; no cross-device code is needed. With no valid row the running
    statistics stay and normalise.
    """

    kind: str = 'plain'  # entry of NORMS
    scale_init: float = 1.0

    @nn.compact
    def __call__(self, x, valid, train: bool):
        kind = NORMS[choose(self.kind, NORMS, 'batch norm')]
        width = x.shape[-1]
        mean = self.variable('batch_stats', 'mean', jnp.zeros, (width,), jnp.float32)
        var = self.variable('batch_stats', 'var', jnp.ones, (width,), jnp.float32)
        # batches that the running statistics have seen
        seen = (
            self.variable('batch_stats', 'count', jnp.zeros, (), jnp.int32)
            if kind['debiased']
            else None
        )
        scale = self.param(
            'scale',
            logical(jax.nn.initializers.constant(self.scale_init), 'joint'),
            (width,),
            jnp.float32,
        )
        bias = self.param(
            'bias', logical(jax.nn.initializers.zeros, 'joint'), (width,), jnp.float32
        )
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
                keep = kind['momentum']
                if seen is not None:
                    seen.value = seen.value + some
                    # The average of n batches weighted by momentum^age, as a step from that of n - 1.
                    keep = 1 - (1 - keep) / (
                        1 - keep ** jnp.maximum(seen.value, 1).astype(jnp.float32)
                    )
                keep = jnp.where(some, keep, 1.0)
                new_var = (
                    batch_var * count / jnp.maximum(count - 1, 1) if kind['unbiased'] else batch_var
                )
                mean.value = keep * mean.value + (1 - keep) * batch_mean
                var.value = keep * var.value + (1 - keep) * new_var
        return (x - m) * jax.lax.rsqrt(v + kind['eps']) * scale + bias
