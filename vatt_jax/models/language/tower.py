"""The causal language model as a tower over sentences, so that a run can train one."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vatt_jax.config import choose
from vatt_jax.models.language.causal_lm import CausalLM
from vatt_jax.models.language.form import GPT2, LLAMA, Form

KINDS = {'gpt2': GPT2, 'llama': LLAMA}
# Begins and ends every sentence: the number of padding, which is no word.
MARK = 0
# The name of the model among the tower's parameters.
MODEL = 'model'


class LanguageTower(nn.Module):
    """Sentences [R L] -> (what the last word makes of each [R D], what each word follows [R L D]).

    The decoder reads the mark and the words but the last: column l is the state from which word l
    is to be told, and behind the last word the mark again. There is no dropout. The output is the
    word table.

    Attributes:
        kind: entry of KINDS, for all that the other fields do not say.
        vocab: rows of the word table.
        layers: of the decoder.
        width: D.
        mlp: hidden width of the feed-forward part.
        heads: of queries.
        key_heads: of keys and values.
        head_width: of each head.
        context: most words of a sentence.
        remat: entry of transformer.REMAT.
        dtype: of activations.
    """

    kind: str = 'gpt2'
    vocab: int = 1 << 16
    layers: int = 12
    width: int = 768
    mlp: int = 3072
    heads: int = 12
    key_heads: int = 12
    head_width: int = 64
    context: int = 64
    remat: str = 'none'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, ids: Int[Array, 'R L'], valid: Any = None, train: bool = False
    ) -> tuple[Float[Array, 'R D'], Float[Array, 'R L D']]:
        """Encode sentences; valid and train are arguments of every net and not read here."""
        before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=MARK)
        hidden, _ = self.decoder(name=MODEL).hidden(before)
        # The state that has seen all words, or all but the last of a sentence that fills its row.
        last = jnp.minimum((ids != MARK).sum(1), ids.shape[1] - 1)
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], hidden

    def decoder(self, **options: Any) -> CausalLM:
        """The module whose variables are those of `MODEL`."""
        return CausalLM(self.form(), remat=self.remat, dtype=self.dtype, **options)

    def form(self) -> Form:
        """The architecture.

        Raises:
            ConfigError: the fields make none.
        """
        kind = KINDS[choose(self.kind, KINDS, 'config.model.towers.text.kind')]
        own = {field.name for field in dataclasses.fields(Form)} & set(type(self).__annotations__)
        return dataclasses.replace(kind, **{name: getattr(self, name) for name in own}, tied=True)
