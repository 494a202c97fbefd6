"""What ViLBERT and UNITER tell of a pair: masked words and regions, and whether it matches."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vatt_jax.models.layers import ACTIVATIONS, Dense, LayerNorm
from vatt_jax.models.vision_language.sizes import EPS
from vatt_jax.parallel.sharding import logical


def dense(features: int, dtype: str, name: str | None = None) -> Dense:
    """A dense layer of a head."""
    return Dense(features, ('embed', None), init='bert', dtype=dtype, name=name)


class Transform(nn.Module):
    """norm(act(W x)), before what tells words or regions.

    Attributes:
        width: of the result.
        activation: entry of layers.ACTIVATIONS.
        dtype: to compute in.
    """

    width: int
    activation: str = 'gelu'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x: Float[Array, '*batch D']) -> Float[Array, '*batch E']:
        x = ACTIVATIONS[self.activation](dense(self.width, self.dtype, 'dense')(x))
        return LayerNorm(eps=EPS, name='norm')(x)


class Tied(nn.Module):
    """A transform, then the product with a table of the embeddings, and a bias of its own.

    The table is that of words (masked words), or the transposed kernel that features came in by
    (UNITER's feature regression).

    Attributes:
        width: of the transform.
        outputs: rows of the table.
        activation: entry of layers.ACTIVATIONS.
        dtype: to compute in.
    """

    width: int
    outputs: int
    activation: str = 'gelu'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B N D'], table: Float[Array, 'outputs D']
    ) -> Float[Array, 'B N outputs']:
        x = Transform(self.width, self.activation, self.dtype, name='transform')(x)
        y = jnp.einsum('bnd,vd->bnv', x, table.astype(x.dtype))
        zeros = logical(jax.nn.initializers.zeros, 'vocab')
        bias = self.param('bias', zeros, (self.outputs,), jnp.float32)
        return y + bias.astype(y.dtype)


class Classifier(nn.Module):
    """A transform, then a dense layer: classes of regions, answers of VQA.

    Attributes:
        width: of the transform.
        outputs: number of classes.
        activation: entry of layers.ACTIVATIONS.
        dtype: to compute in.
    """

    width: int
    outputs: int
    activation: str = 'gelu'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x: Float[Array, '*batch D']) -> Float[Array, '*batch outputs']:
        x = Transform(self.width, self.activation, self.dtype, name='transform')(x)
        return dense(self.outputs, self.dtype, 'decoder')(x)
