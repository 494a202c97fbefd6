"""R(2+1)D-18: each 3-D convolution is one over space and one over time (Tran et al.).

In the forms of torchvision and of XDC.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from vatt_jax.config import choose
from vatt_jax.models.towers.convolutions import ConvNorm
from vatt_jax.models.towers.stages import sow_stage

MIDS = ('block', 'conv')


def mid_planes(inputs: int, outputs: int) -> int:
    """Width between the two halves that gives them the parameters of the full 3×3×3 kernel."""
    # t d² I O / (d² I + t O) with t = d = 3 (Tran et al.): the 1×3×3 kernel has 9·I·M
    # parameters, the 3×1×1 one 3·M·O.
    return 27 * inputs * outputs // (9 * inputs + 3 * outputs)


class Factorised(nn.Module):
    """A convolution over space to `mid` channels, then one over time to `features`.

    1×3×3 with the spatial stride, batch norm, ReLU; 3×1×1 with the temporal one, batch norm, and
    ReLU if `relu`.
    """

    features: int
    mid: int
    stride: int = 1
    relu: bool = True
    norm: str = 'torch'
    dtype: str = 'float32'
    init: str = 'kaiming'  # type: ignore[assignment]  # no one calls Module.init of this

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T H W C'], valid: Any, train: bool
    ) -> Float[Array, 'B T2 H2 W2 D']:
        options: dict[str, Any] = conv_options(self.norm, self.dtype)
        options['init'] = self.init
        stride = self.stride
        # The ReLU between the halves doubles the nonlinearities of a 3×3×3 convolution.
        spatial = ConvNorm(self.mid, (1, 3, 3), (1, stride, stride), name='spatial', **options)
        temporal = ConvNorm(
            self.features, (3, 1, 1), (stride, 1, 1), relu=self.relu, name='temporal', **options
        )
        x = spatial(x, valid, train)  # [B T H/stride W/stride M]
        return temporal(x, valid, train)


def conv_options(norm: str, dtype: str) -> dict[str, Any]:
    """What all convolutions of the network have in common."""
    return {'padding': 'FIXED', 'norm': norm, 'init': 'kaiming', 'dtype': dtype}


class R2Plus1D(nn.Module):
    """Video [B T H W 3] -> (pooled [B 512·w], map [B T/8 H/16 W/16 512·w]), w = `multiplier`.

    Padded evenly, no max pool.

    Attributes:
        mid: how the width between the halves is computed. 'block': once for a block, from its input
            and output, and its second convolution has it too (torchvision, GDT, SeLaVi). 'conv':
            for each convolution (XDC; its size is the published 33.3 M).
        multiplier: of all widths.
        norm: entry of layers.NORMS, 'torch' or 'xdc': eps 1e-3, and running statistics that hold a
            tenth of the past.
        dtype: of activations.
    """

    mid: str = 'block'
    multiplier: float = 1.0
    norm: str = 'torch'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T H W C'], valid: Any, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        choose(self.mid, MIDS, 'config.model.towers.video.mid')
        options = conv_options(self.norm, self.dtype)

        def scaled(width: int) -> int:
            return max(1, round(width * self.multiplier))  # a narrow network still has channels

        # 45 is torchvision's; the formula above would give 83 for a kernel of 3×7×7.
        stem_spatial = ConvNorm(scaled(45), (1, 7, 7), (1, 2, 2), name='stem_spatial', **options)
        x = stem_spatial(x, valid, train)
        stem_temporal = ConvNorm(scaled(64), (3, 1, 1), (1, 1, 1), name='stem_temporal', **options)
        x = stem_temporal(x, valid, train)
        # R(2+1)D-18: four layers of two blocks of two convolutions, 64 to 512 channels.
        for layer in range(4):
            width = scaled(64 << layer)
            for block in range(2):
                # Every layer but the first halves the map, in its first block.
                stride = 2 if layer > 0 and block == 0 else 1
                name = f'layer_{layer + 1}_block_{block}'
                mid = mid_planes(x.shape[-1], width)
                # In a block that widens, the second convolution has more inputs than the first.
                second_mid = mid if self.mid == 'block' else mid_planes(width, width)
                shortcut = x
                if stride > 1:
                    projection = ConvNorm(
                        width, (1, 1, 1), (stride,) * 3, relu=False, name=f'{name}_short', **options
                    )
                    shortcut = projection(x, valid, train)
                y = Factorised(
                    width, mid, stride, True, self.norm, self.dtype, name=f'{name}_conv_1'
                )(x, valid, train)
                y = Factorised(
                    width, second_mid, 1, False, self.norm, self.dtype, name=f'{name}_conv_2'
                )(y, valid, train)
                x = jax.nn.relu(y + shortcut)  # [B T' H' W' width]
            sow_stage(self, layer + 1, x)
        return x.mean((1, 2, 3)), x  # [B D], [B T/8 H/16 W/16 D]
