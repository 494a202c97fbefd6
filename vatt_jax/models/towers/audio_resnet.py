"""ResNets over spectrograms: post-activation as VATT's `mmv_fac` has it (padded after SimCLR's ResNet), pre-activation as MMV, and SeLaVi's."""

from __future__ import annotations

import flax.linen as nn
import jax

from vatt_jax.models.towers.convolutions import ConvNorm, max_pool
from vatt_jax.models.towers.resnet_v2 import ResNetV2


class Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride), 1×1 to four times the width; added to the input or its projection; ReLU."""

    width: int
    stride: int
    projected: bool
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        unit = lambda features, k, stride, name, **kw: ConvNorm(
            features,
            (k, k),
            (stride, stride),
            'SAME' if stride == 1 else 'FIXED',
            dtype=self.dtype,
            name=name,
            **kw,
        )
        short = (
            unit(4 * self.width, 1, self.stride, 'short', relu=False)(x, valid, train)
            if self.projected
            else x
        )
        x = unit(self.width, 1, 1, 'conv_1')(x, valid, train)
        x = unit(self.width, 3, self.stride, 'conv_2')(x, valid, train)
        x = unit(4 * self.width, 1, 1, 'conv_3', relu=False, scale_init=0.0)(x, valid, train)
        return jax.nn.relu(x + short)


class ResNet2D(nn.Module):
    """Spectrogram [B T F] -> (pooled [B 2048], map [B T/32 F/32 2048]). blocks: of each of the four groups; (3, 4, 6, 3) is ResNet-50."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        x = ConvNorm(64, (7, 7), (2, 2), 'FIXED', dtype=self.dtype, name='stem')(
            x[..., None], valid, train
        )
        x = max_pool(x, (3, 3), (2, 2), 'SAME')
        for group, count in enumerate(self.blocks):
            for block in range(count):
                x = Bottleneck(
                    64 << group,
                    2 if group and not block else 1,
                    not block,
                    self.dtype,
                    name=f'group_{group + 1}_block_{block + 1}',
                )(x, valid, train)
        return x.mean((1, 2)), x


class ResNet2DV2(nn.Module):
    """Spectrogram [B T F] -> (pooled [B 2048·w], map [B T/32 F/32 2048·w] *before* the last batch norm and ReLU, the released end point), w =
    `multiplier`; depth 50, 34 or 18 (the latter two: 512·w)."""

    depth: int = 50
    multiplier: float = 1.0
    norm: str = 'debiased'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        before, after = ResNetV2(
            self.depth, self.multiplier, norm=self.norm, dtype=self.dtype, name='resnet'
        )(x[..., None], valid, train)
        return after.mean((1, 2)), before


class ResNet9(nn.Module):
    """Spectrogram [B T F] -> (pooled [B 512·w], map [B T/32 F/32 512·w]), w = `multiplier`: torchvision's ResNet with one basic block in each
    group (SeLaVi and GDT: log-filterbanks of 257 bands of one second). Padded evenly."""

    multiplier: float = 1.0
    norm: str = 'torch'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        unit = lambda x, features, k, stride, name, **kw: ConvNorm(
            features,
            (k, k),
            (stride, stride),
            'FIXED',
            norm=self.norm,
            init='kaiming',
            dtype=self.dtype,
            name=name,
            **kw,
        )(x, valid, train)
        scale = lambda width: max(1, round(width * self.multiplier))
        x = unit(x[..., None], scale(64), 7, 2, 'stem')
        x = max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for group in range(4):
            width, stride, name = scale(64 << group), 2 if group else 1, f'group_{group + 1}'
            short = unit(x, width, 1, stride, f'{name}_short', relu=False) if group else x
            y = unit(
                unit(x, width, 3, stride, f'{name}_conv_1'),
                width,
                3,
                1,
                f'{name}_conv_2',
                relu=False,
            )
            x = jax.nn.relu(y + short)
        return x.mean((1, 2)), x
