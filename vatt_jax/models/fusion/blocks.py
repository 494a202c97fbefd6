"""A transformer layer whose keys and values may come from elsewhere than its queries.

What BERT, ViLBERT, UNITER, Flamingo and ClipCap differ in are fields: the place of the norms, their
eps, the activation, biases, gates, initial values.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vatt_jax.models.attention import attention_or_zero
from vatt_jax.models.layers import ACTIVATIONS, LayerNorm
from vatt_jax.models.transformer import BLOCK_INITS, Projection, Spread
from vatt_jax.parallel.sharding import constrain
from vatt_jax.rng import Rng


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """What all layers of a stack have in common.

    Attributes:
        mlp: hidden width of the feed-forward part.
        heads: of the attention.
        head_width: of queries, keys and values; heads · head_width need not be a stream's width.
        dropout: rate, before each residual sum and inside the feed-forward part.
        hidden_dropout: rate inside the feed-forward part, where it is another one (BERT: 0).
        attention_dropout: rate on attention probabilities.
        bias: whether projections have one.
        qkv_bias: whether those to queries, keys and values have one too.
        gated: whether each part is multiplied by tanh of a learned number, at first 0, before its
            residual sum (Flamingo): a new layer begins as the identity.
        pre_norm: whether norms come before each part (VATT) or after its residual sum (BERT).
        eps: of all norms, added to the variance.
        activation: entry of layers.ACTIVATIONS.
        kernel_init: entry of transformer.BLOCK_INITS.
        depth: number of layers, for initial values that depend on it.
        implementation: of attention, see `attention.IMPLEMENTATIONS`.
        dtype: to compute in.
    """

    mlp: int
    heads: int
    head_width: int
    dropout: float = 0.0
    hidden_dropout: float | None = None
    attention_dropout: float = 0.0
    bias: bool = True
    qkv_bias: bool = True
    gated: bool = False
    pre_norm: bool = True
    eps: float = 1e-6
    activation: str = 'gelu'
    kernel_init: str = 'glorot'
    depth: int = 1
    implementation: str = 'dense'
    dtype: str = 'float32'


class CrossBlock(nn.Module):
    """One layer of one stream, in three steps, between which streams may exchange keys.

        y = norm(x);  x += drop(softmax(Q y · (K c)ᵀ / sqrt(head_width)) V c · O)
        x += drop(W2 drop(act(W1 norm(x))))

    c is the context, such as y itself, another stream's y, or both. With pre_norm False y is x, and
    norms follow the sums. A query whose keys are all masked attends to nothing: its attention is
    exactly zero before O.

    Parameters are named as those of `transformer.Block`. Each is made where it is first used, so
    that a stream which is only looked at has neither queries nor a feed-forward part.

    Attributes:
        width: D of the stream.
        options: what it shares with other layers.
        context_width: of the context; 0: D.
    """

    width: int
    options: BlockOptions
    context_width: int = 0

    def setup(self) -> None:
        options = self.options
        heads_width = options.heads * options.head_width
        context_width = self.context_width or self.width
        init = BLOCK_INITS[options.kernel_init]
        own = init(self.width, heads_width, options.mlp, options.depth)
        of_context = init(context_width, heads_width, options.mlp, options.depth)

        self.attention_norm = LayerNorm(eps=options.eps)
        self.query = self._to_heads(self.width, own['query'])
        self.key = self._to_heads(context_width, of_context['key'])
        self.value = self._to_heads(context_width, of_context['value'])
        self.out = Projection(
            equation='...hk,hkd->...d',
            shape=(options.heads, options.head_width, self.width),
            axes=('heads', 'kv', 'embed'),
            spread=own['out'],
            bias=options.bias,
            dtype=options.dtype,
        )
        self.mlp_norm = LayerNorm(eps=options.eps)
        self.mlp_in = Projection(
            equation='...d,df->...f',
            shape=(self.width, options.mlp),
            axes=('embed', 'mlp'),
            spread=own['mlp_in'],
            bias=options.bias,
            dtype=options.dtype,
        )
        self.mlp_out = Projection(
            equation='...f,fd->...d',
            shape=(options.mlp, self.width),
            axes=('mlp', 'embed'),
            spread=own['mlp_out'],
            bias=options.bias,
            dtype=options.dtype,
        )
        if options.gated:
            self.attention_gate = self.param('attention_gate', jax.nn.initializers.zeros, ())
            self.mlp_gate = self.param('mlp_gate', jax.nn.initializers.zeros, ())

    def __call__(
        self,
        x: Float[Array, 'B N D'],
        context: jax.Array | None,
        mask: jax.Array | None,
        rng: Rng | None,
        train: bool,
    ) -> Float[Array, 'B N D']:
        """Apply the layer.

        Args:
            x: tokens.
            context: [B M C], what keys and values are made of, as it is; None: the normed tokens.
            mask: bool [B M] or [B N M] (queries, keys), or None.
            rng: of the layer; may be None where no dropout is on.
            train: whether dropout is on.
        """
        normed = self.normed(x)
        key, value = self.keys_and_values(normed if context is None else context)
        return self.attend(x, normed, key, value, mask, rng, train)

    def normed(self, x: Float[Array, 'B N D']) -> Float[Array, 'B N D']:
        """The tokens as queries, keys and values are made of them."""
        return self.attention_norm(x) if self.options.pre_norm else x

    def keys_and_values(
        self, context: Float[Array, 'B M C']
    ) -> tuple[Float[Array, 'B M heads kv'], Float[Array, 'B M heads kv']]:
        """Project a context."""
        return self.key(context), self.value(context)

    def attend(
        self,
        x: Float[Array, 'B N D'],
        normed: Float[Array, 'B N D'],
        key: Float[Array, 'B M heads kv'],
        value: Float[Array, 'B M heads kv'],
        mask: jax.Array | None,
        rng: Rng | None,
        train: bool,
    ) -> Float[Array, 'B N D']:
        """The rest of the layer, for keys and values that may be of several contexts.

        Args:
            x: tokens.
            normed: what `normed` made of them.
            key: of all contexts, end to end.
            value: likewise.
            mask: see `__call__`.
            rng: likewise.
            train: whether dropout is on.
        """
        options = self.options
        attended = attention_or_zero(
            self.query(normed),
            key,
            value,
            mask=mask,
            scale=options.head_width**-0.5,
            dropout=options.attention_dropout if train else 0.0,
            rng=rng,
            implementation=options.implementation,
        )  # [B N heads kv]
        attended = self._drop(self.out(attended), rng, 'attention', train)  # [B N D]
        x = x + (attended * _opened(self.attention_gate, x) if options.gated else attended)
        if not options.pre_norm:
            x = self.attention_norm(x)

        y = self.mlp_norm(x) if options.pre_norm else x
        # As in transformer.Block: `mlp` is split over the mesh between the two matrices.
        hidden = constrain(self.mlp_in(y), 'batch', 'length', 'mlp')
        hidden = ACTIVATIONS[options.activation](hidden)
        hidden = self._drop(hidden, rng, 'hidden', train, options.hidden_dropout)
        hidden = self._drop(self.mlp_out(hidden), rng, 'mlp', train)  # [B N D]
        x = x + (hidden * _opened(self.mlp_gate, x) if options.gated else hidden)
        if not options.pre_norm:
            x = self.mlp_norm(x)
        return constrain(x, 'batch', 'length', None)

    def _to_heads(self, width: int, spread: Spread) -> Projection:
        """A projection to queries, keys or values."""
        options = self.options
        return Projection(
            equation='...d,dhk->...hk',
            shape=(width, options.heads, options.head_width),
            axes=('embed', 'heads', 'kv'),
            spread=spread,
            bias=options.bias and options.qkv_bias,
            dtype=options.dtype,
        )

    def _drop(
        self, x: jax.Array, rng: Rng | None, site: str, train: bool, rate: float | None = None
    ) -> jax.Array:
        """Dropout with the random bits of a site, in training; rate None: that of all sites."""
        if not train or rng is None:
            return x
        return rng.at(site).dropout(x, self.options.dropout if rate is None else rate)


def _opened(gate: Float[Array, ''], x: jax.Array) -> jax.Array:
    """How far a gate is open, in the type of what goes through it."""
    return jnp.tanh(gate).astype(x.dtype)
