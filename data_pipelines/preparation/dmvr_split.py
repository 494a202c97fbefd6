"""Writes the index and the byte offsets of one split of DMVR records, record by record."""

from __future__ import annotations

import os
import pathlib
import types
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.preparation import dmvr_records
from data_pipelines.preparation.dmvr_records import RecordParser
from data_pipelines.storage import piece_tables, record_index
from data_pipelines.storage.columns import Table, TableWriter
from data_pipelines.storage.index_writer import IndexWriter

# Records whose labels are in memory at a time.
_BLOCK = 4096


class SplitWriter:
    """Reads the files of a split and writes its tables.

    How many classes there are, and whether a record may have several, is known when the records of
    all splits are read. Until then the classes are in a table of their own.

    As a context manager it deletes at the end what was not closed.

    Attributes:
      num_records: read so far.
    """

    def __init__(
        self, folder: pathlib.Path, split: str, paths: Sequence[str], parser: RecordParser
    ):
        """Begin the tables of a split.

        Args:
          folder: of the tables.
          split: its name.
          paths: its files.
          parser: reads the records of all splits.
        """
        self.num_records = 0
        self._parser = parser
        self._folder = record_index.folder_of(folder, split)
        self._index = IndexWriter(self._folder, {})
        second_bytes = 4 * parser.rate  # float32
        self._pieces = piece_tables.PiecesWriter(
            folder, split, paths, second_bytes, piece_tables.SEQUENCE_EXAMPLE
        )
        self._labelled = TableWriter(folder / f'classes-{split}')
        self._row = self._labelled.offsets('row')
        self._classes = self._labelled.column('class', np.int32)
        self._is_closed = False

    def add_file(self, number: int, path: str, skipped: dict[str, str]) -> None:
        """Add the records of the `number`-th file; unreadable ones go to `skipped`."""
        for offset, raw in dmvr_records.read_records(path, skipped):
            where = f'{path}, byte {offset}'
            record = self._parser.parse(raw, where)
            pieces = self._parser.pieces(raw, record, where)
            # Numbered over the split, so that unnamed records of two files of one name differ.
            record_id = record['id'] or f'{os.path.basename(path)}:{self.num_records}'
            self._index.add({**record, 'id': record_id}, zlib.crc32(raw))
            # The record's own bytes begin behind the header.
            begin = offset + dmvr_records.HEADER
            self._pieces.add(number, begin, len(raw), pieces.frames, pieces.seconds)
            self._row.extend([len(record['labelled'])])
            self._classes.extend(record['labelled'])
            self.num_records += 1

    def close(self) -> record_index.Index:
        """Add the label `class`, if any record of any split has one; returns the index."""
        self._labelled.finish()
        num_classes = len(self._parser.labels().get('class', []))
        if num_classes:
            width = num_classes if self._parser.is_multi_hot else None
            self._index.add_label('class', width, self._label_blocks(width))
        self._labelled.discard()
        self._index.close()
        self._pieces.close()
        self._is_closed = True
        return record_index.Index.open(self._folder)

    def _label_blocks(self, width: int | None) -> Iterator[np.ndarray]:
        """Labels of the records, a block at a time: class numbers [b], or multi-hot [b width]."""
        table = Table(self._labelled.path, 'run the command again')
        row = table.offsets('row', self.num_records)
        classes = table.column('class', np.int32, (int(row[-1]),))
        for begin in range(0, self.num_records, _BLOCK):
            offsets = row[begin : begin + _BLOCK + 1]
            counts = np.diff(offsets)
            owners = np.repeat(np.arange(len(counts)), counts)
            values = classes[offsets[0] : offsets[-1]]
            if width is None:
                labels = np.full(len(counts), -1, np.int32)  # unknown
                labels[owners] = values
            else:
                labels = np.zeros((len(counts), width), np.uint8)
                labels[owners, values] = 1
            yield labels

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if not self._is_closed:
            for writer in (self._index, self._pieces, self._labelled):
                writer.discard()
