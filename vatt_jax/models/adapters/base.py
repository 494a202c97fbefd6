"""Adapters: few new parameters inside a tower that stays as it is.

The contract. An adapter is a Linen module, one for each tower that it adapts, and a tower asks it
in four places, in the order in which a clip passes them:

    pixels(data)      the input, as the device stage made it
    words(x, ids)     the words of a sentence, looked up and without positions
    tokens(x, data)   tokens with positions, before the norm that some towers have there
    layers()          what every layer of the encoder is given beside the tokens

A method overrides those that it needs; each is the identity here. What it makes of parameters it
makes in `setup`, so that every place sees the same ones. They are found below `adapters_MODALITY`
of the model's parameters, and nothing else of the model is trained where config.base is set.

`layers` returns arrays, not functions: they are sliced like the parameters of the layers, scanned
or unrolled, recomputed or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vatt_jax.rng import Rng


@dataclasses.dataclass(frozen=True)
class Tower:
    """What an adapter may size itself by.

    Attributes:
        modality: of the tower.
        layers: of its encoder; 0: the tower has none.
        width: D.
        mlp: hidden width of the feed-forward parts.
        heads: of each attention.
        head_width: of queries, keys and values.
        patch_values: numbers in a patch, the inputs of the patch matrix; 0: no patches.
        size: side of its pictures in pixels; 0: it reads none.
        context: tokens of a sentence, where its words can be replaced; else 0.
    """

    modality: str
    layers: int = 0
    width: int = 0
    mlp: int = 0
    heads: int = 0
    head_width: int = 0
    patch_values: int = 0
    size: int = 0
    context: int = 0


# In layers the rank is the last axis of `down` and the first of `up`.
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


class Adapter(nn.Module):
    """The identity in every place.

    Attributes:
        config: the fields of config.model.adapter, with their defaults.
        tower: that it adapts.
        dtype: of activations.
    """

    config: Mapping[str, Any]
    tower: Tower
    dtype: str = 'float32'

    @classmethod
    def misfit(cls, tower: Tower) -> str:
        """Why a tower cannot be adapted in this way, '' where it can."""
        return ''

    def pixels(self, data: jax.Array, rng: Rng) -> jax.Array:
        """The input of the tower in the place of `data` [B …]; `rng` is of its rows."""
        return data

    def words(
        self, x: Float[Array, 'R L D'], ids: Int[Array, 'R L']
    ) -> tuple[Float[Array, 'R M D'], Int[Array, ' R'] | None]:
        """Words in the place of x, and which token is the sentence's vector (None: as before)."""
        return x, None

    def tokens(
        self, x: Float[Array, 'R N D'], data: jax.Array, train: bool
    ) -> Float[Array, 'R M D']:
        """Tokens in the place of x, more at the end or as many; `data` is the tower's input."""
        return x

    def layers(self) -> LayerInputs:
        """What the layers are given."""
        return LayerInputs()
