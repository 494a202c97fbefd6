"""R(2+1)D-18: each 3-D convolution is one over space and one over time (Tran et al., 2018), in the forms of torchvision and of XDC."""

from __future__ import annotations

import flax.linen as nn
import jax

from vatt_jax.config import choose
from vatt_jax.models.towers.convolutions import ConvNorm

MIDS = ('block', 'conv')


def mid_planes(inputs: int, outputs: int) -> int:
    """Width between the two halves that gives them the parameters of the full 3×3×3 kernel."""
    return 27 * inputs * outputs // (9 * inputs + 3 * outputs)


class Factorised(nn.Module):
    """1×3×3 to `mid` with the spatial stride, batch norm, ReLU, 3×1×1 to `features` with the temporal one, batch norm, and ReLU if `relu`."""

    features: int
    mid: int
    stride: int = 1
    relu: bool = True
    norm: str = 'torch'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        s, options = (
            self.stride,
            {'padding': 'FIXED', 'norm': self.norm, 'init': 'kaiming', 'dtype': self.dtype},
        )
        x = ConvNorm(self.mid, (1, 3, 3), (1, s, s), name='spatial', **options)(x, valid, train)
        return ConvNorm(
            self.features, (3, 1, 1), (s, 1, 1), relu=self.relu, name='temporal', **options
        )(x, valid, train)


class R2Plus1D(nn.Module):
    """Video [B T H W 3] -> (pooled [B 512·w], map [B T/8 H/16 W/16 512·w]), w = `multiplier`. Padded evenly, no max pool.

    mid: 'block', the width between the halves is computed once for a block, from its input and output, and its second convolution has it too
    (torchvision, GDT, SeLaVi); 'conv', for each convolution (XDC; its size is the published 33.3 M).
    """

    mid: str = 'block'
    multiplier: float = 1.0
    norm: str = (
        'torch'  # torch | xdc: eps 1e-3, and running statistics that hold a tenth of the past
    )
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        choose(self.mid, MIDS, 'config.model.towers.video.mid')
        scale = lambda width: max(1, round(width * self.multiplier))
        options = {'padding': 'FIXED', 'norm': self.norm, 'init': 'kaiming', 'dtype': self.dtype}
        x = ConvNorm(scale(45), (1, 7, 7), (1, 2, 2), name='stem_spatial', **options)(
            x, valid, train
        )
        x = ConvNorm(scale(64), (3, 1, 1), (1, 1, 1), name='stem_temporal', **options)(
            x, valid, train
        )
        for layer in range(4):
            width = scale(64 << layer)
            for block in range(2):
                stride, name = 2 if layer and not block else 1, f'layer_{layer + 1}_block_{block}'
                inputs = x.shape[-1]
                mid = mid_planes(inputs, width)
                short = x
                if stride > 1:
                    short = ConvNorm(
                        width, (1, 1, 1), (stride,) * 3, relu=False, name=f'{name}_short', **options
                    )(x, valid, train)
                part = lambda inner, stride, relu, which: Factorised(
                    width, inner, stride, relu, self.norm, self.dtype, name=f'{name}_{which}'
                )  # noqa: B023
                y = part(mid, stride, True, 'conv_1')(x, valid, train)
                y = part(
                    mid if self.mid == 'block' else mid_planes(width, width), 1, False, 'conv_2'
                )(y, valid, train)
                x = jax.nn.relu(y + short)
        return x.mean((1, 2, 3)), x
