"""From a stream to tokens: patches, words, positions, DropToken. One front per kind of input, entries of FRONTS."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vatt_jax.models.layers import Dense, LayerNorm
from vatt_jax.parallel.sharding import logical
from vatt_jax.rng import Rng


@dataclasses.dataclass
class Tokens:
    """x [R N D], first the aggregate token; R = B, or B*K for text. mask bool [R N] or None. grid: token counts per axis.
    kept int32 [N'] or [B N']: which grid tokens DropToken left, or None."""

    x: Any
    mask: Any
    grid: tuple[int, ...]
    kept: Any = None


class Positions(nn.Module):
    """One learnt table per axis, summed, normalised, added, dropped out (VATT paper, section 3.2; official module: its own
    LayerNorm, and a dropout rate of its own). Tables of another size than the grid are resized by spline.

    transposed: places are numbered with the first axis fastest although tokens come with the last one fastest, so token i of a grid (T, F)
    gets the rows i mod T and i div T. The official spectrogram tower does this, and its released weights were trained with it.
    """

    sizes: tuple[int, ...]
    names: tuple[str, ...]
    width: int
    dropout: float = 0.1
    transposed: bool = False

    @nn.compact
    def __call__(self, x, grid, kept, rng: Rng, train: bool):
        """x [B N D]: the tokens of `kept` (None: all of the grid, in row-major order)."""
        init = jax.nn.initializers.truncated_normal(self.width**-0.5)
        total = 0.0
        for axis, (size, name, n) in enumerate(zip(self.sizes, self.names, grid, strict=True)):
            table = self.param(
                f'{name}_positions',
                logical(init, 'buckets', 'embed'),
                (size, self.width),
                jnp.float32,
            )
            if n != size:
                table = jnp.asarray(spline_matrix(size, n), jnp.float32) @ table
            shape = [1] * len(grid) + [self.width]
            shape[len(grid) - 1 - axis if self.transposed else axis] = n
            total = total + table.reshape(shape)
        total = LayerNorm(name='norm')(total.reshape(-1, self.width))
        if kept is not None:
            total = total[kept]
        x = x + total.astype(x.dtype)
        return rng.at('positions').dropout(x, self.dropout) if train else x


def spline_matrix(n: int, m: int) -> np.ndarray:
    """float64 [m n]: cubic polyharmonic spline through n rows at i/n, read at j/m (official `interpolate`: order 3 with a linear
    term, no regularisation). The interpolant is linear in the rows, so it is this matrix, whatever the table holds."""
    x, q = np.arange(n) / n, np.arange(m) / m
    cubic = lambda r: np.maximum(r * r, 1e-10) ** 1.5
    a, ones = cubic(np.abs(x[:, None] - x[None])), np.stack([x, np.ones(n)], 1)
    system = np.block([[a, ones], [ones.T, np.zeros((2, 2))]])
    weights = np.linalg.solve(system, np.concatenate([np.eye(n), np.zeros((2, n))]))
    return (
        np.concatenate([cubic(np.abs(q[:, None] - x[None])), np.stack([q, np.ones(m)], 1)], 1)
        @ weights
    )


class Patches(nn.Module):
    """Video, waveform or spectrogram: non-overlapping patches, DropToken, one matrix (the convolution with kernel = stride, VALID),
    positions, AGG.

    patch: size per axis. tables: rows of the position tables. drop_token: share of tokens dropped in training; the number kept comes
    from the tables, as in the official code. per_example: a permutation of its own for each clip instead of one for the batch; replicas > 1:
    one for each of so many equal parts of the batch, as on so many devices of the official code.
    projection: a further Dense + GELU per token (modality-agnostic). patch_init: factor on the initial matrix; 1 is official. The position
    codes have variance 1 from the start and the patches' projections a tenth of it or less, which a short run does not make up for.
    """

    patch: tuple[int, ...]
    tables: tuple[int, ...]
    names: tuple[str, ...]
    width: int
    drop_token: float = 0.0
    per_example: bool = False
    replicas: int = 1
    projection: bool = False
    position_dropout: float = 0.1
    transposed: bool = False
    patch_init: float = 1.0
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, data, rng: Rng, train: bool) -> Tokens:
        """data: [B T H W C], [B S] or [B T F]."""
        data = data[..., None] if data.ndim == len(self.patch) + 1 else data
        x, grid = fold(data, self.patch)
        kept = None
        count = int((1 - self.drop_token) * math.prod(self.tables))
        if train and self.drop_token and count < x.shape[1]:
            # What is dropped is never projected: tokens are independent until the encoder.
            kept = rng.at('drop_token').permutation(x.shape[1], self.per_example, self.replicas)[
                ..., :count
            ]
            x = jnp.take_along_axis(x, kept[..., None], 1) if kept.ndim == 2 else x[:, kept]
        x = Dense(
            self.width,
            ('patch', 'embed'),
            init_scale=self.patch_init,
            dtype=self.dtype,
            name='patch',
        )(x)
        if self.projection:
            x = jax.nn.gelu(
                Dense(self.width, ('embed', None), dtype=self.dtype, name='projection')(x),
                approximate=False,
            )
        positions = Positions(
            self.tables,
            self.names,
            self.width,
            self.position_dropout,
            self.transposed,
            name='positions',
        )
        return Tokens(
            prepend(self, 'agg', positions(x, grid, kept, rng, train), self.width), None, grid, kept
        )


def fold(data: jax.Array, patch: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """[B axes… C] -> ([B N patch·C] in row-major order of the grid, pixels in (axes…, C) order, grid). What does not fill a patch falls off."""
    grid = tuple(n // p for n, p in zip(data.shape[1:-1], patch, strict=True))
    b, c, k = data.shape[0], data.shape[-1], len(patch)
    data = data[(slice(None), *(slice(g * p) for g, p in zip(grid, patch)))]
    # Channels stay with the last axis: an array that ends in 16 × 3 takes ten times its size on a TPU, which pads the last axis to 128.
    inside = *patch[:-1], patch[-1] * c
    data = data.reshape(b, *(n for g, p in zip(grid, inside) for n in (g, p)))
    data = data.transpose(0, *range(1, 2 * k, 2), *range(2, 2 * k + 1, 2))
    return data.reshape(b, math.prod(grid), math.prod(inside)), grid


def prepend(module: nn.Module, name: str, x: jax.Array, width: int) -> jax.Array:
    """A learnt token before the others. As aggregate token it has no position and is never dropped."""
    # Official initialiser: glorot normal of a vector, which has fan in = fan out = its length.
    token = module.param(
        name, logical(jax.nn.initializers.normal(width**-0.5), 'embed'), (width,), jnp.float32
    )
    return jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, width)), x], 1)


def look_up(module: nn.Module, ids: jax.Array, vocab: int, width: int, frozen: bool) -> jax.Array:
    """ids [...] -> rows of the word table [... width]. frozen: no gradient reaches it (the official word2vec table)."""
    table = module.param(
        'word_table',
        logical(jax.nn.initializers.normal(width**-0.5), 'vocab', 'word'),
        (vocab, width),
        jnp.float32,
    )
    return (jax.lax.stop_gradient(table) if frozen else table)[ids]


class Words(nn.Module):
    """Word ids [R L] -> tokens: table, Dense + GELU, and what the kind of tower asks for:

    T5: aggregate token in word space before the Dense; relative positions are the encoder's. BERT, modality-agnostic: absolute positions (a
    table of `positions` rows), then the aggregate token. Official `bert_small` inherits T5's settings and has both (`extra`): a learnt
    token in word space that takes part in positions and counts as a word, then the aggregate token; its table is resized by spline.
    """

    vocab: int
    word_width: int
    width: int
    frozen: bool = True
    positions: int = 0  # rows of the absolute table; 0: T5
    bias: bool = False  # of the Dense
    extra: bool = False
    dropout: float = 0.0  # after the Dense (T5)
    position_dropout: float = 0.1
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, ids, rng: Rng, train: bool) -> Tokens:
        x = look_up(self, ids, self.vocab, self.word_width, self.frozen).astype(self.dtype)
        mask = ids != 0
        prefix = lambda mask: jnp.concatenate([jnp.ones_like(mask[:, :1]), mask], 1)
        if not self.positions or self.extra:
            x, mask = (
                prepend(self, 'word_agg' if self.extra else 'agg', x, self.word_width),
                prefix(mask),
            )
        x = jax.nn.gelu(
            Dense(
                self.width, ('word', 'embed'), bias=self.bias, dtype=self.dtype, name='projection'
            )(x),
            approximate=False,
        )
        x = rng.at('words').dropout(x, self.dropout) if train else x
        if not self.positions:
            return Tokens(x, mask, (x.shape[1] - 1,))
        grid = (x.shape[1],)
        x = Positions(
            (self.positions,), ('temporal',), self.width, self.position_dropout, name='positions'
        )(x, grid, None, rng, train)
        return Tokens(prepend(self, 'agg', x, self.width), prefix(mask), grid)


class LinearWords(nn.Module):
    """Word ids [R L] -> (pooled [R D], words [R L D]): each word through one matrix and ReLU, then the maximum over words, padding included
    (MMV's text tower and official VATT's `linear`, after MIL-NCE). valid and train are those of every net, and of no use here."""

    vocab: int = 1 << 16
    word_width: int = 300
    width: int = 2048
    frozen_words: bool = True
    init: str = 'glorot'  # entry of layers.INITS; MMV: fan_in
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, ids, valid=None, train: bool = False):
        x = look_up(self, ids, self.vocab, self.word_width, self.frozen_words).astype(self.dtype)
        x = jax.nn.relu(
            Dense(
                self.width, ('word', 'embed'), init=self.init, dtype=self.dtype, name='projection'
            )(x)
        )
        return x.max(1), x
