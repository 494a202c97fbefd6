"""S3D-G: Inception with separable convolutions and self-gating (Xie et al., 2018), as MMV has it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vatt_jax.config import ConfigError
from vatt_jax.models.embeddings import fold
from vatt_jax.models.layers import Dense
from vatt_jax.models.towers.convolutions import ConvNorm
from vatt_jax.models.towers.i3d import BLOCKS, trunk

FOLD = (2, 2, 2)  # frames, rows and columns that space-to-depth puts into one pixel


def space_to_depth(x: jax.Array, block: tuple[int, int, int] = FOLD) -> jax.Array:
    """[B T H W C] -> [B T/2 H/2 W/2 8C], new channels in the order (time, row, column, colour), colour fastest."""
    if any(n % b for n, b in zip(x.shape[1:4], block)):
        raise ConfigError(
            f'config.model.inputs.video: {x.shape[1]} frames of {x.shape[2]}×{x.shape[3]} do not fold into blocks of '
            f'{"×".join(map(str, block))}; choose even frames and size, or set config.model.towers.video.space_to_depth=False'
        )
    cells, grid = fold(x, block)
    return cells.reshape(x.shape[0], *grid, -1)


class Gate(nn.Module):
    """Each channel times the sigmoid of a linear function of the means of all channels over time and space."""

    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x):
        mean = x.astype(jnp.float32).mean((1, 2, 3))
        gate = Dense(x.shape[-1], (None, 'hidden'), init='fan_in', name='dense')(mean)
        return x * jax.nn.sigmoid(gate)[:, None, None, None].astype(x.dtype)


class Unit(nn.Module):
    """Convolution, batch norm, ReLU; where the kernel extends over time and space and `separable`, over space and then over time, each with
    batch norm and ReLU; then, where `gated`, the gate."""

    features: int
    kernel: tuple[int, int, int]
    strides: tuple[int, int, int] = (1, 1, 1)
    separable: bool = True
    gated: bool = True
    still: bool = False
    norm: str = 'debiased'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        (t, *space), (step, *steps) = self.kernel, self.strides
        parts = [(self.kernel, self.strides)]
        if self.separable and t > 1 and max(space) > 1:
            parts = [((1, *space), (1, *steps)), ((t, 1, 1), (step, 1, 1))]
        for i, (kernel, strides) in enumerate(parts):
            kernel = (1, *kernel[1:]) if self.still else kernel
            x = ConvNorm(
                self.features,
                kernel,
                strides,
                norm=self.norm,
                init='fan_in',
                dtype=self.dtype,
                name=f'conv_{i}',
            )(x, valid, train)
        return Gate(self.dtype, name='gate')(x) if self.gated else x


class S3D(nn.Module):
    """Video [B T H W 3] -> (pooled [B 1024·w], map [B T/8 H/32 W/32 1024·w]), w = `multiplier`.

    space_to_depth: blocks of 2×2×2 pixels become one of 24 channels, and the first kernel is 2×4×4 on these instead of 7×7×7 on pixels (what was
    trained and released). Input that has 24 channels already is taken as it is. still: every kernel sees one frame (a network for images, which
    deflate.py makes out of one for video). pools, blocks: how many of the max pools and Inception blocks there are (i3d.trunk); with 2 pools, the
    map is [B T/2 H/8 W/8 …], with one block of the last stage instead of two it has 832·w channels.
    """

    space_to_depth: bool = True
    multiplier: float = 1.0
    pools: int = 4
    blocks: tuple[int, int, int] = BLOCKS
    still: bool = False
    norm: str = 'debiased'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        def unit(features, kernel, strides=(1, 1, 1), separable=True, name=None):
            # what only reduces the width before a larger kernel has no gate, nor have the two layers at the beginning
            gated = not name.endswith('_in') and name not in ('conv_1a', 'conv_2b')
            return Unit(
                max(1, round(features * self.multiplier)),
                kernel,
                strides,
                separable,
                gated,
                self.still,
                self.norm,
                self.dtype,
                name=name,
            )

        if self.space_to_depth and x.shape[-1] == 3:
            x = space_to_depth(x, (1, *FOLD[1:]) if self.still else FOLD)
        stem = ((2, 4, 4), (1, 1, 1)) if self.space_to_depth else ((7, 7, 7), (2, 2, 2))
        x = trunk(
            unit(64, *stem, separable=False, name='conv_1a')(x, valid, train),
            unit,
            valid,
            train,
            self.pools,
            self.blocks,
        )
        return x.mean((1, 2, 3)), x
