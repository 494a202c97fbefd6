"""The table of contents of one prepared split: what every record holds, in record order.

It is read without opening the records. From it alone the pipeline knows which frames, samples,
sentences and labels a row needs before anything is read, evaluators know their segments, and a
damaged record is noticed (crc32). NumPy only.

On disk it is a table of columns (`columns`), written by `index_writer` and mapped into memory here.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int, Int8, Int32, Int64, UInt32

from data_pipelines.storage import segment_captions
from data_pipelines.storage.columns import Strings, Table, ranges, write_json
from data_pipelines.storage.frame_shapes import frame_shapes

__all__ = ['VERSION', 'Index', 'Strings', 'write_json']

# Of the layout of a prepared folder and its tables. Folders of version 1 (`version_1`) are read
# too; one of a later version is refused.
VERSION = 2

# Columns of single numbers: dtype, and what has a row in them.
NUMBERS: dict[str, tuple[Any, str]] = {
    'crc': (np.uint32, 'records'),
    'frames': (np.int32, 'records'),
    'samples': (np.int64, 'records'),
    'height': (np.int32, 'records'),
    'width': (np.int32, 'records'),
    'duration': (np.float64, 'records'),
    'sentence_start': (np.float32, 'sentences'),
    'sentence_end': (np.float32, 'sentences'),
    'segment_record': (np.int32, 'segments'),
    'segment_start': (np.float32, 'segments'),
    'segment_end': (np.float32, 'segments'),
}
# Those that a record's own fields give.
OF_RECORD = ('frames', 'samples', 'height', 'width', 'duration')
# Columns of texts, and what has a row in them.
TEXTS = {
    'id': 'records',
    'ground_truth': 'records',
    'sentence_text': 'sentences',
    'segment_caption': 'segments',
}
# Offsets of the records' items, and what the items are.
OFFSETS = {'sentence_offset': 'sentences', 'segment_offset': 'segments'}


def folder_of(folder: pathlib.Path, split: str) -> pathlib.Path:
    """The folder of a split's index."""
    return folder / f'index-{split}'


def label_column(number: int) -> str:
    """Name of the column of the `number`-th label."""
    return f'label.{number}'


def label_dtype(classes: int | None) -> Any:
    """dtype of a label of class numbers (None) or of a multi-hot one."""
    return np.int32 if classes is None else np.uint8


@dataclasses.dataclass
class Index:
    """M records, G segments, N sentences of one split.

    Times are in seconds from the record's beginning. Sentences and segments of all records stand
    one behind the other: those of record i are offset[i] … offset[i + 1], sorted by start.

    Attributes:
      id: path of the file below the folder it came from, of each record [M].
      crc: crc32 of the serialized record.
      frames: of each record, 0 without pictures.
      samples: of each record, 0 without sound.
      height: of the frames, in pixels.
      width: of the frames, in pixels.
      duration: of each record.
      ground_truth: JSON of each record [M].
      sentence_offset: first sentence of each record, and N.
      sentence_start: of each sentence.
      sentence_end: of each sentence.
      sentence_text: of each sentence [N].
      segment_offset: first segment of each record, and G.
      segment_record: the record each segment belongs to.
      segment_start: of each segment.
      segment_end: of each segment.
      segment_caption: of each segment [G], '' without.
      labels: {name: int32 [G], -1 unknown, or uint8 [G P], multi-hot}.
      folds: which of train, validation, test a record is in, in each fold; -1: in none.
      known_max_captions: `max_captions` where it was counted already, else None.
    """

    id: Strings
    crc: UInt32[np.ndarray, ' M']
    frames: Int32[np.ndarray, ' M']
    samples: Int64[np.ndarray, ' M']
    height: Int32[np.ndarray, ' M']
    width: Int32[np.ndarray, ' M']
    duration: Float64[np.ndarray, ' M']
    ground_truth: Strings
    sentence_offset: Int64[np.ndarray, ' M+1']
    sentence_start: Float32[np.ndarray, ' N']
    sentence_end: Float32[np.ndarray, ' N']
    sentence_text: Strings
    segment_offset: Int64[np.ndarray, ' M+1']
    segment_record: Int32[np.ndarray, ' G']
    segment_start: Float32[np.ndarray, ' G']
    segment_end: Float32[np.ndarray, ' G']
    segment_caption: Strings
    labels: dict[str, np.ndarray]
    folds: Int8[np.ndarray, 'M F'] | None = None
    known_max_captions: int | None = None

    def __len__(self) -> int:
        return len(self.crc)

    @classmethod
    def open(
        cls, folder: str | os.PathLike, again: str = 'prepare the data again with --overwrite'
    ) -> Index:
        """Map an index into memory; its arrays are read-only.

        Args:
          folder: of the index.
          again: how to make the index again; the errors end with it.

        Raises:
          DataError: a column that is missing, cut or of another length than the others.
        """
        table = Table(pathlib.Path(folder), again)
        counts = {name: table.number(name) for name in ('records', 'sentences', 'segments')}
        fields: dict[str, Any] = {}
        for name, (dtype, of) in NUMBERS.items():
            fields[name] = table.column(name, dtype, (counts[of],))
        for name, of in TEXTS.items():
            fields[name] = table.strings(name, counts[of])
        for name, of in OFFSETS.items():
            fields[name] = table.offsets(name, counts['records'], counts[of])
        labels = {}
        for number, (name, classes) in enumerate(table.entry('labels', dict).items()):
            width = () if classes is None else (classes,)
            shape = (counts['segments'], *width)
            labels[name] = table.column(label_column(number), label_dtype(classes), shape)
        folds = None
        if num_folds := table.number('folds'):
            folds = table.column('folds', np.int8, (counts['records'], num_folds))
        known = table.about.get('max_captions')
        return cls(**fields, labels=labels, folds=folds, known_max_captions=known)

    def summary(self) -> dict[str, Any]:
        """What index.json and the command's last table say of the split."""
        shapes = frame_shapes(self.frames, self.height, self.width)
        return {
            'records': len(self),
            'segments': len(self.segment_record),
            'sentences': len(self.sentence_start),
            # Durations are in seconds.
            'hours': round(float(self.duration.sum()) / 3600, 3),
            'without_audio': int((self.samples == 0).sum()),
            'without_video': int((self.frames == 0).sum()),
            # Lists, as they come back from JSON.
            'frame_shapes': [list(shape) for shape in sorted(shapes)],
        }

    def captions_of(self, segment: int) -> list[str]:
        """The captions of a segment, the one that it carries first; none where it carries none.

        Sentences of exactly its stretch describe it as well if its caption is one of them: of
        MSR-VTT's twenty, the segment carries the first. Other sentences are what is said meanwhile.
        """
        caption = self.segment_caption[segment]
        if not caption:
            return []
        record = self.segment_record[segment]
        first, last = self.sentence_offset[record : record + 2]
        is_same_start = self.sentence_start[first:last] == self.segment_start[segment]
        is_same_end = self.sentence_end[first:last] == self.segment_end[segment]
        numbers = first + np.flatnonzero(is_same_start & is_same_end)
        captions = [self.sentence_text[number] for number in numbers]
        if caption not in captions:
            return [caption]
        captions.remove(caption)  # once: two people may have written the same
        return [caption, *captions]

    @functools.cached_property
    def max_captions(self) -> int:
        """The largest number of captions of a segment; 0 if none carries any."""
        if self.known_max_captions is not None:
            return self.known_max_captions
        return segment_captions.max_captions(
            self.sentence_offset,
            (self.sentence_start, self.sentence_end),
            self.sentence_text,
            self.segment_record,
            (self.segment_start, self.segment_end),
            self.segment_caption,
        )

    def take(self, rows: Int[np.ndarray, ' m']) -> Index:
        """The index of these records alone, in memory."""
        # `sentences` and `segments` number, among all N and G, those that remain.
        sentence_offset, sentences = ranges(self.sentence_offset, rows)
        segment_offset, segments = ranges(self.segment_offset, rows)
        return Index(
            id=self.id.take(rows),
            crc=self.crc[rows],
            frames=self.frames[rows],
            samples=self.samples[rows],
            height=self.height[rows],
            width=self.width[rows],
            duration=self.duration[rows],
            ground_truth=self.ground_truth.take(rows),
            sentence_offset=sentence_offset,
            sentence_start=self.sentence_start[sentences],
            sentence_end=self.sentence_end[sentences],
            sentence_text=self.sentence_text.take(sentences),
            segment_offset=segment_offset,
            # Not selected but counted anew: records have new numbers here.
            segment_record=_owners(segment_offset),
            segment_start=self.segment_start[segments],
            segment_end=self.segment_end[segments],
            segment_caption=self.segment_caption.take(segments),
            labels={name: label[segments] for name, label in self.labels.items()},
            folds=None if self.folds is None else self.folds[rows],
        )


def _owners(offsets: Int64[np.ndarray, ' M_plus_1']) -> Int32[np.ndarray, ' items']:
    """The record of each item."""
    return np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
