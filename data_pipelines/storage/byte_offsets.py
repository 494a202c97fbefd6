"""Reads frames and seconds of sound of a record by where they lie in its file.

A clip reads its own bytes and no others, however long the video is. Where they lie is in the tables
of `piece_tables`, which are written when the records are.

Records are protocol buffers whose bytes lie in one run in their file: TFRecord files, and
ArrayRecord files as `prepare` writes them (`array_record_files`).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from data_pipelines.errors import DataError
from data_pipelines.storage import array_record_files, record_files, version_1
from data_pipelines.storage.piece_tables import PieceTables
from data_pipelines.storage.record_files import Range, RecordFiles

Tables = PieceTables | version_1.PieceTables


class Pieces:
    """Random access to the pieces of one split's records. Safe from several threads."""

    def __init__(
        self,
        tables: Tables,
        files: RecordFiles,
        blocks: bool,
        what: str,
        again: str,
    ):
        """Check that the tables of a split belong to its files.

        Args:
          tables: where the pieces are.
          files: of the records.
          blocks: ArrayRecord files, else TFRecord files.
          what: the split in the errors.
          again: how to make the tables again; the errors end with it.

        Raises:
          DataError: files that are missing or not those that the tables were made for.
        """
        if len(files.paths) != len(tables.file_sizes):
            raise DataError(
                f'{what} has {len(files.paths)} files now, and had {len(tables.file_sizes)} when '
                f'it was made; {again}'
            )
        # Offsets into a file that was written anew would read bytes of other records; its size
        # tells that at once, long before a checksum fails.
        for number, size in enumerate(tables.file_sizes):
            if files.size(number) != size:
                raise DataError(
                    f'{files.paths[number]} is not the file of {size} bytes that {what} was made '
                    f'for; {again}'
                )
        self._tables = tables
        self._files = files
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._tables)

    def __getitem__(self, i: int) -> bytes:
        """A whole record, unchecked."""
        file_number, offset, length = self._tables.place(i)
        return bytes(self._read(file_number, [(offset, length)])[0])

    def read(
        self, i: int, frames: Sequence[int], seconds: Sequence[int], flows: Sequence[int] = ()
    ) -> list[bytes]:
        """Read pieces of record i.

        Args:
          i: number of the record.
          frames: numbers of frames.
          seconds: numbers of seconds of sound.
          flows: numbers of optical flows.

        Returns:
          The frames, the seconds behind them, and behind these the flows.

        Raises:
          ValueError: a piece is not what was written.
          OSError: the file cannot be read.
          StoreError: the object store cannot be read.
        """
        file_number, record_begin, _ = self._tables.place(i)
        pieces = self._tables.pieces(i, frames, seconds, flows)
        # Not the order of the table: sound may lie before or behind the frames.
        runs = list(record_files.runs(pieces, self._files.apart))
        ranges = [(record_begin + begin, size) for (begin, size), _ in runs]
        contents = [b''] * len(pieces)
        for ((run_begin, _), numbers), data in zip(runs, self._read(file_number, ranges)):
            for k in numbers:
                begin = pieces[k].offset - run_begin
                contents[k] = bytes(data[begin : begin + pieces[k].size])
                if zlib.crc32(contents[k]) & self._tables.crc_mask != pieces[k].crc:
                    raise ValueError('its bytes are not those that were written (crc32)')
        return contents

    def _read(self, file_number: int, ranges: Sequence[Range]) -> list[memoryview]:
        """Parts of a file, by (offset, bytes); the offsets are logical in ArrayRecord files."""
        if not ranges:
            return []
        if not self._blocks:
            return self._files.read(file_number, ranges)
        physical = [array_record_files.physical_range(*part) for part in ranges]
        contents = []
        for (begin, _), data in zip(physical, self._files.read(file_number, physical)):
            contents.append(array_record_files.without_headers(data, begin))
        return contents
