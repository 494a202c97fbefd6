"""MC2 to MC5 and R3D: ResNet-18 of 3-D convolutions first, of 2-D ones after (Tran et al. 2018).

In the form of torchvision (r3d_18, mc3_18).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from vatt_jax.config import check_range
from vatt_jax.models.towers.convolutions import ConvNorm
from vatt_jax.models.towers.r2plus1d import conv_options
from vatt_jax.models.towers.stages import sow_stage

NUM_GROUPS = 5  # conv1, which is the stem, to conv5


class MixedConvolutions(nn.Module):
    """Video [B T H W 3] -> (pooled [B 512·w], map [B T' H/16 W/16 512·w]), w = `multiplier`.

    A 3-D convolution of a group that halves the map halves time as well, a 2-D one keeps it: T' is
    T for MC2 and MC3, T/2 for MC4, T/4 for MC5 and T/8 for R3D. Padded evenly, no max pool.

    Attributes:
        first_2d: the first of the groups conv1 to conv5 whose convolutions see one frame: 3 is MC3,
            6 is R3D, 1 a network of single frames.
        multiplier: of all widths.
        norm: entry of layers.NORMS.
        dtype: of activations.
    """

    first_2d: int = 3
    multiplier: float = 1.0
    norm: str = 'torch'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T H W C'], valid: Any, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        check_range(self.first_2d, 1, NUM_GROUPS + 1, 'config.model.towers.video.first_2d')
        options = conv_options(self.norm, self.dtype)

        def scaled(width: int) -> int:
            return max(1, round(width * self.multiplier))  # a narrow network still has channels

        num_frames = 3 if self.first_2d > 1 else 1
        stem = ConvNorm(scaled(64), (num_frames, 7, 7), (1, 2, 2), name='stem', **options)
        x = stem(x, valid, train)
        # ResNet-18: conv2 to conv5 of two blocks of two convolutions, 64 to 512 channels.
        for group in range(2, NUM_GROUPS + 1):
            width = scaled(64 << (group - 2))
            is_3d = group < self.first_2d
            kernel = (3 if is_3d else 1, 3, 3)
            for block in range(2):
                # Every group but the first of these halves the map, in its first block.
                stride = 2 if group > 2 and block == 0 else 1
                strides = (stride if is_3d else 1, stride, stride)
                name = f'conv{group}_block_{block}'
                shortcut = x
                if stride > 1:
                    projection = ConvNorm(
                        width, (1, 1, 1), strides, relu=False, name=f'{name}_short', **options
                    )
                    shortcut = projection(x, valid, train)
                y = ConvNorm(width, kernel, strides, name=f'{name}_conv_1', **options)(
                    x, valid, train
                )
                y = ConvNorm(
                    width, kernel, (1, 1, 1), relu=False, name=f'{name}_conv_2', **options
                )(y, valid, train)
                x = jax.nn.relu(y + shortcut)  # [B T' H' W' width]
            sow_stage(self, group - 1, x)  # conv2 is the first
        return x.mean((1, 2, 3)), x
