"""What preparation knows of a million files, on disk: a temporary SQLite database.

In memory are a page cache of fixed size and what is asked for. Nothing here outlasts a run: names
and values are read anew from the caption and annotation files by the next one.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

# Of the database in memory, in KiB (SQLite takes a negative number for that).
_CACHE_KIB = 64 << 10
# Entries of one name that are collected before they are written.
_MAX_COLLECTED = 1000


class Store:
    """A temporary database, whose tables are made by the classes that use them.

    It is used by one thread at a time.

    Attributes:
        connection: of SQLite.
    """

    def __init__(self, folder: str | os.PathLike = ''):
        """Open an empty database.

        Args:
            folder: on whose disk it lies; '' for the folder of temporary files.
        """
        path = ''
        if folder:
            descriptor, path = tempfile.mkstemp(prefix='.store-', dir=folder)
            os.close(descriptor)
        # Worker threads take files from it in turn. isolation_level: transactions are begun here.
        self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        if path:
            # The file lives on without its name, until the process ends: nothing is left of it,
            # though it be killed. SQLite does the same to its own temporary files.
            os.unlink(path)
        # A journal is for databases that are read again after a crash.
        self.connection.execute('PRAGMA journal_mode = OFF')
        self.connection.execute('PRAGMA synchronous = OFF')
        self.connection.execute('PRAGMA locking_mode = EXCLUSIVE')
        self.connection.execute(f'PRAGMA cache_size = -{_CACHE_KIB}')
        # One transaction that never ends: pages go to the disk when the cache is full, not after
        # every row.
        self.connection.execute('BEGIN')
        self._num_tables = 0

    def new_table(self, columns: str) -> str:
        """Make a table.

        Args:
            columns: in SQL, and what follows the parenthesis.

        Returns:
            Its name.
        """
        self._num_tables += 1
        name = f'table_{self._num_tables}'
        self.connection.execute(f'CREATE TABLE {name} {columns}')
        return name

    def close(self) -> None:
        """Close the database, which is gone then."""
        self.connection.close()


def to_bytes(text: str) -> bytes:
    """Text as it is stored: names may hold halves of characters, which SQLite's text may not."""
    return text.encode('utf-8', 'surrogatepass')


def to_text(stored: bytes) -> str:
    """The text of `to_bytes`."""
    return stored.decode('utf-8', 'surrogatepass')


class StoredDict(MutableMapping[str, Any]):
    """A dict on disk. Values are JSON-able, and come back as JSON has them."""

    def __init__(self, store: Store):
        self._connection = store.connection
        self._table = store.new_table('(number INTEGER PRIMARY KEY, name BLOB UNIQUE, value TEXT)')

    def __getitem__(self, name: str) -> Any:
        row = self._connection.execute(
            f'SELECT value FROM {self._table} WHERE name = ?', (to_bytes(name),)
        ).fetchone()
        if row is None:
            raise KeyError(name)
        return json.loads(row[0])

    def __setitem__(self, name: str, value: Any) -> None:
        self._connection.execute(
            f'INSERT INTO {self._table} (name, value) VALUES (?, ?) '
            'ON CONFLICT (name) DO UPDATE SET value = excluded.value',
            (to_bytes(name), json.dumps(value)),
        )

    def __delitem__(self, name: str) -> None:
        cursor = self._connection.execute(
            f'DELETE FROM {self._table} WHERE name = ?', (to_bytes(name),)
        )
        if not cursor.rowcount:
            raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        # Without reading the value.
        return isinstance(name, str) and _has_row(self._connection, self._table, name)

    def __iter__(self) -> Iterator[str]:
        """Names in the order in which they came."""
        return _names(self._connection, self._table)

    def in_order(self) -> Iterator[str]:
        """Names in the order of the alphabet."""
        for (name,) in self._connection.execute(f'SELECT name FROM {self._table} ORDER BY name'):
            yield to_text(name)

    def __len__(self) -> int:
        return _num_rows(self._connection, self._table)


class StoredLists(Mapping[str, list[Any]]):
    """Lists by name, on disk, which grow at their ends. Entries are JSON-able."""

    def __init__(self, store: Store):
        self._connection = store.connection
        self._names = store.new_table('(number INTEGER PRIMARY KEY, name BLOB UNIQUE)')
        self._parts = store.new_table('(name_number INTEGER, entries TEXT)')
        # Entries of one name usually come one behind the other: they become one row.
        self._last_name: str | None = None
        self._collected: list[Any] = []
        self._has_index = False

    def extend(self, name: str, entries: Iterable[Any] = ()) -> None:
        """Put entries at the end of a list; a name without any has an empty one."""
        if name != self._last_name or len(self._collected) >= _MAX_COLLECTED:
            self._flush()
            self._last_name = name
        self._collected.extend(entries)

    def _flush(self) -> None:
        """Write what was collected."""
        if self._last_name is None:
            return
        self._connection.execute(
            f'INSERT OR IGNORE INTO {self._names} (name) VALUES (?)', (to_bytes(self._last_name),)
        )
        if self._collected:
            self._connection.execute(
                f'INSERT INTO {self._parts} SELECT number, ? FROM {self._names} WHERE name = ?',
                (json.dumps(self._collected), to_bytes(self._last_name)),
            )
        self._last_name = None
        self._collected = []

    def __getitem__(self, name: str) -> list[Any]:
        self._flush()
        if not self._has_index:
            # Behind the rows: made with each of them, it would be sorted again and again.
            self._connection.execute(
                f'CREATE INDEX index_{self._parts} ON {self._parts} (name_number)'
            )
            self._has_index = True
        row = self._connection.execute(
            f'SELECT number FROM {self._names} WHERE name = ?', (to_bytes(name),)
        ).fetchone()
        if row is None:
            raise KeyError(name)
        parts = self._connection.execute(
            f'SELECT entries FROM {self._parts} WHERE name_number = ? ORDER BY rowid', row
        )
        entries: list[Any] = []
        for (part,) in parts:
            entries += json.loads(part)
        return entries

    def __contains__(self, name: object) -> bool:
        self._flush()
        return isinstance(name, str) and _has_row(self._connection, self._names, name)

    def __iter__(self) -> Iterator[str]:
        """Names in the order in which they came."""
        self._flush()
        return _names(self._connection, self._names)

    def __len__(self) -> int:
        self._flush()
        return _num_rows(self._connection, self._names)


def _has_row(connection: sqlite3.Connection, table: str, name: str) -> bool:
    query = f'SELECT 1 FROM {table} WHERE name = ?'
    return connection.execute(query, (to_bytes(name),)).fetchone() is not None


def _names(connection: sqlite3.Connection, table: str) -> Iterator[str]:
    for (name,) in connection.execute(f'SELECT name FROM {table} ORDER BY number'):
        yield to_text(name)


def _num_rows(connection: sqlite3.Connection, table: str) -> int:
    return connection.execute(f'SELECT COUNT(*) FROM {table}').fetchone()[0]
