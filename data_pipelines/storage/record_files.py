"""The files of a split's records: on this machine, or on an object store."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator, Sequence

from vatt_jax.object_store import Store, StoredFile, StoreSettings, is_url

# (offset, bytes) of a part of a file.
Range = tuple[int, int]


class RecordFiles(abc.ABC):
    """Files that are read at random. Safe from several threads.

    Attributes:
      paths: of the files, for errors.
      apart: parts of a file that are farther apart, in bytes, are read by requests of their own:
        below, reading the bytes between costs less than another request.
    """

    paths: Sequence[str]
    apart: int

    @abc.abstractmethod
    def size(self, number: int) -> int | None:
        """Bytes of a file; None where there is no such file."""

    @abc.abstractmethod
    def read(self, number: int, ranges: Sequence[Range]) -> list[memoryview]:
        """Read parts of one file.

        Args:
          number: of the file.
          ranges: (offset, bytes) of each part.
        """


class LocalFiles(RecordFiles):
    """Files of this machine."""

    apart = 1 << 17

    def __init__(self, paths: Sequence[str | os.PathLike]):
        self.paths = [os.fspath(path) for path in paths]

    def size(self, number: int) -> int | None:
        path = self.paths[number]
        return os.path.getsize(path) if os.path.isfile(path) else None

    def read(self, number: int, ranges: Sequence[Range]) -> list[memoryview]:
        # Opened for each read: threads share nothing. Unbuffered: a buffer would read ahead bytes
        # that nothing needs.
        with open(self.paths[number], 'rb', buffering=0) as file:
            return [memoryview(os.pread(file.fileno(), size, offset)) for offset, size in ranges]


class StoreFiles(RecordFiles):
    """Files of a folder on an object store. Parts of one file are requested side by side."""

    # What a connection of 30 MB/s brings in the 30 ms that a request waits for its first byte.
    apart = 1 << 20

    def __init__(self, store: Store, files: dict[str, StoredFile]):
        """Nothing is requested yet.

        Args:
          store: the folder.
          files: {path below the folder: what its listing said}, in record order.
        """
        self.paths = [f'{store.url}/{name}' for name in files]
        self._store = store
        self._names = list(files)
        self._sizes = [file.size for file in files.values()]

    def size(self, number: int) -> int | None:
        return self._sizes[number]

    def read(self, number: int, ranges: Sequence[Range]) -> list[memoryview]:
        contents = self._store.read_ranges(self._names[number], ranges)
        return [memoryview(content) for content in contents]


def runs(parts: Sequence[tuple[int, ...]], apart: int) -> Iterator[tuple[Range, list[int]]]:
    """Join parts of a file that one request reads together.

    Args:
      parts: (offset, bytes, …) of each.
      apart: largest number of bytes between two of them that is read along.

    Yields:
      (offset, bytes) to read, and the numbers of the parts in it, in ascending order.
    """
    run: list[int] = []
    run_begin = run_end = 0
    for k in sorted(range(len(parts)), key=parts.__getitem__):
        begin = parts[k][0]
        end = begin + parts[k][1]
        if run and begin - run_end > apart:
            yield (run_begin, run_end - run_begin), run
            run = []
        if not run:
            run_begin = run_end = begin
        run_end = max(run_end, end)
        run.append(k)
    if run:
        yield (run_begin, run_end - run_begin), run


def open_files(paths: Sequence[str], settings: StoreSettings) -> RecordFiles:
    """Files that are all here, or all in one folder of an object store.

    Args:
      paths: of the files, in record order; each may be a URL.
      settings: timeouts and tries of a store.

    Raises:
      StoreError: the store cannot be read.
    """
    if not paths or not is_url(paths[0]):
        return LocalFiles(paths)
    folder = paths[0].rpartition('/')[0]
    store = Store(folder, settings)
    names = [path.removeprefix(f'{folder}/') for path in paths]
    missing = StoredFile(-1, '')  # of no size that a table of offsets could name
    listed = store.files()
    return StoreFiles(store, {name: listed.get(name, missing) for name in names})
