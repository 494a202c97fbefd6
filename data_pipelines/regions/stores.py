"""Folders and databases of region features, as mappings {name of a picture: Picture}.

All are lazy: opening reads names, a picture is read when it is asked for.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.regions.pictures import Picture
from data_pipelines.regions.records import parse_uniter, parse_vilbert
from data_pipelines.regions.tsv import Tsv
from vatt_jax import extras

Store = Mapping[str, Picture]
# Entries of a database that are no pictures: its list of names.
LISTS = (b'keys', b'__keys__')


class NpzFolder(Mapping[str, Picture]):
    """A folder with an npz file per picture: what UNITER's extractor writes.

    Raises:
        DataError: there is no npz file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = pathlib.Path(path)
        self._names = sorted(file.stem for file in self.path.glob('*.npz'))
        if not self._names:
            raise DataError(f'{self.path}: expected a folder of .npz files, found none')
        self._known = frozenset(self._names)

    def __getitem__(self, name: str) -> Picture:
        if name not in self._known:
            raise KeyError(name)
        path = self.path / f'{name}.npz'
        return parse_uniter(path.read_bytes(), str(path), name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Lmdb(Mapping[str, Picture]):
    """A database of lmdb, by the keys it has.

    Args:
        path: its folder (or file).
        parse: (bytes of a record, where, key) -> Picture.

    Raises:
        MissingExtra: lmdb is not installed.
        DataError: there is no database.
    """

    def __init__(
        self, path: str | os.PathLike, parse: Callable[[bytes, str, str], Picture]
    ) -> None:
        with extras.needed('regions', 'reading lmdb files of region features'):
            import lmdb
        self.path = pathlib.Path(path)
        if not self.path.exists():
            raise DataError(f'{self.path}: there is no such database')
        try:
            # No lock and no read-ahead: many readers, and records far apart.
            self._file: Any = lmdb.open(
                str(self.path),
                subdir=self.path.is_dir(),
                readonly=True,
                lock=False,
                readahead=False,
            )
        except lmdb.Error as error:
            raise DataError(f'{self.path}: expected a database of lmdb ({error})') from None
        self._parse = parse
        with self._file.begin() as reading:
            keys = [bytes(key) for key in reading.cursor().iternext(keys=True, values=False)]
        self._names = {
            key.decode('utf-8', 'backslashreplace'): key for key in keys if key not in LISTS
        }

    def __getitem__(self, name: str) -> Picture:
        key = self._names[name]
        with self._file.begin() as reading:
            data = reading.get(key)
        return self._parse(data, f'{self.path}, {name}', name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_store(kind: str, path: str | os.PathLike) -> Store:
    """Open region features.

    Args:
        kind: 'tsv', 'npz', 'vilbert_lmdb' or 'uniter_lmdb'.
        path: the file or folder.

    Raises:
        DataError: there is no such kind, or the file is of another one.
        MissingExtra: a database without lmdb installed.
    """
    if kind == 'tsv':
        return Tsv(path)
    if kind == 'npz':
        return NpzFolder(path)
    if kind == 'vilbert_lmdb':
        return Lmdb(path, lambda data, where, name: parse_vilbert(data, where))
    if kind == 'uniter_lmdb':
        return Lmdb(path, lambda data, where, name: parse_uniter(data, where, _stem(name)))
    raise DataError(f"kind: expected 'tsv', 'npz', 'vilbert_lmdb' or 'uniter_lmdb', got {kind!r}")


def _stem(key: str) -> str:
    """UNITER's keys are names of npz files."""
    return key.removesuffix('.npz')
