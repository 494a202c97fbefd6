"""Perceiver resampler (Flamingo, section 2.1): any number of tokens in, a fixed number out."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vatt_jax.config import ConfigError
from vatt_jax.models.fusion.blocks import BlockOptions, CrossBlock
from vatt_jax.models.layers import LayerNorm
from vatt_jax.parallel.sharding import logical

EPS = 1e-5  # of all norms, in the open implementations


class PerceiverResampler(nn.Module):
    """R learned latents that read the tokens of each medium by cross-attention.

        z += attention(queries: norm(z), keys and values: [norm'(x); norm(z)]);  z += MLP(norm(z))

    and a last norm. Media know nothing of each other. Linear layers have no bias.

    Attributes:
        width: D of the tokens, and of what comes out.
        latents: R.
        layers: of the resampler.
        heads: of the attention.
        head_width: of each head.
        mlp: hidden width of the feed-forward part; 0: 4 D.
        activation: entry of layers.ACTIVATIONS; the paper's is squared_relu, the open
            implementations' gelu.
        frames: rows of the table of times of frames; 0: no such table.
        media: rows of the table of media; 0: no such table.
        implementation: of attention, see `attention.IMPLEMENTATIONS`.
        dtype: of activations; parameters are float32.
    """

    width: int
    latents: int = 64
    layers: int = 6
    heads: int = 8
    head_width: int = 64
    mlp: int = 0
    activation: str = 'gelu'
    frames: int = 0
    media: int = 0
    implementation: str = 'dense'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B M T S D'], mask: Bool[Array, 'B M T S'] | None = None
    ) -> Float[Array, 'B M R D']:
        """Resample the tokens of each medium.

        Args:
            x: S tokens of T frames of M media.
            mask: tokens that are there; None: all. Latents always see themselves.

        Raises:
            ConfigError: tokens of another width, or more media than the table has rows.
        """
        num_rows, num_media, num_frames, num_tokens, width = x.shape
        self._check(num_media, width)
        x = x.astype(self.dtype)
        if self.frames:
            times = _at_times(self._table('frame_table', self.frames), num_frames)
            x = x + times[:, None].astype(self.dtype)
        if self.media:
            table = self._table('media_table', self.media)[:num_media]
            x = x + table[:, None, None].astype(self.dtype)

        # Media become rows of the batch, frames become tokens.
        x = x.reshape(num_rows * num_media, num_frames * num_tokens, width)
        latents = self._table('latents', self.latents).astype(self.dtype)
        z = jnp.broadcast_to(latents, (len(x), *latents.shape))
        seen = None
        if mask is not None:
            own = jnp.ones(z.shape[:2], bool)
            seen = jnp.concatenate([mask.reshape(x.shape[:2]), own], axis=1)
        for layer in range(self.layers):
            z = self._layer(layer, z, x, seen)
        z = LayerNorm(eps=EPS, name='final_norm')(z)
        return z.reshape(num_rows, num_media, self.latents, width)

    def _layer(
        self,
        number: int,
        z: Float[Array, 'rows R D'],
        x: Float[Array, 'rows N D'],
        seen: Bool[Array, 'rows N+R'] | None,
    ) -> Float[Array, 'rows R D']:
        block = CrossBlock(self.width, self._options(), name=f'layers_{number}')
        normed = block.normed(z)
        media = LayerNorm(eps=EPS, name=f'media_norms_{number}')(x)
        key, value = block.keys_and_values(jnp.concatenate([media, normed], axis=1))
        return block.attend(z, normed, key, value, seen, None, False)

    def _options(self) -> BlockOptions:
        return BlockOptions(
            mlp=self.mlp or 4 * self.width,
            heads=self.heads,
            head_width=self.head_width,
            bias=False,
            eps=EPS,
            activation=self.activation,
            kernel_init='linear',
            implementation=self.implementation,
            dtype=self.dtype,
        )

    def _table(self, name: str, rows: int) -> Float[Array, 'rows D']:
        normal = jax.nn.initializers.normal(1.0)
        return self.param(name, logical(normal, None, 'embed'), (rows, self.width), jnp.float32)

    def _check(self, num_media: int, width: int) -> None:
        if width != self.width:
            raise ConfigError(
                f'PerceiverResampler.width: expected the width of the tokens, {width}, got '
                f'{self.width}'
            )
        if self.media and num_media > self.media:
            raise ConfigError(
                f'PerceiverResampler.media: expected at least {num_media} rows, one for each '
                f'medium of a text, got {self.media}'
            )


def _at_times(table: Float[Array, 'rows D'], num_frames: int) -> Float[Array, 'T D']:
    """Rows of the first T frames; of more frames than rows, between them.

    The paper interpolates for videos that are longer than those of the training. That it is
    linear, and that the first and the last rows stay at the ends, is assumed.
    """
    num_rows = len(table)
    if num_frames <= num_rows:
        return table[:num_frames]
    time = np.linspace(0, num_rows - 1, num_frames)
    before = np.floor(time).astype(int)
    after = np.minimum(before + 1, num_rows - 1)
    share = (time - before)[:, None].astype(np.float32)
    return (1 - share) * table[before] + share * table[after]
