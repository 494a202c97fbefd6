"""The tables behind `byte_offsets`: 4 bytes a frame or optical flow and 2 a second of sound.

A piece is one frame (JPEG or one H.264 packet), one optical flow or one second of sound. The
folder pieces-SPLIT is a table (`columns`) of these columns, where a record's rows lie one behind
the other in record order:

  of each record: offset in its file, length, offset in the record of its first frame
    (frame_begin) and of its sound (sound_begin), bytes of its sound (sound_bytes), and
    which rows of the columns below are its own (frame_row, second_row);
  of each frame: frame_length, the lower 16 bits of its bytes, and frame_crc, those of its crc32;
  of each second of sound: second_crc, likewise;
  where optical flow is stored, flow_begin, flow_row, flow_length and flow_crc, as of frames.

Where the second frame begins follows from where the first ends: between two values, a protocol
buffer has nothing but the tags and lengths of the messages that hold the second. The writer
compares. What does not follow is kept for whole records: the upper 16 bits of the lengths (`high`)
where a frame has 64 KiB or more, and all offsets (`offsets`) where a foreign writer's differ. (Of
flow: `flow_high` and `flow_offsets`.)
"""

from __future__ import annotations

import bisect
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64, Shaped, UInt32
from numpy.typing import DTypeLike

from data_pipelines.errors import DataError
from data_pipelines.storage.columns import FolderWriter, Table, TableWriter

# Messages around each frame: the BytesList of a tf.train.Example; the FeatureList, Feature and
# BytesList of a tf.train.SequenceExample.
EXAMPLE = 1
SEQUENCE_EXAMPLE = 3

_VERSION = 2
_LOW = 0xFFFF
# dtypes of the columns with a row for each record.
_OF_RECORD = {
    'offset': np.int64,
    'length': np.uint32,
    'sound_begin': np.uint32,
    'sound_bytes': np.uint32,
}


class Piece(NamedTuple):
    """Of a piece of a record: offset in the record, bytes, and the stored bits of its crc32."""

    offset: int
    size: int
    crc: int


def folder_of(folder: pathlib.Path, split: str) -> pathlib.Path:
    """The folder of a split's table."""
    return folder / f'pieces-{split}'


class PiecesWriter(FolderWriter):
    """Writes the table of a split record by record; it takes its name when all is written.

    with PiecesWriter(folder, 'train', paths, 2 * rate, EXAMPLE) as writer:
        writer.add(0, offset, len(raw), frames, seconds)
    """

    def __init__(
        self,
        folder: pathlib.Path,
        split: str,
        paths: Sequence[str | os.PathLike],
        second_bytes: int,
        nesting: int,
        has_flow: bool = False,
    ):
        """Begin a table.

        Args:
          folder: of the dataset.
          split: whose table.
          paths: the files of the records.
          second_bytes: of a second of sound.
          nesting: messages around each frame: EXAMPLE or SEQUENCE_EXAMPLE.
          has_flow: whether optical flow is stored.
        """
        self._table = TableWriter(folder_of(folder, split))
        self._file_sizes = [os.path.getsize(path) for path in paths]
        self._second_bytes = second_bytes
        self._nesting = nesting
        self._num_records = 0
        self._file_first = [0]  # first record of each file
        self._of_record = {
            name: self._table.column(name, dtype) for name, dtype in _OF_RECORD.items()
        }
        self._lists = [_ListWriter(self._table, 'frame', '', nesting)]
        if has_flow:
            self._lists.append(_ListWriter(self._table, 'flow', 'flow_', nesting))
        self._second_row = self._table.offsets('second_row')
        self._second_crc = self._table.column('second_crc', np.uint16)

    def add(
        self,
        file: int,
        offset: int,
        length: int,
        frames: UInt32[np.ndarray, 'frames 3'],
        seconds: UInt32[np.ndarray, 'seconds 3'],
        flows: UInt32[np.ndarray, 'flows 3'] | None = None,
    ) -> None:
        """Add one record.

        Args:
          file: number of the file it is in; files come in order.
          offset: of the record in its file, logical in ArrayRecord files.
          length: of the record, in bytes.
          frames: offset in the record, bytes and crc32 of each frame.
          seconds: likewise of each second of sound.
          flows: likewise of each optical flow, where it is stored.

        Raises:
          ValueError: the sound is not in seconds one behind the other.
        """
        sound_begin, sound_bytes = _sound(seconds, self._second_bytes)
        # Of files without records, the next record is the first too.
        while len(self._file_first) <= file:
            self._file_first.append(self._num_records)
        values = {
            'offset': offset,
            'length': length,
            'sound_begin': sound_begin,
            'sound_bytes': sound_bytes,
        }
        for name, column in self._of_record.items():
            column.extend([values[name]])
        for writer, entries in zip(self._lists, (frames, flows)):
            writer.add(self._num_records, entries)
        self._second_row.extend([len(seconds)])
        self._second_crc.extend(seconds[:, 2] & _LOW)
        self._num_records += 1

    def close(self) -> None:
        num_files = len(self._file_sizes)
        missing = num_files + 1 - len(self._file_first)
        self._table.about = {
            'version': _VERSION,
            'records': self._num_records,
            'second_bytes': self._second_bytes,
            'nesting': self._nesting,
            'file_bytes': self._file_sizes,
            # First record of each file, and the number of all.
            'file_first': [*self._file_first, *[self._num_records] * missing],
        }
        for writer in self._lists:
            self._table.about |= writer.about()
        self._table.finish()
        self._table.publish()

    def discard(self) -> None:
        self._table.discard()


class PieceTables:
    """Where the pieces of one split's records are.

    Attributes:
      file_sizes: bytes of each file of the records.
      crc_mask: the bits of a crc32 that are stored.
    """

    crc_mask = _LOW

    def __init__(self, folder: pathlib.Path, split: str, frames: Int[np.ndarray, ' M'], again: str):
        """Open the table of a split.

        Args:
          folder: of the dataset.
          split: whose table.
          frames: of each record, as the index says.
          again: how to make the table again; the errors end with it.

        Raises:
          DataError: a table that is missing, damaged or not of these records.
        """
        path = folder_of(folder, split)
        table = Table(path, again)
        num_records = table.number('records')
        if num_records != len(frames):
            raise DataError(
                f'{folder}: split {split!r} has {num_records} records and its index '
                f'{len(frames)}; {again}'
            )
        self._of_record = {
            name: table.column(name, dtype, (num_records,)) for name, dtype in _OF_RECORD.items()
        }
        self._frames = _List(table, 'frame', '', int(frames.sum(dtype=np.int64)))
        self._flows: _List | None = None
        # Tables of datasets without flow do not mention it.
        if 'flow_high' in table.about:
            self._flows = _List(table, 'flow', 'flow_', int(frames.sum(dtype=np.int64)))
        self._second_row = table.offsets('second_row', num_records)
        self._second_crc = table.column('second_crc', np.uint16, (int(self._second_row[-1]),))
        self._second_bytes = table.number('second_bytes')
        self.file_sizes: list[int] = table.entry('file_bytes', list)
        self._file_first: list[int] = table.entry('file_first', list)

    def __len__(self) -> int:
        return len(self._of_record['offset'])

    def place(self, i: int) -> tuple[int, int, int]:
        """(number of the file, offset in it, bytes) of record i."""
        file = bisect.bisect_right(self._file_first, i) - 1
        return file, int(self._of_record['offset'][i]), int(self._of_record['length'][i])

    def pieces(
        self, i: int, frames: Sequence[int], seconds: Sequence[int], flows: Sequence[int] = ()
    ) -> list[Piece]:
        """Frames, seconds of sound and flows of record i, by their numbers in the record.

        Raises:
          ValueError: flows of a dataset without them.
        """
        found = [*self._frames.pieces(i, frames), *self._seconds(i, seconds)]
        if not len(flows):
            return found
        if self._flows is None:
            raise ValueError('its table says nothing of optical flow')
        return [*found, *self._flows.pieces(i, flows)]

    def _seconds(self, i: int, numbers: Sequence[int]) -> list[Piece]:
        begin = int(self._of_record['sound_begin'][i])
        end = int(self._of_record['sound_bytes'][i])
        first = int(self._second_row[i])
        pieces = []
        for number in numbers:
            offset = number * self._second_bytes
            size = min(self._second_bytes, end - offset)
            pieces.append(Piece(begin + offset, size, int(self._second_crc[first + number])))
        return pieces


class _ListWriter:
    """Writes where the entries of one list lie in each record: its frames, or its flows."""

    def __init__(self, table: TableWriter, name: str, prefix: str, nesting: int):
        """Begin the columns of a list.

        Args:
          table: of all columns.
          name: of an entry, with which the columns' names begin.
          prefix: of the names of exceptions; frames have none.
          nesting: messages around each entry.
        """
        self._prefix = prefix
        self._nesting = nesting
        self._begin = table.column(f'{name}_begin', np.uint32)
        self._row = table.offsets(f'{name}_row')
        self._length = table.column(f'{name}_length', np.uint16)
        self._crc = table.column(f'{name}_crc', np.uint16)
        self._high = _ExceptionsWriter(table, f'{prefix}high', np.uint16)
        self._offsets = _ExceptionsWriter(table, f'{prefix}offsets', np.uint32)

    def add(self, record: int, entries: UInt32[np.ndarray, 'n 3'] | None) -> None:
        """Add the list of a record.

        Args:
          record: its number.
          entries: offset in the record, bytes and crc32 of each; None: there are none.
        """
        if entries is None:
            entries = np.zeros((0, 3), np.uint32)
        begin = int(entries[0, 0]) if len(entries) else 0
        offsets, lengths = entries[:, 0], entries[:, 1].astype(np.int64)
        self._begin.extend([begin])
        self._row.extend([len(entries)])
        self._length.extend(lengths & _LOW)
        self._crc.extend(entries[:, 2] & _LOW)
        if (lengths > _LOW).any():
            self._high.add(record, lengths >> 16)
        if not np.array_equal(offsets, _offsets(begin, lengths, self._nesting)):
            self._offsets.add(record, offsets)

    def about(self) -> dict[str, int]:
        """What table.json says of the list."""
        return {
            f'{self._prefix}high': self._high.num_records,
            f'{self._prefix}offsets': self._offsets.num_records,
        }


class _List:
    """Where the entries of one list lie in each record."""

    def __init__(self, table: Table, name: str, prefix: str, num_entries: int):
        """Open what `_ListWriter` wrote; `num_entries`: of all records, as the index says."""
        num_records = table.number('records')
        self._begin = table.column(f'{name}_begin', np.uint32, (num_records,))
        self._row = table.offsets(f'{name}_row', num_records, num_entries)
        self._length = table.column(f'{name}_length', np.uint16, (num_entries,))
        self._crc = table.column(f'{name}_crc', np.uint16, (num_entries,))
        self._high = _Exceptions(table, f'{prefix}high', np.uint16)
        self._offsets = _Exceptions(table, f'{prefix}offsets', np.uint32)
        self._nesting = table.number('nesting')

    def pieces(self, i: int, numbers: Sequence[int]) -> list[Piece]:
        """Entries of record i, by their numbers."""
        if not len(numbers):
            return []
        # Only what lies before the last one: offsets are sums of lengths.
        first = int(self._row[i])
        rows = slice(first, first + max(numbers) + 1)
        count = rows.stop - rows.start
        lengths = self._length[rows].astype(np.int64)
        high = self._high.of(i)
        if high is not None:
            lengths += high[:count].astype(np.int64) << 16
        offsets = self._offsets.of(i)
        if offsets is None:
            offsets = _offsets(int(self._begin[i]), lengths, self._nesting)
        checksums = self._crc[rows]
        return [Piece(int(offsets[k]), int(lengths[k]), int(checksums[k])) for k in numbers]


class _ExceptionsWriter:
    """Writes values for each frame of a few records."""

    def __init__(self, table: TableWriter, name: str, dtype: DTypeLike):
        self.num_records = 0
        self._record = table.column(f'{name}.record', np.int64)
        self._row = table.offsets(f'{name}.row')
        self._value = table.column(f'{name}.value', dtype)

    def add(self, record: int, values: Shaped[np.ndarray, ' frames']) -> None:
        self.num_records += 1
        self._record.extend([record])
        self._row.extend([len(values)])
        self._value.extend(values)


class _Exceptions:
    """Values for each frame of a few records."""

    def __init__(self, table: Table, name: str, dtype: DTypeLike):
        num_records = table.number(name)
        self._record = table.column(f'{name}.record', np.int64, (num_records,))
        self._row = table.offsets(f'{name}.row', num_records)
        self._value = table.column(f'{name}.value', dtype, (int(self._row[-1]),))

    def of(self, record: int) -> Shaped[np.ndarray, ' frames'] | None:
        """Those of a record; None if it is no exception."""
        k = int(np.searchsorted(self._record, record))
        if k == len(self._record) or self._record[k] != record:
            return None
        return self._value[self._row[k] : self._row[k + 1]]


def _sound(seconds: UInt32[np.ndarray, 'n 3'], second_bytes: int) -> tuple[int, int]:
    """(offset in the record, bytes) of all sound."""
    if not len(seconds):
        return 0, 0
    offsets, sizes = seconds[:, 0].astype(np.int64), seconds[:, 1]
    begin = int(offsets[0])
    is_whole = (sizes[:-1] == second_bytes).all() and sizes[-1] <= second_bytes
    if not is_whole or not np.array_equal(offsets, begin + second_bytes * np.arange(len(offsets))):
        raise ValueError(f'expected sound in seconds of {second_bytes} bytes without gaps')
    return begin, int(offsets[-1]) + int(sizes[-1]) - begin


def _offsets(begin: int, lengths: Int64[np.ndarray, ' n'], nesting: int) -> Int64[np.ndarray, ' n']:
    """Where frames of these lengths begin, the first one at `begin`."""
    if not len(lengths):
        return lengths
    steps = lengths[:-1] + _prefix_bytes(lengths[1:], nesting)
    return begin + np.concatenate([[0], np.cumsum(steps)])


def _prefix_bytes(lengths: Int64[np.ndarray, ' n'], nesting: int) -> Int64[np.ndarray, ' n']:
    """Bytes between the end of a frame and the next one, of these lengths.

    From the inside out, each message puts in front of its content a tag of one byte and the length
    of the content, seven bits a byte.
    """
    sizes = lengths
    for _ in range(nesting):
        size_bytes = 1 + sum((sizes >= 1 << bits).astype(np.int64) for bits in (7, 14, 21, 28))
        sizes = sizes + 1 + size_bytes
    return sizes - lengths
