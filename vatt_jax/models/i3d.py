"""I3D: Inception inflated to three dimensions (Carreira & Zisserman, 2017), as VATT's `mmv_fac` and MIL-NCE use it."""
from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from vatt_jax.models.conv import ConvNorm

# name -> widths of the branches (1×1; 1×1 before 3×3, 3×3; 1×1 before 3×3, 3×3; 1×1 after the max pool)
MIXED = {
    'mixed_3b': (64, (96, 128), (16, 32), 32), 'mixed_3c': (128, (128, 192), (32, 96), 64),
    'mixed_4b': (192, (96, 208), (16, 48), 64), 'mixed_4c': (160, (112, 224), (24, 64), 64), 'mixed_4d': (128, (128, 256), (24, 64), 64),
    'mixed_4e': (112, (144, 288), (32, 64), 64), 'mixed_4f': (256, (160, 320), (32, 128), 128),
    'mixed_5b': (256, (160, 320), (32, 128), 128), 'mixed_5c': (384, (192, 384), (48, 128), 128),
}


class Mixed(nn.Module):
    """Four branches side by side, concatenated in their order."""
    widths: tuple
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        unit = lambda features, k, name: ConvNorm(features, (k, k, k), (1, 1, 1), dtype=self.dtype, name=name)
        b0, (b1_in, b1), (b2_in, b2), b3 = self.widths
        pooled = nn.max_pool(x, (3, 3, 3), (1, 1, 1), 'SAME')
        return jnp.concatenate([
            unit(b0, 1, 'b0')(x, valid, train),
            unit(b1, 3, 'b1')(unit(b1_in, 1, 'b1_in')(x, valid, train), valid, train),
            unit(b2, 3, 'b2')(unit(b2_in, 1, 'b2_in')(x, valid, train), valid, train),
            unit(b3, 1, 'b3')(pooled, valid, train)], -1)


class I3D(nn.Module):
    """Video [B T H W 3] -> (pooled [B 1024], map [B T/8 H/32 W/32 1024]). The official width multiplier has no effect and is left out."""
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        unit = lambda features, k, stride, name: ConvNorm(features, (k,) * 3, (stride,) * 3, dtype=self.dtype, name=name)
        pool = lambda x, window, strides: nn.max_pool(x, window, strides, 'SAME')
        x = unit(64, 7, 2, 'conv_1a')(x, valid, train)
        x = pool(x, (1, 3, 3), (1, 2, 2))
        x = unit(64, 1, 1, 'conv_2b')(x, valid, train)
        x = unit(192, 3, 1, 'conv_2c')(x, valid, train)
        x = pool(x, (1, 3, 3), (1, 2, 2))
        for name, widths in MIXED.items():
            if name == 'mixed_4b':
                x = pool(x, (3, 3, 3), (2, 2, 2))
            if name == 'mixed_5b':
                x = pool(x, (2, 2, 2), (2, 2, 2))
            x = Mixed(widths, self.dtype, name=name)(x, valid, train)
        return x.mean((1, 2, 3)), x
