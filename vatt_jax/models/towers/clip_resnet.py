"""CLIP's ResNets: three convolutions as stem, means before strides, attention as the last pool.

As in OpenAI's released code (`ModifiedResNet`); Radford et al. 2021, section 2.4.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vatt_jax.models.attention import attention
from vatt_jax.models.layers import Dense
from vatt_jax.models.towers.convolutions import ConvNorm
from vatt_jax.parallel.sharding import logical

# Output channels of a block in those of its middle.
EXPANSION = 4
# Halvings of the picture until the last map: two of the stem, and one of each group but the first.
REDUCTION = 32


def mean_pool(x: Float[Array, 'B H W C'], size: int) -> Float[Array, 'B H2 W2 C']:
    """Means over squares of `size` pixels; what does not fill one at the end is left out."""
    if size == 1:
        return x
    height, width = x.shape[1] // size, x.shape[2] // size
    x = x[:, : height * size, : width * size]
    return x.reshape(len(x), height, size, width, size, -1).mean((2, 4))


class Bottleneck(nn.Module):
    """One point to `features` channels, 3×3, and one point to four times as many.

    A stride is a mean before the last convolution, and before that of the shortcut.

    Attributes:
        features: of the middle.
        stride: of the block.
        norm: entry of layers.NORMS.
        dtype: of activations.
    """

    features: int
    stride: int = 1
    norm: str = 'torch'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B H W C'], valid: Any, train: bool
    ) -> Float[Array, 'B H2 W2 D']:
        options: dict[str, Any] = {'norm': self.norm, 'init': 'torch', 'dtype': self.dtype}
        width = EXPANSION * self.features
        shortcut = x
        if self.stride > 1 or x.shape[-1] != width:
            projection = ConvNorm(width, (1, 1), (1, 1), relu=False, name='short', **options)
            shortcut = projection(mean_pool(x, self.stride), valid, train)
        reduce = ConvNorm(self.features, (1, 1), (1, 1), name='reduce', **options)
        spatial = ConvNorm(self.features, (3, 3), (1, 1), 'FIXED', name='spatial', **options)
        # A block begins as its shortcut.
        expand = ConvNorm(
            width, (1, 1), (1, 1), relu=False, scale_init=0.0, name='expand', **options
        )
        y = spatial(reduce(x, valid, train), valid, train)
        y = expand(mean_pool(y, self.stride), valid, train)
        return jax.nn.relu(y + shortcut)


class MeanQueryPooling(nn.Module):
    """A map [B H W C] -> [B C]: the mean of its points attends to itself and to them.

    CLIP's attention pooling without its last matrix, which is the projection into the common space.

    Attributes:
        table: rows and columns of the map that the positions are of. Maps of another size read
            them resized.
        heads: of the attention.
        dtype: of activations.
    """

    table: tuple[int, int]
    heads: int
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B C']:
        batch_size, height, width, channels = x.shape
        points = x.reshape(batch_size, -1, channels)
        points = jnp.concatenate([points.mean(1, keepdims=True), points], axis=1)  # [B 1+HW C]
        points = points + self._positions((height, width), channels).astype(self.dtype)
        heads = (self.heads, channels // self.heads)
        query = self._dense('query', channels)(points[:, :1]).reshape(batch_size, 1, *heads)
        key = self._dense('key', channels)(points).reshape(*points.shape[:2], *heads)
        value = self._dense('value', channels)(points).reshape(*points.shape[:2], *heads)
        attended = attention(query, key, value, scale=heads[1] ** -0.5)  # [B 1 heads kv]
        return attended.reshape(batch_size, channels)

    def _positions(self, grid: tuple[int, int], channels: int) -> Float[Array, 'N C']:
        init = logical(jax.nn.initializers.normal(channels**-0.5), 'buckets', 'embed')
        num_rows = 1 + self.table[0] * self.table[1]
        table = self.param('position_table', init, (num_rows, channels), jnp.float32)
        if grid == tuple(self.table):
            return table
        squares = table[1:].reshape(*self.table, channels)
        resized = jax.image.resize(squares, (*grid, channels), 'bicubic')
        return jnp.concatenate([table[:1], resized.reshape(-1, channels)])

    def _dense(self, name: str, channels: int) -> Dense:
        return Dense(channels, ('embed', 'heads'), init='normal', dtype=self.dtype, name=name)


class CLIPResNet(nn.Module):
    """Pictures [B T H W 3] -> (pooled [B 32·w], map [B T H/32 W/32 32·w]), w = `features`.

    Every frame is a picture by itself; the vectors of a clip's frames are averaged.

    Attributes:
        blocks: of each of the four groups.
        features: channels of the first group's middle.
        size: of the pictures in pixels that the position table is for.
        heads: of the pooling; 0: one for each 64 channels.
        norm: entry of layers.NORMS.
        dtype: of activations.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    features: int = 64
    size: int = 224
    heads: int = 0
    norm: str = 'torch'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T H W C'], valid: Any, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        batch_size, num_frames = x.shape[:2]
        x = x.reshape(-1, *x.shape[2:])  # [R H W C], R = B·T
        if valid is not None:
            valid = jnp.repeat(valid, num_frames)
        options: dict[str, Any] = {'norm': self.norm, 'dtype': self.dtype}
        x = self._stem(x, valid, train)
        for group, num_blocks in enumerate(self.blocks):
            for block in range(num_blocks):
                # Every group but the first halves the map, in its first block.
                stride = 2 if group > 0 and block == 0 else 1
                name = f'group_{group + 1}_block_{block}'
                x = Bottleneck(self.features << group, stride, name=name, **options)(
                    x, valid, train
                )
        side = self.size // REDUCTION
        heads = self.heads or x.shape[-1] // 64
        pooled = MeanQueryPooling((side, side), heads, self.dtype, name='pool')(x)  # [R D]
        pooled = pooled.reshape(batch_size, num_frames, -1).mean(1)
        return pooled, x.reshape(batch_size, num_frames, *x.shape[1:])

    def _stem(self, x: Float[Array, 'R H W C'], valid: Any, train: bool) -> jax.Array:
        options: dict[str, Any] = {'norm': self.norm, 'init': 'torch', 'dtype': self.dtype}
        half = self.features // 2
        for number, (width, stride) in enumerate(((half, 2), (half, 1), (self.features, 1)), 1):
            convolution = ConvNorm(
                width, (3, 3), (stride, stride), 'FIXED', name=f'stem_{number}', **options
            )
            x = convolution(x, valid, train)
        return mean_pool(x, 2)
