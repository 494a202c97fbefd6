"""ArrayRecord files as `prepare` writes them: uncompressed, one record a chunk.

The bytes of a record lie in one run, but for the block headers that the format puts every 64 KiB.
An offset is `physical` when it counts all bytes of a file, `logical` when it leaves out the block
headers.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator

from data_pipelines.errors import DataError
from data_pipelines.storage.record_messages import read_varint

# ArrayRecord files are Riegeli files: every BLOCK bytes begin with a header, even in the middle of
# a record; it belongs to no record.
BLOCK = 1 << 16
HEADER = 24
# Bytes of the header of a Riegeli chunk.
_CHUNK = 40


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
            head = read_logical(file, position, _CHUNK)
            length = int.from_bytes(head[8:16], 'little')
            kind = head[24:25]
            num_records = int.from_bytes(head[25:32], 'little')
            position += _CHUNK
            if kind == b'r' and num_records == 1:
                data = read_logical(file, position, length)
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
        bytes_of_sizes, sizes_begin = read_varint(data, 1)
        record_size, _ = read_varint(data, sizes_begin)
    except IndexError:
        raise DataError(
            f'{path} is damaged: expected a chunk with one record, got {len(data)} bytes; copy the '
            'file again, or prepare the data again with --overwrite'
        ) from None
    begin = sizes_begin + bytes_of_sizes
    if compression or begin + record_size != len(data):
        raise DataError(f'{path} holds compressed records; prepare the data again with --overwrite')
    return begin


def physical(logical: int) -> int:
    """Physical offset of the byte at a logical offset."""
    num_headers = logical // (BLOCK - HEADER) + 1  # a file begins with one
    return logical + HEADER * num_headers


def physical_range(logical: int, size: int) -> tuple[int, int]:
    """(physical offset, bytes) of what holds `size` bytes from a logical offset on."""
    begin = physical(logical)
    # Of the last byte, plus one: the offset behind it could lie behind a further header.
    end = physical(logical + size - 1) + 1 if size else begin
    return begin, end - begin


def read_logical(file: io.FileIO, logical: int, size: int) -> memoryview:
    """`size` bytes from a logical offset on, block headers left out."""
    begin, physical_size = physical_range(logical, size)
    data = memoryview(os.pread(file.fileno(), physical_size, begin))
    return without_headers(data, begin)


def without_headers(data: memoryview, begin: int) -> memoryview:
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
