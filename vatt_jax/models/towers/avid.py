"""AVID's towers, which end in the largest value of each channel (Morgado et al. 2020).

As in the authors' code: R(2+1)D of 18 layers whose halves have the width of the block, and a
convolutional network of ten layers for spectrograms.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from vatt_jax.models.layers import BatchNorm
from vatt_jax.models.towers.convolutions import Conv, ConvNorm, max_pool
from vatt_jax.models.towers.r2plus1d import Factorised
from vatt_jax.models.towers.stages import sow_stage

# Even padding and PyTorch's default initial values.
OPTIONS: dict[str, Any] = {'padding': 'FIXED', 'init': 'torch'}


def _scaled(width: int, multiplier: float) -> int:
    return max(1, round(width * multiplier))  # a narrow network still has channels


class AVIDVideo(nn.Module):
    """Video [B T H W 3] -> (pooled [B 512·w], map [B T/8 H/32 W/32 512·w]), w = `multiplier`.

    Attributes:
        multiplier: of all widths.
        norm: entry of layers.NORMS.
        dtype: of activations.
    """

    multiplier: float = 1.0
    norm: str = 'torch'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T H W C'], valid: Any, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        stem = ConvNorm(
            _scaled(64, self.multiplier),
            (3, 7, 7),
            (1, 2, 2),
            norm=self.norm,
            dtype=self.dtype,
            name='stem',
            **OPTIONS,
        )
        x = max_pool(stem(x, valid, train), (1, 3, 3), (1, 2, 2), ((0, 0), (1, 1), (1, 1)))
        for layer in range(4):
            for block in range(2):
                x = FactorisedBlock(
                    _scaled(64 << layer, self.multiplier),
                    # Every layer but the first halves the map, in its first block.
                    stride=2 if layer > 0 and block == 0 else 1,
                    norm=self.norm,
                    dtype=self.dtype,
                    name=f'layer_{layer + 1}_block_{block}',
                )(x, valid, train)
            sow_stage(self, layer + 1, x)
        return x.max((1, 2, 3)), x


class FactorisedBlock(nn.Module):
    """Two convolutions over space and time, and a shortcut; the last norm is that of their sum.

    Attributes:
        features: width of all that is in it.
        stride: of space and time.
        norm: entry of layers.NORMS.
        dtype: of activations.
    """

    features: int
    stride: int
    norm: str
    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T H W C'], valid: Any, train: bool
    ) -> Float[Array, 'B T2 H2 W2 D']:
        width = self.features
        y = Factorised(
            width, width, self.stride, norm=self.norm, dtype=self.dtype, init='torch', name='conv_1'
        )(x, valid, train)
        y = ConvNorm(
            width,
            (1, 3, 3),
            (1, 1, 1),
            norm=self.norm,
            dtype=self.dtype,
            name='conv_2_spatial',
            **OPTIONS,
        )(y, valid, train)
        y = Conv(width, (3, 1, 1), (1, 1, 1), dtype=self.dtype, name='conv_2_temporal', **OPTIONS)(
            y
        )
        if x.shape[-1] != width or self.stride > 1:
            strides = (self.stride,) * 3
            x = Conv(width, (1, 1, 1), strides, dtype=self.dtype, name='short', **OPTIONS)(x)
        y = BatchNorm(self.norm, name='norm')(y + x, valid, train)
        return jax.nn.relu(y).astype(self.dtype)


class AVIDAudio(nn.Module):
    """Spectrogram [B T F] -> (pooled [B 512·w], map [B T/16 F/16 512·w]), w = `multiplier`.

    Bands are normalised first, each by its own statistics. The authors' are of their data, and in a
    file; here a batch norm learns them.

    Attributes:
        multiplier: of all widths.
        norm: entry of layers.NORMS.
        dtype: of activations.
    """

    multiplier: float = 1.0
    norm: str = 'torch'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T F'], valid: Any, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        def conv(x: jax.Array, width: int, size: int, stride: int, name: str) -> jax.Array:
            return ConvNorm(
                _scaled(width, self.multiplier),
                (size, size),
                (stride, stride),
                norm=self.norm,
                dtype=self.dtype,
                name=name,
                **OPTIONS,
            )(x, valid, train)

        x = BatchNorm(self.norm, name='bands')(x, valid, train)
        x = conv(x[..., None], 64, 7, 2, 'stem')
        for block in range(4):
            # Every block but the last halves the map.
            stride = 1 if block == 3 else 2
            x = conv(x, 64 << block, 3, stride, f'block_{block + 1}_conv_1')
            x = conv(x, 64 << block, 3, 1, f'block_{block + 1}_conv_2')
            sow_stage(self, block + 1, x)
        return x.max((1, 2)), x
