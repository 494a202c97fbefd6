"""Captioning: a causal language model tells clips in words, after a prefix made of their embedding.

ClipCap (Mokady et al. 2021) on any tower of this project: the embedding of a clip becomes k vectors
that stand before the words of its caption. Clips are embedded as in evaluation, and their tower
learns nothing. The language model learns too (published with the MLP), or is left as it is by
config.optimizer.frozen (published with the Transformer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from vatt_jax.config import ConfigError, check_range, choose
from vatt_jax.inputs.batch import modality_of
from vatt_jax.models.language import CausalLM, Rules
from vatt_jax.models.language.tower import MARK, MODEL
from vatt_jax.models.media_language import ClipCap, MLPMapper, TransformerMapper, write_captions
from vatt_jax.objectives import next_token
from vatt_jax.objectives.base import Encoding, Spec
from vatt_jax.objectives.next_token import SUMS, NextToken, decoder_of, sums_of_rows
from vatt_jax.rng import Rng

DEFAULTS = {
    # `stream`: the captions.
    **next_token.DEFAULTS,
    'name': 'captioning',
    # The stream that is told in words.
    'media': 'video',
    # Common space of the embedding, which is then of unit length; '': the tower's pooled feature.
    'space': '',
    # Whether a pooled feature is scaled to length 1 as well.
    'unit': False,
    # mlp | transformer: what makes the prefix.
    'mapper': 'mlp',
    # k, vectors of the prefix. Published: 10 by the MLP, 40 by the Transformer.
    'prefix': 10,
    # Of the Transformer: vectors made of the embedding, layers, heads.
    'tokens': 40,
    'layers': 8,
    'heads': 8,
}
MAPPERS = ('mlp', 'transformer')
COUNTS = ('prefix', 'tokens', 'layers', 'heads')
MAPPER = 'mapper'


class Captioning(NextToken):
    """Mean cross entropy over all words of all captions, and the mark behind each.

    Every caption of a clip is an example of its own. Clips without the medium count for nothing.
    Parameters are those of the mapper; the language model is the tower of text.
    """

    DEFAULTS = DEFAULTS

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        c = self.config
        choose(c.mapper, MAPPERS, 'config.objective.mapper')
        for field in COUNTS:
            check_range(c[field], 1, 1 << 16, f'config.objective.{field}')
        if modality_of(c.media) == 'text':
            raise ConfigError(
                'config.objective.media: expected a stream of clips, such as video, got '
                f'{c.media!r}'
            )

    def streams(self) -> tuple[str, ...]:
        return (self.config.media, self.config.stream)

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        super().init(key, spec)
        c = self.config
        if spec.model.config.get('fusion'):
            raise ConfigError(
                'config.model.fusion: expected none with captioning: clips must not see their '
                'captions in evaluation'
            )
        language = decoder_of(spec.model)
        num_words = spec.batch[c.stream]['data'].shape[-1]
        context = language.form.context
        if c.prefix + num_words > context:
            raise ConfigError(
                f'config.model.towers.text.context: expected room for a prefix of {c.prefix} and '
                f'{num_words} words, {c.prefix + num_words} in all, got {context}'
            )
        like = self._abstract_embedding(spec)
        variables: Any = self._mapper(language).init(key, jnp.zeros(like.shape, jnp.float32))
        return {MAPPER: variables['params']}, {}

    def _abstract_embedding(self, spec: Spec) -> Any:
        """Shape [B E] of what the prefix is made of.

        Raises:
            ConfigError: there is no such space.
        """
        c = self.config
        if not c.space:
            return spec.outputs.encoded[c.media].pooled
        members = spec.outputs.spaces.get(c.space, {})
        if c.media not in members:
            known = [name for name, streams in spec.outputs.spaces.items() if c.media in streams]
            raise ConfigError(
                f'config.objective.space: expected a space of {c.media!r} '
                f'({", ".join(known) or "it has none"}) or nothing, got {c.space!r}'
            )
        return members[c.media]

    def _mapper(self, language: CausalLM) -> MLPMapper | TransformerMapper:
        c, width = self.config, language.form.width
        if c.mapper == 'mlp':
            return MLPMapper(width, c.prefix, dtype=language.dtype, parent=None)
        return TransformerMapper(
            width, c.prefix, c.tokens, c.layers, c.heads, dtype=language.dtype, parent=None
        )

    def _clipcap(self, model: Any) -> ClipCap:
        language = decoder_of(model)
        is_unit = self.config.unit or bool(self.config.space)
        return ClipCap(language, self._mapper(language), unit=is_unit, parent=None)

    def encode(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Encoding:
        c = self.config
        out: Any = model.apply(variables, {c.media: batch[c.media]}, train=False, rng=rng)
        embeddings = out.spaces[c.space][c.media] if c.space else out.encoded[c.media].pooled
        embeddings = jax.lax.stop_gradient(embeddings)  # [B E]

        ids = batch[c.stream]['data']  # [B K L]
        rows = ids.reshape(-1, ids.shape[-1])
        of_rows = jnp.repeat(embeddings, ids.shape[1], axis=0)
        of_clipcap = clipcap_variables(variables, params)
        # Here, not in compute_loss: logits of a microbatch alone are in memory.
        logits: Any = self._clipcap(model).apply(of_clipcap, of_rows, rows)
        is_told = batch[c.media]['valid'][:, None]  # [B 1]
        by_name = {}
        for name, sums in zip(SUMS, sums_of_rows(logits, rows)):
            by_name[f'{c.stream}/{name}'] = jnp.where(is_told, sums.reshape(ids.shape[:2]), 0.0)
        return Encoding(by_name, variables.get('batch_stats', {}), state)

    def embeddings(self, features: Mapping[str, Any]) -> Float[np.ndarray, 'N E']:
        """What the prefixes are made of, from what a FeatureExtractor returns."""
        c = self.config
        return features['spaces'][c.space][c.media] if c.space else features['pooled'][c.media]

    def write(
        self,
        model: Any,
        variables: Any,
        params: Any,
        embeddings: Float[Array, 'B E'],
        width: int,
    ) -> Int32[Array, 'B L']:
        """Captions by beam search: word numbers, filled with 0.

        Args:
            model: the Linen module.
            variables: {'params', …} of it.
            params: the objective's parameters.
            embeddings: see `embeddings`.
            width: of the beam; 1: the likeliest word, always.
        """
        num_words = model.config['inputs']['text']['words']
        rules = Rules(new_tokens=num_words, ends=(MARK,))
        of_clipcap = clipcap_variables(variables, params)
        clipcap = self._clipcap(model)
        beams = write_captions(clipcap, of_clipcap, embeddings, rules=rules, width=width)
        best: Array = beams.tokens[:, 0]
        return best


def clipcap_variables(variables: Any, params: Any) -> dict[str, Any]:
    """Variables of the whole of language model and mapper."""
    language = variables['params']['nets_text'][MODEL]
    return {'params': {'language': language, 'mapper': params[MAPPER]}}
