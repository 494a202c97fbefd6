"""Next-word prediction: a causal language model on the sentences of clips.

Radford et al. 2019 (GPT-2), on captions in the place of web pages: each word is told from those
before it, the first from a mark, and behind the last word the mark is to come again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from vatt_jax.config import ConfigError, with_defaults
from vatt_jax.inputs.batch import modality_of
from vatt_jax.models.language import CausalLM
from vatt_jax.models.language.tower import MARK, MODEL, LanguageTower
from vatt_jax.objectives.base import Encoding, Loss, Objective, Spec
from vatt_jax.rng import Rng

DEFAULTS = {
    'name': 'next_token',
    # Text, or a view of it. The tower is `language`.
    'stream': 'text',
}
TOWER = 'language'
# Of these tokenizers 0 is a word, or padding has the number of the end.
MARKED = ('clip', 'siglip')
# What `encode` hands on of each sentence: sum of losses, words, words told right.
SUMS = ('losses', 'words', 'right')


class NextToken(Objective):
    """Mean cross entropy over all words of all sentences, and the mark behind each.

    Sentences that are cut have no mark to tell. Sentences that are not there count for nothing.
    `perplexity` in the log is e to the loss.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = DEFAULTS

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, self.DEFAULTS, 'config.objective'))
        if modality_of(self.config.stream) != 'text':
            raise ConfigError(
                'config.objective.stream: expected text or a view of it, got '
                f'{self.config.stream!r}.'
            )

    def streams(self) -> tuple[str, ...]:
        return (self.config.stream,)

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        tower = spec.model.config['towers'].get('text', {})
        if tower.get('name') != TOWER:
            raise ConfigError(
                f'config.model.towers.text.name: {self.config.name} needs a causal language model, '
                f'expected {TOWER!r}, got {tower.get("name")!r}'
            )
        kind = spec.info.get('tokenizer', {}).get('kind')
        if kind in MARKED:
            raise ConfigError(
                f'config.model.inputs.text.tokenizer: {self.config.name} takes padding for the end '
                f'of a sentence, expected words, wordpiece or sentencepiece, got {kind!r}'
            )
        return {}, {}

    def encode(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Encoding:
        stream = self.config.stream
        encoded, _ = model.apply(
            variables,
            stream,
            batch[stream],
            train=True,
            rng=rng,
            features=True,
            mutable=['batch_stats'],
            method='encode',
        )
        decoder = decoder_of(model)
        of_decoder = {'params': variables['params']['nets_text'][MODEL]}
        # Here, not in compute_loss: logits of a microbatch alone are in memory.
        ids = batch[stream]['data']  # [B K L]
        tokens = encoded.tokens.reshape(-1, *encoded.tokens.shape[2:])  # [B·K L D]
        logits: Any = decoder.apply(of_decoder, tokens, method='logits')
        sums = sums_of_rows(logits, ids.reshape(-1, ids.shape[-1]))
        by_name = {f'{stream}/{name}': x.reshape(ids.shape[:2]) for name, x in zip(SUMS, sums)}
        return Encoding(by_name, variables.get('batch_stats', {}), state)

    def compute_loss(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        pooled: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: Any,
    ) -> Loss:
        stream = self.config.stream
        is_there = batch[stream]['mask'] & batch[stream]['valid'][:, None]  # [B K]
        losses, words, right = (
            jnp.sum(jnp.where(is_there, pooled[f'{stream}/{name}'], 0.0)) for name in SUMS
        )
        # A batch may hold no sentence at all: 0 / 1 then, not NaN.
        words = jnp.maximum(words, 1)
        value = losses / words
        metrics = {'perplexity': jnp.exp(value), 'accuracy': right / words}
        return Loss(value, metrics, variables['batch_stats'], state)


def decoder_of(model: Any) -> CausalLM:
    """The language model that is a model's tower of text, as a module by itself."""
    fields = {k: v for k, v in model.config['towers']['text'].items() if k != 'name'}
    return LanguageTower(**fields, dtype=model.dtype).decoder(parent=None)


def sums_of_rows(
    logits: Float32[Array, 'R L V'], ids: Int[Array, 'R L']
) -> tuple[Float32[Array, ' R'], Float32[Array, ' R'], Float32[Array, ' R']]:
    """Of each sentence: the sum of its words' losses, their number, and how many are told right.

    Args:
        logits: of the word at each column.
        ids: the words, MARK behind the last.
    """
    counted = counted_words(ids)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    # A sum against a one-hot row, not a gather: its gradient needs no scatter.
    one_hot = jax.nn.one_hot(ids, logits.shape[-1], dtype=logits.dtype)
    losses = -jnp.sum(one_hot * log_probabilities, axis=-1)  # [R L]
    is_right = logits.argmax(-1) == ids
    columns = (losses * counted, counted, is_right & counted)
    losses, words, right = (x.sum(axis=1, dtype=jnp.float32) for x in columns)
    return losses, words, right


def counted_words(ids: Int[Array, 'R L']) -> Bool[Array, 'R L']:
    """The words of each sentence, and the mark behind them where the row has room for it."""
    lengths = (ids != MARK).sum(1, keepdims=True)
    return jnp.arange(ids.shape[1]) <= lengths
