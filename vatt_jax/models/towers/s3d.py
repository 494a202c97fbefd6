"""S3D-G: Inception with separable convolutions and gates (Xie et al., 2018), as MMV has it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vatt_jax.config import ConfigError
from vatt_jax.models.embeddings import fold
from vatt_jax.models.layers import Dense
from vatt_jax.models.towers.convolutions import ConvNorm
from vatt_jax.models.towers.i3d import BLOCKS, trunk

FOLD = (2, 2, 2)  # frames, rows and columns that space-to-depth puts into one pixel
PIXEL_CHANNELS = (2, 3)  # of optical flow and of video, before they are folded


def space_to_depth(
    x: Float[Array, 'B T H W C'], block: tuple[int, int, int] = FOLD
) -> Float[Array, 'B T2 H2 W2 D']:
    """[B T H W C] -> [B T/2 H/2 W/2 8C], for other blocks accordingly.

    New channels are in the order (time, row, column, colour), colour fastest.

    Raises:
        ConfigError: if the blocks do not divide the video.
    """
    batch_size, frames, height, width, _ = x.shape
    if any(length % size for length, size in zip((frames, height, width), block)):
        raise ConfigError(
            f'config.model.inputs.video (or flow): {frames} frames of {height}×{width} do not fold '
            f'into blocks of {"×".join(map(str, block))}; choose even frames and size, or set '
            'space_to_depth=False of the tower'
        )
    cells, grid = fold(x, block)  # [B N 8C]
    return cells.reshape(batch_size, *grid, -1)


class Gate(nn.Module):
    """Each channel times the sigmoid of a linear function of all channels' means.

    The means are over time and space.
    """

    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x: Float[Array, 'B T H W C']) -> Float[Array, 'B T H W C']:
        # In float32: sums over T·H·W points outgrow the 8 significant bits of bfloat16.
        mean = x.astype(jnp.float32).mean((1, 2, 3))  # [B C]
        logits = Dense(x.shape[-1], (None, 'hidden'), init='fan_in', name='dense')(mean)
        # The feature gating of Xie et al. (2018), the G of S3D-G.
        gate = jax.nn.sigmoid(logits)[:, None, None, None]  # [B 1 1 1 C]
        return x * gate.astype(x.dtype)


class Unit(nn.Module):
    """Convolution, batch norm and ReLU, then the gate if `gated`.

    Where the kernel extends over time and space and `separable`, there are two convolutions: over
    space and then over time, each with batch norm and ReLU.

    Attributes:
        still: whether kernels see one frame only; see S3D.
    """

    features: int
    kernel: tuple[int, int, int]
    strides: tuple[int, int, int] = (1, 1, 1)
    separable: bool = True
    gated: bool = True
    still: bool = False
    norm: str = 'debiased'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T H W C'], valid: Any, train: bool
    ) -> Float[Array, 'B T2 H2 W2 D']:
        time, height, width = self.kernel
        time_stride, row_stride, column_stride = self.strides
        convolutions = [(self.kernel, self.strides)]
        if self.separable and time > 1 and max(height, width) > 1:
            # k² + k parameters for each pair of channels instead of k³.
            spatial = ((1, height, width), (1, row_stride, column_stride))
            temporal = ((time, 1, 1), (time_stride, 1, 1))
            convolutions = [spatial, temporal]
        for i, (kernel, strides) in enumerate(convolutions):
            if self.still:
                # Strides over time stay as they are: one frame gives one.
                kernel = (1, kernel[1], kernel[2])
            x = ConvNorm(
                self.features,
                kernel,
                strides,
                norm=self.norm,
                init='fan_in',
                dtype=self.dtype,
                name=f'conv_{i}',
            )(x, valid, train)
        if self.gated:
            x = Gate(self.dtype, name='gate')(x)
        return x


class S3D(nn.Module):
    """Video [B T H W 3] -> (pooled [B 1024·w], map [B T/8 H/32 W/32 1024·w]), w = `multiplier`.

    Attributes:
        space_to_depth: whether blocks of 2×2×2 pixels become one of 24 channels and the first
            kernel is 2×4×4 on these instead of 7×7×7 on pixels (what was trained and released). Of
            flow of 2 channels the blocks are 16. Input that has more channels than pixels have is
            taken as it is.
        multiplier: of all widths.
        pools: how many of the max pools there are (i3d.trunk); with 2, the map is
            [B T/2 H/8 W/8 …].
        blocks: how many of the Inception blocks there are (i3d.trunk); with one block of the last
            stage instead of two, the map has 832·w channels.
        still: whether every kernel sees one frame: a network for images, which deflation.py makes
            out of one for video.
        norm: entry of layers.NORMS.
        dtype: of activations.
    """

    space_to_depth: bool = True
    multiplier: float = 1.0
    pools: int = 4
    blocks: Any = BLOCKS
    still: bool = False
    norm: str = 'debiased'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T H W C'], valid: Any, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        def unit(
            features: int,
            kernel: tuple[int, int, int],
            strides: tuple[int, int, int] = (1, 1, 1),
            separable: bool = True,
            name: str = '',
        ) -> Unit:
            # What only reduces the width before a larger kernel has no gate, nor have the two
            # layers at the beginning.
            gated = not name.endswith('_in') and name not in ('conv_1a', 'conv_2b')
            return Unit(
                features=max(1, round(features * self.multiplier)),
                kernel=kernel,
                strides=strides,
                separable=separable,
                gated=gated,
                still=self.still,
                norm=self.norm,
                dtype=self.dtype,
                name=name,
            )

        if self.space_to_depth and x.shape[-1] in PIXEL_CHANNELS:
            # [B T/2 H/2 W/2 24], or for still images [B T H/2 W/2 12].
            x = space_to_depth(x, (1, *FOLD[1:]) if self.still else FOLD)
        if self.space_to_depth:
            # Two folded frames of 4×4 are 4 frames of 8×8 pixels, at the stride of 2 that folding
            # gives.
            stem = unit(64, (2, 4, 4), (1, 1, 1), separable=False, name='conv_1a')
        else:
            stem = unit(64, (7, 7, 7), (2, 2, 2), separable=False, name='conv_1a')
        x = stem(x, valid, train)
        x = trunk(self, x, unit, valid, train, self.pools, self.blocks)
        return x.mean((1, 2, 3)), x  # [B D], [B T/8 H/32 W/32 D]
