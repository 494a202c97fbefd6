"""I3D: Inception inflated to three dimensions (Carreira & Zisserman, 2017), as VATT's `mmv_fac` and MIL-NCE use it."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from vatt_jax.config import ConfigError
from vatt_jax.models.towers.convolutions import ConvNorm, max_pool

# name -> widths of the branches (1×1; 1×1 before 3×3, 3×3; 1×1 before 3×3, 3×3; 1×1 after the max pool)
MIXED = {
    'mixed_3b': (64, (96, 128), (16, 32), 32),
    'mixed_3c': (128, (128, 192), (32, 96), 64),
    'mixed_4b': (192, (96, 208), (16, 48), 64),
    'mixed_4c': (160, (112, 224), (24, 64), 64),
    'mixed_4d': (128, (128, 256), (24, 64), 64),
    'mixed_4e': (112, (144, 288), (32, 64), 64),
    'mixed_4f': (256, (160, 320), (32, 128), 128),
    'mixed_5b': (256, (160, 320), (32, 128), 128),
    'mixed_5c': (384, (192, 384), (48, 128), 128),
}
BLOCKS = (2, 5, 2)  # mixed_3*, 4*, 5*


class Mixed(nn.Module):
    """Four branches side by side, concatenated in their order. unit(width, kernel, name): a convolutional unit."""

    widths: tuple
    unit: Callable

    @nn.compact
    def __call__(self, x, valid, train: bool):
        apply = lambda x, features, k, name: self.unit(features, (k, k, k), name=name)(
            x, valid, train
        )
        b0, (b1_in, b1), (b2_in, b2), b3 = self.widths
        return jnp.concatenate(
            [
                apply(x, b0, 1, 'b0'),
                apply(apply(x, b1_in, 1, 'b1_in'), b1, 3, 'b1'),
                apply(apply(x, b2_in, 1, 'b2_in'), b2, 3, 'b2'),
                apply(max_pool(x, (3, 3, 3), (1, 1, 1)), b3, 1, 'b3'),
            ],
            -1,
        )


def trunk(
    x, unit: Callable, valid, train: bool, pools: int = 4, blocks: tuple[int, int, int] = BLOCKS
):
    """From the map of the first layer to that of the last: what every network of this family shares. unit: see Mixed.

    pools: how many of the four max pools that halve the map are there, from the first on. blocks: how many of mixed_3*, mixed_4* and mixed_5*, from
    the first on of each. The published numbers are made for 200 pixels and many steps. With fewer of either, leave out the last pools, so that there
    are places to average over, and some blocks: without shortcuts, gradients grow towards the first layer with every block (docs/mmv.md).
    """
    if (
        pools not in range(5)
        or len(blocks) != 3
        or not all(1 <= n <= most for n, most in zip(blocks, BLOCKS))
    ):
        raise ConfigError(
            f'config.model.towers.video: pools={pools}, blocks={tuple(blocks)}: 0 to 4 pools and three numbers of blocks are wanted, '
            f'from 1 to {BLOCKS}'
        )
    x = max_pool(x, (1, 3, 3), (1, 2, 2)) if pools > 0 else x
    x = unit(64, (1, 1, 1), name='conv_2b')(x, valid, train)
    x = unit(192, (3, 3, 3), name='conv_2c')(x, valid, train)
    for stage, (count, pool) in enumerate(
        zip(blocks, (((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2)))), 3
    ):
        x = max_pool(x, *pool) if pools > stage - 2 else x
        for name in [name for name in MIXED if name.startswith(f'mixed_{stage}')][:count]:
            x = Mixed(MIXED[name], unit, name=name)(x, valid, train)
    return x


class I3D(nn.Module):
    """Video [B T H W 3] -> (pooled [B 1024], map [B T/8 H/32 W/32 1024]). The official width multiplier has no effect and is left out.
    pools, blocks: see trunk."""

    pools: int = 4
    blocks: tuple[int, int, int] = BLOCKS
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        unit = lambda features, kernel, strides=(1, 1, 1), name=None: ConvNorm(
            features, kernel, strides, dtype=self.dtype, name=name
        )
        x = trunk(
            unit(64, (7, 7, 7), (2, 2, 2), name='conv_1a')(x, valid, train),
            unit,
            valid,
            train,
            self.pools,
            self.blocks,
        )
        return x.mean((1, 2, 3)), x
