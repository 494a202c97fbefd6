"""A queue of keys: the rows of the newest batches, the oldest overwritten first (MoCo).

A queue is a tree of arrays, part of an objective's state, and these functions are pure. Rows enter
in the order of the global batch, so a queue is the same on any mesh. It is not sharded: every
query is compared with all of it, and 16384 keys of width 128 take 8 MB.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

Queue = dict[str, Any]


def create(size: int, columns: Mapping[str, jax.ShapeDtypeStruct]) -> Queue:
    """An empty queue.

    Args:
        size: number of rows Q that it holds.
        columns: name -> shape and type of one row's entry.

    Returns:
        'columns', {name: [Q …]}; 'next', int32 [], the place of the next row; 'is_full', bool [].
    """
    arrays = {}
    for name, entry in columns.items():
        arrays[name] = jnp.zeros((size, *entry.shape), entry.dtype)
    return {
        'columns': arrays,
        'next': jnp.zeros((), jnp.int32),
        'is_full': jnp.zeros((), bool),
    }


def size_of(queue: Queue) -> int:
    """Number of rows Q that the queue holds."""
    return len(next(iter(queue['columns'].values())))


def is_filled(queue: Queue) -> Bool[Array, ' Q']:
    """Which places of the queue hold a row."""
    return (jnp.arange(size_of(queue)) < queue['next']) | queue['is_full']


def push(
    queue: Queue,
    rows: Mapping[str, Shaped[Array, 'B ...']],
    valid: Bool[Array, ' B'],
) -> Queue:
    """The queue with the rows of a batch, which overwrite the oldest ones.

    Rows that are not valid are left out: those behind them move up, so that a full queue holds Q
    keys, all of them real. No gradient flows through a queue.

    Args:
        queue: as it was.
        rows: column -> its entries of the batch.
        valid: which rows enter.

    Raises:
        ValueError: the batch is larger than the queue, or has other columns.
    """
    columns, size = queue['columns'], size_of(queue)
    if len(valid) > size:
        raise ValueError(
            f'expected a batch of at most {size} rows, the size of the queue, got {len(valid)}'
        )
    if set(rows) != set(columns):
        raise ValueError(f'expected the columns {sorted(columns)}, got {sorted(rows)}')
    # The n-th valid row goes n places behind the newest.
    place = (queue['next'] + jnp.cumsum(valid, dtype=jnp.int32) - 1) % size  # [B]
    # Beyond the end, where `mode='drop'` leaves rows out: shapes cannot depend on their number.
    place = jnp.where(valid, place, size)
    pushed = {}
    for name, column in columns.items():
        entries = jax.lax.stop_gradient(rows[name]).astype(column.dtype)
        pushed[name] = column.at[place].set(entries, mode='drop')
    end = queue['next'] + jnp.sum(valid, dtype=jnp.int32)
    return {
        'columns': pushed,
        'next': end % size,
        'is_full': queue['is_full'] | (end >= size),
    }
