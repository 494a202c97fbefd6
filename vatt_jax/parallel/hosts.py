"""What each process holds a part of: its own rows, and sums and joins over all processes.

All functions but `own_rows` are collective: every process calls them, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Shaped

# Bytes that one exchange of `blocks_of_all` brings to a process.
EXCHANGED_BYTES = 1 << 26
TEXT_BYTES = 512  # of `first_text`, in UTF-8


def stretch(num_rows: int, process: int, num_processes: int) -> tuple[int, int]:
    """The rows of one process where consecutive rows are dealt: (first, last + 1).

    Processes differ by a row at most.
    """
    return num_rows * process // num_processes, num_rows * (process + 1) // num_processes


def own_stretch(num_rows: int) -> slice:
    """The rows of this process, see `stretch`."""
    return slice(*stretch(num_rows, jax.process_index(), jax.process_count()))


def gather(part: Any) -> Shaped[np.ndarray, 'processes ...']:
    """The arrays of all processes, in their order.

    Args:
        part: this process's array, of the same shape and dtype on all.
    """
    part = np.ascontiguousarray(part).reshape(np.shape(part))
    if jax.process_count() == 1:
        return part[None]
    # Imported where it is used: it starts the distributed runtime's helpers.
    from jax.experimental import multihost_utils

    # As bytes: JAX would round what has 64 bits.
    gathered = multihost_utils.process_allgather(np.frombuffer(part.tobytes(), np.uint8))
    return np.ascontiguousarray(gathered).view(part.dtype).reshape(-1, *part.shape)


def total(part: Any) -> Any:
    """The sum over all processes of their numbers or arrays, the same to the bit on each."""
    return gather(part).sum(0)


def first_text(text: str) -> str:
    """The text of the first process that has one, cut at TEXT_BYTES; '' where none has."""
    encoded = text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b'\0')
    for row in gather(np.frombuffer(encoded, np.uint8)):
        found = row.tobytes().rstrip(b'\0').decode(errors='ignore')
        if found:
            return found
    return ''


def own_rows(array: jax.Array) -> Shaped[np.ndarray, 'n ...']:
    """The rows that lie on this process's devices, of an array whose first axis is divided."""
    if array.is_fully_addressable:
        return np.asarray(array)
    # Rows may lie on several devices (where other mesh axes repeat them).
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[first]) for first in sorted(shards)])


def own_stretch_of(array: jax.Array, num_rows: int) -> Shaped[np.ndarray, 'n ...']:
    """This process's stretch (`own_stretch`) of an array whose rows lie on the devices of all.

    No process and no device holds more of the others' rows than one exchange brings.

    Args:
        array: [rows ...], divided along its first axis; its first `num_rows` rows are dealt.
        num_rows: of the stretches of all processes together.
    """
    own = own_stretch(num_rows)
    if array.is_fully_addressable:
        return np.asarray(array)[own]
    # Which rows lie on whose devices is the mesh's affair: rows travel with their numbers.
    numbers = []
    for shard in array.addressable_shards:
        first = shard.index[0].start or 0
        numbers.append(np.arange(first, first + len(shard.data)))
    return exchanged(np.unique(np.concatenate(numbers)), own_rows(array), own)


def exchanged(
    numbers: Int[np.ndarray, ' n'], rows: Shaped[np.ndarray, 'n ...'], wanted: slice
) -> Shaped[np.ndarray, 'm ...']:
    """The wanted rows, whichever process has them.

    Args:
        numbers: of this process's rows.
        rows: these rows.
        wanted: a stretch of numbers, of which each is some process's.
    """
    kind = np.dtype([('number', np.int64), ('row', rows.dtype, rows.shape[1:])])
    part = np.empty(len(rows), kind)
    part['number'], part['row'] = numbers, rows
    found = np.empty((wanted.stop - wanted.start, *rows.shape[1:]), rows.dtype)
    for _, block in blocks_of_all(part):
        is_wanted = (block['number'] >= wanted.start) & (block['number'] < wanted.stop)
        found[block['number'][is_wanted] - wanted.start] = block['row'][is_wanted]
    return found


def blocks_of_all(
    part: Shaped[np.ndarray, 'n ...'],
) -> Iterator[tuple[int, Shaped[np.ndarray, 'b ...']]]:
    """All rows of all processes, block by block: (number of the first row, rows).

    Rows are numbered through, those of process 0 first. Blocks come in any order.

    Args:
        part: this process's rows, any number of them.
    """
    num_rows = gather(np.int64(len(part)))
    first_rows = np.cumsum(num_rows) - num_rows
    row_bytes = max(1, part[:0].itemsize * int(np.prod(part.shape[1:])))
    size = max(1, EXCHANGED_BYTES // (row_bytes * len(num_rows)))
    for begin in range(0, int(num_rows.max()), size):
        # Collectives want one shape on all processes.
        block = np.zeros((min(size, int(num_rows.max()) - begin), *part.shape[1:]), part.dtype)
        own = part[begin : begin + len(block)]
        block[: len(own)] = own
        for process, rows in enumerate(gather(block)):
            is_there = max(0, min(len(rows), int(num_rows[process]) - begin))
            if is_there:
                yield int(first_rows[process]) + begin, rows[:is_there]
