"""An index: the embeddings of a folder of media files, window by window, in one SQLite file.

A file's windows are written in one transaction, so that a killed run leaves whole files alone and
the next run continues. Paths are bytes: names on disk need not be text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import sqlite3
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vatt_jax.command_line import run_command
from vatt_jax.config import ConfigError
from vatt_jax.search.window_features import Features

DATABASE = 'index.sqlite'
# Seconds to wait for another process that writes.
TIMEOUT = 10.0
# Raised when the tables below change.
VERSION = 1
TABLES = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS files (
    id INTEGER PRIMARY KEY, path BLOB UNIQUE NOT NULL, size INTEGER NOT NULL,
    modified INTEGER NOT NULL, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS windows (
    id INTEGER PRIMARY KEY, file INTEGER NOT NULL REFERENCES files ON DELETE CASCADE,
    start REAL NOT NULL, stop REAL NOT NULL);
CREATE TABLE IF NOT EXISTS embeddings (
    file INTEGER NOT NULL REFERENCES files ON DELETE CASCADE,
    modality TEXT NOT NULL, space TEXT NOT NULL, windows BLOB NOT NULL, vectors BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS windows_of_file ON windows (file);
CREATE INDEX IF NOT EXISTS embeddings_of_file ON embeddings (file);
CREATE INDEX IF NOT EXISTS embeddings_of_space ON embeddings (modality, space);
"""


@dataclasses.dataclass(frozen=True)
class Stamp:
    """What of a file says whether it changed.

    Attributes:
        size: bytes.
        modified: nanoseconds.
    """

    size: int
    modified: int


@dataclasses.dataclass(frozen=True)
class Window:
    """One searchable stretch of a file.

    Attributes:
        id: number in the index.
        file: number of its file.
        path: of the file, below the indexed folder.
        start: seconds.
        end: seconds.
    """

    id: int
    file: int
    path: pathlib.PurePath
    start: float
    end: float


class Index:
    """An open index.

    Args:
        folder: where it is; made where it is not there.
        create: False to read one that exists.

    Raises:
        ConfigError: there is none, or it is none that this version reads.
    """

    def __init__(self, folder: str | os.PathLike, create: bool = False):
        self.folder = pathlib.Path(folder)
        path = self.folder / DATABASE
        if not create and not path.exists():
            raise ConfigError(
                f'--index={self.folder}: expected a folder with {DATABASE}, found none; make it '
                f'with {run_command()} --mode=index --workdir=RUN --videos=FOLDER --out=INDEX'
            )
        try:
            if create:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._connection = sqlite3.connect(path, timeout=TIMEOUT)
                self._connection.execute('PRAGMA foreign_keys = ON')
                self._connection.executescript(TABLES)
            else:
                # Searching must not write: the index may be another user's.
                uri = f'{path.absolute().as_uri()}?mode=ro'
                self._connection = sqlite3.connect(uri, uri=True)
                self._connection.execute('SELECT COUNT(*) FROM about')
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f'{path}: expected an index that can be opened, got: {error}'
            ) from error

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what the index is of

    def about(self) -> dict[str, Any]:
        """What `claim` stored; {} for a new index."""
        rows = self._connection.execute('SELECT name, value FROM about')
        return {name: json.loads(value) for name, value in rows}

    def claim(self, about: Mapping[str, Any], flags: Mapping[str, str]) -> None:
        """Stores what a new index is of, or checks that an older one is of the same.

        Args:
            about: JSON-able values: the model, the folder, window and stride.
            flags: name in `about` -> the flag that sets it, of what must not change.

        Raises:
            ConfigError: the index was made with something else.
        """
        stored = self.about()
        if not stored:
            with self._connection:
                for name, value in {**about, 'version': VERSION}.items():
                    self._connection.execute(
                        'INSERT INTO about VALUES (?, ?)', (name, json.dumps(value))
                    )
            return
        if stored.get('version') != VERSION:
            raise ConfigError(
                f'{self.folder}: expected an index of version {VERSION}, got '
                f'{stored.get("version")}; name another --out'
            )
        for name, flag in flags.items():
            if stored.get(name) != about[name]:
                raise ConfigError(
                    f'{flag}: expected {stored.get(name)}, with which the index {self.folder} was '
                    f'begun, got {about[name]}; name another --out for a new index'
                )

    # ---- files

    def stamps(self) -> dict[bytes, Stamp]:
        """Path -> stamp of every file that is done, those that were skipped included."""
        rows = self._connection.execute('SELECT path, size, modified FROM files')
        return {path: Stamp(size, modified) for path, size, modified in rows}

    def skipped(self) -> dict[bytes, str]:
        """Path -> reason of the files that could not be read."""
        rows = self._connection.execute("SELECT path, reason FROM files WHERE reason != ''")
        return dict(rows)

    def forget(self, path: bytes) -> None:
        """Drops a file and all that is known of it."""
        with self._connection:
            self._connection.execute('DELETE FROM files WHERE path = ?', (path,))

    @contextlib.contextmanager
    def write_file(self, path: bytes, stamp: Stamp) -> Iterator[FileWriter]:
        """The writer of one file; all of it appears when the block ends, nothing where it raises.

        Args:
            path: below the indexed folder.
            stamp: of the file before it was read.
        """
        with self._connection:
            self._connection.execute('DELETE FROM files WHERE path = ?', (path,))
            cursor = self._connection.execute(
                "INSERT INTO files (path, size, modified, reason) VALUES (?, ?, ?, '')",
                (path, stamp.size, stamp.modified),
            )
            yield FileWriter(self._connection, int(cursor.lastrowid or 0))

    def skip_file(self, path: bytes, stamp: Stamp, reason: str) -> None:
        """Notes a file that cannot be read, so that it is tried again only when it changes."""
        with self._connection:
            self._connection.execute('DELETE FROM files WHERE path = ?', (path,))
            self._connection.execute(
                'INSERT INTO files (path, size, modified, reason) VALUES (?, ?, ?, ?)',
                (path, stamp.size, stamp.modified, reason),
            )

    # ---- reading

    def spaces(self) -> dict[str, list[str]]:
        """Modality -> the spaces in which its windows have embeddings."""
        rows = self._connection.execute(
            'SELECT modality, space FROM embeddings GROUP BY modality, space ORDER BY MIN(rowid)'
        )
        spaces: dict[str, list[str]] = {}
        for modality, space in rows:
            spaces.setdefault(modality, []).append(space)
        return spaces

    def windows(self) -> dict[int, Window]:
        """All windows by number."""
        rows = self._connection.execute(
            'SELECT windows.id, files.id, path, start, stop FROM windows '
            'JOIN files ON files.id = windows.file ORDER BY windows.id'
        )
        windows = {}
        for number, file, path, start, end in rows:
            windows[number] = Window(number, file, pathlib.PurePath(os.fsdecode(path)), start, end)
        return windows

    def count(self) -> tuple[int, int]:
        """(files with windows, windows)."""
        files = "SELECT COUNT(*) FROM files WHERE reason = ''"
        windows = 'SELECT COUNT(*) FROM windows'
        count_of = self._connection.execute
        return count_of(files).fetchone()[0], count_of(windows).fetchone()[0]

    def embeddings(
        self, modality: str, space: str
    ) -> tuple[Int[np.ndarray, ' N'], Float[np.ndarray, 'N E']]:
        """(window numbers, unit embeddings) of one modality in one space."""
        rows = self._connection.execute(
            'SELECT windows, vectors FROM embeddings WHERE modality = ? AND space = ? '
            'ORDER BY rowid',
            (modality, space),
        )
        numbers, vectors = [], []
        for window_bytes, vector_bytes in rows:
            number = np.frombuffer(window_bytes, '<i8')
            numbers.append(number)
            vectors.append(np.frombuffer(vector_bytes, '<f4').reshape(len(number), -1))
        return np.concatenate(numbers), np.concatenate(vectors)


class FileWriter:
    """Adds the windows of one file to an index, a few at a time."""

    def __init__(self, connection: sqlite3.Connection, file: int):
        self._connection = connection
        self._file = file
        self.num_windows = 0

    def add(self, windows: Sequence[Any], features: Features) -> None:
        """Adds windows and their embeddings.

        Args:
            windows: with `start` and `end`.
            features: {(modality, space): (rows of `windows`, embeddings)}.
        """
        numbers = []
        for window in windows:
            cursor = self._connection.execute(
                'INSERT INTO windows (file, start, stop) VALUES (?, ?, ?)',
                (self._file, float(window.start), float(window.end)),
            )
            numbers.append(int(cursor.lastrowid or 0))
        for (modality, space), (rows, vectors) in features.items():
            self._connection.execute(
                'INSERT INTO embeddings VALUES (?, ?, ?, ?, ?)',
                (
                    self._file,
                    modality,
                    space,
                    np.asarray(numbers, '<i8')[rows].tobytes(),
                    np.ascontiguousarray(vectors, '<f4').tobytes(),
                ),
            )
        self.num_windows += len(numbers)


def find_media(
    folder: pathlib.Path, suffixes: tuple[str, ...]
) -> tuple[list[bytes], list[tuple[bytes, str]]]:
    """Finds the media files below a folder.

    Hidden files and folders are passed over: they are a system's, not a collection's.

    Args:
        folder: the folder.
        suffixes: of media files, in lower case.

    Returns:
        (paths below the folder in order, [(folder that cannot be read, reason)]).

    Raises:
        ConfigError: it is no folder.
    """
    if not folder.is_dir():
        raise ConfigError(f'--videos={folder}: expected a folder of media files, found none there')
    root = os.fsencode(folder)
    endings = tuple(suffix.encode() for suffix in suffixes)
    unreadable: list[tuple[bytes, str]] = []

    def note(error: OSError) -> None:
        unreadable.append((os.fsencode(error.filename), str(error.strerror)))

    paths = []
    for parent, folders, names in os.walk(root, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith(b'.'))
        for name in sorted(names):
            if name.lower().endswith(endings) and not name.startswith(b'.'):
                paths.append(os.path.relpath(os.path.join(parent, name), root))
    return paths, unreadable


def stamp_of(path: bytes) -> Stamp:
    """The stamp of a file.

    Raises:
        OSError: it is gone, unreadable, or no regular file.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 'rb') as file:
        state = os.fstat(file.fileno())
    if not stat.S_ISREG(state.st_mode):
        raise OSError('it is no regular file')
    return Stamp(state.st_size, state.st_mtime_ns)
