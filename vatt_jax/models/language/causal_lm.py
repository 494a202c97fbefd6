"""The causal language model: words or embeddings in, logits of the next word out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from vatt_jax.config import ConfigError, choose
from vatt_jax.models.attention import IMPLEMENTATIONS
from vatt_jax.models.language.cache import Cache, Memory
from vatt_jax.models.language.decoder import SPREAD, DecoderLayer
from vatt_jax.models.language.form import Form
from vatt_jax.models.language.interleaved import Interleaved
from vatt_jax.models.language.rotary import Rotation, frequencies, rotation
from vatt_jax.models.layers import Dense, LayerNorm
from vatt_jax.models.stacks import stacked_params
from vatt_jax.models.transformer import REMAT, causal_mask
from vatt_jax.parallel.sharding import constrain, logical
from vatt_jax.rng import Rng


@flax.struct.dataclass
class LMOutputs:
    """What the model makes of a batch.

    Attributes:
        logits: float32 [B N vocab]; those of column n are of the word after it.
        cache: with these tokens; None where none was given.
    """

    logits: Any
    cache: Any = None


class CausalLM(nn.Module):
    """A decoder-only Transformer, pre-norm, in GPT-2's form or Llama's (`Form`).

    Padding may lie anywhere: positions count the tokens that are there, and no token sees padding.
    What comes out at padding means nothing.

    The way of a batch is `embed` → `hidden` → `logits`. Whoever puts something else in the place
    of words (a prefix, tokens of pictures) gives embeddings to `hidden`.

    Attributes:
        form: the architecture.
        dropout: rate after the embeddings and in the layers, in training (GPT-2: 0.1).
        implementation: of attention, see `attention.IMPLEMENTATIONS`.
        scan: whether layers are scanned or unrolled; parameters are stacked either way.
        remat: entry of transformer.REMAT.
        dtype: of activations; parameters are float32.
    """

    form: Form
    dropout: float = 0.0
    implementation: str = 'dense'
    scan: bool = True
    remat: str = 'none'
    dtype: str = 'float32'

    def setup(self) -> None:
        form = self.form
        choose(self.implementation, IMPLEMENTATIONS, 'CausalLM.implementation')
        choose(self.remat, REMAT, 'CausalLM.remat')
        normal = jax.nn.initializers.normal
        self.word_table = self.param(
            'word_table',
            logical(normal(SPREAD), 'vocab', 'embed'),
            (form.vocab, form.width),
            jnp.float32,
        )
        if form.positions == 'learned':
            self.position_table = self.param(
                'position_table',
                logical(normal(SPREAD / 2), 'buckets', 'embed'),
                (form.context, form.width),
                jnp.float32,
            )
        self.stacked = stacked_params(self, 'layers', self._init_layer, form.layers)
        self.final_norm = LayerNorm(form.rms, form.eps)
        if not form.tied:
            self.output = Dense(
                form.vocab, ('embed', 'vocab'), bias=False, init='bert', dtype=self.dtype
            )

    def __call__(
        self,
        inputs: jax.Array,
        mask: Bool[Array, 'B N'] | None = None,
        cache: Cache | None = None,
        rng: Rng | None = None,
    ) -> LMOutputs:
        """Logits at every token; the arguments are those of `hidden`."""
        x, cache = self.hidden(inputs, mask, cache, rng)
        return LMOutputs(self.logits(x), cache)

    def embed(self, ids: Int[Array, 'B N']) -> Float[Array, 'B N D']:
        """Rows of the word table; positions are added by `hidden`."""
        return self.word_table[ids].astype(self.dtype)

    def hidden(
        self,
        inputs: jax.Array,
        mask: Bool[Array, 'B N'] | None = None,
        cache: Cache | None = None,
        rng: Rng | None = None,
        interleaved: Interleaved | None = None,
    ) -> tuple[Float[Array, 'B N D'], Cache | None]:
        """What the last norm makes of each token.

        Args:
            inputs: numbers of words [B N], or embeddings [B N D] in their place.
            mask: tokens that are there; None: all.
            cache: of the tokens before these, or None. It must have N free slots, which only its
                maker can see to: `filled` is not known while a program is traced.
            rng: of the rows, for dropout; None: none, as in evaluation.
            interleaved: layers of another model between these; None: none.

        Returns:
            The tokens, and the cache with them.

        Raises:
            ConfigError: the text is longer than the model's context.
        """
        x = self.embed(inputs) if inputs.ndim == 2 else inputs.astype(self.dtype)
        self._check_length(x.shape[1] if cache is None else cache.slots)
        if mask is None:
            mask = jnp.ones(x.shape[:2], bool)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        if cache is None:
            seen = causal_mask(x.shape[1], mask)
        else:
            positions = positions + cache.num_tokens()[:, None]
            cache = cache.mark(mask)
            seen = cache.seen(x.shape[1])
        if self.form.positions == 'learned':
            x = x + self.position_table[positions].astype(self.dtype)
        if rng is not None:
            x = rng.at('embedding').dropout(x, self.dropout)
        x = constrain(x, 'batch', 'length', None)
        x, cache = self._run_layers(x, seen, self._rotation(positions), cache, rng, interleaved)
        return self.final_norm(x), cache

    def logits(self, hidden: Float[Array, 'B N D']) -> Float32[Array, 'B N V']:
        """Logits of the next word, float32."""
        if self.form.tied:
            logits = hidden @ self.word_table.T.astype(self.dtype)
        else:
            logits = self.output(hidden)
        return logits.astype(jnp.float32)

    def _check_length(self, length: int) -> None:
        if length > self.form.context:
            raise ConfigError(
                f'a text of {length} tokens (those still to be written included): this model was '
                f'made for at most {self.form.context} (Form.context); shorten the text'
            )

    def _rotation(self, positions: Int[Array, 'B N']) -> Rotation | None:
        form = self.form
        if form.positions != 'rotary':
            return None
        return rotation(positions, frequencies(form.head_width, form.rope_base, form.rope_scaling))

    def _layer(self) -> DecoderLayer:
        """A layer without parameters of its own: they are rows of `layers`."""
        return DecoderLayer(self.form, self.dropout, self.implementation, self.dtype, parent=None)

    def _init_layer(self, key: jax.Array) -> Any:
        """Initial parameters of one layer."""
        # No parameter's shape depends on the numbers of rows and tokens.
        sample = jnp.zeros((1, 1, self.form.width), self.dtype)
        seen = jnp.ones((1, 1, 1), bool)
        variables: Any = self._layer().init(key, sample, seen, None, None, None, None)
        return variables['params']

    def _run_layers(
        self,
        x: Float[Array, 'B N D'],
        seen: Bool[Array, '_ N M'],
        rotation: Rotation | None,
        cache: Cache | None,
        rng: Rng | None,
        interleaved: Interleaved | None,
    ) -> tuple[Float[Array, 'B N D'], Cache | None]:
        """Apply all layers, scanned or unrolled; both go through the same stacked parameters."""
        layer = self._layer()
        memory = None if cache is None else cache.memory
        start = None if cache is None else cache.filled
        num_tokens = x.shape[1]

        def step(x: jax.Array, scanned: Any) -> tuple[jax.Array, Memory | None]:
            params, number, memory = scanned
            of_layer = None if rng is None else rng.at(number)
            applied: Any = layer.apply(
                {'params': params}, x, seen, rotation, memory, start, of_layer
            )
            return applied

        scanned = (self.stacked, jnp.arange(self.form.layers), memory)
        run_layer = self._rematerialised(step)
        if interleaved is None:
            x, memory = jax.lax.scan(run_layer, x, scanned, unroll=not self.scan)
        else:
            interleaved = dataclasses.replace(
                interleaved, apply=self._rematerialised(interleaved.apply)
            )
            x, memory = interleaved.scan(run_layer, x, scanned, unroll=not self.scan)
        if cache is not None:
            cache = cache.replace(  # type: ignore[attr-defined]  # by flax
                memory=memory, filled=cache.filled + num_tokens
            )
        return x, cache

    def _rematerialised(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step with what the backward pass is to compute again; see transformer.REMAT."""
        if self.remat == 'none':
            return step
        policy = None
        if self.remat == 'dots':
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(step, prevent_cse=not self.scan, policy=policy)
