"""From a stream to tokens: patches, words, positions, DropToken.

One front for each kind of input.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vatt_jax.models.layers import Dense, LayerNorm
from vatt_jax.parallel.sharding import logical
from vatt_jax.rng import Rng


@dataclasses.dataclass
class Tokens:
    """Tokens of a stream.

    Attributes:
        x: [R N D], the aggregate token first; R = B, or B·K for text.
        mask: bool [R N], or None where all tokens are real.
        grid: number of tokens along each axis.
        kept: int32 [N'] or [B N'], which grid tokens DropToken left, or None.
        read: int32 [R], the token of each row that is its vector, where there is no aggregate one.
        words: bool [R N], which tokens are words, where attention sees the others as well.
        frames: pictures of a clip that are rows of their own: R = B·frames.
    """

    x: Any
    mask: Any
    grid: tuple[int, ...]
    kept: Any = None
    read: Any = None
    words: Any = None
    frames: int = 1


# Collection of scalars, one for each position table, whose "gradients" `spread_counting` makes.
LOOKUP_PROBES = 'lookup_probes'


class Positions(nn.Module):
    """One learnt table for each axis, summed, normalised, added, dropped out.

    As in the VATT paper; the official module has its own LayerNorm, and a dropout rate of its
    own. Tables of another size than the grid are resized by spline.

    Attributes:
        sizes: rows of each table.
        names: of the axes.
        width: D.
        dropout: rate, after the positions were added.
        transposed: whether tokens are numbered with the first axis fastest although they come with
            the last one fastest, so that token i of a grid (T, F) gets the rows i mod T and
            i div T. The official spectrogram tower does this, and its released weights were trained
            with it.
    """

    sizes: tuple[int, ...]
    names: tuple[str, ...]
    width: int
    dropout: float = 0.1
    transposed: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B N D'],
        grid: tuple[int, ...],
        kept: Any,
        rng: Rng,
        train: bool,
    ) -> Float[Array, 'B N D']:
        """Add positions to tokens.

        Args:
            x: tokens.
            grid: number of tokens along each axis.
            kept: which grid tokens these are; None: all of the grid, in row-major order.
            rng: of the tokens' rows.
            train: whether dropout is on.
        """
        init = jax.nn.initializers.truncated_normal(self.width**-0.5)
        # One table for each axis: T + H + W rows instead of T·H·W.
        positions: Any = 0.0
        for axis, (size, name, length) in enumerate(zip(self.sizes, self.names, grid, strict=True)):
            table = self.param(
                f'{name}_positions',
                logical(init, 'buckets', 'embed'),
                (size, self.width),
                jnp.float32,
            )
            if length != size:
                table = jnp.asarray(spline_matrix(size, length), jnp.float32) @ table
            # Broadcast over the other axes of the grid.
            table_axis = len(grid) - 1 - axis if self.transposed else axis
            collection, field = LOOKUP_PROBES, f'{name}_positions'
            # A resized table is looked up after the resize, and its own gradient is dense.
            if length == size and self.has_variable(collection, field):
                probe: jax.Array = self.get_variable(collection, field)
                rows = spread_counting(table, probe, table_axis, tuple(grid))
            else:
                rows = table.reshape(_spread_shape(table_axis, len(grid), length, self.width))
            positions = positions + rows
        # Normalised row by row, so it does not matter that tokens are selected only after it.
        positions = LayerNorm(name='norm')(positions.reshape(-1, self.width))  # [N D]
        if kept is not None:
            positions = positions[kept]  # [N' D] or [B N' D]
        x = x + positions.astype(x.dtype)
        if not train:
            return x
        return rng.at('positions').dropout(x, self.dropout)


def _spread_shape(axis: int, num_axes: int, length: int, width: int) -> list[int]:
    """Return the shape in which a table [length width] lies along one axis of a grid."""
    shape = [1] * num_axes + [width]
    shape[axis] = length
    return shape


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def spread_counting(
    table: Float[Array, 'L D'], probe: Float[Array, ''], axis: int, grid: tuple[int, ...]
) -> Float[Array, '... D']:
    """Look up the row of each token of a grid, with a second norm of the gradient.

    TensorFlow keeps the gradient of a looked-up table as IndexedSlices, one row for each lookup,
    and its global norm squares these before tokens that share a row are summed. The "gradient" of
    `probe` is by how much that exceeds the squared norm of the true gradient:

        Σ over tokens |g_token|²  -  Σ over rows |Σ over tokens of the row g_token|²

    Args:
        table: rows.
        probe: any scalar; no value depends on it.
        axis: of the grid, along which the rows lie.
        grid: tokens along each axis.

    Returns:
        [*grid D].
    """
    del probe
    shape = _spread_shape(axis, len(grid), *table.shape)
    return jnp.broadcast_to(table.reshape(shape), (*grid, table.shape[1]))


def _spread_forward(
    table: jax.Array, probe: jax.Array, axis: int, grid: tuple[int, ...]
) -> tuple[jax.Array, None]:
    return spread_counting(table, probe, axis, grid), None


def _spread_backward(
    axis: int, grid: tuple[int, ...], _: None, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    others = tuple(other for other in range(len(grid)) if other != axis)
    table_grad = grad.sum(others)  # [L D]
    excess = jnp.sum(jnp.square(grad)) - jnp.sum(jnp.square(table_grad))
    return table_grad, excess


spread_counting.defvjp(_spread_forward, _spread_backward)


def spline_matrix(n: int, m: int) -> Float[np.ndarray, 'M N']:
    """The matrix that resizes a table of n rows to m rows by a cubic polyharmonic spline.

    The spline goes through n rows at i/n and is read at j/m (official `interpolate`: order 3 with a
    linear term, no regularisation). The interpolant is linear in the rows, so it is this matrix,
    whatever the table holds:

        [Φ(q - x)  q  1] · [Φ(x - x')  x  1; (x 1)ᵀ  0]⁻¹ · [I; 0],   Φ(r) = |r|³
    """
    # NumPy in float64: this runs while the program is traced, which holds the result as a constant.
    knots = np.arange(n) / n
    queries = np.arange(m) / m
    kernel = _cubic(np.abs(knots[:, None] - knots[None]))  # [n n]
    linear = np.stack([knots, np.ones(n)], axis=1)  # [n 2]
    # The two last rows make the weights of Φ orthogonal to lines, which fixes the linear term.
    system = np.block([[kernel, linear], [linear.T, np.zeros((2, 2))]])
    values = np.concatenate([np.eye(n), np.zeros((2, n))])
    weights = np.linalg.solve(system, values)  # [n+2 n]
    query_kernel = _cubic(np.abs(queries[:, None] - knots[None]))  # [m n]
    query_linear = np.stack([queries, np.ones(m)], axis=1)  # [m 2]
    return np.concatenate([query_kernel, query_linear], axis=1) @ weights


def _cubic(distance: np.ndarray) -> np.ndarray:
    """|r|³, with the floor of the official code."""
    return np.maximum(distance * distance, 1e-10) ** 1.5


class Patches(nn.Module):
    """Video, waveform or spectrogram to tokens.

    Non-overlapping patches, DropToken, one matrix (the convolution with kernel = stride, VALID),
    positions, aggregate token.

    Attributes:
        patch: size along each axis.
        tables: rows of the position tables.
        names: of the axes.
        width: D.
        drop_token: share of tokens dropped in training. How many stay follows from the tables, as
            in the official code.
        per_example: whether each clip has a permutation of its own instead of one for the batch.
        replicas: if above 1, there is one permutation for each of so many equal parts of the batch,
            as on so many devices of the official code.
        projection: whether there is a further Dense + GELU for each token (modality-agnostic).
        position_dropout: rate.
        transposed: see Positions.
        patch_init: factor on the initial matrix; 1 is official. The position codes have variance 1
            from the start and the patches' projections a tenth of it or less, which a short run
            does not make up for.
        dtype: of activations.
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
    def __call__(
        self,
        data: jax.Array,
        rng: Rng,
        train: bool,
        extra: jax.Array | None = None,
        keep: jax.Array | None = None,
    ) -> Tokens:
        """Turn data, [B T H W C], [B S] or [B T F], into tokens.

        Args:
            data: of the stream.
            rng: of its rows.
            train: whether DropToken and dropout are on.
            extra: further tokens [B K D], which come last.
            keep: int32 [B N'], the tokens of the grid that are there, in the place of DropToken's.
        """
        has_channels = data.ndim != len(self.patch) + 1
        x, grid = fold(data if has_channels else data[..., None], self.patch)
        num_patches = x.shape[1]
        # From the tables: with inputs of another size, as many stay as the official code leaves.
        num_kept = int((1 - self.drop_token) * math.prod(self.tables))
        kept = keep
        if keep is None and train and self.drop_token and num_kept < num_patches:
            order = rng.at('drop_token').permutation(num_patches, self.per_example, self.replicas)
            kept = order[..., :num_kept]  # [N'] or [B N']
        if kept is not None:
            # What is dropped is never projected: tokens are independent until the encoder.
            x = jnp.take_along_axis(x, kept[..., None], 1) if kept.ndim == 2 else x[:, kept]
        x = Dense(
            self.width,
            ('patch', 'embed'),
            init_scale=self.patch_init,
            dtype=self.dtype,
            name='patch',
        )(x)  # [B N D]
        if self.projection:
            x = Dense(self.width, ('embed', None), dtype=self.dtype, name='projection')(x)
            # The exact GELU is TensorFlow's default; JAX's is the tanh approximation.
            x = jax.nn.gelu(x, approximate=False)
        positions = Positions(
            self.tables,
            self.names,
            self.width,
            self.position_dropout,
            self.transposed,
            name='positions',
        )
        x = positions(x, grid, kept, rng, train)
        x = prepend(self, 'agg', x, self.width)
        x = append(x, extra)
        return Tokens(x, None, grid, kept)  # x [B 1+N' D]


def fold(data: jax.Array, patch: Sequence[int]) -> tuple[jax.Array, tuple[int, ...]]:
    """Cut an array into patches. What does not fill a patch at the end of an axis is left out.

    Args:
        data: [B axes… C].
        patch: size along each axis.

    Returns:
        The patches [B N patch·C], in row-major order of the grid, pixels in the order (axes…, C);
        and the grid.
    """
    batch_size, *lengths, channels = data.shape
    grid = tuple(length // size for length, size in zip(lengths, patch, strict=True))
    covered = tuple(slice(count * size) for count, size in zip(grid, patch))
    data = data[(slice(None), *covered)]

    # Channels stay with the last axis: an array that ends in 16 × 3 takes ten times its size on a
    # TPU, which pads the last axis to 128.
    cell = (*patch[:-1], patch[-1] * channels)
    split_shape: list[int] = []
    for count, size in zip(grid, cell):
        split_shape += [count, size]
    data = data.reshape(batch_size, *split_shape)  # [B grid_0 cell_0 grid_1 cell_1 …]
    num_axes = len(patch)
    grid_axes = range(1, 2 * num_axes, 2)
    cell_axes = range(2, 2 * num_axes + 1, 2)
    data = data.transpose(0, *grid_axes, *cell_axes)
    return data.reshape(batch_size, math.prod(grid), math.prod(cell)), grid


def prepend(
    module: nn.Module, name: str, x: Float[Array, 'R N D'], width: int
) -> Float[Array, 'R M D']:
    """Put a learnt token before the others.

    As aggregate token it has no position and is never dropped.

    Args:
        module: whose parameter the token is.
        name: of the parameter.
        x: the others.
        width: D.
    """
    # Official initialiser: glorot normal of a vector, which has fan in = fan out = its length.
    init = logical(jax.nn.initializers.normal(width**-0.5), 'embed')
    token = module.param(name, init, (width,), jnp.float32)
    repeated = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, width))
    return jnp.concatenate([repeated, x], axis=1)


def append(x: Float[Array, 'R N D'], extra: jax.Array | None) -> Float[Array, 'R M D']:
    """Put further tokens [R K D] behind the others, if there are some."""
    if extra is None:
        return x
    return jnp.concatenate([x, extra.astype(x.dtype)], axis=1)


def look_up(
    module: nn.Module,
    ids: jax.Array,
    vocab: int,
    width: int,
    frozen: bool,
    spread: float = 0.0,
) -> jax.Array:
    """Rows of the word table, ids [...] -> [... width].

    Args:
        module: whose parameter the table is.
        ids: of words.
        vocab: number of rows.
        width: of the table.
        frozen: whether no gradient reaches the table (the official word2vec table).
        spread: deviation of the initial table; 0: width^-1/2.
    """
    deviation = spread or width**-0.5
    init = logical(jax.nn.initializers.normal(deviation), 'vocab', 'word')
    table = module.param('word_table', init, (vocab, width), jnp.float32)
    if frozen:
        table = jax.lax.stop_gradient(table)  # its gradient is zero, not absent
    return table[ids]


class Words(nn.Module):
    """Word ids [R L] to tokens: a table, Dense + GELU, and what the kind of tower needs.

    - T5: the aggregate token in word space, before the Dense; relative positions are the encoder's.
    - BERT and modality-agnostic: absolute positions (a table of `positions` rows), then the
      aggregate token.
    - Official `bert_small` inherits T5's settings and has both (`extra`): a learnt token in word
      space that takes part in positions and counts as a word, then the aggregate token; its table
      is resized by spline.

    Attributes:
        vocab: rows of the word table.
        word_width: of the word table.
        width: D.
        frozen: whether the word table is not trained.
        positions: rows of the table of absolute positions; 0: T5.
        bias: whether the Dense has one.
        extra: whether there is the token of `bert_small`.
        dropout: rate after the Dense (T5).
        position_dropout: rate after the positions.
        dtype: of activations.
    """

    vocab: int
    word_width: int
    width: int
    frozen: bool = True
    positions: int = 0
    bias: bool = False
    extra: bool = False
    dropout: float = 0.0
    position_dropout: float = 0.1
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, ids: jax.Array, rng: Rng, train: bool) -> Tokens:
        x = look_up(self, ids, self.vocab, self.word_width, self.frozen).astype(self.dtype)
        mask = ids != 0  # [R L]; 0 is padding
        if not self.positions or self.extra:
            x = prepend(self, 'word_agg' if self.extra else 'agg', x, self.word_width)
            mask = _prepend_true(mask)
        projection = Dense(
            self.width, ('word', 'embed'), bias=self.bias, dtype=self.dtype, name='projection'
        )
        x = jax.nn.gelu(projection(x), approximate=False)  # [R N D]
        if train:
            x = rng.at('words').dropout(x, self.dropout)
        if not self.positions:
            return Tokens(x, mask, (x.shape[1] - 1,))  # the grid leaves the aggregate out

        grid = (x.shape[1],)
        positions = Positions(
            (self.positions,), ('temporal',), self.width, self.position_dropout, name='positions'
        )
        x = positions(x, grid, None, rng, train)
        x = prepend(self, 'agg', x, self.width)
        return Tokens(x, _prepend_true(mask), grid)


def _prepend_true(mask: jax.Array) -> jax.Array:
    """The mask [R N] with a token before the others."""
    return jnp.concatenate([jnp.ones_like(mask[:, :1]), mask], axis=1)


class LinearWords(nn.Module):
    """Word ids [R L] -> (pooled [R D], words [R L D]).

    Each word goes through one matrix and ReLU; then the maximum over words is taken, padding
    included (MMV's text tower and official VATT's `linear`, after MIL-NCE).

    Attributes:
        init: entry of layers.INITS; MMV: fan_in.

    The other attributes are those of `Words`.
    """

    vocab: int = 1 << 16
    word_width: int = 300
    width: int = 2048
    frozen_words: bool = True
    init: str = 'glorot'  # type: ignore[assignment]  # no one calls Module.init of this
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, ids: jax.Array, valid: Any = None, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Encode sentences; valid and train are arguments of every net and not read here."""
        x = look_up(self, ids, self.vocab, self.word_width, self.frozen_words).astype(self.dtype)
        projection = Dense(
            self.width, ('word', 'embed'), init=self.init, dtype=self.dtype, name='projection'
        )
        x = jax.nn.relu(projection(x))
        return x.max(1), x  # [R D], [R L D]
