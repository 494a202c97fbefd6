"""How often each word occurs in more text than fits into memory."""

from __future__ import annotations

import collections
import sqlite3
from collections.abc import Iterable

# Different words that are counted in memory: some 100 MB.
_MAX_IN_MEMORY = 1 << 20


class WordCounts:
    """Counts words in memory, and adds the counts up on disk whenever there are too many words.

    No count is estimated and no word forgotten. The file on disk is SQLite's, which removes it.
    """

    def __init__(self, max_in_memory: int = _MAX_IN_MEMORY):
        """See the class.

        Args:
            max_in_memory: number of different words.
        """
        self._max_in_memory = max_in_memory
        self._counts: collections.Counter[str] = collections.Counter()
        self._database: sqlite3.Connection | None = None

    def add(self, words: Iterable[str]) -> None:
        """Count the words of a text."""
        self._counts.update(words)
        if len(self._counts) > self._max_in_memory:
            self._add_up()

    def most_frequent(self, size: int) -> list[str]:
        """The most frequent words, ties in alphabetical order.

        Args:
            size: how many, at most.
        """
        if self._database is None:
            # Ties by alphabet: Counter.most_common would order them as they were found.
            by_frequency = sorted(self._counts, key=lambda word: (-self._counts[word], word))
            return by_frequency[:size]
        self._add_up()
        rows = self._database.execute(
            'SELECT word FROM counts ORDER BY count DESC, word LIMIT ?', (size,)
        )
        return [_decoded(word) for (word,) in rows]

    def _add_up(self) -> None:
        """Move the counts in memory to the disk."""
        if self._database is None:
            # The empty name is a temporary file. One transaction that never ends: nothing is kept.
            self._database = sqlite3.connect('', isolation_level=None)
            self._database.execute('PRAGMA journal_mode = OFF')
            self._database.execute('BEGIN')
            # Bytes, whose order is that of Python's strings.
            self._database.execute(
                'CREATE TABLE counts (word BLOB PRIMARY KEY, count INTEGER) WITHOUT ROWID'
            )
        self._database.executemany(
            'INSERT INTO counts VALUES (?, ?) '
            'ON CONFLICT (word) DO UPDATE SET count = count + excluded.count',
            # In order, so that neighbours are written to the same place.
            sorted((_encoded(word), count) for word, count in self._counts.items()),
        )
        self._counts.clear()


def _encoded(word: str) -> bytes:
    # Halves of characters, which UTF-8 has no bytes for, may be in a text.
    return word.encode('utf-8', 'surrogatepass')


def _decoded(word: bytes) -> str:
    return word.decode('utf-8', 'surrogatepass')
