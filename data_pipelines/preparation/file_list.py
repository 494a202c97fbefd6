"""A million media files as a sequence that lies on disk."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex, overload

import numpy as np
from jaxtyping import Int64

from data_pipelines.preparation.decoded_files import File
from data_pipelines.preparation.store import Store, to_bytes, to_text

_FIELDS = 'id, path, bytes, modified, part_start, part_end, offset'


class FileList(Sequence[File]):
    """Media files in the order in which they were added; no two have one id."""

    def __init__(self, store: Store):
        self._connection = store.connection
        self._table = store.new_table(
            '(number INTEGER PRIMARY KEY, id BLOB UNIQUE, stem BLOB, path BLOB, bytes INTEGER, '
            'modified INTEGER, part_start REAL, part_end REAL, offset INTEGER)'
        )
        self._length = 0
        self._has_stems = False

    def append(self, file: File) -> None:
        """Add a file at the end."""
        row = (
            self._length,
            to_bytes(file.id),
            to_bytes(file.id.rpartition('.')[0]),
            # Names that are no UTF-8 stay what they are.
            os.fsencode(file.path),
            file.bytes,
            file.modified,
            *file.part,
            file.offset,
        )
        places = ', '.join('?' * len(row))
        self._connection.execute(f'INSERT INTO {self._table} VALUES ({places})', row)
        self._length += 1

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, i: SupportsIndex) -> File: ...

    @overload
    def __getitem__(self, i: slice) -> list[File]: ...

    def __getitem__(self, i: SupportsIndex | slice) -> File | list[File]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        number = int(i)
        if number < 0:
            number += len(self)
        query = f'SELECT {_FIELDS} FROM {self._table} WHERE number = ?'
        row = self._connection.execute(query, (number,)).fetchone()
        if row is None:
            raise IndexError(i)
        return _file(row)

    def __iter__(self) -> Iterator[File]:
        query = f'SELECT {_FIELDS} FROM {self._table} ORDER BY number'
        for row in self._connection.execute(query):
            yield _file(row)

    def by_id(self, file_id: str) -> File:
        """The file of this id; KeyError if there is none."""
        query = f'SELECT {_FIELDS} FROM {self._table} WHERE id = ?'
        row = self._connection.execute(query, (to_bytes(file_id),)).fetchone()
        if row is None:
            raise KeyError(file_id)
        return _file(row)

    def ids(self) -> Iterator[str]:
        """The ids of all files, in their order."""
        for (file_id,) in self._connection.execute(f'SELECT id FROM {self._table} ORDER BY number'):
            yield to_text(file_id)

    def ids_called(self, name: str) -> list[str]:
        """Ids of the files whose id is `name`, with a suffix or without one."""
        if not self._has_stems:
            # For subtitles alone, and faster behind the rows.
            self._connection.execute(f'CREATE INDEX stems_{self._table} ON {self._table} (stem)')
            self._has_stems = True
        query = f'SELECT id FROM {self._table} WHERE stem = ?1 OR id = ?1 ORDER BY number'
        rows = self._connection.execute(query, (to_bytes(name),))
        return [to_text(file_id) for (file_id,) in rows]


class Selection(Sequence[File]):
    """Some of a sequence of files.

    Args:
        files: all of them.
        numbers: of those in the selection, ascending.
    """

    def __init__(self, files: Sequence[File], numbers: Int64[np.ndarray, ' m']):
        self._files = files
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, i: SupportsIndex) -> File: ...

    @overload
    def __getitem__(self, i: slice) -> list[File]: ...

    def __getitem__(self, i: SupportsIndex | slice) -> File | list[File]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self._files[int(self._numbers[i])]

    def __iter__(self) -> Iterator[File]:
        is_selected = np.zeros(len(self._files), bool)
        is_selected[self._numbers] = True
        # One pass, which is faster than a look-up for each.
        return itertools.compress(self._files, is_selected)


def _file(row: tuple[Any, ...]) -> File:
    file_id, path, size, modified, start, end, offset = row
    return File(to_text(file_id), os.fsdecode(path), size, modified, (start, end), offset)
