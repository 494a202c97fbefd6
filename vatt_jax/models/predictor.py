"""The narrow transformer of joint-embedding prediction: what is seen in, what is hidden out.

V-JEPA (Bardes et al. 2024, section 3.2). Tokens that the encoder made of what it sees, and a mask
token at each place that is to be told, all with positions; outputs at the latter are predictions of
the target encoder's tokens.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from vatt_jax.models.layers import Dense
from vatt_jax.models.transformer import Encoder
from vatt_jax.parallel.sharding import logical
from vatt_jax.rng import Rng


class Predictor(nn.Module):
    """Predicts hidden tokens of one modality from seen tokens of the same one, or of another.

    One predictor serves all modalities (assumed for several; V-JEPA has one). A learnt vector tells
    it of which modality a seen token is, and mask tokens are of one modality and kind of mask.

    Attributes:
        outputs: width D of the encoder's tokens.
        grids: (modality, its grid of tokens), of all modalities.
        masks: kinds of masks.
        width: P of its tokens.
        layers, mlp, heads: of its transformer.
        scan, remat, implementation: see Encoder.
        dtype: of activations.
    """

    outputs: int
    grids: tuple[tuple[str, tuple[int, ...]], ...]
    masks: int = 2
    width: int = 384
    layers: int = 12
    mlp: int = 1536
    heads: int = 12
    scan: bool = False
    remat: str = 'none'
    implementation: str = 'dense'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self,
        seen: Float[Array, 'B K D'],
        kept: Int32[Array, 'B K'],
        hidden: Int32[Array, 'B M'],
        source: str,
        target: str,
        mask: int,
        rng: Rng,
    ) -> Float[Array, 'B M D']:
        """Predict tokens.

        Args:
            seen: the context encoder's tokens.
            kept: their places in the source's grid.
            hidden: places in the target's grid.
            source: modality of what is seen.
            target: modality of what is predicted.
            mask: kind of the mask.
            rng: of these clips.
        """
        grids = dict(self.grids)
        mask_tokens, kinds = self._learnt_tokens()
        seen = Dense(self.width, ('embed', None), dtype=self.dtype, name='embed')(seen)
        seen = seen + kinds[source] + sincos_positions(grids[source], self.width)[kept]
        told = mask_tokens[target][mask] + sincos_positions(grids[target], self.width)[hidden]
        x = jnp.concatenate([seen.astype(self.dtype), told.astype(self.dtype)], axis=1)
        encoder = Encoder(
            layers=self.layers,
            width=self.width,
            mlp=self.mlp,
            heads=self.heads,
            head_width=self.width // self.heads,
            dropout=0.0,
            attention_dropout=0.0,
            scan=self.scan,
            remat=self.remat,
            implementation=self.implementation,
            dtype=self.dtype,
            name='encoder',
        )
        # Nothing is dropped out: training and evaluation are one.
        x = encoder(x, None, rng, False, features=True)[:, kept.shape[1] :]
        return Dense(self.outputs, (None, 'embed'), dtype=self.dtype, name='outputs')(x)

    def _learnt_tokens(self) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """By modality: mask tokens [masks P], and what is added to tokens that are seen [P]."""
        mask_tokens, kinds = {}, {}
        # All of them, whichever this call reads: parameters are made by one call.
        for modality, _ in self.grids:
            zeros = logical(jax.nn.initializers.zeros, None, None)
            mask_tokens[modality] = self.param(
                f'{modality}_mask_tokens', zeros, (self.masks, self.width), jnp.float32
            )
            small = logical(jax.nn.initializers.normal(0.02), None)
            kinds[modality] = self.param(
                f'{modality}_seen_position', small, (self.width,), jnp.float32
            )
        return mask_tokens, kinds


def sincos_positions(grid: tuple[int, ...], width: int) -> Float[Array, 'N P']:
    """Fixed positions of a grid's tokens in row-major order: sines and cosines of each axis.

    Each axis has the same share of the width (`uniform_power` of the published code), rounded up to
    an even number; what is too much of the last one is cut off.
    """
    share = 2 * math.ceil(width / (2 * len(grid)))
    frequencies = 10_000.0 ** -(np.arange(share // 2) / (share // 2))
    parts = []
    for index in np.indices(grid).reshape(len(grid), -1):  # [N] of each axis
        angles = index[:, None] * frequencies
        parts += [np.sin(angles), np.cos(angles)]
    positions = np.concatenate(parts, axis=1)[:, :width]
    return jnp.asarray(positions, jnp.float32)
