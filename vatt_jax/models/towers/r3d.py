"""R3D-50: ResNet-50 with time in the first kernels of its deeper blocks (CVRL's network).

As in CVRL's released code: the stem halves the frames, the last two groups see three of them.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from vatt_jax.models.towers.convolutions import ConvNorm, max_pool
from vatt_jax.models.towers.stages import sow_stage

# Frames that the first kernel of a block sees, by group.
TEMPORAL_KERNELS = (1, 1, 3, 3)
# Output channels of a block in those of its middle.
EXPANSION = 4


class Bottleneck(nn.Module):
    """Time to `features` channels, space with the stride, and one point to four times as many.

    Attributes:
        features: of the middle.
        frames: that the first kernel sees.
        stride: of space.
        norm: entry of layers.NORMS.
        dtype: of activations.
    """

    features: int
    frames: int
    stride: int = 1
    norm: str = 'plain'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T H W C'], valid: Any, train: bool
    ) -> Float[Array, 'B T H2 W2 D']:
        options: dict[str, Any] = {'norm': self.norm, 'dtype': self.dtype}
        point, once = (1, 1, 1), (1, 1, 1)
        strides = (1, self.stride, self.stride)
        width = EXPANSION * self.features
        shortcut = x
        if x.shape[-1] != width or self.stride > 1:
            projection = ConvNorm(width, point, strides, relu=False, name='short', **options)
            shortcut = projection(x, valid, train)
        temporal = ConvNorm(self.features, (self.frames, 1, 1), once, name='temporal', **options)
        spatial = ConvNorm(self.features, (1, 3, 3), strides, name='spatial', **options)
        expand = ConvNorm(width, point, once, relu=False, name='expand', **options)
        y = temporal(x, valid, train)
        y = spatial(y, valid, train)
        y = expand(y, valid, train)
        return jax.nn.relu(y + shortcut)


class R3D(nn.Module):
    """Video [B T H W 3] -> (pooled [B 2048·w], map [B T/2 H/32 W/32 2048·w]), w = `multiplier`.

    Attributes:
        blocks: of each of the four groups; (3, 4, 6, 3) is R3D-50.
        multiplier: of all widths (published: 1 and 4).
        norm: entry of layers.NORMS.
        dtype: of activations.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    multiplier: float = 1.0
    norm: str = 'plain'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T H W C'], valid: Any, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        def scaled(width: int) -> int:
            return max(1, round(width * self.multiplier))  # a narrow network still has channels

        options: dict[str, Any] = {'norm': self.norm, 'dtype': self.dtype}
        stem = ConvNorm(scaled(64), (5, 7, 7), (2, 2, 2), name='stem', **options)
        x = stem(x, valid, train)  # [B T/2 H/2 W/2 C]
        x = max_pool(x, (1, 3, 3), (1, 2, 2))
        for group, num_blocks in enumerate(self.blocks):
            for block in range(num_blocks):
                # Every group but the first halves the map, in its first block.
                stride = 2 if group > 0 and block == 0 else 1
                x = Bottleneck(
                    scaled(64 << group),
                    TEMPORAL_KERNELS[group],
                    stride,
                    name=f'group_{group + 1}_block_{block}',
                    **options,
                )(x, valid, train)
            sow_stage(self, group + 1, x)
        return x.mean((1, 2, 3)), x  # [B D], [B T/2 H/32 W/32 D]
