"""ViLBERT (Lu, Batra, Parikh and Lee 2019): two streams that attend to each other late.

Words go through the layers of BERT, regions through layers of another width. Before some layers
stands a co-attention: each stream's queries, the other one's keys and values.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax
import flax.linen as nn
import jax
from jaxtyping import Array, Float

from vatt_jax.inputs.regions import Regions, Words
from vatt_jax.models.fusion.blocks import CrossBlock
from vatt_jax.models.fusion.layer import CO, FusionLayer
from vatt_jax.models.vision_language.embeddings import SummedRegions, TextEmbeddings
from vatt_jax.models.vision_language.heads import Classifier, Tied, dense
from vatt_jax.models.vision_language.sizes import PRODUCT, VilbertSizes, block_options
from vatt_jax.rng import Rng

TEXT, IMAGE = 'text', 'image'


@flax.struct.dataclass
class VilbertEncoded:
    """What the streams become.

    Attributes:
        words: [B L D].
        regions: [B N V].
        pooled_words: [B C], of [CLS].
        pooled_regions: [B C], of the global region.
        joined: [B C], their product (or sum).
    """

    # Any: JAX rebuilds this tree with other things than arrays as leaves.
    words: Any
    regions: Any
    pooled_words: Any
    pooled_regions: Any
    joined: Any


@flax.struct.dataclass
class VilbertOutputs:
    """What is told of a pair.

    Attributes:
        encoded: VilbertEncoded.
        word_logits: [B L vocabulary].
        region_logits: [B N targets]: of classes, or a feature.
        match_logits: [B 2], of a pair that matches (0) and of one that does not (1).
    """

    encoded: Any
    word_logits: Any
    region_logits: Any
    match_logits: Any


class Vilbert(nn.Module):
    """ViLBERT with the heads of its pretraining.

    Attributes:
        sizes: of all parts.
        implementation: of attention, see `attention.IMPLEMENTATIONS`.
        dtype: to compute in.
    """

    sizes: VilbertSizes
    implementation: str = 'dense'
    dtype: str = 'float32'

    def setup(self) -> None:
        sizes, dtype = self.sizes, self.dtype
        text, image = sizes.text, sizes.image
        self.text_embeddings = TextEmbeddings(
            width=text.width,
            vocabulary=sizes.vocabulary,
            positions=sizes.positions,
            types=sizes.types,
            dropout=sizes.dropout,
            dtype=dtype,
        )
        self.region_embeddings = SummedRegions(image.width, sizes.dropout, dtype)
        text_options = block_options(text, sizes, self.implementation, dtype)
        image_options = block_options(image, sizes, self.implementation, dtype)
        self.text_layer = [CrossBlock(text.width, text_options) for _ in range(text.count)]
        self.image_layer = [CrossBlock(image.width, image_options) for _ in range(image.count)]
        self.co_layer = [self._co_layer() for _ in sizes.text_stops]
        self.text_pooler = dense(sizes.co_width, dtype)
        self.image_pooler = dense(sizes.co_width, dtype)
        self.word_head = Tied(text.width, sizes.vocabulary, sizes.activation, dtype)
        self.region_head = Classifier(image.width, sizes.targets, sizes.activation, dtype)
        self.match_head = dense(2, dtype)

    def __call__(self, words: Words, regions: Regions, rng: Rng, train: bool) -> VilbertOutputs:
        """Tell everything of B pairs; what is not read of it is not computed under jit.

        Args:
            words: of each pair, [CLS] first.
            regions: of each pair, the global one first (`regions.add_global`), boxes of 5 numbers.
            rng: of the batch.
            train: whether dropout is on.
        """
        return self.tell(self.encode(words, regions, rng, train))

    def tell(self, encoded: VilbertEncoded) -> VilbertOutputs:
        """What the heads say of pairs that `encode` has read."""
        return VilbertOutputs(
            encoded=encoded,
            word_logits=self.word_head(encoded.words, self.text_embeddings.word_table),
            region_logits=self.region_head(encoded.regions),
            match_logits=self.match_head(encoded.joined),
        )

    def encode(self, words: Words, regions: Regions, rng: Rng, train: bool) -> VilbertEncoded:
        """The streams after all layers; arguments as those of `__call__`."""
        x = {
            TEXT: self.text_embeddings(words, rng, train),
            IMAGE: self.region_embeddings(regions, rng, train),
        }
        x = self._run_layers(x, {TEXT: words.mask, IMAGE: regions.mask}, rng, train)
        pooled_words = nn.relu(self.text_pooler(x[TEXT][:, 0]))
        pooled_regions = nn.relu(self.image_pooler(x[IMAGE][:, 0]))
        return VilbertEncoded(
            words=x[TEXT],
            regions=x[IMAGE],
            pooled_words=pooled_words,
            pooled_regions=pooled_regions,
            joined=self._join(pooled_words, pooled_regions, rng, train),
        )

    def _run_layers(
        self, x: dict[str, jax.Array], masks: dict[str, jax.Array], rng: Rng, train: bool
    ) -> dict[str, jax.Array]:
        """All layers: each stream's own ones up to where a co-attention stands, and that one."""
        sizes = self.sizes
        done = {TEXT: 0, IMAGE: 0}
        # After the last co-attention come the layers that are left.
        text_stops = (*sizes.text_stops, sizes.text.count)
        image_stops = (*sizes.image_stops, sizes.image.count)
        for number, stops in enumerate(zip(text_stops, image_stops, strict=True)):
            for stream, layers, stop in zip(
                (TEXT, IMAGE), (self.text_layer, self.image_layer), stops, strict=True
            ):
                for layer in range(done[stream], stop):
                    layer_rng = rng.at(stream).at(layer)
                    x[stream] = layers[layer](x[stream], None, masks[stream], layer_rng, train)
                done[stream] = stop
            if number < len(self.co_layer):
                x = self.co_layer[number](x, masks, rng.at('co').at(number), train)
        return x

    def _co_layer(self) -> FusionLayer:
        """A co-attention, and the feed-forward part of each stream after it."""
        sizes = self.sizes
        options = dataclasses.replace(
            block_options(sizes.text, sizes, self.implementation, self.dtype),
            heads=sizes.co_heads,
            head_width=sizes.co_width // sizes.co_heads,
        )
        return FusionLayer(
            CO, (TEXT, IMAGE), options, mlps=((TEXT, sizes.text.mlp), (IMAGE, sizes.image.mlp))
        )

    def _join(
        self, words: Float[Array, 'B C'], regions: Float[Array, 'B C'], rng: Rng, train: bool
    ) -> Float[Array, 'B C']:
        """The vector of a pair."""
        joined = words * regions if self.sizes.join == PRODUCT else words + regions
        return rng.at('joined').dropout(joined, self.sizes.dropout) if train else joined
