"""What an adapter gives to the layers of an encoder: prompts, and matrices of low rank.

Arrays and nothing else, so that they are sliced, scanned and recomputed like parameters.
"""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@flax.struct.dataclass
class LowRank:
    """A matrix of low rank that is added to a frozen one, scale · down · up.

    Attributes:
        down: [inputs… r]; of all layers [layers inputs… r].
        up: [r outputs…]; of all layers [layers r outputs…].
        scale: of the product.
    """

    down: Any
    up: Any
    scale: float = flax.struct.field(pytree_node=False, default=1.0)

    def apply(self, x: jax.Array, num_inputs: int) -> jax.Array:
        """scale · (x · down) · up, without the product of the two.

        Args:
            x: [… inputs…].
            num_inputs: axes of an input.
        """
        hidden = jnp.tensordot(x, self.down.astype(x.dtype), num_inputs)  # [… r]
        return self.scale * jnp.tensordot(hidden, self.up.astype(x.dtype), 1)


@flax.struct.dataclass
class LayerInputs:
    """What the layers of an encoder are given beside the tokens.

    Attributes:
        prompts: [p D], tokens that enter with the others at the first layer and leave after the
            last; None: none.
        deep_prompts: [layers p D]: in every layer those of the layer take the place of what became
            of the ones before; the first are `prompts`. None: they pass through all layers.
        low_rank: projection of transformer.Block -> LowRank of all layers; None: none.
    """

    prompts: Any = None
    deep_prompts: Any = None
    low_rank: Any = None


def add_prompts(x: Float[Array, 'R N D'], prompts: Float[Array, 'p D']) -> Float[Array, 'R M D']:
    """The tokens with prompts behind the first, which is the aggregate token where there is one."""
    repeated = jnp.broadcast_to(prompts.astype(x.dtype), (len(x), *prompts.shape))
    return jnp.concatenate([x[:, :1], repeated, x[:, 1:]], axis=1)


def without_prompts(
    x: Float[Array, 'R M D'], prompts: Float[Array, 'p D']
) -> Float[Array, 'R N D']:
    """The tokens that `add_prompts` was given, whatever became of them."""
    return jnp.concatenate([x[:, :1], x[:, 1 + len(prompts) :]], axis=1)


def replace_prompts(
    x: Float[Array, 'R M D'], prompts: Float[Array, 'p D']
) -> Float[Array, 'R M D']:
    """The tokens with others in the place of those that `add_prompts` put there."""
    return add_prompts(without_prompts(x, prompts), prompts)
