"""Tables on disk with a .npy file a column: written row by row, mapped into memory when read.

A table is a folder:

  NAME.npy: a column, whose first axis is the rows.
  table.json: crc32 of every column, and what else the writer notes.

A column may be larger than the memory. The writer buffers a few hundred kB of it; a reader maps it,
so that the system loads only the pages that are touched, once for all processes of a machine.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import json
import os
import pathlib
import shutil
import types
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex, TypeVar, overload

import numpy as np
from jaxtyping import Int, Int64, UInt8
from numpy.typing import ArrayLike, DTypeLike

from data_pipelines.errors import DataError

T = TypeVar('T')
# Not typing.Self, which the run-time check of the tests refuses outside of whole classes.
W = TypeVar('W', bound='DiscardsOnError')

TABLE_FILE = 'table.json'
# What the names of folders hold that are still being written.
TEMPORARY = '.tmp-'
# Bytes of a column that its writer holds back. A table has some thirty columns.
_BUFFER = 1 << 18
# A file up to this size is read whole instead of mapped: each mapped file keeps a file descriptor,
# and a mixture may have hundreds of small tables. Only these are compared with their crc32.
READ_WHOLE = 1 << 16


class Strings(Sequence[str]):
    """Many strings in two arrays.

    A list of millions of str objects would take several times the memory, and could not be mapped.

    Attributes:
      data: all strings in UTF-8, one behind the other.
      offsets: where each begins in `data`, and the length of `data`.
    """

    def __init__(self, data: UInt8[np.ndarray, ' bytes'], offsets: Int64[np.ndarray, ' n_plus_1']):
        self.data = data
        self.offsets = offsets

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> Strings:
        encoded = [encode(text) for text in texts]
        offsets = offsets_of([len(text) for text in encoded])
        return cls(np.frombuffer(b''.join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, i: SupportsIndex) -> str: ...

    @overload
    def __getitem__(self, i: slice) -> list[str]: ...

    def __getitem__(self, i: SupportsIndex | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        number = int(i)
        # Iteration over a Sequence ends at IndexError: an index too large must not wrap around.
        if not -len(self) <= number < len(self):
            raise IndexError(i)
        number %= len(self)  # negative numbers count from the end
        begin, end = self.offsets[number : number + 2]
        return self.data[begin:end].tobytes().decode()

    def take(self, rows: Int[np.ndarray, ' m']) -> Strings:
        """These strings alone."""
        offsets, characters = ranges(self.offsets, rows)
        return Strings(self.data[characters], offsets)


def encode(text: str) -> bytes:
    """A text as `Strings` stores it."""
    # 'replace': file names may hold lone surrogates, which UTF-8 has no bytes for.
    return text.encode('utf-8', 'replace')


def offsets_of(counts: Sequence[int] | Int[np.ndarray, ' M']) -> Int64[np.ndarray, ' M_plus_1']:
    """Where the items of each row begin, and the number of all items."""
    # np.cumsum of an empty list is float64, and makes the concatenation so.
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def ranges(
    offsets: Int64[np.ndarray, ' M_plus_1'], rows: Int[np.ndarray, ' m']
) -> tuple[Int64[np.ndarray, ' m_plus_1'], Int64[np.ndarray, ' items']]:
    """Offsets of these rows' items when they stand alone, and the numbers of the items."""
    first = offsets[rows]  # [m]
    counts = offsets[rows + 1] - first  # [m]
    alone = offsets_of(counts)
    # An item keeps its distance from the first of its row.
    shift = np.repeat(first - alone[:-1], counts)
    return alone, np.arange(alone[-1], dtype=np.int64) + shift


def is_table(path: pathlib.Path) -> bool:
    """Whether a path is the folder of a table."""
    return (path / TABLE_FILE).is_file()


class ColumnWriter:
    """Writes a .npy file whose number of rows is known when it is closed."""

    def __init__(self, path: pathlib.Path, dtype: DTypeLike, width: int | None = None):
        """`width`: numbers of a row, None for a column of single numbers."""
        self.crc = 0
        self._dtype = np.dtype(dtype)
        self._row_shape = () if width is None else (width,)
        self._num_rows = 0
        self._file = open(path, 'wb', buffering=_BUFFER)
        self._write_header()

    def extend(self, rows: ArrayLike) -> None:
        """Add rows."""
        # Reshaped because a list without rows does not tell their width.
        block = np.asarray(rows, self._dtype).reshape(-1, *self._row_shape)
        self._num_rows += len(block)
        self._write(block.tobytes())

    def extend_bytes(self, data: bytes) -> None:
        """Add rows of a column of bytes."""
        self._num_rows += len(data)
        self._write(data)

    def close(self) -> None:
        self._file.seek(0)
        # As long as the first one: NumPy leaves room for the digits of the first axis.
        self._write_header()
        self._file.close()

    def abandon(self) -> None:
        # What is in the buffer may not fit the disk either.
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, data: bytes) -> None:
        self.crc = zlib.crc32(data, self.crc)
        self._file.write(data)

    def _write_header(self) -> None:
        header = {
            'descr': np.lib.format.dtype_to_descr(self._dtype),
            'fortran_order': False,
            'shape': (self._num_rows, *self._row_shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


class OffsetsWriter:
    """Writes a column of offsets from the number of items of each row."""

    def __init__(self, column: ColumnWriter):
        self.total = 0
        self._column = column
        column.extend([0])

    def extend(self, counts: ArrayLike) -> None:
        """Add rows of so many items each."""
        offsets = self.total + np.cumsum(np.asarray(counts, np.int64), dtype=np.int64)
        self._column.extend(offsets)
        if len(offsets):
            self.total = int(offsets[-1])


class StringsWriter:
    """Writes the two columns of `Strings`."""

    def __init__(self, data: ColumnWriter, offsets: OffsetsWriter):
        self._data = data
        self._offsets = offsets

    def extend(self, texts: Iterable[str]) -> None:
        """Add strings."""
        encoded = [encode(text) for text in texts]
        self._data.extend_bytes(b''.join(encoded))
        self._offsets.extend([len(text) for text in encoded])


class DiscardsOnError(abc.ABC):
    """A context manager that leaves nothing behind after an exception."""

    @abc.abstractmethod
    def discard(self) -> None:
        """Delete what was written."""

    def __enter__(self: W) -> W:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if kind is not None:
            self.discard()


class TableWriter(DiscardsOnError):
    """Writes a table, whose folder takes its name when all is written.

    As a context manager it leaves nothing behind after an exception.

    Attributes:
      path: the folder while it is written.
      about: what table.json will hold beside the checksums; the caller's to fill.
    """

    def __init__(self, folder: pathlib.Path):
        # The process's number: several processes may open one old dataset, each adding a table.
        self.path = folder.with_name(f'{folder.name}{TEMPORARY}{os.getpid()}')
        self.about: dict[str, Any] = {}
        self._folder = folder
        self._columns: dict[str, ColumnWriter] = {}
        shutil.rmtree(self.path, ignore_errors=True)  # of a killed process of this number
        self.path.mkdir(parents=True)

    def column(self, name: str, dtype: DTypeLike, width: int | None = None) -> ColumnWriter:
        """A new column; `width`: numbers of a row, None for a column of single numbers."""
        self._columns[name] = ColumnWriter(self.path / f'{name}.npy', dtype, width)
        return self._columns[name]

    def offsets(self, name: str) -> OffsetsWriter:
        """A new column of offsets."""
        return OffsetsWriter(self.column(name, np.int64))

    def strings(self, name: str) -> StringsWriter:
        """Two new columns of texts."""
        return StringsWriter(self.column(f'{name}.data', np.uint8), self.offsets(f'{name}.offsets'))

    def finish(self) -> None:
        """Close the columns: `path` is a whole table, which the caller may read and describe."""
        for column in self._columns.values():
            column.close()
        self._write_about()

    def publish(self) -> None:
        """Give the finished folder its name. Where another process was faster, its table stays."""
        self._write_about()
        try:
            os.replace(self.path, self._folder)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(self.path)

    def discard(self) -> None:
        for column in self._columns.values():
            column.abandon()
        shutil.rmtree(self.path, ignore_errors=True)

    def _write_about(self) -> None:
        checksums = {name: column.crc for name, column in self._columns.items()}
        write_json(self.path / TABLE_FILE, {**self.about, 'columns': checksums})


class FolderWriter(DiscardsOnError):
    """A context manager that closes at the end, and leaves nothing behind after an exception."""

    @abc.abstractmethod
    def close(self) -> None:
        """Write the rest and give the folder its name."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        if kind is not None:
            return
        try:
            self.close()
        except BaseException:  # such as a full disk
            self.discard()
            raise


class Table:
    """Reads a table.

    Attributes:
      about: contents of table.json.
    """

    def __init__(self, folder: pathlib.Path, again: str):
        """Open a table.

        Args:
          folder: of the table.
          again: how to make the table again; the errors end with it.

        Raises:
          DataError: the table is missing or damaged, here and in all methods.
        """
        self._folder = folder
        self._again = again
        path = folder / TABLE_FILE
        try:
            self.about = json.loads(path.read_text(encoding='utf-8'))
            self._checksums = self.about['columns']
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(f'{path} cannot be read ({e}); {again}') from None

    def entry(self, name: str, kind: type[T]) -> T:
        """An entry of table.json, which must be of a type."""
        value = self.about.get(name)
        if not isinstance(value, kind):
            raise DataError(
                f'{self._folder / TABLE_FILE}: {name}: expected {kind.__name__}, got {value!r}; '
                f'{self._again}'
            )
        return value

    def number(self, name: str) -> int:
        """An entry of table.json that is a count."""
        value = self.entry(name, int)
        if value < 0:
            raise DataError(
                f'{self._folder / TABLE_FILE}: {name}: expected a count, got {value}; {self._again}'
            )
        return value

    def column(self, name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> np.ndarray:
        """A column, read-only; one of another dtype or shape than is expected is an error."""
        path = self._folder / f'{name}.npy'
        try:
            values, is_mapped = _open_column(path)
        except (OSError, ValueError, EOFError) as e:
            if isinstance(e, OSError) and e.errno == errno.EMFILE:
                raise DataError(
                    f'{path} cannot be opened: this process has too many open files; raise the '
                    'limit, such as with ulimit -n 65536'
                ) from None
            raise DataError(f'{path} cannot be read ({e}); {self._again}') from None
        if values.dtype != np.dtype(dtype) or values.shape != shape:
            raise DataError(
                f'{path}: expected {np.dtype(dtype)} {list(shape)}, got {values.dtype} '
                f'{list(values.shape)}; {self._again}'
            )
        if not is_mapped and zlib.crc32(values.tobytes()) != self._checksums.get(name):
            raise DataError(
                f'{path} is damaged: its bytes are not those that were written (crc32); '
                f'{self._again}'
            )
        return values

    def offsets(self, name: str, num_rows: int, num_items: int | None = None) -> np.ndarray:
        """A column of offsets of `num_items` items, or of as many as its last entry says."""
        offsets = self.column(name, np.int64, (num_rows + 1,))
        if offsets[0] != 0 or (num_items is not None and offsets[-1] != num_items):
            raise DataError(
                f'{self._folder / name}.npy: expected offsets from 0 to {num_items}, got '
                f'{offsets[0]} to {offsets[-1]}; {self._again}'
            )
        return offsets

    def strings(self, name: str, num_rows: int) -> Strings:
        """A column of texts."""
        offsets = self.offsets(f'{name}.offsets', num_rows)
        return Strings(self.column(f'{name}.data', np.uint8, (int(offsets[-1]),)), offsets)


def _open_column(path: pathlib.Path) -> tuple[np.ndarray, bool]:
    """The array of a file, and whether it is mapped; never anything but whole."""
    try:
        return _load_column(path)
    except OSError as error:
        # A mapped column is an open file, and hundreds of large sources have thousands.
        if error.errno != errno.EMFILE or not _allow_more_files():
            raise
    return _load_column(path)


def _load_column(path: pathlib.Path) -> tuple[np.ndarray, bool]:
    if path.stat().st_size <= READ_WHOLE:
        values = np.load(path, allow_pickle=False)
        values.flags.writeable = False  # as mapped ones
        return values, False
    # A plain view: np.memmap does work of its own at every look-up.
    return np.load(path, mmap_mode='r', allow_pickle=False).view(np.ndarray), True


def _allow_more_files() -> bool:
    """Raise this process's limit of open files as far as the system lets it; whether it rose."""
    try:
        import resource  # not on Windows
    except ImportError:
        return False
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # macOS refuses more than its kernel's own limit
        return False
    return True


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    # A rename replaces the file in one step: a reader finds the old one or the new one.
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    os.replace(temporary, path)
