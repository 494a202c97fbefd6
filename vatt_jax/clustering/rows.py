"""Rows on the host -> rows spread over devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Shaped


def rows_on_devices(
    host: Shaped[np.ndarray, 'M ...'], sharding: NamedSharding, num_rows: int
) -> jax.Array:
    """Spreads rows that every host has over all devices, padded with zeros to `num_rows`.

    Args:
      host: The rows.
      sharding: By rows.
      num_rows: Rows with padding, a multiple of the number of devices.
    """

    # Each process is asked for the rows of its own devices only, and only the part that reaches
    # beyond the last row is copied.
    def part(index: Any) -> np.ndarray:  # a slice for each axis
        rows = host[index]
        first, last, _ = index[0].indices(num_rows)
        missing = last - first - len(rows)
        if not missing:
            return rows
        return np.concatenate([rows, np.zeros((missing, *host.shape[1:]), host.dtype)])

    return jax.make_array_from_callback((num_rows, *host.shape[1:]), sharding, part)
