"""Adapters: few new parameters inside a tower that stays as it is.

The contract. An adapter is a Linen module, one for each tower that it adapts, and a tower asks it
in five places, in the order in which a clip passes them:

    pixels(data)      the input, as the device stage made it
    words(x, read)    the words of a sentence, looked up and without positions
    tokens(data)      further tokens behind those of the input, which have positions by then,
                      before the norm that some towers have there
    layers()          what every layer of the encoder is given beside the tokens
    frames(vectors)   vectors of the frames of a clip, where each frame is a picture by itself

A method overrides those that it needs; they change nothing here. What it makes of parameters it
makes in `setup`, so that every place sees the same ones. They are found below `adapters_MODALITY`
of the model's parameters, and nothing else of the model is trained where config.base is set.

`layers` returns arrays, not functions: they are sliced like the parameters of the layers, scanned
or unrolled, recomputed or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from vatt_jax.models.layer_inputs import LayerInputs
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
        marks: tokens of a sentence before its first word.
        frames: of a clip.
        by_frame: whether each frame is a row of its own.
        mixes_frames: whether it has layers over the vectors of frames already.
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
    marks: int = 0
    frames: int = 1
    by_frame: bool = False
    mixes_frames: bool = False


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
        self, x: Float[Array, 'R L D'], read: Int[Array, ' R']
    ) -> tuple[Float[Array, 'R L D'], Int[Array, ' R']]:
        """Words in the place of x, and which of them is read for the sentence."""
        return x, read

    def tokens(self, data: jax.Array, train: bool) -> jax.Array | None:
        """Further tokens [R K D] of the tower's input [B …]; None: none."""
        return None

    def layers(self) -> LayerInputs:
        """What the layers are given."""
        return LayerInputs()

    def frames(self, vectors: Float[Array, 'B T D']) -> Float[Array, 'B D']:
        """The vector of a clip."""
        return vectors.mean(1)
