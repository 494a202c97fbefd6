"""Texts in, texts out: a language model with its tokenizer, as one function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vatt_jax.config import ConfigError
from vatt_jax.inputs.byte_pairs import BytePairs
from vatt_jax.models.language import CausalLM, Rules, generate
from vatt_jax.rng import Rng

# Prompts are padded to a multiple, so that one compiled program serves many lengths.
LENGTH_STEP = 32


class TextGenerator:
    """What a language model writes after a prompt: a generator of `vatt_jax.socratic`.

    Args:
        model: the module.
        variables: {'params': …} of it.
        tokenizer: of the model.
        rules: how words are chosen.
        seed: of what is drawn. Every call draws anew; the same calls in the same order make the
            same texts.

    Raises:
        ConfigError: the model has no tokenizer, or one with more numbers than its word table.
    """

    def __init__(
        self,
        model: CausalLM,
        variables: Any,
        tokenizer: BytePairs | None,
        rules: Rules,
        seed: int = 0,
    ) -> None:
        if tokenizer is None:
            raise ConfigError('TextGenerator: expected a tokenizer; the model has none beside it')
        if tokenizer.size > model.form.vocab:
            raise ConfigError(
                f'TextGenerator: the tokenizer has {tokenizer.size} numbers, the word table '
                f'{model.form.vocab} rows; expected the tokenizer of this model'
            )
        self._model, self._variables = model, variables
        self._tokenizer, self._rules = tokenizer, rules
        self._seed, self._calls = seed, 0

    def __call__(self, prompt: str) -> str:
        """The text after a prompt."""
        return self.write([prompt])[0]

    def write(self, prompts: Sequence[str]) -> list[str]:
        """The text after each of several prompts.

        Raises:
            ConfigError: a prompt is empty, or longer than the model's context has room for.
        """
        if not prompts:
            return []
        ids, mask = self._tokenizer.encode(prompts)
        lengths = mask.sum(1)
        if not lengths.all():
            raise ConfigError(
                f'TextGenerator: prompt {int(np.argmin(lengths))} has no words to go on from'
            )
        room = self._model.form.context - self._rules.new_tokens
        if ids.shape[1] > room:
            raise ConfigError(
                f'TextGenerator: prompt {int(np.argmax(lengths))} has {ids.shape[1]} words; with '
                f'{self._rules.new_tokens} new ones the context of {self._model.form.context} has '
                f'room for {room}; shorten it, or lower Rules.new_tokens'
            )
        padding = min(-ids.shape[1] % LENGTH_STEP, room - ids.shape[1])
        ids = np.pad(ids, ((0, 0), (0, padding)))
        mask = np.pad(mask, ((0, 0), (0, padding)))
        rng = Rng.create(self._seed, self._calls, jnp.arange(len(prompts)))
        self._calls += 1
        written = generate(self._model, self._variables, ids, mask, rng, rules=self._rules)
        return self._tokenizer.decode(np.asarray(written.tokens), np.asarray(written.lengths))
