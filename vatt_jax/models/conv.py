"""A convolution without bias and the batch norm that follows it: the unit of every convolutional tower."""
from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vatt_jax.models.layers import INITS, BatchNorm
from vatt_jax.sharding import logical


class Conv(nn.Module):
    """x [B axes… I] -> [B axes'… O]; kernel [axes… I O], cross-correlation, no bias.

    padding: 'SAME' as TensorFlow pads (more at the end), or 'FIXED': (k-1)/2 on both sides whatever the input's size.
    """
    features: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = 'SAME'
    init: str = 'glorot'         # entry of layers.INITS
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x):
        axes = (None,) * (len(self.kernel) + 1)
        kernel = self.param('kernel', logical(INITS[self.init], *axes, 'hidden'),
                            (*self.kernel, x.shape[-1], self.features), jnp.float32)
        padding = self.padding if self.padding == 'SAME' else [((k - 1) // 2, k - 1 - (k - 1) // 2) for k in self.kernel]
        spatial = 'DHW'[-len(self.kernel):]
        return jax.lax.conv_general_dilated(x.astype(self.dtype), kernel.astype(self.dtype), self.strides, padding,
                                            dimension_numbers=(f'N{spatial}C', f'{spatial}IO', f'N{spatial}C'))


class ConvNorm(nn.Module):
    """Convolution, batch norm over the valid rows of the global batch, ReLU if `relu`."""
    features: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = 'SAME'
    relu: bool = True
    scale_init: float = 1.0
    norm: str = 'plain'          # entry of layers.NORMS
    init: str = 'glorot'         # entry of layers.INITS
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        """x [B axes… I], valid bool [B]."""
        x = Conv(self.features, self.kernel, self.strides, self.padding, self.init, self.dtype, name='conv')(x)
        x = BatchNorm(self.norm, self.scale_init, name='norm')(x, valid, train)
        return (jax.nn.relu(x) if self.relu else x).astype(self.dtype)
