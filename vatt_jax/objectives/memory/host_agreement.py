"""Records that agree, in memories on the host: what agreement.py finds in those on devices."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from vatt_jax.objectives.memory import agreement, table
from vatt_jax.objectives.memory.agreement import KEYS, QUERIES, Neighbours

# Blocks of each memory on a device at a time: queries stay there while all keys come by.
QUERY_BLOCKS, KEY_BLOCKS = 256, 16


def find_neighbours(
    tables: Sequence[Float[np.ndarray, 'M E']], own: slice, count: int
) -> tuple[Float[np.ndarray, 'n X'], Int[np.ndarray, 'n X']]:
    """The records that agree best with each record of this host, itself left out.

    Every host has whole tables: each finds those of its own records, on its own devices, and
    nothing is exchanged.

    Args:
      tables: unit vectors.
      own: the records of this host.
      count: neighbours X of each, fewer than M.

    Returns:
      (their agreement, their records), as of `agreement.find_neighbours`.
    """
    size = min(QUERIES, own.stop - own.start)
    found = []
    with _own_devices() as num_devices:
        blocks = _round_up(math.ceil((own.stop - own.start) / size), num_devices)
        blocks = min(blocks, QUERY_BLOCKS * num_devices)
        for first in range(own.start, own.stop, blocks * size):
            found.append(_find(tables, first, (blocks, size), count))
    num_queries = own.stop - own.start
    agreements, records = (np.concatenate(parts) for parts in zip(*found, strict=True))
    # What is beyond the last query is padding.
    return agreements[:num_queries], records[:num_queries]


def _find(
    tables: Sequence[np.ndarray], first: int, shape: tuple[int, int], count: int
) -> list[np.ndarray]:
    """(agreement, records) of the neighbours [blocks·q X] of the records from `first` on."""
    num_records = len(tables[0])
    key_size = min(KEYS, num_records)
    key_blocks = min(KEY_BLOCKS, math.ceil(num_records / key_size))
    records = first + np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    queries = tuple(_place(_blocks(rows, first, shape)) for rows in tables)
    best = Neighbours(
        _place(np.full((*shape, count), -np.inf, np.float32)),
        _place(np.full((*shape, count), -1, np.int32)),
    )
    for first_key in range(0, num_records, key_blocks * key_size):
        keys = tuple(_blocks(rows, first_key, (key_blocks, key_size)) for rows in tables)
        best = _visit(best, queries, _place(records), keys, np.int32(first_key), num_records)
    return [np.asarray(part).reshape(-1, count) for part in best]


def _blocks(rows: np.ndarray, first: int, shape: tuple[int, int]) -> np.ndarray:
    """Rows from `first` on as [blocks q E], zeros after the last one."""
    found = np.zeros((math.prod(shape), rows.shape[1]), rows.dtype)
    there = rows[first : first + len(found)]
    found[: len(there)] = there
    return found.reshape(*shape, -1)


@jax.jit
def _visit(
    best: Neighbours,
    queries: tuple[jax.Array, ...],
    query_records: jax.Array,
    keys: tuple[jax.Array, ...],
    first_key: jax.Array,
    num_records: jax.Array,
) -> Neighbours:
    """The best of the old neighbours and of some blocks of keys [c k E]."""
    axes = table.spread_axes()
    visit: Any = _visit_here
    if axes:
        rows, whole = P(axes), P()
        # check_vma off: as in agreement.py.
        visit = jax.shard_map(
            visit,
            in_specs=(rows, rows, rows, whole, whole, whole),
            out_specs=rows,
            check_vma=False,
        )
    return visit(best, queries, query_records, keys, first_key, num_records)


def _visit_here(
    best: Neighbours,
    queries: tuple[jax.Array, ...],
    query_records: jax.Array,
    keys: tuple[jax.Array, ...],
    first_key: jax.Array,
    num_records: jax.Array,
) -> Neighbours:
    """`_visit`, on one device's blocks of queries."""
    num_blocks, size, _ = keys[0].shape

    def visit_keys(best: Neighbours, block: tuple) -> tuple[Neighbours, None]:
        number, *block_keys = block
        records = first_key + number * size + jnp.arange(size)

        def visit_queries(inputs: tuple) -> Neighbours:
            query, query_records, best = inputs
            return agreement.update(best, query, query_records, block_keys, records, num_records)

        return jax.lax.map(visit_queries, (queries, query_records, best)), None

    best, _ = jax.lax.scan(visit_keys, best, (jnp.arange(num_blocks), *keys))
    return best


# ---- Where queries lie: over the data axes of this host's part of the mesh.


@contextlib.contextmanager
def _own_devices() -> Iterator[int]:
    """Compute on this host's part of the mesh; yields over how many devices queries are spread."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        yield 1
        return
    with jax.set_mesh(mesh.local_mesh):
        yield math.prod(mesh.local_mesh.shape[axis] for axis in table.spread_axes())


def _place(blocks: np.ndarray) -> jax.Array:
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jnp.asarray(blocks)
    return jax.device_put(blocks, NamedSharding(mesh, P(table.spread_axes() or None)))


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple
