"""Columns: what a refresh says of each of M training records, where M may be a hundred million.

The order of examples gives any host any record, so no host can do with a part of the rows. What a
host holds is bounded otherwise: large columns lie in a file that is mapped into memory, whose pages
are read when a batch looks at them and given up when memory is short. A checkpoint holds a column
in pieces of consecutive rows, one written by each host, which any number of hosts can read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vatt_jax.parallel import hosts
from vatt_jax.training.table_storage import Snapshot

# Columns of fewer bytes stay in memory.
MAPPED_BYTES = 1 << 26
ZEROS = bytes(1 << 20)
# Of a column at a time, as a checkpoint is written.
WRITTEN_BYTES = 1 << 23
# Describes the pieces of a checkpoint.
DESCRIPTION = 'columns.json'

Columns = dict[str, np.ndarray]
# What a checkpoint is written of: columns, and tables of the host as they were at its step.
SavedColumns = Mapping[str, np.ndarray | Snapshot]


def keep(columns: Mapping[str, np.ndarray]) -> Columns:
    """The columns as a run keeps them: large ones mapped from a file.

    The file is one of the system's temporary folder (the variable TMPDIR), gone with the process.

    Args:
      columns: name -> [M …], which no one changes any more.
    """
    return {name: _kept(column) for name, column in columns.items()}


def join(parts: Mapping[str, np.ndarray]) -> Columns:
    """Every process's records -> whole columns on every process, kept as `keep` does.

    Args:
      parts: name -> [m …], this process's records; they follow on those of the process before.
    """
    if jax.process_count() == 1:
        return keep(parts)
    return {name: _joined(np.asarray(part)) for name, part in parts.items()}


def _joined(part: np.ndarray) -> np.ndarray:
    shape = (int(hosts.total(np.int64(len(part)))), *part.shape[1:])
    column = room_for(shape, part.dtype)
    for first, rows in hosts.blocks_of_all(part):
        column[first : first + len(rows)] = rows
    column.setflags(write=False)
    return column


def room_for(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array to be filled, in memory or mapped from a nameless file."""
    size = math.prod(shape) * dtype.itemsize
    if size >= MAPPED_BYTES:
        try:
            with tempfile.TemporaryFile() as file:
                # The room is taken before anything is exchanged: storing into a mapping kills a
                # process whose disk is full, and a process that begins anew leaves others waiting.
                for begin in range(0, size, len(ZEROS)):
                    file.write(ZEROS[: size - begin])
                file.flush()
                return np.memmap(file, dtype, 'r+', shape=shape)
        except OSError:
            # As in `_join`.
            pass
    return np.empty(shape, dtype)


def _kept(column: np.ndarray) -> np.ndarray:
    if isinstance(column, np.memmap):
        return column
    array = np.asarray(column)
    return _join(lambda: [array], array.shape, array.dtype)


def _join(
    blocks: Callable[[], Iterable[np.ndarray]], shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Blocks of rows as one array, in memory or mapped; `blocks` gives them, as often as asked."""
    if math.prod(shape) * dtype.itemsize >= MAPPED_BYTES:
        try:
            return _mapped(blocks(), shape, dtype)
        except OSError:
            # Most likely the temporary folder has no room. Memory may have.
            pass
    parts = list(blocks())
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _mapped(blocks: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Blocks of rows in a nameless file, mapped; they are not to be changed (but: `writable`)."""
    # Nameless, so that nothing stays behind however the process ends. Written and then mapped: of a
    # full disk a write is told, while storing into a mapping kills the process.
    with tempfile.TemporaryFile() as file:
        for block in blocks:
            file.write(np.ascontiguousarray(block).view(np.uint8).reshape(-1).data)
        file.flush()
        column = np.memmap(file, dtype, 'r+', shape=shape)
    column.setflags(write=False)
    return column


def writable(column: np.ndarray) -> np.ndarray:
    """The column, for its only holder to write from now on; a copy where that cannot be."""
    if not column.flags.writeable:
        try:
            column.setflags(write=True)
        except ValueError:
            # Its memory is another library's.
            return np.array(column)
    return column


def as_declared(
    columns: Mapping[str, np.ndarray], declared: Mapping[str, jax.ShapeDtypeStruct]
) -> Columns:
    """The columns in the types that the objective declares; older runs stored wider ones."""
    converted = {}
    for name, column in columns.items():
        if name in declared:
            column = column.astype(declared[name].dtype, copy=False)
        converted[name] = column
    return converted


def lookup(columns: Mapping[str, np.ndarray], records: np.ndarray) -> dict[str, np.ndarray]:
    """The entries of these records, in memory.

    Args:
      columns: name -> [M …].
      records: int [B], rows of the columns.
    """
    return {name: np.asarray(column[records]) for name, column in columns.items()}


# ---- A checkpoint's pieces. `folder` is a pathlib.Path or one of etils.epath.


def write_piece(folder: Any, columns: SavedColumns, host: int, num_hosts: int) -> None:
    """Write one host's rows of all columns, and as host 0 their description.

    Args:
      folder: of the pieces, which exists.
      columns: name -> [M …], the same on all hosts.
      host: number of this host.
      num_hosts: that write.
    """
    description: dict[str, Any] = {'pieces': num_hosts, 'columns': {}}
    for name, column in columns.items():
        # The names of types, which also those have that NumPy itself does not know (bfloat16).
        description['columns'][name] = {'shape': column.shape, 'dtype': column.dtype.name}
        first, last = hosts.stretch(len(column), host, num_hosts)
        with (folder / _piece_name(name, host, num_hosts)).open('wb') as file:
            _write_rows(file, column, first, last)
    if host == 0:
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))


def _write_rows(file: Any, column: np.ndarray | Snapshot, first: int, last: int) -> None:
    """Write rows as `np.save` would, block by block: a snapshot copies what it is asked for."""
    header = np.lib.format.header_data_from_array_1_0(column[first:first])
    header['shape'] = (last - first, *column.shape[1:])
    np.lib.format.write_array_header_1_0(file, header)
    row_bytes = max(1, column.dtype.itemsize * math.prod(column.shape[1:]))
    size = max(1, WRITTEN_BYTES // row_bytes)
    for begin in range(first, last, size):
        block = column[begin : min(begin + size, last)]
        file.write(np.ascontiguousarray(block).view(np.uint8).reshape(-1).data)


def has_pieces(folder: Any) -> bool:
    """Whether a folder is one of `write_piece`."""
    return (folder / DESCRIPTION).exists()


def read_pieces(folder: Any, names: Collection[str] | None = None) -> Columns:
    """Read columns, whoever wrote the pieces; kept as `keep` does.

    Args:
      folder: of the pieces.
      names: of those to read that there are; None: all.

    Raises:
      OSError: a piece cannot be read.
      ValueError: a piece is not of this checkpoint.
    """
    description = json.loads((folder / DESCRIPTION).read_text())
    columns = {}
    for name, about in description['columns'].items():
        if names is not None and name not in names:
            continue
        stored = _StoredColumn(
            folder, name, tuple(about['shape']), np.dtype(about['dtype']), description['pieces']
        )
        columns[name] = _join(stored.blocks, stored.shape, stored.dtype)
    return columns


@dataclasses.dataclass(frozen=True)
class _StoredColumn:
    """A column in pieces."""

    folder: Any
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    num_pieces: int

    def blocks(self) -> Iterator[np.ndarray]:
        """Read one piece after another."""
        for piece in range(self.num_pieces):
            yield self._read(piece)

    def _read(self, piece: int) -> np.ndarray:
        path = self.folder / _piece_name(self.name, piece, self.num_pieces)
        with path.open('rb') as file:
            # No pickles: a folder from elsewhere must not run code.
            rows = np.load(file, allow_pickle=False)
        first, last = hosts.stretch(self.shape[0], piece, self.num_pieces)
        expected = (last - first, *self.shape[1:])
        if rows.shape != expected or rows.dtype.itemsize != self.dtype.itemsize:
            raise ValueError(
                f'{path}: expected {self.dtype.name} of shape {expected}, got {rows.dtype} of '
                f'{rows.shape}'
            )
        # Types that NumPy does not know come back as bytes of their width.
        return rows.view(self.dtype)


def _piece_name(name: str, piece: int, num_pieces: int) -> str:
    # Names are the objective's, and may hold a slash.
    quoted = urllib.parse.quote(name, safe='')
    return f'{quoted}-{piece:05d}-of-{num_pieces:05d}.npy'
