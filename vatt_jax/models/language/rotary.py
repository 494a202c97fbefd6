"""Rotary positions (Su et al. 2021, "RoFormer"), in the half-by-half order of Hugging Face's Llama.

Number i of a head's first half and number i of its second half are one pair, which is turned by
position · frequency i. Meta's own files pair neighbours instead; whoever converts them to Hugging
Face's layout reorders the rows of queries and keys.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

SCALINGS = ('linear', 'llama3')


class Scaling(NamedTuple):
    """How frequencies are lowered for texts longer than those of the first training.

    Attributes:
        kind: entry of SCALINGS. linear: all of them are divided by `factor`. llama3: those that
            turn less than `low` times within `original` tokens are, those that turn more than
            `high` times stay, and those between are blended (Llama 3.1).
        factor: divisor.
        low: of llama3, turns.
        high: of llama3, turns.
        original: of llama3, tokens.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


# Cosine and sine of the angles, [B N 1 kv/2] each: the same for all heads and layers.
Rotation = tuple[Float32[Array, 'B N 1 half'], Float32[Array, 'B N 1 half']]


def frequencies(
    head_width: int, base: float, scaling: Scaling | None = None
) -> Float[np.ndarray, ' half']:
    """Radians a position, of each pair: base^(-2i / head_width), scaled."""
    plain = base ** (-np.arange(0, head_width, 2) / head_width)
    if scaling is None:
        return plain
    if scaling.kind == 'linear':
        return plain / scaling.factor
    turns = scaling.original * plain / (2 * math.pi)
    kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)


def rotation(positions: Int[Array, 'B N'], frequencies: Float[np.ndarray, ' half']) -> Rotation:
    """The angles of tokens at these positions, in float32: bfloat16 cannot tell positions apart."""
    angles = positions[:, :, None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x: Float[Array, 'B N heads kv'], rotation: Rotation) -> Float[Array, 'B N heads kv']:
    """Turn the pairs of queries or keys; their type stays."""
    cosine, sine = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
