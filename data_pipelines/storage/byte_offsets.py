"""Where every frame and every second of sound of a record lies in its file.

A clip reads its own bytes and no others, however long the video is.

A piece is one frame (JPEG or one H.264 packet) or one second of sound. Two tables are written when
the records are:

  pieces-SPLIT.npy: uint32 [pieces 3], the offset in the record, bytes and crc32 of each piece,
    record by record, frames first. It is memory-mapped.
  places-SPLIT.npz: where each record begins.

Records are protocol buffers whose bytes lie in one run in their file: TFRecord files, and
ArrayRecord files as `prepare` writes them (uncompressed, one record a chunk). Of the latter only
the block headers that the format puts every 64 KiB have to be left out.

An offset is `physical` when it counts all bytes of a file, `logical` when it leaves out the block
headers.
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
from jaxtyping import Int, Int64, UInt32

from data_pipelines.errors import DataError

# ArrayRecord files are Riegeli files: every BLOCK bytes begin with a header, even in the middle of
# a record; it belongs to no record.
BLOCK = 1 << 16
HEADER = 24
# Bytes of the header of a Riegeli chunk.
_CHUNK = 40
# Pieces farther apart than this are read by calls of their own: below, reading the bytes between
# two pieces costs less than another call.
_APART = 1 << 17

# Wire types of protocol buffers: the lowest three bits of a field's tag.
_VARINT = 0
_FIXED_64 = 1
_LENGTH_DELIMITED = 2

# (first byte, last + 1) of a part of a message.
Span = tuple[int, int]


class Pieces:
    """Random access to the pieces of one split's records. Safe from several threads."""

    def __init__(
        self,
        folder: pathlib.Path,
        split: str,
        paths: Sequence[str | os.PathLike],
        firsts: Int[np.ndarray, ' M_plus_1'],
        blocks: bool,
        again: str,
    ):
        """Open the tables of a split and check that they belong to its files.

        Args:
          folder: of the tables.
          split: whose tables.
          paths: the files of the records.
          firsts: first piece of each record.
          blocks: ArrayRecord files, else TFRecord files.
          again: how to make the tables again; the errors end with it.

        Raises:
          DataError: files or tables that are missing, damaged or not those that were written
            together.
        """
        try:
            with np.load(folder / f'places-{split}.npz') as table:
                self._shard = table['shard']  # [M]
                self._offset = table['offset']  # [M]
                self._length = table['length']  # [M]
                file_sizes = table['bytes'].tolist()
            # Memory-mapped: the table of a large dataset has a row for every frame, and a clip
            # needs few of them.
            self._pieces = np.load(folder / f'pieces-{split}.npy', mmap_mode='r')  # [pieces 3]
        except (OSError, ValueError, KeyError, EOFError) as e:
            raise DataError(
                f'the tables places-{split}.npz and pieces-{split}.npy of {folder} cannot be read '
                f'({e}); {again}'
            ) from None
        if len(paths) != len(file_sizes):
            raise DataError(
                f'{folder} has {len(paths)} files of split {split!r}, and had {len(file_sizes)} '
                f'when it was made; {again}'
            )
        # Offsets into a file that was written anew would read bytes of other records; its size
        # tells that at once, long before a checksum fails.
        for path, size in zip(paths, file_sizes):
            if not os.path.isfile(path) or os.path.getsize(path) != size:
                raise DataError(
                    f'{path} is not the file of {size} bytes that {folder} was made for; {again}'
                )
        num_records = len(firsts) - 1
        if len(self._offset) != num_records or self._pieces.shape != (firsts[-1], 3):
            raise DataError(
                f'{folder}: split {split!r} has {len(self._offset)} records and its index '
                f'{num_records}; {again}'
            )
        self._paths = list(paths)
        self._firsts = firsts
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._offset)

    def __getitem__(self, i: int) -> bytes:
        """A whole record, unchecked."""
        with self._open(i) as file:
            return bytes(self._read(file, int(self._offset[i]), int(self._length[i])))

    def read(self, i: int, numbers: Sequence[int]) -> list[bytes]:
        """Read pieces `numbers` of record i.

        Raises:
          ValueError: a piece is not what was written.
        """
        record_pieces = self._pieces[self._firsts[i] : self._firsts[i + 1]]
        table = np.asarray(record_pieces)[numbers].tolist()  # offset, bytes, crc32 of each
        record_begin = int(self._offset[i])
        contents = [b''] * len(table)
        with self._open(i) as file:
            for run in _nearby(table):
                run_begin = table[run[0]][0]
                run_end = _end(table[run[-1]])
                data = self._read(file, record_begin + run_begin, run_end - run_begin)
                for k in run:
                    offset, size, crc = table[k]
                    begin = offset - run_begin
                    contents[k] = bytes(data[begin : begin + size])
                    if zlib.crc32(contents[k]) != crc:
                        raise ValueError('its bytes are not those that were written (crc32)')
        return contents

    def _open(self, i: int) -> io.FileIO:
        """The file of record i, opened for each read: threads share nothing."""
        # Unbuffered: a buffer would read ahead bytes that no piece needs.
        return open(self._paths[self._shard[i]], 'rb', buffering=0)

    def _read(self, file: io.FileIO, offset: int, size: int) -> memoryview:
        if self._blocks:
            return _read_logical(file, offset, size)
        return memoryview(os.pread(file.fileno(), size, offset))


def _end(piece: Sequence[int]) -> int:
    """Offset of the first byte behind a piece."""
    offset, size, _ = piece
    return offset + size


def _nearby(table: Sequence[list[int]]) -> Iterator[list[int]]:
    """Numbers of the pieces that one call reads together, in ascending order of offset."""
    # Not the order of the table: sound may lie before or behind the frames.
    order = sorted(range(len(table)), key=lambda k: table[k])
    run: list[int] = []
    for k in order:
        if run and table[k][0] - _end(table[run[-1]]) > _APART:
            yield run
            run = []
        run.append(k)
    if run:
        yield run


def _physical(logical: int) -> int:
    """Physical offset of the byte at a logical offset."""
    num_headers = logical // (BLOCK - HEADER) + 1  # a file begins with one
    return logical + HEADER * num_headers


def _read_logical(file: io.FileIO, logical: int, size: int) -> memoryview:
    """`size` bytes from a logical offset on, block headers left out."""
    begin = _physical(logical)
    # Of the last byte, plus one: the offset behind it could lie behind a further header.
    end = _physical(logical + size - 1) + 1 if size else begin
    data = memoryview(os.pread(file.fileno(), end - begin, begin))
    return _without_headers(data, begin)


def _without_headers(data: memoryview, begin: int) -> memoryview:
    """Leave out the block headers of the bytes from physical offset `begin` on.

    Neither end of `data` lies in a header.
    """
    header_begins = range(-begin % BLOCK, len(data), BLOCK)
    if not header_begins:
        return data  # most reads are short: nothing is copied
    parts = []
    part_begin = 0
    for header_begin in header_begins:
        parts.append(data[part_begin:header_begin])
        part_begin = header_begin + HEADER
    parts.append(data[part_begin:])
    return memoryview(b''.join(parts))


def array_records(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """Read an ArrayRecord file that `prepare` wrote.

    Yields:
      The logical offset of each record, and the record.

    Raises:
      DataError: the file is of another kind, or damaged.
    """
    physical_size = os.path.getsize(path)
    num_blocks = -(-physical_size // BLOCK)
    logical_size = physical_size - HEADER * num_blocks
    with open(path, 'rb', buffering=0) as file:
        position = 0
        while position + _CHUNK <= logical_size:
            # Header of a Riegeli chunk, little-endian: its hash [8 bytes], size of the data [8],
            # hash of the data [8], kind [1], number of records [7], size when decompressed [8].
            head = _read_logical(file, position, _CHUNK)
            length = int.from_bytes(head[8:16], 'little')
            kind = head[24:25]
            num_records = int.from_bytes(head[25:32], 'little')
            position += _CHUNK
            if kind == b'r' and num_records == 1:
                data = _read_logical(file, position, length)
                begin = _record_begin(data, path)
                yield position + begin, bytes(data[begin:])
            elif kind == b'r':
                return  # ArrayRecord's own table of contents, behind the records
            # Chunks of other kinds, such as the signature of the file, hold no records.
            position += length


def _record_begin(data: memoryview, path: str | os.PathLike) -> int:
    """Where the only record of a chunk begins in the chunk's data."""
    # Compression [1 byte, 0: none], bytes of the sizes [varint], the sizes [a varint each], the
    # records.
    try:
        compression = data[0]
        bytes_of_sizes, sizes_begin = _varint(data, 1)
        record_size, _ = _varint(data, sizes_begin)
    except IndexError:
        raise DataError(
            f'{path} is damaged: expected a chunk with one record, got {len(data)} bytes; copy the '
            'file again, or prepare the data again with --overwrite'
        ) from None
    begin = sizes_begin + bytes_of_sizes
    if compression or begin + record_size != len(data):
        raise DataError(f'{path} holds compressed records; prepare the data again with --overwrite')
    return begin


def save(
    folder: pathlib.Path,
    split: str,
    paths: Sequence[str | os.PathLike],
    rows: Sequence[tuple[int, int, int]],
    pieces: Sequence[UInt32[np.ndarray, '_ 3']],
) -> None:
    """Write the tables of a split. Each appears whole or not at all.

    Args:
      folder: of the tables.
      split: whose tables.
      paths: the files of the records.
      rows: (number of the file, offset, bytes) of each record; the offset is logical in
        ArrayRecord files.
      pieces: (offset in the record, bytes, crc32) of the pieces of each record.
    """
    table = np.array(rows, np.int64).reshape(-1, 3)  # [M 3], also of no records
    with _atomic(folder / f'pieces-{split}.npy') as file:
        # np.concatenate refuses an empty list; the empty table stands for a split of no records.
        empty = np.zeros((0, 3), np.uint32)
        np.save(file, np.concatenate([empty, *pieces]))
    with _atomic(folder / f'places-{split}.npz') as file:
        np.savez(
            file,
            shard=table[:, 0].astype(np.int32),
            offset=table[:, 1],
            length=table[:, 2],
            bytes=[os.path.getsize(path) for path in paths],
        )


@contextlib.contextmanager
def _atomic(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its name only when all is written."""
    # The process's number: several processes may open one old dataset, each adding its tables.
    temporary = path.with_name(f'{path.name}.{os.getpid()}')
    with open(temporary, 'wb') as file:
        yield file
    os.replace(temporary, path)


def firsts(
    frames: Int[np.ndarray, ' M'], samples: Int[np.ndarray, ' M'], rate: int
) -> Int64[np.ndarray, ' M_plus_1']:
    """First piece of each record, and the number of all pieces.

    Args:
      frames: of each record.
      samples: of each record.
      rate: samples a second.
    """
    seconds = -(-samples // rate)  # rounded up: the last second may be short
    num_pieces = frames.astype(np.int64) + seconds
    return np.concatenate([[0], np.cumsum(num_pieces)]).astype(np.int64)


def pieces_of_example(raw: bytes, rate: int) -> tuple[str, UInt32[np.ndarray, 'pieces 3']]:
    """Find the pieces of one tf.train.Example that `prepare` wrote.

    The message is walked by hand: a protocol buffer library gives the values, but not where they
    lie.

    Args:
      raw: the serialized record.
      rate: samples a second.

    Returns:
      The record's id and its pieces.
    """
    message = memoryview(raw)
    values: dict[str, list[Span]] = {}
    for _, begin, end in _fields(message, 0, len(message)):  # Example.features
        for name, feature in _map_entries(message, begin, end):  # Features.feature
            if name in ('id', 'frames', 'audio'):
                values[name] = _values(message, *feature)
    id_begin, id_end = values['id'][0]
    record_id = bytes(message[id_begin:id_end]).decode()
    # A record without sound has an empty list, or none.
    sound = values['audio'][0] if values.get('audio') else (0, 0)
    frames = values.get('frames', [])
    return record_id, _pieces(message, frames, sound, 2 * rate)  # int16


def pieces_of_sequence_example(
    raw: bytes, frames: str, audio: str, rate: int
) -> UInt32[np.ndarray, 'pieces 3']:
    """Find the pieces of one tf.train.SequenceExample of DMVR.

    Args:
      raw: the serialized record.
      frames: name of the feature list of frames, '' for none.
      audio: name of the feature list of sound, '' for none.
      rate: samples a second.

    Raises:
      ValueError: sound in several lists.
    """
    message = memoryview(raw)
    values: dict[str, list[Span]] = {}
    for number, begin, end in _fields(message, 0, len(message)):
        if number != 2:  # SequenceExample.feature_lists; 1 is the context
            continue
        for name, feature_list in _map_entries(message, begin, end):  # FeatureLists.feature_list
            if name in (frames, audio):
                spans = []
                for _, *feature in _fields(message, *feature_list):  # FeatureList.feature
                    spans.extend(_values(message, *feature))
                values[name] = spans
    sound = values.get(audio) or [(0, 0)]
    if len(sound) > 1:
        raise ValueError(f'{audio} is not one list of samples')
    return _pieces(message, values.get(frames, []), sound[0], 4 * rate)  # float32


def _map_entries(message: memoryview, begin: int, end: int) -> Iterator[tuple[str, Span]]:
    """(key, span of the value) of each entry of a message that holds one map."""
    # On the wire a map is a repeated message of two fields: the key, 1, and the value, 2.
    for _, entry_begin, entry_end in _fields(message, begin, end):
        entry = {}
        for number, field_begin, field_end in _fields(message, entry_begin, entry_end):
            entry[number] = (field_begin, field_end)
        key_begin, key_end = entry[1]
        name = bytes(message[key_begin:key_end]).decode()
        if 2 in entry:
            yield name, entry[2]


def _values(message: memoryview, begin: int, end: int) -> list[Span]:
    """Spans of the values of the tf.train.Feature from `begin` to `end`.

    Those of a bytes_list one by one. The numbers of a float_list are packed: one span holds all.
    """
    spans = []
    for _, list_begin, list_end in _fields(message, begin, end):  # Feature.bytes_list, .float_list
        for _, value_begin, value_end in _fields(message, list_begin, list_end):
            spans.append((value_begin, value_end))
    return spans


def _pieces(
    message: memoryview, frames: Sequence[Span], sound: Span, second: int
) -> UInt32[np.ndarray, 'pieces 3']:
    """The table of the pieces of a record; `second`: bytes of a second of sound."""
    spans = list(frames)
    sound_begin, sound_end = sound
    for begin in range(sound_begin, sound_end, second):
        spans.append((begin, min(begin + second, sound_end)))
    table = [(begin, end - begin, zlib.crc32(message[begin:end])) for begin, end in spans]
    return np.array(table, np.uint32).reshape(-1, 3)


def _fields(message: memoryview, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, first byte, last + 1) of the fields of a message that have a length.

    Fields of numbers are passed over.
    """
    while position < end:
        tag, position = _varint(message, position)
        number = tag >> 3
        wire_type = tag & 7
        if wire_type == _LENGTH_DELIMITED:
            size, position = _varint(message, position)
            yield number, position, position + size
            position += size
        elif wire_type == _VARINT:
            _, position = _varint(message, position)
        elif wire_type == _FIXED_64:
            position += 8
        else:  # 32 bits
            position += 4


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """An integer of variable length, and the position behind it.

    Seven bits a byte, the lowest first; all bytes but the last have the highest bit set.
    """
    value = 0
    shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
