"""What convolutional towers are made of.

Convolutions without bias, the batch norm that follows them, and maxima over windows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vatt_jax.models.layers import INITS, BatchNorm
from vatt_jax.parallel.sharding import logical

# Up to so many channels in all frames that a kernel sees, the frames become channels of one frame.
MAX_STACKED_CHANNELS = 64


def convolve(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any) -> jax.Array:
    """Cross-correlate x with a kernel.

    XLA has slow routines on a CPU for convolutions in three dimensions and for their derivatives,
    so the same sums are computed in other ways where these are faster:

    - a kernel of a single point is a product of matrices;
    - one that sees one frame runs over pictures;
    - one that sees one pixel of several frames is a sum of products;
    - one that sees several frames of few channels (a network's first) sees them as channels of one.

    Elsewhere it is XLA's convolution.

    Args:
        x: [B axes… I].
        kernel: [axes… I O].
        strides: one for each axis.
        padding: 'SAME' as TensorFlow pads, or pairs (before, after).

    Returns:
        [B axes'… O].
    """
    *kernel_sizes, _, out_channels = kernel.shape
    if padding == 'SAME':
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], kernel_sizes, strides, 'SAME')

    if len(kernel_sizes) == 3:
        num_frames, *spatial_sizes = kernel_sizes
        is_temporal = math.prod(spatial_sizes) == 1
        # Of a network's first kernel, 7 frames of 3 colours make 21 channels.
        stacks_frames = num_frames * x.shape[-1] <= MAX_STACKED_CHANNELS
        # This calls `convolve` again, for kernels of two axes, which pass the branch below.
        if is_temporal or stacks_frames or num_frames == 1:
            return _convolve_frames(x, kernel, strides, padding)

    # With a kernel of one point, a stride only selects points: select first, multiply less.
    is_pointwise = math.prod(kernel_sizes) == 1
    if len(kernel_sizes) != 3 and is_pointwise and not any(map(sum, padding)):
        strided = tuple(slice(None, None, stride) for stride in strides)
        x = x[(slice(None), *strided)]
        product = x.reshape(-1, x.shape[-1]) @ kernel.reshape(-1, out_channels)  # [B·points O]
        return product.reshape(*x.shape[:-1], out_channels)

    # Channels last throughout, kernels [axes… I O] as in TensorFlow's checkpoints.
    spatial = 'DHW'[-len(kernel_sizes) :]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=(f'N{spatial}C', f'{spatial}IO', f'N{spatial}C'),
    )


def _convolve_frames(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any
) -> jax.Array:
    """A convolution of x [B T H W I] in three dimensions by convolutions over pictures."""
    num_frames, *spatial_sizes, _, _ = kernel.shape
    # The first, second, … frame of every window in time: [B T' H W I] each.
    frames = windows(x, 1, num_frames, strides[0], padding[0], 0)
    batch_size, out_frames = frames[0].shape[:2]
    pictures = [frame.reshape(batch_size * out_frames, *frame.shape[2:]) for frame in frames]
    kernels = list(kernel)
    if math.prod(spatial_sizes) > 1:
        # One convolution over all frames as channels. A kernel of one pixel needs no such copy:
        # there each frame is a matrix product, and these are added.
        pictures = [jnp.concatenate(pictures, axis=-1)]
        kernels = [jnp.concatenate(kernels, axis=-2)]
    # The sum is over the frames of a kernel, or of one term where they were concatenated.
    y: Any = sum(
        convolve(picture, frame_kernel, strides[1:], padding[1:])
        for picture, frame_kernel in zip(pictures, kernels)
    )
    return y.reshape(batch_size, out_frames, *y.shape[1:])


def windows(
    x: jax.Array, axis: int, size: int, stride: int, padding: Sequence[int], fill: float
) -> list[jax.Array]:
    """The first, second, … element of every window of `size` along an axis, one array for each."""
    if any(padding):
        pads = [(0, 0)] * x.ndim
        pads[axis] = (padding[0], padding[1])
        x = jnp.pad(x, pads, constant_values=fill)
    # The last slice ends with the last window, so all slices have one length.
    num_windows = (x.shape[axis] - size) // stride + 1
    length = (num_windows - 1) * stride + 1
    return [
        jax.lax.slice_in_dim(x, offset, offset + length, stride, axis) for offset in range(size)
    ]


def max_pool(
    x: jax.Array, window: Sequence[int], strides: Sequence[int], padding: Any = 'SAME'
) -> jax.Array:
    """Maxima over windows.

    One axis after another, which is the same maximum: XLA's derivative of a window's maximum is
    many times slower on a CPU. For the derivative the steps in between are computed again, not
    stored.

    Args:
        x: [B axes… C].
        window: its size along each axis.
        strides: one for each axis.
        padding: by minus infinity, 'SAME' as TensorFlow pads, or pairs (before, after).
    """
    if padding == 'SAME':
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], window, strides, 'SAME')

    def separable_max(x: jax.Array) -> jax.Array:
        for axis, (size, stride, pads) in enumerate(zip(window, strides, padding), start=1):
            if size > 1 or stride > 1:
                # -inf cannot win: every window holds a real element.
                elements = windows(x, axis, size, stride, pads, -jnp.inf)
                x = functools.reduce(jnp.maximum, elements)
        return x

    return jax.checkpoint(separable_max)(x)


class Conv(nn.Module):
    """Cross-correlation without bias, x [B axes… I] -> [B axes'… O]; kernel [axes… I O].

    Attributes:
        padding: 'SAME' as TensorFlow pads (more at the end), or 'FIXED': (k-1)/2 on both sides
            whatever the input's size.
        init: entry of layers.INITS.
    """

    features: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = 'SAME'
    init: str = 'glorot'  # type: ignore[assignment]  # no one calls Module.init of this
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        input_axes = (None,) * (len(self.kernel) + 1)
        kernel = self.param(
            'kernel',
            logical(INITS[self.init], *input_axes, 'hidden'),
            (*self.kernel, x.shape[-1], self.features),  # [axes… I O]
            jnp.float32,
        )
        padding: Any = self.padding
        if padding != 'SAME':
            # An even kernel has the odd one at the end.
            padding = tuple(((size - 1) // 2, size - 1 - (size - 1) // 2) for size in self.kernel)
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.strides, padding)


class ConvNorm(nn.Module):
    """Convolution, batch norm over the valid rows of the global batch, ReLU if `relu`.

    Attributes:
        scale_init: initial scale of the batch norm.
        norm: entry of layers.NORMS.
        init: entry of layers.INITS.
        The others are those of Conv.
    """

    features: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = 'SAME'
    relu: bool = True
    scale_init: float = 1.0
    norm: str = 'plain'
    init: str = 'glorot'  # type: ignore[assignment]  # no one calls Module.init of this
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x: jax.Array, valid: Any, train: bool) -> jax.Array:
        """Apply to x [B axes… I]; valid bool [B], the rows that count in batch statistics."""
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
        if self.relu:
            x = jax.nn.relu(x)
        # The norm computes in float32; the map that is stored is in the compute type.
        return x.astype(self.dtype)
