"""ClipCap (Mokady et al. 2021): captions of embeddings, by a language model with a prefix."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from vatt_jax.models.language import Beams, CausalLM, Rules, beam_search
from vatt_jax.models.media_language.mappers import MLPMapper, TransformerMapper
from vatt_jax.models.media_language.new_parts import LANGUAGE
from vatt_jax.rng import Rng


class ClipCap(nn.Module):
    """A mapper of embeddings before a language model.

    Parameters of the language model are the entry `language`: frozen with the Transformer mapper,
    trained too with the MLP in the paper (`new_parts.split` is for the first).

    Attributes:
        language: the language model.
        mapper: embeddings -> prefix.
        unit: whether embeddings are scaled to length 1.
    """

    language: CausalLM
    mapper: MLPMapper | TransformerMapper
    unit: bool = False

    def __call__(
        self,
        embeddings: Float[Array, 'B E'],
        ids: Int[Array, 'B N'],
        mask: Bool[Array, 'B N'] | None = None,
        rng: Rng | None = None,
    ) -> Float32[Array, 'B N V']:
        """Logits of the words themselves: those of column n are made of the prefix and words < n.

        Args:
            embeddings: of pictures, clips or sounds.
            ids: captions, with their ends.
            mask: words that are there; None: all.
            rng: of the rows, for dropout in the language model; None: none.
        """
        if mask is None:
            mask = jnp.ones(ids.shape, bool)
        prefix = self.prefix(embeddings)
        x = jnp.concatenate([prefix, self.language.embed(ids)], axis=1)
        seen = jnp.concatenate([jnp.ones(prefix.shape[:2], bool), mask], axis=1)
        hidden, _ = self.language.hidden(x, seen, rng=rng)
        # The last vector of the prefix tells the first word; after the last word none is wanted.
        return self.language.logits(hidden[:, prefix.shape[1] - 1 : -1])

    def prefix(self, embeddings: Float[Array, 'B E']) -> Float[Array, 'B k D']:
        """What stands before the words."""
        embeddings = embeddings.astype(jnp.float32)
        if self.unit:
            # An embedding of zeros stays one.
            length = jnp.linalg.norm(embeddings, axis=-1, keepdims=True)
            embeddings = embeddings / jnp.maximum(length, 1e-12)
        return self.mapper(embeddings).astype(self.language.dtype)


def write_captions(
    model: ClipCap,
    variables: Any,
    embeddings: jax.Array,
    *,
    rules: Rules,
    width: int = 5,
    length_power: float = 1.0,
) -> Beams:
    """Captions of embeddings [B E] by beam search; arguments as of `language.beam_search`.

    Raises:
        ConfigError: as of `language.beam_search`.
    """
    prefix: Any = model.apply(variables, embeddings, method='prefix')
    of_language = {'params': variables['params'][LANGUAGE]}
    return beam_search(
        model.language, of_language, prefix, rules=rules, width=width, length_power=length_power
    )
