"""Writes the index of a split record by record, in memory that does not grow with it."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.storage import record_index
from data_pipelines.storage.columns import ColumnWriter, FolderWriter, TableWriter


class IndexWriter(FolderWriter):
    """Writes the folder that `Index.open` reads; it takes its name when all is written.

        with IndexWriter(folder / 'index-train', {'class': None}) as writer:
            for record in records:
                writer.add(record, crc)

    Attributes:
      num_records: added so far.
      num_sentences: added so far.
      num_segments: added so far.
    """

    def __init__(self, folder: pathlib.Path, multi_hot: Mapping[str, int | None]):
        """Begin an index.

        Args:
          folder: of the index, which does not exist yet.
          multi_hot: number of classes of each label that is multi-hot, None of the others.
        """
        self.num_records = 0
        self.num_sentences = 0
        self.num_segments = 0
        self._table = TableWriter(folder)
        table = self._table
        self._numbers = {
            name: table.column(name, dtype) for name, (dtype, _) in record_index.NUMBERS.items()
        }
        self._texts = {name: table.strings(name) for name in record_index.TEXTS}
        self._offsets = {name: table.offsets(name) for name in record_index.OFFSETS}
        self._multi_hot: dict[str, int | None] = {}
        self._labels = {name: self._label_column(name, multi_hot[name]) for name in multi_hot}
        self._folds: ColumnWriter | None = None
        self._num_folds = 0

    def add(self, record: Mapping[str, Any], crc: int) -> None:
        """Add one record.

        Args:
          record: fields of `Index` for one record: `id`, `frames`, `samples`, `height`, `width`,
            `duration` and `ground_truth`; `sentences`, a list of {start, end, text}; `segments`, a
            list of {start, end, caption, labels}; and `folds` in datasets that have them.
          crc: crc32 of the serialized record.
        """
        sentences = record['sentences']
        segments = record['segments']
        self._numbers['crc'].extend([crc])
        for name in record_index.OF_RECORD:
            self._numbers[name].extend([record[name]])
        for name in ('id', 'ground_truth'):
            self._texts[name].extend([record[name]])

        self._offsets['sentence_offset'].extend([len(sentences)])
        self._texts['sentence_text'].extend(sentence['text'] for sentence in sentences)
        self._offsets['segment_offset'].extend([len(segments)])
        self._texts['segment_caption'].extend(segment['caption'] for segment in segments)
        for time in ('start', 'end'):
            self._numbers[f'sentence_{time}'].extend([entry[time] for entry in sentences])
            self._numbers[f'segment_{time}'].extend([entry[time] for entry in segments])
        self._numbers['segment_record'].extend([self.num_records] * len(segments))
        for name, column in self._labels.items():
            column.extend([segment['labels'][name] for segment in segments])
        if 'folds' in record:
            self._add_folds(record['folds'])

        self.num_records += 1
        self.num_sentences += len(sentences)
        self.num_segments += len(segments)

    def add_label(self, name: str, classes: int | None, blocks: Iterable[np.ndarray]) -> None:
        """Add a label whose values are known when all records are.

        Args:
          name: of the label.
          classes: number of classes of a multi-hot label, None for class numbers.
          blocks: values of all segments, some at a time: [g], or [g classes].
        """
        column = self._label_column(name, classes)
        for block in blocks:
            column.extend(block)

    def close(self) -> None:
        counts = {
            'records': self.num_records,
            'sentences': self.num_sentences,
            'segments': self.num_segments,
            'folds': self._num_folds,
        }
        publish(self._table, counts, self._multi_hot)

    def discard(self) -> None:
        self._table.discard()

    def _label_column(self, name: str, classes: int | None) -> ColumnWriter:
        # Numbered: a label may have any name, a file may not.
        file = record_index.label_column(len(self._multi_hot))
        self._multi_hot[name] = classes
        return self._table.column(file, record_index.label_dtype(classes), classes)

    def _add_folds(self, folds: Sequence[int]) -> None:
        if self._folds is None:
            self._num_folds = len(folds)
            self._folds = self._table.column('folds', np.int8, self._num_folds)
        self._folds.extend([folds])


def publish(
    table: TableWriter, counts: Mapping[str, int], multi_hot: Mapping[str, int | None]
) -> None:
    """Give a table that holds the columns of an index its name.

    Args:
      table: with all columns written.
      counts: of records, sentences, segments and folds.
      multi_hot: number of classes of each label that is multi-hot, None of the others.
    """
    table.about = {'version': record_index.VERSION, **counts, 'labels': multi_hot}
    table.finish()
    # Counted over the finished columns, so that no reader has to.
    index = record_index.Index.open(table.path)
    table.about['max_captions'] = index.max_captions
    table.publish()
