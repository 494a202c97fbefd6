"""ResNet v2 (pre-activation; He et al., 2016) as MMV has it.

It runs over spectrograms, and over frames with a temporal shift (tsm_resnet.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from vatt_jax.config import choose
from vatt_jax.models.layers import BatchNorm
from vatt_jax.models.towers.convolutions import Conv, max_pool
from vatt_jax.models.towers.stages import sow_stage

# depth -> (blocks of the four units, whether these are bottlenecks, widths of the units' results)
DEPTHS: dict[int, Any] = {
    # Small enough that a position of a map of small pictures does not see them whole.
    10: ((1, 1, 1, 1), False, (64, 128, 256, 512)),
    18: ((2, 2, 2, 2), False, (64, 128, 256, 512)),
    34: ((3, 4, 6, 3), False, (64, 128, 256, 512)),
    50: ((3, 4, 6, 3), True, (256, 512, 1024, 2048)),
}

# Of the map after none, one, two or three units that halve it.
STRIDES = (4, 8, 16, 32)


def identity(x: jax.Array) -> jax.Array:
    """Return x: nothing is mixed into a branch, and a map stays as it is."""
    return x


class Block(nn.Module):
    """Batch norm and ReLU before each convolution, and a shortcut around them.

    The shortcut is the input, or, where the width changes, a projection of the first ReLU.
    Bottleneck: 1×1 to a quarter of the width, 3×3 with the stride, 1×1. Basic: 1×1, 3×3 with the
    stride (official: no 3×3 in the first place).

    Attributes:
        mix: applied to what the branch, not the shortcut, sees of the first ReLU (the temporal
            shift).
    """

    width: int
    stride: int
    bottleneck: bool
    mix: Callable[[jax.Array], jax.Array] = identity
    norm: str = 'debiased'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'N H W C'], valid: Any, train: bool
    ) -> Float[Array, 'N H2 W2 D']:
        def conv(x: jax.Array, features: int, size: int, stride: int, name: str) -> jax.Array:
            kernel = (size, size)
            strides = (stride, stride)
            return Conv(features, kernel, strides, init='fan_in', dtype=self.dtype, name=name)(x)

        def norm_relu(x: jax.Array, name: str) -> jax.Array:
            x = BatchNorm(self.norm, name=name)(x, valid, train)
            return jax.nn.relu(x).astype(self.dtype)

        preactivated = norm_relu(x, 'norm_0')
        # The plain input, not normalised: signal and gradient pass all blocks of a unit unchanged.
        shortcut = x
        if x.shape[-1] != self.width:
            # A first block projects what is normalised already; its stride acts on the shortcut
            # too.
            shortcut = conv(preactivated, self.width, 1, self.stride, 'shortcut')
        inner_width = self.width // 4 if self.bottleneck else self.width
        # Mixed in the residual branch alone: the shortcut keeps each frame's own features.
        y = conv(self.mix(preactivated), inner_width, 1, 1, 'conv_0')
        y = norm_relu(y, 'norm_1')
        y = conv(y, inner_width, 3, self.stride, 'conv_1')
        if self.bottleneck:
            y = norm_relu(y, 'norm_2')
            y = conv(y, self.width, 1, 1, 'conv_2')
        return shortcut + y  # no ReLU after the sum: the next block begins with it


class ResNetV2(nn.Module):
    """Pictures [N H W C] -> (map before the last batch norm, map after it and ReLU).

    Both maps are [N H/32 W/32 D], of another `stride` accordingly.

    Attributes:
        depth: entry of DEPTHS.
        multiplier: of every width.
        mix: see Block.
        to_map: what the features after a stage are handed out as; frames become a video.
        stride: pixels from one position of the map to the next. 4, 8 or 16: the last units do not
            halve the map any more, whose positions show where things are.
        norm: entry of layers.NORMS.
        dtype: of activations.
    """

    depth: int = 50
    multiplier: float = 1.0
    mix: Callable[[jax.Array], jax.Array] = identity
    to_map: Callable[[jax.Array], jax.Array] = identity
    stride: int = 32
    norm: str = 'debiased'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'N H W C'], valid: Any, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        choose(self.depth, DEPTHS, 'config.model.towers depth')
        choose(self.stride, STRIDES, 'config.model.towers stride')
        num_blocks, bottleneck, widths = DEPTHS[self.depth]

        def scaled(width: int) -> int:
            # A multiple of 4, so that a bottleneck's inner width is a quarter of it.
            return 4 * max(1, round(width * self.multiplier / 4))

        x = Conv(scaled(64), (7, 7), (2, 2), init='fan_in', dtype=self.dtype, name='stem')(x)
        x = max_pool(x, (3, 3), (2, 2), 'SAME')  # [N H/4 W/4 64]
        for unit, (count, width) in enumerate(zip(num_blocks, widths)):
            # Every unit but the first halves the map, in its first block.
            halves = 0 < unit <= STRIDES.index(self.stride)
            for block in range(count):
                x = Block(
                    width=scaled(width),
                    stride=2 if halves and block == 0 else 1,
                    bottleneck=bottleneck,
                    mix=self.mix,
                    norm=self.norm,
                    dtype=self.dtype,
                    name=f'unit_{unit}_block_{block}',
                )(x, valid, train)
            sow_stage(self, unit + 1, self.to_map(x))
        # The last sum has had no norm and no ReLU yet.
        normalised = BatchNorm(self.norm, name='norm')(x, valid, train)
        return x, jax.nn.relu(normalised).astype(self.dtype)
