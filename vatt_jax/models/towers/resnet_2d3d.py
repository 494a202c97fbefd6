"""2D3D-ResNet: pictures in its first two groups, three frames at a time in the last two (DPC's).

As in the code of DPC and MemDPC (Han, Xie and Zisserman 2019, 2020): the last group has 256
channels, not 512, time is halved where the kernels see it, and the map has no last ReLU.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from vatt_jax.config import choose
from vatt_jax.models.towers.convolutions import ConvNorm, max_pool
from vatt_jax.models.towers.resnet_v2 import STRIDES
from vatt_jax.models.towers.stages import sow_stage

# depth -> (blocks of the four groups, whether these are bottlenecks)
DEPTHS: dict[int, Any] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
}
# By group: channels of a basic block, frames that a kernel sees.
WIDTHS = (64, 128, 256, 256)
TEMPORAL_KERNELS = (1, 1, 3, 3)
# Output channels of a bottleneck in those of its middle.
EXPANSION = 4


class Block(nn.Module):
    """Two convolutions, or a bottleneck of three, and a shortcut around them.

    Attributes:
        features: of the convolution that sees several pixels.
        frames: that it sees.
        strides: of time, rows and columns.
        bottleneck: it stands between two of a single point, the last four times as wide.
        relu: after the sum.
        norm: entry of layers.NORMS.
        dtype: of activations.
    """

    features: int
    frames: int
    strides: tuple[int, int, int] = (1, 1, 1)
    bottleneck: bool = False
    relu: bool = True
    norm: str = 'torch'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T H W C'], valid: Any, train: bool
    ) -> Float[Array, 'B T2 H2 W2 D']:
        def conv(x: jax.Array, width: int, kernel: Any, strides: Any, relu: bool, name: str) -> Any:
            options: dict[str, Any] = {'norm': self.norm, 'dtype': self.dtype, 'name': name}
            layer = ConvNorm(width, kernel, strides, 'FIXED', relu, init='kaiming', **options)
            return layer(x, valid, train)

        point, once, window = (1, 1, 1), (1, 1, 1), (self.frames, 3, 3)
        width = self.features * (EXPANSION if self.bottleneck else 1)
        shortcut = x
        if x.shape[-1] != width or self.strides != once:
            shortcut = conv(x, width, point, self.strides, False, 'short')
        if self.bottleneck:
            x = conv(x, self.features, point, once, True, 'conv_0')
            x = conv(x, self.features, window, self.strides, True, 'conv_1')
            x = conv(x, width, point, once, False, 'conv_2')
        else:
            x = conv(x, self.features, window, self.strides, True, 'conv_0')
            x = conv(x, width, window, once, False, 'conv_1')
        x = x + shortcut
        return jax.nn.relu(x) if self.relu else x


class ResNet2D3D(nn.Module):
    """Video [B T H W C] -> (pooled [B D], map [B T/4 H/32 W/32 D]), D = 256, of a bottleneck 1024.

    The map may be negative, what is pooled is its positive part. Sizes are rounded up.

    Attributes:
        depth: entry of DEPTHS.
        multiplier: of all widths (published: 1).
        stride: pixels from one position of the map to the next (published: 32). 4, 8 or 16: the
            last groups do not halve the map any more.
        norm: entry of layers.NORMS.
        dtype: of activations.
    """

    depth: int = 18
    multiplier: float = 1.0
    stride: int = 32
    norm: str = 'torch'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T H W C'], valid: Any, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        choose(self.depth, DEPTHS, 'config.model.towers depth')
        choose(self.stride, STRIDES, 'config.model.towers stride')
        num_blocks, bottleneck = DEPTHS[self.depth]
        widths = [max(1, round(width * self.multiplier)) for width in WIDTHS]
        options: dict[str, Any] = {'norm': self.norm, 'dtype': self.dtype}
        stem = ConvNorm(
            widths[0], (1, 7, 7), (1, 2, 2), 'FIXED', init='kaiming', name='stem', **options
        )
        x = stem(x, valid, train)
        x = max_pool(x, (1, 3, 3), (1, 2, 2), ((0, 0), (1, 1), (1, 1)))  # [B T H/4 W/4 C]
        for group, count in enumerate(num_blocks):
            for block in range(count):
                is_last = group == len(num_blocks) - 1 and block == count - 1
                x = Block(
                    widths[group],
                    TEMPORAL_KERNELS[group],
                    self._strides(group) if block == 0 else (1, 1, 1),
                    bottleneck,
                    relu=not is_last,
                    name=f'group_{group + 1}_block_{block}',
                    **options,
                )(x, valid, train)
            sow_stage(self, group + 1, x)
        return jax.nn.relu(x).mean((1, 2, 3)), x

    def _strides(self, group: int) -> tuple[int, int, int]:
        """Strides of a group's first block: of time, rows and columns."""
        space = 2 if 0 < group <= STRIDES.index(self.stride) else 1
        time = 2 if TEMPORAL_KERNELS[group] > 1 else 1
        return time, space, space
