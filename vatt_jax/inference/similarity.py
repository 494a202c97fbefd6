"""Cosines of embeddings that users hand over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vatt_jax.config import ConfigError
from vatt_jax.inference import arrays

# Keys of what `embed` returns that tell its rows apart.
ABOUT_ROWS = ('valid', 'start', 'item')


def cosines(a: Any, b: Any, space: str | None) -> Float[np.ndarray, '...'] | np.float32:
    """Cosines of two sides; see `vatt_jax.api.Model.similarity`.

    Args:
        a: one modality of what `embed` returned, or an array [A E] or [E].
        b: the other side.
        space: the common space; None: the only one that both have.

    Returns:
        float32 [A B], without A or B where a side is a single embedding; -inf where a row is not
        valid.

    Raises:
        ConfigError: the two cannot be compared.
    """
    x, y = _compared(a, b, space)
    products = _unit(np.atleast_2d(x)) @ _unit(np.atleast_2d(y)).T
    is_valid = _valid_rows(a, x)[:, None] & _valid_rows(b, y)
    products = np.where(is_valid, products, -np.inf)
    if y.ndim == 1:
        products = products[:, 0]
    return products[0] if x.ndim == 1 else products


def _compared(a: Any, b: Any, space: str | None) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of both sides in one space."""
    sides = {'a': a, 'b': b}
    for name, side in sides.items():
        if isinstance(side, Mapping) and 'pooled' not in side:
            raise ConfigError(
                f'similarity({name}=…): expected one modality of what embed returned, such as '
                f"out['video'], or an array [N E], got a dict of {', '.join(map(str, side))}"
            )
    mappings = [set(side) for side in sides.values() if isinstance(side, Mapping)]
    if mappings and space is None:
        shared = set.intersection(*mappings) - {'pooled', *ABOUT_ROWS}
        if len(shared) != 1:
            raise ConfigError(
                'similarity(space=None): expected one common space of both, '
                f'got {", ".join(sorted(shared)) or "none"}; name one with space='
            )
        (space,) = shared
    x, y = (_in_space(side, space, name) for name, side in sides.items())
    if x.shape[-1] != y.shape[-1]:
        raise ConfigError(
            f'similarity: expected embeddings of one width, got {list(x.shape)} and {list(y.shape)}'
        )
    return x, y


def _in_space(side: Any, space: str | None, name: str) -> np.ndarray:
    if isinstance(side, Mapping):
        spaces = [key for key in side if key not in ABOUT_ROWS]
        if space not in spaces:
            raise ConfigError(
                f'similarity(space={space!r}): {name} has {", ".join(spaces)}; name one that '
                'both have'
            )
        side = side[space]
    x = arrays.as_array(side, f'similarity({name}=…)')
    if x.ndim not in (1, 2):
        raise ConfigError(f'similarity({name}=…): expected [N E] or [E], got {list(x.shape)}')
    return x.astype(np.float32)


def _valid_rows(side: Any, x: np.ndarray) -> Bool[np.ndarray, ' N']:
    if isinstance(side, Mapping) and 'valid' in side:
        return np.atleast_1d(side['valid'])
    return np.ones(len(np.atleast_2d(x)), bool)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
