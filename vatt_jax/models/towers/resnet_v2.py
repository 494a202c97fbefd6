"""ResNet v2 (pre-activation; He et al., 2016) as MMV has it: over spectrograms, and over frames with a temporal shift (tsm_resnet.py)."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax

from vatt_jax.config import choose
from vatt_jax.models.layers import BatchNorm
from vatt_jax.models.towers.convolutions import Conv, max_pool

# depth -> (blocks of the four units, bottleneck blocks?, widths of their results)
DEPTHS = {
    18: ((2, 2, 2, 2), False, (64, 128, 256, 512)),
    34: ((3, 4, 6, 3), False, (64, 128, 256, 512)),
    50: ((3, 4, 6, 3), True, (256, 512, 1024, 2048)),
}


class Block(nn.Module):
    """Batch norm and ReLU before each convolution; the shortcut is the input, or, where the width changes, a projection of the first ReLU.

    Bottleneck: 1×1 to a quarter of the width, 3×3 with the stride, 1×1. Basic: 1×1, 3×3 with the stride (official: no 3×3 in the first place).
    mix: what the branch, not the shortcut, sees of the first ReLU (the temporal shift).
    """

    width: int
    stride: int
    bottleneck: bool
    mix: Callable = lambda x: x
    norm: str = 'debiased'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        conv = lambda features, k, stride, name: Conv(
            features, (k, k), (stride, stride), init='fan_in', dtype=self.dtype, name=name
        )
        active = lambda x, i: jax.nn.relu(
            BatchNorm(self.norm, name=f'norm_{i}')(x, valid, train)
        ).astype(self.dtype)
        p = active(x, 0)
        short = conv(self.width, 1, self.stride, 'shortcut')(p) if x.shape[-1] != self.width else x
        inner = self.width // 4 if self.bottleneck else self.width
        y = active(conv(inner, 1, 1, 'conv_0')(self.mix(p)), 1)
        y = conv(inner, 3, self.stride, 'conv_1')(y)
        if self.bottleneck:
            y = conv(self.width, 1, 1, 'conv_2')(active(y, 2))
        return short + y


class ResNetV2(nn.Module):
    """Pictures [N H W C] -> (map before the last batch norm, map after it and ReLU), both [N H/32 W/32 D]; valid bool [N].

    multiplier: on every width. mix: see Block.
    """

    depth: int = 50
    multiplier: float = 1.0
    mix: Callable = lambda x: x
    norm: str = 'debiased'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        blocks, bottleneck, widths = DEPTHS[choose(self.depth, DEPTHS, 'config.model.towers depth')]
        scale = lambda width: 4 * max(1, round(width * self.multiplier / 4))
        x = Conv(scale(64), (7, 7), (2, 2), init='fan_in', dtype=self.dtype, name='stem')(x)
        x = max_pool(x, (3, 3), (2, 2), 'SAME')
        for unit, (count, width) in enumerate(zip(blocks, widths)):
            for block in range(count):
                x = Block(
                    scale(width),
                    2 if unit and not block else 1,
                    bottleneck,
                    self.mix,
                    self.norm,
                    self.dtype,
                    name=f'unit_{unit}_block_{block}',
                )(x, valid, train)
        return x, jax.nn.relu(BatchNorm(self.norm, name='norm')(x, valid, train)).astype(self.dtype)
