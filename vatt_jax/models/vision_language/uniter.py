"""UNITER (Chen et al. 2020): words and regions end to end, in the one stream of a BERT."""

from __future__ import annotations

from typing import Any

import flax
import flax.linen as nn
import jax.numpy as jnp

from vatt_jax.inputs.regions import Regions, Words
from vatt_jax.models.fusion.blocks import CrossBlock
from vatt_jax.models.vision_language.embeddings import NormedRegions, TextEmbeddings
from vatt_jax.models.vision_language.heads import Classifier, Tied, dense
from vatt_jax.models.vision_language.sizes import UniterSizes, block_options
from vatt_jax.rng import Rng


@flax.struct.dataclass
class UniterEncoded:
    """What words and regions become.

    Attributes:
        words: [B L D].
        regions: [B N D].
        pooled: [B D], of [CLS].
    """

    # Any: JAX rebuilds this tree with other things than arrays as leaves.
    words: Any
    regions: Any
    pooled: Any


@flax.struct.dataclass
class UniterOutputs:
    """What is told of a pair.

    Attributes:
        encoded: UniterEncoded.
        word_logits: [B L vocabulary].
        region_features: [B N F].
        region_logits: [B N classes].
        match_logits: [B 2], of a pair that does not match (0) and of one that does (1).
    """

    encoded: Any
    word_logits: Any
    region_features: Any
    region_logits: Any
    match_logits: Any


class Uniter(nn.Module):
    """UNITER with the heads of its pretraining.

    Attributes:
        sizes: of all parts.
        implementation: of attention, see `attention.IMPLEMENTATIONS`.
        dtype: to compute in.
    """

    sizes: UniterSizes
    implementation: str = 'dense'
    dtype: str = 'float32'

    def setup(self) -> None:
        sizes, dtype = self.sizes, self.dtype
        width = sizes.layers.width
        self.text_embeddings = TextEmbeddings(
            width=width,
            vocabulary=sizes.vocabulary,
            positions=sizes.positions,
            types=sizes.types,
            dropout=sizes.dropout,
            dtype=dtype,
        )
        self.region_embeddings = NormedRegions(width, sizes.feature_width, sizes.dropout, dtype)
        options = block_options(sizes.layers, sizes, self.implementation, dtype)
        self.layer = [CrossBlock(width, options) for _ in range(sizes.layers.count)]
        self.pooler = dense(width, dtype)
        self.word_head = Tied(width, sizes.vocabulary, sizes.activation, dtype)
        # The released heads of regions have GELU whatever the layers have.
        self.feature_head = Tied(width, sizes.feature_width, 'gelu', dtype)
        self.class_head = Classifier(width, sizes.classes, 'gelu', dtype)
        self.match_head = dense(2, dtype)

    def __call__(self, words: Words, regions: Regions, rng: Rng, train: bool) -> UniterOutputs:
        """Tell everything of B pairs; what is not read of it is not computed under jit.

        Args:
            words: of each pair, [CLS] first.
            regions: of each pair, boxes of 7 numbers.
            rng: of the batch.
            train: whether dropout is on.
        """
        return self.tell(self.encode(words, regions, rng, train))

    def tell(self, encoded: UniterEncoded) -> UniterOutputs:
        """What the heads say of pairs that `encode` has read."""
        return UniterOutputs(
            encoded=encoded,
            word_logits=self.word_head(encoded.words, self.text_embeddings.word_table),
            region_features=self.feature_head(
                encoded.regions, self.region_embeddings.feature_kernel()
            ),
            region_logits=self.class_head(encoded.regions),
            match_logits=self.match_head(encoded.pooled),
        )

    def encode(self, words: Words, regions: Regions, rng: Rng, train: bool) -> UniterEncoded:
        """Words and regions after all layers; arguments as those of `__call__`."""
        length = words.ids.shape[1]
        types = jnp.ones(regions.mask.shape, jnp.int32)
        if regions.types is not None:
            types = jnp.asarray(regions.types)
        type_vectors = self.text_embeddings.type_vectors(types)
        x = jnp.concatenate(
            [
                self.text_embeddings(words, rng, train),
                self.region_embeddings(regions, type_vectors, rng, train),
            ],
            axis=1,
        )
        # The release moves all padding to the end; a mask of keys gives the same at real tokens.
        mask = jnp.concatenate([words.mask, regions.mask], axis=1)
        for number, layer in enumerate(self.layer):
            x = layer(x, None, mask, rng.at(number), train)
        pooled = nn.tanh(self.pooler(x[:, 0]))
        return UniterEncoded(words=x[:, :length], regions=x[:, length:], pooled=pooled)
