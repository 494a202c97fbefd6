"""What a batch is: streams by name, beside arrays that say which examples they are of.

The contract is written in docs/architecture.md. A *stream* is named `modality[.view]` and is a dict
with the key `data`; everything else in a batch is not a stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vatt_jax.parallel import sharding

Batch = Mapping[str, Any]


def is_stream(value: Any) -> bool:
    """Whether an entry of a batch is a stream."""
    return isinstance(value, Mapping) and 'data' in value


def stream_names(batch: Batch) -> list[str]:
    """Names of the streams of a batch, in its order."""
    return [name for name, value in batch.items() if is_stream(value)]


def modality_of(stream: str) -> str:
    """'video.second' -> 'video'."""
    return stream.split('.')[0]


def device_part(batch: Batch) -> dict[str, Any]:
    """A host batch as it goes to the device: all of it, `position` reduced modulo 2^32.

    Positions key random bits, for which 32 bits are enough; JAX has no 64-bit integers by default.
    """
    arrays = {name: value for name, value in batch.items() if name != 'position'}
    position = np.asarray(batch['position'], np.int64)
    # The mask is applied to int64: positions grow over the whole run and may pass 2^32.
    arrays['position'] = (position & 0xFFFFFFFF).astype(np.uint32)
    return arrays


def place_on_mesh(batch: Batch, mesh: Mesh) -> dict[str, Any]:
    """This host's rows -> arrays of the global batch, sharded by rows over the mesh's data axes."""
    # Each host hands in its own rows [B/hosts …]; together they are one array [B …].
    rows = sharding.batch_sharding(mesh)

    def to_devices(x: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(rows, np.asarray(x))

    return jax.tree.map(to_devices, device_part(batch))


def gather_rows(batch: Batch, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named host arrays of every host's rows, in global order.

    In a single process these are the arrays themselves.
    """
    local = {name: np.asarray(batch[name]) for name in names}
    if jax.process_count() == 1:
        return local
    # Imported where it is used: it starts the distributed runtime's helpers.
    from jax.experimental import multihost_utils

    # tiled: joined along the rows, not stacked as [hosts B …].
    gathered = multihost_utils.process_allgather(local, tiled=True)
    return {name: np.asarray(value) for name, value in gathered.items()}
