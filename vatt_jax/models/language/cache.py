"""Keys and values of the tokens so far, so that each new token is computed once."""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from vatt_jax.models.language.form import Form
from vatt_jax.parallel.sharding import constrain

# Keys and values of one layer, [B M key_heads kv]; of all layers, [layers B M key_heads kv].
Memory = tuple[Any, Any]


# A pytree: it crosses loops and the boundary of jit.
@flax.struct.dataclass
class Cache:
    """M slots of every row, filled from the left; all rows are filled equally far.

    Rows of different lengths hold padding, which no token sees.

    Attributes:
        memory: keys and values.
        mask: bool [B M], slots that hold a token; not padding, and not free.
        filled: int32 [], slots in use.
    """

    memory: Memory
    mask: Any
    filled: Any

    @staticmethod
    def create(form: Form, rows: int, slots: int, dtype: str = 'float32') -> Cache:
        """An empty cache of B rows and M slots, spread over the mesh where one is set."""
        shape = (form.layers, rows, slots, form.key_heads, form.head_width)
        names = ('layers', 'batch', None, 'heads', 'kv')
        empty = constrain(jnp.zeros(shape, dtype), *names)
        return Cache((empty, empty), jnp.zeros((rows, slots), bool), jnp.int32(0))

    @property
    def slots(self) -> int:
        """M."""
        return self.mask.shape[1]

    def num_tokens(self) -> Int[Array, ' B']:
        """Tokens of each row, without padding: the position of the next one."""
        return self.mask.sum(1, dtype=jnp.int32)

    def mark(self, mask: Bool[Array, 'B N']) -> Cache:
        """The cache that knows which of the next N slots hold tokens; `filled` stays."""
        marked = jax.lax.dynamic_update_slice_in_dim(self.mask, mask, self.filled, axis=1)
        return self.replace(mask=marked)  # type: ignore[attr-defined]  # by flax

    def seen(self, num_tokens: int) -> Bool[Array, 'B N M']:
        """The slots that each of the next N tokens sees: its own, and marked ones before it."""
        columns = self.filled + jnp.arange(num_tokens)
        is_before = jnp.arange(self.slots) <= columns[:, None]  # [N M]
        return is_before & self.mask[:, None]

    def take_rows(self, rows: Int[Array, ' R']) -> Cache:
        """The cache of other rows: those of these numbers, in this order."""
        taken = jax.tree.map(lambda x: x[:, rows], self.memory)
        return self.replace(  # type: ignore[attr-defined]  # by flax
            memory=taken, mask=self.mask[rows]
        )


def write(memory: Memory, key: jax.Array, value: jax.Array, start: jax.Array) -> Memory:
    """One layer's memory with those of N tokens [B N key_heads kv] from slot `start` on."""
    keys, values = memory
    keys = jax.lax.dynamic_update_slice_in_dim(keys, key.astype(keys.dtype), start, axis=1)
    values = jax.lax.dynamic_update_slice_in_dim(values, value.astype(values.dtype), start, axis=1)
    return keys, values
