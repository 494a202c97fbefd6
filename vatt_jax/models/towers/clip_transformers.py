"""What CLIP's and SigLIP's transformers have besides the layers: pictures and sentences to tokens.

CLIP (Radford et al. 2021) reads a picture at a class token and a sentence at its end token; SigLIP
(Zhai et al. 2023) at a learnt query and at the last token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vatt_jax.models.attention import attention
from vatt_jax.models.embeddings import Tokens, append, fold, look_up
from vatt_jax.models.layers import ACTIVATIONS, Dense, LayerNorm
from vatt_jax.models.transformer import Encoder
from vatt_jax.parallel.sharding import logical
from vatt_jax.rng import Rng

# Which token of a sentence is its vector. end: that of the largest number, CLIP's end token.
# last_word: the last that is not padding. last: the last of the row (SigLIP).
TEXT_POOLS = ('end', 'last_word', 'last')
# class: a learnt token before the patches (CLIP). map: AttentionPooling (SigLIP).
PICTURE_POOLS = ('class', 'map')


class PictureTokens(nn.Module):
    """Pictures to tokens: patches, one matrix, a class token, positions, a norm.

    Every frame of a clip is a picture by itself.

    Attributes:
        patch: side of a patch in pixels.
        table: rows and columns of the position table. Grids of another size read it resized
            (bicubic, antialiased), as open_clip resizes it.
        width: D.
        class_token: whether there is one. It has a position of its own and is never dropped.
        norm: whether tokens are normalised before the layers (CLIP's `ln_pre`).
        eps: of that norm.
        bias: whether the patches' matrix has one (SigLIP).
        drop_token: share of the patches dropped in training, without a trace (FLIP, Li et al.
            2023).
        per_example: whether each picture drops patches of its own, else one choice for the batch.
        dtype: of activations.
    """

    patch: int
    table: tuple[int, int]
    width: int
    class_token: bool = True
    norm: bool = True
    eps: float = 1e-5
    bias: bool = False
    drop_token: float = 0.0
    per_example: bool = True
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self,
        data: Float[Array, 'B T H W 3'],
        rng: Rng,
        train: bool,
        extra: jax.Array | None = None,
    ) -> Tokens:
        """Turn every frame into tokens [B·T N D]; `frames` of the result is T.

        Further tokens, `extra` [B·T K D], come last and are normalised with the others.
        """
        num_frames = data.shape[1]
        pictures = data.reshape(-1, *data.shape[2:])  # [R H W 3], R = B·T
        x, grid = fold(pictures, (self.patch, self.patch))  # [R N patch·patch·3]
        num_patches = x.shape[1]
        positions = self._positions((grid[0], grid[1]))  # [1+N D], without a class token [N D]
        class_position = positions[:-num_patches]
        positions = positions[-num_patches:]
        kept = None
        num_kept = int((1 - self.drop_token) * num_patches)
        if train and num_kept < num_patches:
            # What is dropped is never projected: tokens are independent until the encoder.
            order = (
                rng.repeat(num_frames).at('drop_token').permutation(num_patches, self.per_example)
            )
            kept = order[..., :num_kept]  # [N'] or [R N']
            positions = positions[kept]
            x = jnp.take_along_axis(x, kept[..., None], 1) if kept.ndim == 2 else x[:, kept]
        patches = Dense(
            self.width,
            ('patch', 'embed'),
            bias=self.bias,
            init='torch',
            dtype=self.dtype,
            name='patch',
        )
        x = patches(x) + positions.astype(self.dtype)  # [R N' D]
        if self.class_token:
            x = self._prepend_class_token(x, class_position)
        x = append(x, extra)
        if self.norm:
            x = LayerNorm(eps=self.eps, name='norm')(x)
        return Tokens(x, None, (num_frames, *grid), kept, frames=num_frames)

    def _positions(self, grid: tuple[int, int]) -> Float[Array, 'N D']:
        """Positions of the class token, where there is one, and of the grid row by row."""
        num_class_tokens = int(self.class_token)
        init = logical(jax.nn.initializers.normal(self.width**-0.5), 'buckets', 'embed')
        num_rows = num_class_tokens + math.prod(self.table)
        table = self.param('position_table', init, (num_rows, self.width), jnp.float32)
        if grid == self.table:
            return table
        squares = table[num_class_tokens:].reshape(*self.table, self.width)
        resized = jax.image.resize(squares, (*grid, self.width), 'bicubic')
        return jnp.concatenate([table[:num_class_tokens], resized.reshape(-1, self.width)])

    def _prepend_class_token(
        self, x: Float[Array, 'R N D'], position: Float[Array, '1 D']
    ) -> Float[Array, 'R M D']:
        init = logical(jax.nn.initializers.normal(self.width**-0.5), 'embed')
        token = self.param('class_token', init, (self.width,), jnp.float32)
        repeated = jnp.broadcast_to((token + position).astype(x.dtype), (len(x), 1, self.width))
        return jnp.concatenate([repeated, x], axis=1)


class SentenceTokens(nn.Module):
    """Numbers of words [R L] to tokens: a table, and positions.

    No token is masked: CLIP's end token sees none of the padding behind it, and SigLIP was trained
    to see it.

    Attributes:
        vocab: rows of the word table.
        context: rows of the position table; shorter sentences use the first of them.
        width: D.
        pool: entry of TEXT_POOLS.
        spreads: deviation of the initial words and of the initial positions.
        dtype: of activations.
    """

    vocab: int
    context: int
    width: int
    pool: str = 'end'
    spreads: tuple[float, float] = (0.02, 0.01)
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, 'R L'],
        rng: Rng,
        train: bool,
        arrange: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    ) -> Tokens:
        """Turn sentences into tokens.

        Args:
            ids: numbers of words.
            rng: of the sentences.
            train: whether the model trains; nothing depends on it.
            arrange: (words [R L D], which is read [R]) -> the same of other words.
        """
        word_spread, position_spread = self.spreads
        x = look_up(self, ids, self.vocab, self.width, frozen=False, spread=word_spread)
        read, words = self._column(ids), ids != 0  # 0 is padding
        if arrange is not None:
            x, read = arrange(x, read)
            words = jnp.arange(ids.shape[1]) <= read[:, None]
        init = logical(jax.nn.initializers.normal(position_spread), 'buckets', 'embed')
        shape = (self.context, self.width)
        positions = self.param('position_table', init, shape, jnp.float32)
        x = (x + positions[: ids.shape[1]]).astype(self.dtype)
        return Tokens(x, None, (ids.shape[1],), read=read, words=words)

    def _column(self, ids: Int[Array, 'R L']) -> Int[Array, ' R']:
        """The token of each sentence that stands for it."""
        if self.pool == 'end':
            return jnp.argmax(ids, axis=-1)
        last = ids.shape[1] - 1
        if self.pool == 'last':
            return jnp.full(len(ids), last)
        # Of a sentence of padding alone the last token.
        return last - jnp.argmax(ids[:, ::-1] != 0, axis=-1)


class AttentionPooling(nn.Module):
    """Tokens [R N D] -> [R D]: a learnt query attends to them; then a feed-forward part.

    SigLIP's head of pictures (Zhai et al. 2022, "Scaling vision transformers").

    Attributes:
        width: D.
        mlp: hidden width of the feed-forward part.
        heads: of the attention; each has D / heads of the width.
        eps: of its norm.
        activation: entry of layers.ACTIVATIONS.
        dtype: of activations.
    """

    width: int
    mlp: int
    heads: int
    eps: float = 1e-6
    activation: str = 'gelu_tanh'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x: Float[Array, 'R N D']) -> Float[Array, 'R D']:
        head_width = self.width // self.heads
        init = logical(jax.nn.initializers.glorot_uniform(), None, 'embed')
        probe = self.param('probe', init, (1, self.width), jnp.float32)
        probe = jnp.broadcast_to(probe.astype(self.dtype), (len(x), 1, self.width))
        heads = (self.heads, head_width)
        query = self._dense('query', ('embed', 'heads'))(probe).reshape(*probe.shape[:2], *heads)
        key = self._dense('key', ('embed', 'heads'))(x).reshape(*x.shape[:2], *heads)
        value = self._dense('value', ('embed', 'heads'))(x).reshape(*x.shape[:2], *heads)
        attended = attention(query, key, value, scale=head_width**-0.5)  # [R 1 heads kv]
        y = self._dense('out', ('heads', 'embed'))(attended.reshape(len(x), self.width))  # [R D]
        hidden = LayerNorm(eps=self.eps, name='norm')(y)
        hidden = Dense(self.mlp, ('embed', 'mlp'), dtype=self.dtype, name='mlp_in')(hidden)
        hidden = ACTIVATIONS[self.activation](hidden)
        return y + Dense(self.width, ('mlp', 'embed'), dtype=self.dtype, name='mlp_out')(hidden)

    def _dense(self, name: str, axes: tuple[str, str]) -> Dense:
        """One of the four projections of the attention."""
        return Dense(self.width, axes, dtype=self.dtype, name=name)


class FrameMixing(nn.Module):
    """Vectors of a clip's frames [B T D] -> [B D]: the mean after layers over frames.

    CLIP4Clip's sequential transformer (Luo et al. 2021, section 3.3): learnt positions, layers as
    CLIP's, and each frame's own vector added to what comes out. Here that is scaled by a gate which
    begins at 0, so that a clip begins as the mean of its frames, in whose space others may be.
    There is no dropout.

    Attributes:
        layers: of the transformer.
        width: D.
        mlp: hidden width of the feed-forward part.
        heads: of the attention.
        head_width: of each.
        frames: T, rows of the position table.
        eps: of all norms.
        activation: entry of layers.ACTIVATIONS.
        dtype: of activations.
    """

    layers: int
    width: int
    mlp: int
    heads: int
    head_width: int
    frames: int
    eps: float = 1e-5
    activation: str = 'quick_gelu'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B D']:
        init = logical(jax.nn.initializers.normal(0.01), 'buckets', 'embed')
        positions = self.param('position_table', init, (self.frames, self.width), jnp.float32)
        gate = self.param('gate', logical(jax.nn.initializers.zeros), (), jnp.float32)
        layers = Encoder(
            layers=self.layers,
            width=self.width,
            mlp=self.mlp,
            heads=self.heads,
            head_width=self.head_width,
            dropout=0.0,
            attention_dropout=0.0,
            eps=self.eps,
            activation=self.activation,
            kernel_init='clip',
            dtype=self.dtype,
            name='encoder',
        )
        nothing_drawn = Rng.create(0, 0, jnp.zeros(len(x), jnp.uint32))
        mixed = layers(x + positions.astype(x.dtype), None, nothing_drawn, False, features=True)
        return (x + gate.astype(x.dtype) * mixed).mean(1)
