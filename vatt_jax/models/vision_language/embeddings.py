"""From words and regions to the tokens of ViLBERT and UNITER."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Float, Int

from vatt_jax.inputs.regions import Regions, Words
from vatt_jax.models.layers import Dense, LayerNorm
from vatt_jax.models.vision_language.sizes import EPS
from vatt_jax.parallel.sharding import logical
from vatt_jax.rng import Rng

# BERT's, of all kernels and tables.
INIT = jax.nn.initializers.normal(0.02)


def table_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A table whose row 0 is zero."""
    return INIT(key, shape, dtype).at[0].set(0)


class TextEmbeddings(nn.Module):
    """drop(norm(word + position + segment)), as in BERT.

    Attributes:
        width: D.
        vocabulary: rows of the word table.
        positions: rows of the position table.
        types: rows of the table of segments.
        dropout: rate.
        dtype: to compute in.
    """

    width: int
    vocabulary: int
    positions: int
    types: int
    dropout: float
    dtype: str = 'float32'

    def setup(self) -> None:
        words = logical(INIT, 'vocab', 'embed')
        rows = logical(INIT, 'buckets', 'embed')
        self.word_table = self.param(
            'word_table', words, (self.vocabulary, self.width), jnp.float32
        )
        self.position_table = self.param(
            'position_table', rows, (self.positions, self.width), jnp.float32
        )
        self.type_table = self.param('type_table', rows, (self.types, self.width), jnp.float32)
        self.norm = LayerNorm(eps=EPS)

    def __call__(self, words: Words, rng: Rng, train: bool) -> Float[Array, 'B L D']:
        """Embed sentences.

        Args:
            words: of B sentences.
            rng: of the batch.
            train: whether dropout is on.

        Raises:
            ValueError: they are longer than the position table.
        """
        length = words.ids.shape[1]
        if length > self.positions:
            raise ValueError(f'words: expected at most {self.positions} of them, got {length}')
        types = jnp.zeros_like(words.ids) if words.types is None else jnp.asarray(words.types)
        # A number beyond the table is NaN, not another word.
        x = jnp.take(self.word_table, words.ids, axis=0) + self.position_table[:length]
        x = self.norm(x + self.type_vectors(types)).astype(self.dtype)
        return rng.at('words').dropout(x, self.dropout) if train else x

    def type_vectors(self, types: Int[Array, 'B N']) -> Float[Array, 'B N D']:
        """The vectors of segments, which UNITER's regions have of the same table."""
        return jnp.take(self.type_table, types, axis=0)


class SummedRegions(nn.Module):
    """ViLBERT's: drop(norm(W_f · feature + W_b · box)).

    Attributes:
        width: D.
        dropout: rate.
        dtype: to compute in.
    """

    width: int
    dropout: float
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, regions: Regions, rng: Rng, train: bool) -> Float[Array, 'B N D']:
        """Embed regions."""
        features = to_width(self.width, self.dtype, 'features')(regions.features)
        boxes = to_width(self.width, self.dtype, 'boxes')(regions.boxes)
        x = LayerNorm(eps=EPS, name='norm')(features + boxes)
        return rng.at('regions').dropout(x, self.dropout) if train else x


class NormedRegions(nn.Module):
    """UNITER's: drop(norm(norm(W_f · feature) + norm(W_b · box) + segment)).

    To the zeros of a hidden region a learnt vector is added, before W_f: row 1 of `mask_table`,
    whose row 0 the release holds at zero.

    Attributes:
        width: D.
        feature_width: of a region's feature.
        dropout: rate.
        dtype: to compute in.
    """

    width: int
    feature_width: int
    dropout: float
    dtype: str = 'float32'

    def setup(self) -> None:
        init = logical(table_init, None, None)
        self.mask_table = self.param('mask_table', init, (2, self.feature_width), jnp.float32)
        self.features = to_width(self.width, self.dtype)
        self.features_norm = LayerNorm(eps=EPS)
        self.boxes = to_width(self.width, self.dtype)
        self.boxes_norm = LayerNorm(eps=EPS)
        self.norm = LayerNorm(eps=EPS)

    def __call__(
        self, regions: Regions, types: Float[Array, 'B N D'], rng: Rng, train: bool
    ) -> Float[Array, 'B N D']:
        """Embed regions.

        Args:
            regions: of B pictures.
            types: the vector of each one's segment.
            rng: of the batch.
            train: whether dropout is on.
        """
        features = jnp.asarray(regions.features)
        if regions.is_hidden is not None:
            is_hidden = jnp.asarray(regions.is_hidden)[..., None]
            features = features + jnp.where(is_hidden, self.mask_table[1], 0)
        x = self.features_norm(self.features(features)) + self.boxes_norm(self.boxes(regions.boxes))
        x = self.norm(x + types.astype(x.dtype))
        return rng.at('regions').dropout(x, self.dropout) if train else x

    def feature_kernel(self) -> Float[Array, 'F D']:
        """W_f, by which UNITER's feature regression leaves again."""
        return meta.unbox(self.features.variables['params'])['kernel']


def to_width(width: int, dtype: str, name: str | None = None) -> Dense:
    """A dense layer from what a region has to the width of tokens."""
    return Dense(width, (None, 'embed'), init='bert', dtype=dtype, name=name)
