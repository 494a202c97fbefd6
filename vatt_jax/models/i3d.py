"""I3D: Inception inflated to three dimensions (Carreira & Zisserman, 2017), as VATT's `mmv_fac` and MIL-NCE use it."""
from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from vatt_jax.config import ConfigError
from vatt_jax.models.conv import ConvNorm, max_pool

# name -> widths of the branches (1×1; 1×1 before 3×3, 3×3; 1×1 before 3×3, 3×3; 1×1 after the max pool)
MIXED = {
    'mixed_3b': (64, (96, 128), (16, 32), 32), 'mixed_3c': (128, (128, 192), (32, 96), 64),
    'mixed_4b': (192, (96, 208), (16, 48), 64), 'mixed_4c': (160, (112, 224), (24, 64), 64), 'mixed_4d': (128, (128, 256), (24, 64), 64),
    'mixed_4e': (112, (144, 288), (32, 64), 64), 'mixed_4f': (256, (160, 320), (32, 128), 128),
    'mixed_5b': (256, (160, 320), (32, 128), 128), 'mixed_5c': (384, (192, 384), (48, 128), 128),
}


class Mixed(nn.Module):
    """Four branches side by side, concatenated in their order. unit(width, kernel, name): a convolutional unit."""
    widths: tuple
    unit: Callable

    @nn.compact
    def __call__(self, x, valid, train: bool):
        apply = lambda x, features, k, name: self.unit(features, (k, k, k), name=name)(x, valid, train)
        b0, (b1_in, b1), (b2_in, b2), b3 = self.widths
        return jnp.concatenate([
            apply(x, b0, 1, 'b0'),
            apply(apply(x, b1_in, 1, 'b1_in'), b1, 3, 'b1'),
            apply(apply(x, b2_in, 1, 'b2_in'), b2, 3, 'b2'),
            apply(max_pool(x, (3, 3, 3), (1, 1, 1)), b3, 1, 'b3')], -1)


def trunk(x, unit: Callable, valid, train: bool, pools: int = 4):
    """From the map of the first layer to that of the last: what every network of this family shares. unit: see Mixed. pools: how many of the four
    max pools that halve the map are there, from the first on.

    The published size is made for 200 pixels and more. With fewer, leave out the last: on maps of one place nothing is averaged, and a network as
    deep as this, without shortcuts, hardly begins to learn (docs/mmv.md).
    """
    if pools not in range(5):
        raise ConfigError(f'config.model.towers.video.pools={pools!r}: from 0 to 4 of the four max pools are wanted')

    def pool(number, x, window, strides):
        return max_pool(x, window, strides) if number <= pools else x
    x = pool(1, x, (1, 3, 3), (1, 2, 2))
    x = unit(64, (1, 1, 1), name='conv_2b')(x, valid, train)
    x = unit(192, (3, 3, 3), name='conv_2c')(x, valid, train)
    x = pool(2, x, (1, 3, 3), (1, 2, 2))
    for name, widths in MIXED.items():
        if name == 'mixed_4b':
            x = pool(3, x, (3, 3, 3), (2, 2, 2))
        if name == 'mixed_5b':
            x = pool(4, x, (2, 2, 2), (2, 2, 2))
        x = Mixed(widths, unit, name=name)(x, valid, train)
    return x


class I3D(nn.Module):
    """Video [B T H W 3] -> (pooled [B 1024], map [B T/8 H/32 W/32 1024]). The official width multiplier has no effect and is left out.
    pools: see trunk."""
    pools: int = 4
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        unit = lambda features, kernel, strides=(1, 1, 1), name=None: ConvNorm(features, kernel, strides, dtype=self.dtype, name=name)
        x = trunk(unit(64, (7, 7, 7), (2, 2, 2), name='conv_1a')(x, valid, train), unit, valid, train, self.pools)
        return x.mean((1, 2, 3)), x
