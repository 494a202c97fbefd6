"""Convolutions without bias, the batch norm that follows them, and maxima over windows: what convolutional towers are made of."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vatt_jax.models.layers import INITS, BatchNorm
from vatt_jax.parallel.sharding import logical

THIN = 64  # channels of all frames that a kernel sees, up to which these become channels of one


def convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding) -> jax.Array:
    """Cross-correlation of x [B axes… I] with kernel [axes… I O]; padding: 'SAME' as TensorFlow pads, or pairs (before, after).

    A kernel that sees one place is a product of matrices; one that sees one frame runs over pictures; one that sees one place of several frames is
    a sum of products; one of several frames with few channels (a network's first) sees the frames as channels of one. Elsewhere it is XLA's
    convolution. These are the same sums; on a CPU, XLA has slow routines for convolutions in three dimensions and for their derivatives.
    """
    *axes, _, out = kernel.shape
    if padding == 'SAME':
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], axes, strides, 'SAME')
    if len(axes) == 3:
        frames, *space = axes
        flat = math.prod(space) == 1
        if flat or frames * x.shape[-1] <= THIN or frames == 1:
            parts = windows(x, 1, frames, strides[0], padding[0], 0)
            b, t = parts[0].shape[:2]
            parts, kernels = [p.reshape(b * t, *p.shape[2:]) for p in parts], list(kernel)
            if not flat:  # taps become channels
                parts, kernels = [jnp.concatenate(parts, -1)], [jnp.concatenate(kernels, -2)]
            y = sum(convolve(p, k, strides[1:], padding[1:]) for p, k in zip(parts, kernels))
            return y.reshape(b, t, *y.shape[1:])
    elif math.prod(axes) == 1 and not any(map(sum, padding)):
        x = x[(slice(None), *(slice(None, None, s) for s in strides))]
        return (x.reshape(-1, x.shape[-1]) @ kernel.reshape(-1, out)).reshape(*x.shape[:-1], out)
    spatial = 'DHW'[-len(axes) :]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=(f'N{spatial}C', f'{spatial}IO', f'N{spatial}C'),
    )


def windows(
    x: jax.Array, axis: int, size: int, stride: int, padding: tuple[int, int], fill: float
) -> list[jax.Array]:
    """The first, second, … element of every window of `size` along an axis, one array for each."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = padding
    x = jnp.pad(x, pads, constant_values=fill) if any(padding) else x
    count = (x.shape[axis] - size) // stride + 1
    return [
        jax.lax.slice_in_dim(x, i, i + (count - 1) * stride + 1, stride, axis) for i in range(size)
    ]


def max_pool(
    x: jax.Array, window: tuple[int, ...], strides: tuple[int, ...], padding='SAME'
) -> jax.Array:
    """Maxima over windows of x [B axes… C], padded by minus infinity as TensorFlow pads, or by pairs (before, after).

    One axis after another, which is the same maximum: XLA's derivative of a window's maximum is many times slower on a CPU. For the derivative the
    steps in between are computed again, not stored.
    """
    if padding == 'SAME':
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], window, strides, 'SAME')

    def maxima(x):
        for axis, (size, stride, pads) in enumerate(zip(window, strides, padding), 1):
            if size > 1 or stride > 1:
                x = functools.reduce(jnp.maximum, windows(x, axis, size, stride, pads, -jnp.inf))
        return x

    return jax.checkpoint(maxima)(x)


class Conv(nn.Module):
    """x [B axes… I] -> [B axes'… O]; kernel [axes… I O], cross-correlation, no bias.

    padding: 'SAME' as TensorFlow pads (more at the end), or 'FIXED': (k-1)/2 on both sides whatever the input's size.
    """

    features: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = 'SAME'
    init: str = 'glorot'  # entry of layers.INITS
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x):
        axes = (None,) * (len(self.kernel) + 1)
        kernel = self.param(
            'kernel',
            logical(INITS[self.init], *axes, 'hidden'),
            (*self.kernel, x.shape[-1], self.features),
            jnp.float32,
        )
        padding = (
            self.padding
            if self.padding == 'SAME'
            else tuple(((k - 1) // 2, k - 1 - (k - 1) // 2) for k in self.kernel)
        )
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.strides, padding)


class ConvNorm(nn.Module):
    """Convolution, batch norm over the valid rows of the global batch, ReLU if `relu`."""

    features: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = 'SAME'
    relu: bool = True
    scale_init: float = 1.0
    norm: str = 'plain'  # entry of layers.NORMS
    init: str = 'glorot'  # entry of layers.INITS
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        """x [B axes… I], valid bool [B]."""
        x = Conv(
            self.features,
            self.kernel,
            self.strides,
            self.padding,
            self.init,
            self.dtype,
            name='conv',
        )(x)
        x = BatchNorm(self.norm, self.scale_init, name='norm')(x, valid, train)
        return (jax.nn.relu(x) if self.relu else x).astype(self.dtype)
