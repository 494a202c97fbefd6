"""Memory banks: a unit vector for each training record, on the devices or on the host.

On the devices, the rows of a table are spread over the data axes of the mesh. A step compares its
clips with a few thousand rows that lie anywhere. Vectors of rows do not travel for that: queries
and row numbers, which are small, go to all devices, each of them scores the rows that lie there,
and the scores come back. Inside `jax.set_mesh` the mesh is found by itself.

On the host (training/host_tables.py) a step is given the rows that its clips look up, and returns
those that it writes: `joined_scores` and `new_rows` are what `scores` and `write` are there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Integer

from vatt_jax.config import ConfigError
from vatt_jax.objectives.heads import unit
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng

# Tables have a multiple of so many rows on any mesh, so that a checkpoint restores onto every one
# whose data devices divide it: powers of two up to 1024, and three times these.
ROW_MULTIPLE = 3 * 1024
# Numbers of a table that are read at once: 16 MiB in float32.
BLOCK = 1 << 22

Table = Float[Array, 'rows E']


def num_rows(num_records: int) -> int:
    """Rows of the table of so many records; the last ones are padding."""
    return math.ceil(num_records / ROW_MULTIPLE) * ROW_MULTIPLE


def init(key: jax.Array, num_records: int, width: int) -> Any:
    """A table of random unit vectors, boxed with logical axes; rows of padding are zeros.

    The vector of a record depends on the key and its number alone.

    Args:
      key: of these vectors.
      num_records: records of the training set M.
      width: of an embedding E.
    """

    def unit_rows(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        records = jnp.arange(shape[0], dtype=jnp.uint32)
        is_record = records < num_records
        return jnp.where(is_record[:, None], first_rows(key, records, width), 0).astype(dtype)

    return sharding.logical(unit_rows, 'memory', None)(key, (num_rows(num_records), width))


def first_rows(key: jax.Array, records: Integer[Array, ' n'], width: int) -> Float[Array, 'n E']:
    """Random unit vectors of some records: what `init` gives them.

    Args:
      key: of all vectors.
      records: their numbers.
      width: of an embedding E.
    """
    return unit(Rng(jax.random.bits(key), records.astype(jnp.uint32)).normal((width,)))


def scores(
    table: Table, queries: Float[Array, 'B E'], rows: Int[Array, 'B K']
) -> Float[Array, 'B K']:
    """Dot products of each query with its own choice of rows.

    The value and gradient of `dense_scores`, without the vectors [B K E] on the network or in
    memory. Queries and rows are spread like the batch.

    Args:
      table: carries no gradient.
      queries: of the batch.
      rows: row numbers; the score of one that is outside of the table is 0.
    """
    axes = data_axes(table)
    score = _on_devices(functools.partial(_scores_here, axes), axes, num_inputs=3)
    return score(jax.lax.stop_gradient(table), queries, rows)


def dense_scores(
    table: Table, queries: Float[Array, 'B E'], rows: Int[Array, 'B K']
) -> Float[Array, 'B K']:
    """What `scores` is, with all vectors in memory; rows must be in the table."""
    vectors = jax.lax.stop_gradient(table)[rows]  # [B K E]
    return jnp.einsum('bke,be->bk', vectors, queries, precision='highest')


def write(
    table: Table,
    records: Int[Array, ' B'],
    vectors: Float[Array, 'B E'],
    valid: Bool[Array, ' B'],
    momentum: float,
) -> Table:
    """The table with unit(momentum · old + (1 - momentum) · new) in the rows of some records.

    New is the mean of the record's valid vectors, where it occurs more than once. Rows of records
    that have none stay as they are, bit by bit.

    Args:
      table: as it was.
      records: row of each clip, in the table where valid.
      vectors: unit embeddings.
      valid: clips that count.
      momentum: share of the old vector.
    """
    axes = data_axes(table)
    write_here = functools.partial(_write_here, axes, momentum)
    return _on_devices(write_here, axes, num_inputs=4)(table, records, vectors, valid)


# ---- Rows of a table on the host, joined to the batch.


def joined_scores(
    rows: Float[Array, 'B K E'], queries: Float[Array, 'B E'], columns: Sequence[int]
) -> Float[Array, 'B k']:
    """Dot products of each query with some of the rows that its clip was given.

    Every device has the rows of its own clips, so nothing crosses the network.

    Args:
      rows: carry no gradient.
      queries: of the batch.
      columns: which of the K rows, ascending.
    """
    first, last = columns[0], columns[-1]
    # What lies between is scored too: picking vectors would copy them, picking scores costs little.
    vectors = jax.lax.stop_gradient(rows)[:, first : last + 1]
    found = jnp.einsum('bke,be->bk', vectors, queries, precision='highest')
    if len(columns) == last + 1 - first:
        return found
    return found[:, np.asarray(columns) - first]


def new_rows(
    old: Float[Array, 'B E'],
    records: Int[Array, ' B'],
    vectors: Float[Array, 'B E'],
    valid: Bool[Array, ' B'],
    momentum: float,
) -> Float[Array, 'B E']:
    """The rows of the clips' records as `write` would leave them, the same on all devices.

    Clips of one record have equal rows, also those that do not count.

    Args:
      old: the rows as they were.
      records, vectors, valid, momentum: as of `write`.
    """
    # Whole everywhere: sums over clips of one record must not depend on where these lie.
    old, records, vectors, valid = _replicated((old, records, vectors, valid))
    new, counts = _mean_by_record(records, vectors, valid)
    return jnp.where(counts[:, None] > 0, _moved(old, new, momentum), old)


def _replicated(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    if jax.sharding.get_abstract_mesh().empty:
        return arrays
    return jax.lax.with_sharding_constraint(arrays, P())


# ---- Where rows lie.


def data_axes(table: Table) -> tuple[str, ...]:
    """The mesh axes that rows are spread over; () on one device.

    Raises:
      ConfigError: the devices do not divide the rows.
    """
    axes = spread_axes()
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if len(table) % devices:
        raise ConfigError(
            f'config.mesh: expected replica x fsdp to divide the {len(table)} rows of a memory, '
            f'got {devices}. Use a divisor of {ROW_MULTIPLE} devices.'
        )
    return axes


def spread_axes() -> tuple[str, ...]:
    """The axes of the mesh that rows of any number are spread over; () on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    return tuple(axis for axis in sharding.RULES['memory'] or () if mesh.shape[axis] > 1)


def _on_devices(
    function: Callable[..., Any], axes: tuple[str, ...], num_inputs: int
) -> Callable[..., Any]:
    """The function, run by every device on its rows of each input."""
    if not axes:
        return function
    rows = P(axes)
    return jax.shard_map(function, in_specs=(rows,) * num_inputs, out_specs=rows)


def _gather(axes: tuple[str, ...], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The rows of all devices, in their global order."""
    if not axes:
        return arrays
    return tuple(jax.lax.all_gather(array, axes, tiled=True) for array in arrays)


def _local_rows(
    axes: tuple[str, ...], table: Table, rows: Int[Array, '...']
) -> tuple[jax.Array, jax.Array]:
    """(rows counted from the first one of this device, whether they lie here)."""
    local = rows
    if axes:
        local = rows - jax.lax.axis_index(axes) * len(table)
    return local, (local >= 0) & (local < len(table))


# ---- Below: on one device's share.


def _scores_here(
    axes: tuple[str, ...], table: Table, queries: jax.Array, rows: jax.Array
) -> jax.Array:
    queries, rows = _gather(axes, queries, rows)
    local, is_here = _local_rows(axes, table, rows)  # [B K] of all devices

    # The backward pass reads the table again, instead of keeping what was read.
    @jax.checkpoint
    def score(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        query, local, is_here = inputs  # [E], [K], [K]
        vectors = table[jnp.where(is_here, local, 0)]  # [K E]
        # Over a small temperature, products rounded to bfloat16 would be far off.
        return jnp.where(is_here, jnp.matmul(vectors, query, precision='highest'), 0)

    numbers_per_query = rows.shape[1] * table.shape[1]
    block = max(1, BLOCK // numbers_per_query)
    found = jax.lax.map(score, (queries, local, is_here), batch_size=block)  # [B K]
    if not axes:
        return found
    # All but one of the terms of each sum are 0.
    return jax.lax.psum_scatter(found, axes, tiled=True)


def _write_here(
    axes: tuple[str, ...],
    momentum: float,
    table: Table,
    records: jax.Array,
    vectors: jax.Array,
    valid: jax.Array,
) -> Table:
    records, vectors, valid = _gather(axes, records, vectors, valid)
    new, _ = _mean_by_record(records, vectors, valid)
    local, is_here = _local_rows(axes, table, records)
    is_written = is_here & valid
    old = table[jnp.where(is_written, local, 0)]  # [B E]
    updated = _moved(old, new, momentum)
    # What is not written goes to a row beyond the table, and is dropped there. Rows of one record
    # are equal, so it does not matter which of them is written last.
    target = jnp.where(is_written, local, len(table))
    return table.at[target].set(updated.astype(table.dtype), mode='drop')


def _moved(
    old: Float[Array, 'B E'], new: Float[Array, 'B E'], momentum: float
) -> Float[Array, 'B E']:
    return unit(momentum * old + (1 - momentum) * new)


def _mean_by_record(
    records: Int[Array, ' B'], vectors: Float[Array, 'B E'], valid: Bool[Array, ' B']
) -> tuple[Float[Array, 'B E'], Float[Array, ' B']]:
    """For each clip the mean of the valid vectors of its record, 0 without one; their number."""
    size = len(records)
    # Clips of one record share a number below B: the place of its first one in sorted order.
    group = jnp.searchsorted(jnp.sort(records), records)
    sums = jax.ops.segment_sum(jnp.where(valid[:, None], vectors, 0), group, size)  # [B E]
    counts = jax.ops.segment_sum(valid.astype(vectors.dtype), group, size)  # [B]
    return (sums / jnp.maximum(counts, 1)[:, None])[group], counts[group]
