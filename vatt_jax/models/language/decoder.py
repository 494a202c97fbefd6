"""One layer of a decoder, in GPT-2's form and in Llama's."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vatt_jax.models.attention import attention
from vatt_jax.models.language.cache import Memory, write
from vatt_jax.models.language.form import Form
from vatt_jax.models.language.rotary import Rotation, rotate
from vatt_jax.models.layers import ACTIVATIONS, LayerNorm
from vatt_jax.models.transformer import Projection
from vatt_jax.parallel.sharding import constrain
from vatt_jax.rng import Rng

# Deviation of initial values (GPT-2). What adds to the residual is divided by the root of the
# number of residual parts.
SPREAD = 0.02


class DecoderLayer(nn.Module):
    """x += drop(MHA(norm(x)));  x += drop(MLP(norm(x))); tokens see themselves and those before.

    Attributes:
        form: the architecture.
        dropout: rate on attention probabilities and on both parts' outputs, in training.
        implementation: of attention, see `attention.IMPLEMENTATIONS`.
        dtype: of activations.
    """

    form: Form
    dropout: float = 0.0
    implementation: str = 'dense'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B N D'],
        seen: Bool[Array, '_ N M'],
        rotation: Rotation | None,
        memory: Memory | None,
        start: jax.Array | None,
        rng: Rng | None,
    ) -> tuple[Float[Array, 'B N D'], Memory | None]:
        """Apply the layer.

        Args:
            x: tokens.
            seen: which keys each query sees: M slots of the memory, or without one the N tokens.
            rotation: of rotary positions, or None.
            memory: keys and values of this layer, or None.
            start: int32 [], the slot of the first of these tokens.
            rng: of the layer; None: no dropout.

        Returns:
            The tokens, and the memory with theirs.
        """
        form = self.form
        y = LayerNorm(form.rms, form.eps, name='attention_norm')(x)
        query = self._heads('query', form.heads)(y)  # [B N heads kv]
        key = self._heads('key', form.key_heads)(y)  # [B N key_heads kv]
        value = self._heads('value', form.key_heads)(y)
        if rotation is not None:
            # Keys are kept turned: their positions never change.
            query, key = rotate(query, rotation), rotate(key, rotation)
        if memory is not None:
            assert start is not None, 'a memory needs the slot to begin at'
            memory = write(memory, key, value, start)
            key, value = memory
        attended = self._attend(query, key, value, seen, rng)
        out = self._projection(
            'out',
            '...hk,hkd->...d',
            (form.heads, form.head_width, form.width),
            ('heads', 'kv', 'embed'),
        )
        x = x + self._drop(out(attended), rng, 'attention')
        y = LayerNorm(form.rms, form.eps, name='mlp_norm')(x)
        x = x + self._drop(self._feed_forward(y), rng, 'mlp')
        return constrain(x, 'batch', 'length', None), memory

    def _attend(
        self,
        query: Float[Array, 'B N heads kv'],
        key: Float[Array, 'B M key_heads kv'],
        value: Float[Array, 'B M key_heads kv'],
        seen: Bool[Array, '_ N M'],
        rng: Rng | None,
    ) -> Float[Array, 'B N heads kv']:
        """Attention of queries to the keys that a group of them shares."""
        # Kernels want as many keys as queries; head h reads key head h // group.
        group = self.form.heads // self.form.key_heads
        if group > 1:
            key, value = jnp.repeat(key, group, axis=2), jnp.repeat(value, group, axis=2)
        return attention(
            query,
            key.astype(query.dtype),
            value.astype(query.dtype),
            mask=jnp.broadcast_to(seen, (len(query), *seen.shape[1:])),
            scale=self.form.head_width**-0.5,
            dropout=0.0 if rng is None else self.dropout,
            rng=rng,
            implementation=self.implementation,
        )

    def _feed_forward(self, y: Float[Array, 'B N D']) -> Float[Array, 'B N D']:
        """W2 act(W1 y), or gated W2 (act(Wg y) · W1 y)."""
        form = self.form
        activation = ACTIVATIONS[form.activation]
        inner, shape = '...d,df->...f', (form.width, form.mlp)
        hidden = self._projection('mlp_in', inner, shape, ('embed', 'mlp'))(y)
        if form.gated:
            gate = self._projection('mlp_gate', inner, shape, ('embed', 'mlp'))(y)
            hidden = activation(gate) * hidden
        else:
            hidden = activation(hidden)
        # Split over the mesh between the two matrices, as in the other Transformers.
        hidden = constrain(hidden, 'batch', 'length', 'mlp')
        out = self._projection('mlp_out', '...f,fd->...d', (form.mlp, form.width), ('mlp', 'embed'))
        return out(hidden)

    def _heads(self, name: str, heads: int) -> Projection:
        """The projection to queries, keys or values."""
        shape = (self.form.width, heads, self.form.head_width)
        return self._projection(name, '...d,dhk->...hk', shape, ('embed', 'heads', 'kv'))

    def _projection(
        self, name: str, equation: str, shape: tuple[int, ...], axes: tuple[str, ...]
    ) -> Projection:
        spread = SPREAD
        if name in ('out', 'mlp_out'):
            spread = SPREAD * (2 * self.form.layers) ** -0.5
        return Projection(
            equation=equation,
            shape=shape,
            axes=axes,
            spread=('normal', spread),
            bias=name in self.form.biased,
            dtype=self.dtype,
            name=name,
        )

    def _drop(self, x: jax.Array, rng: Rng | None, site: str) -> jax.Array:
        if rng is None:
            return x
        return rng.at(site).dropout(x, self.dropout)
