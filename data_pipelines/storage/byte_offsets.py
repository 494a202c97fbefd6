"""Reads frames and seconds of sound of a record by where they lie in its file.

A clip reads its own bytes and no others, however long the video is. Where they lie is in the tables
of `piece_tables`, which are written when the records are.

Records are protocol buffers whose bytes lie in one run in their file: TFRecord files, and
ArrayRecord files as `prepare` writes them (`array_record_files`).
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator, Sequence

from data_pipelines.errors import DataError
from data_pipelines.storage import array_record_files, version_1
from data_pipelines.storage.piece_tables import Piece, PieceTables

# Pieces farther apart than this are read by calls of their own: below, reading the bytes between
# two pieces costs less than another call.
_APART = 1 << 17


Tables = PieceTables | version_1.PieceTables


class Pieces:
    """Random access to the pieces of one split's records. Safe from several threads."""

    def __init__(
        self,
        tables: Tables,
        paths: Sequence[str | os.PathLike],
        blocks: bool,
        what: str,
        again: str,
    ):
        """Check that the tables of a split belong to its files.

        Args:
          tables: where the pieces are.
          paths: the files of the records.
          blocks: ArrayRecord files, else TFRecord files.
          what: the split in the errors.
          again: how to make the tables again; the errors end with it.

        Raises:
          DataError: files that are missing or not those that the tables were made for.
        """
        if len(paths) != len(tables.file_sizes):
            raise DataError(
                f'{what} has {len(paths)} files now, and had {len(tables.file_sizes)} when it was '
                f'made; {again}'
            )
        # Offsets into a file that was written anew would read bytes of other records; its size
        # tells that at once, long before a checksum fails.
        for path, size in zip(paths, tables.file_sizes):
            if not os.path.isfile(path) or os.path.getsize(path) != size:
                raise DataError(
                    f'{path} is not the file of {size} bytes that {what} was made for; {again}'
                )
        self._tables = tables
        self._paths = list(paths)
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._tables)

    def __getitem__(self, i: int) -> bytes:
        """A whole record, unchecked."""
        file_number, offset, length = self._tables.place(i)
        with self._open(file_number) as file:
            return bytes(self._read(file, offset, length))

    def read(self, i: int, frames: Sequence[int], seconds: Sequence[int]) -> list[bytes]:
        """Read pieces of record i.

        Args:
          i: number of the record.
          frames: numbers of frames.
          seconds: numbers of seconds of sound.

        Returns:
          The frames, and the seconds behind them.

        Raises:
          ValueError: a piece is not what was written.
        """
        file_number, record_begin, _ = self._tables.place(i)
        pieces = self._tables.pieces(i, frames, seconds)
        contents = [b''] * len(pieces)
        with self._open(file_number) as file:
            for run in _nearby(pieces):
                run_begin = pieces[run[0]].offset
                run_end = max(_end(pieces[k]) for k in run)
                data = self._read(file, record_begin + run_begin, run_end - run_begin)
                for k in run:
                    begin = pieces[k].offset - run_begin
                    contents[k] = bytes(data[begin : begin + pieces[k].size])
                    if zlib.crc32(contents[k]) & self._tables.crc_mask != pieces[k].crc:
                        raise ValueError('its bytes are not those that were written (crc32)')
        return contents

    def _open(self, file_number: int) -> io.FileIO:
        """A file of the records, opened for each read: threads share nothing."""
        # Unbuffered: a buffer would read ahead bytes that no piece needs.
        return open(self._paths[file_number], 'rb', buffering=0)

    def _read(self, file: io.FileIO, offset: int, size: int) -> memoryview:
        if self._blocks:
            return array_record_files.read_logical(file, offset, size)
        return memoryview(os.pread(file.fileno(), size, offset))


def _end(piece: Piece) -> int:
    """Offset of the first byte behind a piece."""
    return piece.offset + piece.size


def _nearby(pieces: Sequence[Piece]) -> Iterator[list[int]]:
    """Numbers of the pieces that one call reads together, in ascending order of offset."""
    # Not the order of the table: sound may lie before or behind the frames.
    order = sorted(range(len(pieces)), key=lambda k: pieces[k])
    run: list[int] = []
    for k in order:
        if run and pieces[k].offset - _end(pieces[run[-1]]) > _APART:
            yield run
            run = []
        run.append(k)
    if run:
        yield run
