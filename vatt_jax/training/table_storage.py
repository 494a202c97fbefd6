"""One table of the host, and how it is saved while steps go on writing it."""

from __future__ import annotations

import threading
import weakref

import numpy as np
from jaxtyping import Int, Shaped


class StoredTable:
    """Rows of all training records in one array, in memory or mapped from a file.

    Args:
        array: [M …], written in place; by one thread, while another may read a snapshot.
    """

    def __init__(self, array: Shaped[np.ndarray, 'M ...']):
        self.array = np.asarray(array)
        # Held while rows change and while a snapshot copies some.
        self._lock = threading.Lock()
        # Those that somebody still holds: a snapshot that was dropped keeps no more rows.
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()

    def read(self, records: Int[np.ndarray, 'b K'], rows: Shaped[np.ndarray, 'b K ...']) -> None:
        """Copy the rows of records, all of which there are, into `rows`; several threads may."""
        # Other modes go by way of a buffer.
        np.take(self.array, records, axis=0, out=rows, mode='clip')

    def store(self, records: Int[np.ndarray, ' B'], rows: Shaped[np.ndarray, 'B ...']) -> None:
        """Write rows; those of one record are equal."""
        with self._lock:
            for snapshot in self._snapshots:
                snapshot.keep(records)
            self.array[records] = rows

    def snapshot(self, own: slice) -> Snapshot:
        """The table as it is now, however long it takes to read it.

        Args:
            own: the rows that will be read.
        """
        snapshot = Snapshot(self.array, own, self._lock)
        with self._lock:
            self._snapshots.add(snapshot)
        return snapshot


def read_only(array: Shaped[np.ndarray, 'M ...']) -> Shaped[np.ndarray, 'M ...']:
    """A view of an array through which it cannot be written."""
    view = array.view()
    view.setflags(write=False)
    return view


class Snapshot:
    """Rows of a table as they were at one step. To `columns.write_piece` it is a column.

    There is no copy of the table: of rows that change before they are read, the old ones are kept.
    They are read once, from the first to the last.

    Attributes:
        shape: of the table.
        dtype: of the table.
    """

    def __init__(self, array: np.ndarray, own: slice, lock: threading.Lock):
        self.shape = array.shape
        self.dtype = array.dtype
        self._array = array
        self._lock = lock
        # record -> its row as it was
        self._old: dict[int, np.ndarray] = {}
        # What is still to be read, and so to be kept.
        self._next, self._end = own.start, own.stop

    def __len__(self) -> int:
        return self.shape[0]

    def keep(self, records: Int[np.ndarray, ' B']) -> None:
        """Keep rows that are about to change. Called while the lock is held."""
        for record in np.unique(records).tolist():
            if self._next <= record < self._end and record not in self._old:
                self._old[record] = self._array[record].copy()

    def __getitem__(self, rows: slice) -> Shaped[np.ndarray, 'n ...']:
        """Rows as they were, copied."""
        first, last, _ = rows.indices(len(self))
        with self._lock:
            block = np.array(self._array[first:last])
            for record in self._old.keys() & range(first, last):
                block[record - first] = self._old.pop(record)
            self._next = last
        return block
