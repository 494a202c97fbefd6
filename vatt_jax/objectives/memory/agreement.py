"""Records that agree: neighbours of one another in every memory (AVID-CMA)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from vatt_jax.objectives.memory import table
from vatt_jax.objectives.memory.table import Table

# Queries and keys of one block of scores, at most: 8 MiB in float32 for each memory.
QUERIES, KEYS = 512, 4096


class Neighbours(NamedTuple):
    """The best of what was seen so far, best first, of equal ones the one of the lower number.

    Attributes:
      agreement: the least of the cosines of all memories.
      records: their numbers.
    """

    agreement: Float[Array, '*rows X']
    records: Int[Array, '*rows X']


def find_neighbours(tables: Sequence[Table], num_records: int, count: int) -> Neighbours:
    """The records that agree best with each record, itself left out.

    Two records agree as much as they do in the memory in which they agree least: a is near b by
    sight and by sound. Blockwise, so that scores of all pairs never exist; every device has the
    queries of its rows, and blocks of keys come to all devices in turn.

    Args:
      tables: unit vectors, rows on the devices as in table.py.
      num_records: records M, fewer than rows; the rest is padding.
      count: neighbours X of each, fewer than M.

    Returns:
      [rows X] each, spread as the tables are.
    """
    axes = table.data_axes(tables[0])
    search = functools.partial(_search_here, axes, num_records, count)
    if axes:
        rows = P(axes)
        in_specs = (rows,) * len(tables)
        # check_vma off: nothing in here is differentiated, and what loops carry would have to be
        # declared as different on every device.
        search = jax.shard_map(search, in_specs=in_specs, out_specs=rows, check_vma=False)
    return search(*tables)


def _search_here(axes: tuple[str, ...], num_records: int, count: int, *tables: Table) -> Neighbours:
    num_local, _ = tables[0].shape
    num_rows = num_local * jax.lax.axis_size(axes) if axes else num_local
    query_size = _largest_divisor(num_local, QUERIES)
    key_size = _largest_divisor(num_local, KEYS)
    first_row = jax.lax.axis_index(axes) * num_local if axes else 0

    def blocks(x: jax.Array) -> jax.Array:
        return x.reshape(-1, query_size, *x.shape[1:])

    queries = tuple(blocks(rows) for rows in tables)  # [blocks q E]
    query_records = blocks(first_row + jnp.arange(num_local))  # [blocks q]

    def visit_keys(best: Neighbours, first_key: jax.Array) -> tuple[Neighbours, None]:
        keys = tuple(_fetch(axes, rows, first_key - first_row, key_size) for rows in tables)
        records = first_key + jnp.arange(key_size)

        def visit_queries(inputs: tuple) -> Neighbours:
            query, query_records, best = inputs
            return update(best, query, query_records, keys, records, num_records)

        return jax.lax.map(visit_queries, (queries, query_records, best)), None

    shape = (*query_records.shape, count)
    nothing = Neighbours(jnp.full(shape, -jnp.inf), jnp.full(shape, -1, jnp.int32))
    best, _ = jax.lax.scan(visit_keys, nothing, jnp.arange(0, num_rows, key_size))
    return Neighbours(
        best.agreement.reshape(num_local, count), best.records.reshape(num_local, count)
    )


def _largest_divisor(length: int, limit: int) -> int:
    """The largest divisor of a length that is not above a limit."""
    return next(size for size in range(min(length, limit), 0, -1) if length % size == 0)


def _fetch(axes: tuple[str, ...], rows: Table, start: jax.Array, size: int) -> jax.Array:
    """A block of rows [size E], on all devices, of the one that has them.

    Args:
      start: counted from this device's first row; beyond its rows, where another one has them.
    """
    block = jax.lax.dynamic_slice_in_dim(rows, start, size)
    if not axes:
        return block
    is_here = (start >= 0) & (start < len(rows))
    # The sum of one block and zeros is the block.
    return jax.lax.psum(jnp.where(is_here, block, 0), axes)


def update(
    best: Neighbours,
    queries: Sequence[Float[Array, 'q E']],
    query_records: Int[Array, ' q'],
    keys: Sequence[Float[Array, 'keys E']],
    records: Int[Array, ' keys'],
    num_records: int | Int[Array, ''],
) -> Neighbours:
    """The best of the old neighbours and of a block of keys.

    Args:
      best: [q X].
      queries: of each memory.
      query_records: their records, which are no neighbours of themselves.
      keys: of each memory.
      records: of the keys, above those of `best`.
      num_records: M; keys of other records are padding.
    """
    agreement = _agreement(queries, keys)  # [q keys]
    is_other = query_records[:, None] != records
    is_allowed = is_other & (records < num_records)
    return _best_of(best, jnp.where(is_allowed, agreement, -jnp.inf), records)


def _agreement(queries: Sequence[jax.Array], keys: Sequence[jax.Array]) -> jax.Array:
    """[q keys], the least of the cosines of all memories."""
    cosines = [
        jnp.matmul(query, key.T, precision='highest')
        for query, key in zip(queries, keys, strict=True)
    ]
    return functools.reduce(jnp.minimum, cosines)


def _best_of(best: Neighbours, agreement: jax.Array, records: jax.Array) -> Neighbours:
    """The best of the old neighbours and of a block of keys.

    Args:
      best: [q X].
      agreement: [q keys].
      records: int [keys], above those of `best`.
    """
    count = best.records.shape[-1]
    # Of equal values top_k takes the first, and old ones come first.
    candidates = jnp.concatenate([best.agreement, agreement], -1)
    agreement, place = jax.lax.top_k(candidates, count)
    is_new = place >= count
    old = jnp.take_along_axis(best.records, jnp.where(is_new, 0, place), -1)
    new = records[jnp.where(is_new, place - count, 0)]
    return Neighbours(agreement, jnp.where(is_new, new, old))
