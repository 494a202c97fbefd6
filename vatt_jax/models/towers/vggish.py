"""VGG over spectrograms: VGGish (Hershey et al. 2017), and the same with batch norm."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vatt_jax.models.layers import Dense
from vatt_jax.models.towers.convolutions import Conv, ConvNorm, max_pool
from vatt_jax.models.towers.stages import sow_stage
from vatt_jax.parallel.sharding import logical

# Widths of the 3×3 convolutions; a 2×2 max pool ends each stage.
STAGES = ((64,), (128,), (256, 256), (512, 512))


class VGGish(nn.Module):
    """Spectrogram [B T F] -> (pooled [B D], map [B T/16 F/16 512·w]), w = `multiplier`.

    Attributes:
        dense: widths of the layers on the flattened map, the last of which is D; all but that one
            are followed by a ReLU. (): the mean of the map, D = 512·w.
        multiplier: of the convolutions' widths.
        batch_norm: after each convolution, in place of its bias. False: as released.
        norm: its kind, entry of layers.NORMS.
        dtype: of activations.
    """

    dense: Any = (4096, 4096, 128)
    multiplier: float = 1.0
    batch_norm: bool = False
    norm: str = 'torch'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T F'], valid: Any, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        x = x[..., None]  # one channel
        for stage, widths in enumerate(STAGES, start=1):
            for i, width in enumerate(widths, start=1):
                # A narrow network still has channels.
                scaled = max(1, round(width * self.multiplier))
                x = self._convolution(x, scaled, f'conv_{stage}_{i}', valid, train)
            x = max_pool(x, (2, 2), (2, 2), 'SAME')
            sow_stage(self, stage, x)
        if not self.dense:
            return x.mean((1, 2)), x
        # Row-major as TensorFlow flattens [T' F' D].
        pooled = x.reshape(len(x), -1)
        for i, width in enumerate(self.dense, start=1):
            pooled = Dense(width, ('embed', None), dtype=self.dtype, name=f'dense_{i}')(pooled)
            if i < len(self.dense):
                pooled = jax.nn.relu(pooled)
        return pooled, x

    def _convolution(
        self, x: jax.Array, width: int, name: str, valid: Any, train: bool
    ) -> jax.Array:
        """3×3, with batch norm or a bias, ReLU."""
        if self.batch_norm:
            return ConvNorm(
                width, (3, 3), (1, 1), norm=self.norm, init='kaiming', dtype=self.dtype, name=name
            )(x, valid, train)
        x = Conv(width, (3, 3), (1, 1), init='kaiming', dtype=self.dtype, name=name)(x)
        zeros = logical(nn.initializers.zeros, 'hidden')
        bias = self.param(f'{name}_bias', zeros, (width,), jnp.float32)
        return jax.nn.relu(x + bias.astype(self.dtype))
