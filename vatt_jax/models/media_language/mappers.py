"""An embedding -> vectors that stand before the words of a caption (ClipCap, section 3.2)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vatt_jax.config import ConfigError
from vatt_jax.models.fusion.blocks import BlockOptions, CrossBlock
from vatt_jax.models.layers import Dense
from vatt_jax.parallel.sharding import logical


class MLPMapper(nn.Module):
    """W2 tanh(W1 c), cut into k vectors.

    Attributes:
        width: D of the language model.
        prefix: k.
        dtype: of activations; parameters are float32.
    """

    width: int
    prefix: int = 10
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, embeddings: Float[Array, 'B E']) -> Float[Array, 'B k D']:
        """The prefix of each embedding."""
        num_outputs = self.prefix * self.width
        hidden = self._dense('mlp_in', num_outputs // 2, (None, 'mlp'))(embeddings)
        x = self._dense('mlp_out', num_outputs, ('mlp', None))(jnp.tanh(hidden))
        return x.reshape(len(x), self.prefix, self.width)

    def _dense(self, name: str, features: int, axes: tuple[str | None, str | None]) -> Dense:
        return Dense(features, axes, init='torch', dtype=self.dtype, name=name)


class TransformerMapper(nn.Module):
    """A Transformer over m vectors made of the embedding and k learned ones, which it returns.

    Pre-norm without a last norm, ReLU; queries, keys and values have no bias.

    Attributes:
        width: D of the language model.
        prefix: k.
        tokens: m.
        layers: of the Transformer.
        heads: of the attention, each D / heads wide.
        mlp: hidden width of the feed-forward part; 0: 2 D.
        implementation: of attention, see `attention.IMPLEMENTATIONS`.
        dtype: of activations; parameters are float32.
    """

    width: int
    prefix: int = 40
    tokens: int = 40
    layers: int = 8
    heads: int = 8
    mlp: int = 0
    implementation: str = 'dense'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, embeddings: Float[Array, 'B E']) -> Float[Array, 'B k D']:
        """The prefix of each embedding.

        Raises:
            ConfigError: the heads do not divide the width.
        """
        if self.width % self.heads:
            raise ConfigError(
                f'TransformerMapper.heads: expected a divisor of width={self.width}, got '
                f'{self.heads}'
            )
        linear = Dense(
            self.tokens * self.width, (None, 'embed'), init='torch', dtype=self.dtype, name='linear'
        )
        x = linear(embeddings).reshape(-1, self.tokens, self.width)
        init = logical(jax.nn.initializers.normal(1.0), None, 'embed')
        constants = self.param('constants', init, (self.prefix, self.width), jnp.float32)
        constants = constants.astype(x.dtype)
        constants = jnp.broadcast_to(constants, (len(x), *constants.shape))
        x = jnp.concatenate([x, constants], axis=1)  # [B m+k D]
        for layer in range(self.layers):
            block = CrossBlock(self.width, self._options(), name=f'layers_{layer}')
            x = block(x, None, None, None, False)
        return x[:, self.tokens :]

    def _options(self) -> BlockOptions:
        return BlockOptions(
            mlp=self.mlp or 2 * self.width,
            heads=self.heads,
            head_width=self.width // self.heads,
            qkv_bias=False,
            eps=1e-5,
            activation='relu',
            kernel_init='linear',
            implementation=self.implementation,
            dtype=self.dtype,
        )
