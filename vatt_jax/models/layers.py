"""Small parts with one declaration each of shape, axes and initialiser."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vatt_jax.config import choose
from vatt_jax.parallel.sharding import as_rows, logical


def fan_in_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Haiku's default: a normal cut at two deviations and not rescaled, variance 1 / fan-in."""
    fan_in = math.prod(shape[:-1])
    return jax.nn.initializers.truncated_normal(fan_in**-0.5)(key, shape, dtype)


# Initial values of kernels. glorot: Keras's default, VATT's. fan_in: Haiku's, MMV's.
# kaiming: He et al. (2015), fan-out, of PyTorch's ResNets.
INITS: dict[str, Callable[..., jax.Array]] = {
    'glorot': jax.nn.initializers.glorot_uniform(),
    'fan_in': fan_in_normal,
    'kaiming': jax.nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
    # PyTorch's default of linear layers: uniform within 1/sqrt(fan in) of 0.
    'torch': jax.nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform'),
    # BERT's, whatever the fan-in.
    'bert': jax.nn.initializers.normal(0.02),
    # CLIP's projections: normal, variance 1 / fan-in.
    'normal': jax.nn.initializers.variance_scaling(1.0, 'fan_in', 'normal'),
}


def quick_gelu(x: jax.Array) -> jax.Array:
    """x · sigmoid(1.702 x), which OpenAI's CLIP has in the place of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def squared_relu(x: jax.Array) -> jax.Array:
    """max(x, 0)², of the paper of Flamingo."""
    return jnp.square(jax.nn.relu(x))


# Between the two matrices of a feed-forward part. gelu: exact, VATT's. gelu_tanh: SigLIP's and
# GPT-2's. silu: Llama's.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
    'quick_gelu': quick_gelu,
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
    'squared_relu': squared_relu,
}

# Kinds of batch norm. eps is added to the variance; momentum is how much of the running statistics
# a step keeps. debiased: running statistics are the weighted mean of those of the batches so far,
# not of these and the initial 0 and 1. unbiased: the running variance is divided by n - 1.
NORMS: dict[str, dict[str, Any]] = {
    # VATT's heads
    'plain': {'eps': 1e-5, 'momentum': 0.9, 'debiased': False, 'unbiased': False},
    # MMV
    'debiased': {'eps': 1e-5, 'momentum': 0.9, 'debiased': True, 'unbiased': False},
    'torch': {'eps': 1e-5, 'momentum': 0.9, 'debiased': False, 'unbiased': True},
    # the same as XDC's released towers set it
    'xdc': {'eps': 1e-3, 'momentum': 0.1, 'debiased': False, 'unbiased': True},
}


class Dense(nn.Module):
    """x [… I] -> [… O]; kernel [I O].

    Attributes:
        features: O.
        axes: logical names of the kernel's dimensions.
        bias: whether to add one.
        init_scale: factor on the initial values of the kernel.
        init: entry of INITS.
        dtype: to compute in.
    """

    features: int
    axes: tuple[str | None, str | None]
    bias: bool = True
    init_scale: float = 1.0
    init: str = 'glorot'  # type: ignore[assignment]  # no one calls Module.init of this
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def scaled_init(*args: Any) -> jax.Array:
            return self.init_scale * INITS[self.init](*args)

        kernel_shape = (x.shape[-1], self.features)
        kernel = self.param('kernel', logical(scaled_init, *self.axes), kernel_shape, jnp.float32)
        product = as_rows(x.astype(self.dtype)) @ kernel.astype(self.dtype)
        y = product.reshape(*x.shape[:-1], self.features)
        if self.bias:
            zeros = logical(jax.nn.initializers.zeros, self.axes[1])
            bias = self.param('bias', zeros, (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype)
        return y


class LayerNorm(nn.Module):
    """Normalise over the last axis, in float32.

    Attributes:
        rms: no mean subtraction and no bias (T5).
        eps: added to the variance.
    """

    rms: bool = False
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        y = x.astype(jnp.float32)
        if not self.rms:
            y = y - y.mean(-1, keepdims=True)
        # y has mean 0 unless rms, so its mean square is the variance.
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        ones = logical(jax.nn.initializers.ones, 'embed')
        y = y * self.param('scale', ones, shape, jnp.float32)
        if not self.rms:
            zeros = logical(jax.nn.initializers.zeros, 'embed')
            y = y + self.param('bias', zeros, shape, jnp.float32)
        return y.astype(x.dtype)


class BatchNorm(nn.Module):
    """Synchronised batch norm over the valid rows of the global batch, with the biased variance.

    Under jit the mean over a sharded batch *is* the global mean; no cross-device code is needed.
    With no valid row the running statistics stay and normalise.

    Attributes:
        kind: entry of NORMS.
        scale_init: initial value of the scale.
    """

    kind: str = 'plain'
    scale_init: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, valid: Any, train: bool) -> jax.Array:
        """Normalise x.

        Args:
            x: [B … C].
            valid: bool [B], the rows that count in the batch's statistics; not read in evaluation.
            train: whether to normalise by the batch's statistics and update the running ones.

        Returns:
            float32 [B … C].
        """
        kind = NORMS[choose(self.kind, NORMS, 'batch norm')]
        shape = (x.shape[-1],)
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, jnp.float32)
        running_var = self.variable('batch_stats', 'var', jnp.ones, shape, jnp.float32)
        num_batches = None  # that the running statistics have seen
        if kind['debiased']:
            num_batches = self.variable('batch_stats', 'count', jnp.zeros, (), jnp.int32)
        constant = jax.nn.initializers.constant(self.scale_init)
        scale = self.param('scale', logical(constant, 'joint'), shape, jnp.float32)
        zeros = logical(jax.nn.initializers.zeros, 'joint')
        bias = self.param('bias', zeros, shape, jnp.float32)

        x = x.astype(jnp.float32)
        mean = running_mean.value
        var = running_var.value
        if train:
            weight = valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim)).astype(jnp.float32)
            # Broadcast, so that `count` counts every place of a map, not rows alone.
            weight = jnp.broadcast_to(weight, (*x.shape[:-1], 1))
            axes = tuple(range(x.ndim - 1))
            count = weight.sum()  # of valid rows, times the map's size
            # Two passes: E[x²] - E[x]² would cancel in float32 where the mean is large.
            batch_mean = (x * weight).sum(axes) / jnp.maximum(count, 1)  # [C]
            batch_var = ((x - batch_mean) ** 2 * weight).sum(axes) / jnp.maximum(count, 1)  # [C]
            any_valid = count > 0
            mean = jnp.where(any_valid, batch_mean, mean)
            var = jnp.where(any_valid, batch_var, var)
            # A run starts with the initial statistics, not those of the example input.
            if not self.is_initializing():
                momentum = kind['momentum']
                if num_batches is not None:
                    num_batches.value = num_batches.value + any_valid
                    momentum = _debiased_momentum(momentum, num_batches.value)
                momentum = jnp.where(any_valid, momentum, 1.0)
                # The batch is normalised by the biased one; PyTorch keeps the unbiased one.
                update_var = batch_var
                if kind['unbiased']:
                    update_var = batch_var * count / jnp.maximum(count - 1, 1)
                running_mean.value = momentum * running_mean.value + (1 - momentum) * batch_mean
                running_var.value = momentum * running_var.value + (1 - momentum) * update_var
        return (x - mean) * jax.lax.rsqrt(var + kind['eps']) * scale + bias


def _debiased_momentum(momentum: float, num_batches: jax.Array) -> jax.Array:
    """How much of the running average of n - 1 batches the one of n batches keeps.

    The average is weighted by momentum^age:  m_n = 1 - (1 - m) / (1 - m^n).
    """
    n = jnp.maximum(num_batches, 1).astype(jnp.float32)
    return 1 - (1 - momentum) / (1 - momentum**n)
