"""ResNets over spectrograms.

Post-activation as VATT's `mmv_fac` has it (padded after SimCLR's ResNet), pre-activation as MMV
has it, and SeLaVi's.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from vatt_jax.models.towers.convolutions import ConvNorm, max_pool
from vatt_jax.models.towers.resnet_v2 import ResNetV2
from vatt_jax.models.towers.stages import sow_stage


class Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride), 1×1 to four times the width; added to a shortcut; ReLU.

    Attributes:
        projected: whether the shortcut is a projection of the input, or the input itself.
    """

    width: int
    stride: int
    projected: bool
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B H W C'], valid: Any, train: bool
    ) -> Float[Array, 'B H2 W2 D']:
        def conv(
            x: jax.Array, features: int, size: int, stride: int, name: str, **options: Any
        ) -> jax.Array:
            return ConvNorm(
                features,
                (size, size),
                (stride, stride),
                # With a stride TensorFlow's SAME padding depends on the input's size; FIXED does
                # not.
                'SAME' if stride == 1 else 'FIXED',
                dtype=self.dtype,
                name=name,
                **options,
            )(x, valid, train)

        shortcut = x
        if self.projected:
            shortcut = conv(x, 4 * self.width, 1, self.stride, 'short', relu=False)
        # The stride is in the 3×3 convolution, not in the first 1×1 as in He et al. (2015).
        x = conv(x, self.width, 1, 1, 'conv_1')
        x = conv(x, self.width, 3, self.stride, 'conv_2')
        # A scale of zero makes every block the identity at first.
        x = conv(x, 4 * self.width, 1, 1, 'conv_3', relu=False, scale_init=0.0)
        return jax.nn.relu(x + shortcut)  # [B H/stride W/stride 4·width]


class ResNet2D(nn.Module):
    """Spectrogram [B T F] -> (pooled [B 2048], map [B T/32 F/32 2048]).

    Attributes:
        blocks: of each of the four groups; (3, 4, 6, 3) is ResNet-50.
        dtype: of activations.
    """

    blocks: Any = (3, 4, 6, 3)
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T F'], valid: Any, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        stem = ConvNorm(64, (7, 7), (2, 2), 'FIXED', dtype=self.dtype, name='stem')
        x = stem(x[..., None], valid, train)  # one channel: [B T/2 F/2 64]
        x = max_pool(x, (3, 3), (2, 2), 'SAME')
        for group, num_blocks in enumerate(self.blocks):
            for block in range(num_blocks):
                # Every group but the first halves the map, in its first block.
                x = Bottleneck(
                    width=64 << group,  # 64, 128, 256, 512; times four at the block's end
                    stride=2 if group > 0 and block == 0 else 1,
                    projected=block == 0,
                    dtype=self.dtype,
                    name=f'group_{group + 1}_block_{block + 1}',
                )(x, valid, train)
            sow_stage(self, group + 1, x)
        return x.mean((1, 2)), x  # [B D], [B T' F' D]


class ResNet2DV2(nn.Module):
    """Spectrogram [B T F] -> (pooled [B 2048·w], map [B T/32 F/32 2048·w]), w = `multiplier`.

    The map is that *before* the last batch norm and ReLU, the released end point.

    Attributes:
        depth: 50, 34 or 18; the latter two have a width of 512·w.
        multiplier: of all widths.
        norm: entry of layers.NORMS.
        dtype: of activations.
    """

    depth: int = 50
    multiplier: float = 1.0
    norm: str = 'debiased'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T F'], valid: Any, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        resnet = ResNetV2(
            self.depth, self.multiplier, norm=self.norm, dtype=self.dtype, name='resnet'
        )
        unnormalised, activated = resnet(x[..., None], valid, train)  # [B T' F' D] each
        # Pooled is what the head reads; the map is the end point that the release names.
        return activated.mean((1, 2)), unnormalised


class ResNet9(nn.Module):
    """Spectrogram [B T F] -> (pooled [B 512·w], map [B T/32 F/32 512·w]), w = `multiplier`.

    Torchvision's ResNet with one basic block in each group (SeLaVi and GDT: log-filterbanks of 257
    bands of one second). Padded evenly.

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
        def conv(
            x: jax.Array, features: int, size: int, stride: int, name: str, relu: bool = True
        ) -> jax.Array:
            return ConvNorm(
                features,
                (size, size),
                (stride, stride),
                'FIXED',
                relu=relu,
                norm=self.norm,
                init='kaiming',
                dtype=self.dtype,
                name=name,
            )(x, valid, train)

        def scaled(width: int) -> int:
            return max(1, round(width * self.multiplier))  # a narrow network still has channels

        x = conv(x[..., None], scaled(64), 7, 2, 'stem')
        # PyTorch pads both sides; SAME would pad an even length at the end alone.
        x = max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for group in range(4):
            width = scaled(64 << group)
            name = f'group_{group + 1}'
            stride = 1
            shortcut = x
            if group > 0:  # every group but the first halves the map
                stride = 2
                # A 1×1 convolution, since width and size change; elsewhere the input itself is
                # added.
                shortcut = conv(x, width, 1, stride, f'{name}_short', relu=False)
            y = conv(x, width, 3, stride, f'{name}_conv_1')
            y = conv(y, width, 3, 1, f'{name}_conv_2', relu=False)
            x = jax.nn.relu(y + shortcut)
            sow_stage(self, group + 1, x)
        return x.mean((1, 2)), x
