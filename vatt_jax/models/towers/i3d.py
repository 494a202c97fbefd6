"""I3D: Inception inflated to three dimensions, as VATT's `mmv_fac` and MIL-NCE use it.

Carreira & Zisserman, 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vatt_jax.config import ConfigError
from vatt_jax.models.towers.convolutions import ConvNorm, max_pool
from vatt_jax.models.towers.stages import sow_stage

# Widths of a Mixed block's four branches:
#       1×1×1, (1×1×1 before 3×3×3, 3×3×3), (1×1×1 before 3×3×3, 3×3×3), 1×1×1 after the max pool
MIXED: dict[str, Any] = {
    # The widths of GoogLeNet (Szegedy et al., 2015).
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
BLOCKS = (2, 5, 2)  # mixed_3*, mixed_4*, mixed_5*

# Window and stride of the max pool before each stage of Mixed blocks (the first pool of all stands
# before conv_2b).
STAGE_POOLS = {
    3: ((1, 3, 3), (1, 2, 2)),
    4: ((3, 3, 3), (2, 2, 2)),
    5: ((2, 2, 2), (2, 2, 2)),
}


class Mixed(nn.Module):
    """Four branches side by side, concatenated in their order.

    Attributes:
        widths: a row of MIXED.
        unit: makes a convolutional unit, unit(features, kernel, name=…).
    """

    widths: Any
    unit: Callable

    @nn.compact
    def __call__(self, x: jax.Array, valid: Any, train: bool) -> jax.Array:
        def conv(x: jax.Array, features: int, size: int, name: str) -> jax.Array:
            unit = self.unit(features, (size, size, size), name=name)
            return unit(x, valid, train)

        pointwise, (reduced_1, wide_1), (reduced_2, wide_2), pooled = self.widths
        branch_0 = conv(x, pointwise, 1, 'b0')
        branch_1 = conv(x, reduced_1, 1, 'b1_in')
        branch_1 = conv(branch_1, wide_1, 3, 'b1')
        branch_2 = conv(x, reduced_2, 1, 'b2_in')
        branch_2 = conv(branch_2, wide_2, 3, 'b2')
        # Stride 1: the pool changes no size, so the branches can be concatenated.
        branch_3 = max_pool(x, (3, 3, 3), (1, 1, 1))
        branch_3 = conv(branch_3, pooled, 1, 'b3')
        # [B T H W D], D the sum of the branches' widths
        return jnp.concatenate([branch_0, branch_1, branch_2, branch_3], axis=-1)


def trunk(
    net: nn.Module,
    x: Float[Array, 'B T H W C'],
    unit: Callable,
    valid: Any,
    train: bool,
    pools: int = 4,
    blocks: Sequence[int] = BLOCKS,
) -> jax.Array:
    """Compute the last map from that of the first layer: what all networks of this family share.

    The published numbers are made for 200 pixels and many steps. With fewer of either, leave out
    the last pools, so that there are places to average over, and some blocks: without shortcuts,
    gradients grow towards the first layer with every block (docs/mmv.md).

    Args:
        net: the network, which hands out its stages.
        x: the map of the first layer.
        unit: makes a convolutional unit; see Mixed.
        valid: bool [B], the rows that count in batch statistics.
        train: whether batch norms take statistics of the batch.
        pools: how many of the four max pools that halve the map there are, from the first on.
        blocks: how many of mixed_3*, mixed_4* and mixed_5* there are, from the first on of each.

    Raises:
        ConfigError: for numbers of pools or blocks that do not exist.
    """
    _check_depth(pools, blocks)
    # The first two pools leave time as it is.
    if pools > 0:
        x = max_pool(x, (1, 3, 3), (1, 2, 2))
    x = unit(64, (1, 1, 1), name='conv_2b')(x, valid, train)  # [B T/2 H/4 W/4 64]
    x = unit(192, (3, 3, 3), name='conv_2c')(x, valid, train)
    sow_stage(net, 1, x)
    for (stage, pool), num_blocks in zip(STAGE_POOLS.items(), blocks):
        # Stage 3 has the second pool, stage 4 the third, stage 5 the fourth.
        if pools > stage - 2:
            window, strides = pool
            x = max_pool(x, window, strides)
        names = [name for name in MIXED if name.startswith(f'mixed_{stage}')]
        for name in names[:num_blocks]:
            x = Mixed(MIXED[name], unit, name=name)(x, valid, train)
        sow_stage(net, stage - 1, x)
    return x


def _check_depth(pools: int, blocks: Sequence[int]) -> None:
    blocks_exist = len(blocks) == len(BLOCKS) and all(
        1 <= count <= most for count, most in zip(blocks, BLOCKS)
    )
    if pools not in range(5) or not blocks_exist:
        raise ConfigError(
            f'config.model.towers.video: pools={pools}, blocks={tuple(blocks)}: expected 0 to 4 '
            f'pools and three numbers of blocks, from 1 to {BLOCKS}.'
        )


class I3D(nn.Module):
    """Video [B T H W 3] -> (pooled [B 1024], map [B T/8 H/32 W/32 1024]).

    The official width multiplier has no effect and is left out.

    Attributes:
        pools: see trunk.
        blocks: see trunk.
        dtype: of activations.
    """

    pools: int = 4
    blocks: Any = BLOCKS
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T H W C'], valid: Any, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        def unit(
            features: int,
            kernel: tuple[int, int, int],
            strides: tuple[int, int, int] = (1, 1, 1),
            name: str | None = None,
        ) -> ConvNorm:
            return ConvNorm(features, kernel, strides, dtype=self.dtype, name=name)

        x = unit(64, (7, 7, 7), (2, 2, 2), name='conv_1a')(x, valid, train)
        x = trunk(self, x, unit, valid, train, self.pools, self.blocks)
        return x.mean((1, 2, 3)), x
