"""The table of contents of one prepared split: what every record holds, in record order.

It is read without opening the records. From it alone the pipeline knows which frames, samples,
sentences and labels a row needs before anything is read, evaluators know their segments, and a
damaged record is noticed (crc32). NumPy only.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex, overload

import numpy as np
from jaxtyping import Float32, Float64, Int, Int8, Int32, Int64, UInt8, UInt32

from data_pipelines.errors import DataError

# Of the layout of index.json and its tables; a folder of another version is refused.
VERSION = 1


class Strings(Sequence[str]):
    """Many strings in two arrays.

    A list of millions of str objects would take several times the memory, and np.savez would have
    to pickle it.

    Attributes:
      data: all strings in UTF-8, one behind the other.
      offsets: where each begins in `data`, and the length of `data`.
    """

    def __init__(self, data: UInt8[np.ndarray, ' bytes'], offsets: Int64[np.ndarray, ' n_plus_1']):
        self.data = data
        self.offsets = offsets

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> Strings:
        # 'replace': file names may hold lone surrogates, which UTF-8 has no bytes for.
        encoded = [text.encode('utf-8', 'replace') for text in texts]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(text) for text in encoded], out=offsets[1:])
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
        return Strings.from_texts(self[row] for row in rows)


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

    def __len__(self) -> int:
        return len(self.crc)

    @classmethod
    def from_records(
        cls, records: Sequence[dict[str, Any]], crc: Sequence[int], multi: dict[str, int | None]
    ) -> Index:
        """The index of records.

        Args:
          records: what `prepare` knows of each record, in record order.
          crc: crc32 of each.
          multi: number of classes of each label that is multi-hot, None of the others.
        """
        # All sentences [N] and segments [G], in record order.
        sentences = [sentence for record in records for sentence in record['sentences']]
        segments = [segment for record in records for segment in record['segments']]
        num_segments = [len(record['segments']) for record in records]
        # All records of a dataset have folds, or none has.
        folds = None
        if records and 'folds' in records[0]:
            folds = _column(records, 'folds', np.int8)
        return cls(
            id=Strings.from_texts(record['id'] for record in records),
            crc=np.array(crc, np.uint32),
            frames=_column(records, 'frames', np.int32),
            samples=_column(records, 'samples', np.int64),
            height=_column(records, 'height', np.int32),
            width=_column(records, 'width', np.int32),
            duration=_column(records, 'duration', np.float64),
            ground_truth=Strings.from_texts(record['ground_truth'] for record in records),
            sentence_offset=_offsets([len(record['sentences']) for record in records]),
            sentence_start=_column(sentences, 'start', np.float32),
            sentence_end=_column(sentences, 'end', np.float32),
            sentence_text=Strings.from_texts(sentence['text'] for sentence in sentences),
            segment_offset=_offsets(num_segments),
            segment_record=_owners(num_segments),
            segment_start=_column(segments, 'start', np.float32),
            segment_end=_column(segments, 'end', np.float32),
            segment_caption=Strings.from_texts(segment['caption'] for segment in segments),
            labels={name: _labels(segments, name, classes) for name, classes in multi.items()},
            folds=folds,
        )

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
        # Most datasets have none, and this visits every segment.
        if not len(self.segment_caption.data):
            return 0
        return max(len(self.captions_of(segment)) for segment in range(len(self.segment_record)))

    def take(self, rows: Int[np.ndarray, ' m']) -> Index:
        """The index of these records alone."""
        # `sentences` and `segments` number, among all N and G, those that remain.
        sentence_offset, sentences = _ranges(self.sentence_offset, rows)
        segment_offset, segments = _ranges(self.segment_offset, rows)
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
            segment_record=_owners(np.diff(segment_offset)),
            segment_start=self.segment_start[segments],
            segment_end=self.segment_end[segments],
            segment_caption=self.segment_caption.take(segments),
            labels={name: label[segments] for name, label in self.labels.items()},
            folds=None if self.folds is None else self.folds[rows],
        )

    def save(self, path: str | os.PathLike) -> None:
        # Any: mypy would take the arrays for np.savez's own keywords.
        arrays: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            name = field.name
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, Strings):
                arrays[f'{name}/data'] = value.data
                arrays[f'{name}/offsets'] = value.offsets
            elif name == 'labels':
                for label, array in value.items():
                    arrays[f'labels/{label}'] = array
            else:
                arrays[name] = value
        # A file object: np.savez would append .npz to a path without it.
        with open(path, 'wb') as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Index:
        """Read an index.

        Raises:
          DataError: a file that is missing, damaged or not an index.
        """
        try:
            # No pickles: a folder from elsewhere must not run code.
            with np.load(path, allow_pickle=False) as stored:
                return cls(**_stored_fields(stored))
        except Exception as e:  # zip, zlib, key and value errors: all say the same to the user
            raise DataError(
                f'{os.fspath(path)} cannot be read ({e}); prepare the data again with --overwrite'
            ) from None


def _stored_fields(stored: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The fields of an Index from the arrays of its file."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Index):
        name = field.name
        if name == 'labels':
            stored_names = [key for key in stored if key.startswith('labels/')]
            values[name] = {key.partition('/')[2]: stored[key] for key in stored_names}
        elif field.type == 'Strings':  # a str: annotations are not evaluated in this module
            values[name] = Strings(stored[f'{name}/data'], stored[f'{name}/offsets'])
        elif name == 'folds' and name not in stored:
            continue  # of a dataset with only one division into splits
        else:
            values[name] = stored[name]
    return values


def _column(rows: Sequence[Mapping[str, Any]], name: str, dtype: Any) -> np.ndarray:
    """One entry of every row."""
    return np.array([row[name] for row in rows], dtype)


def _labels(segments: Sequence[Mapping[str, Any]], name: str, classes: int | None) -> np.ndarray:
    """One label of every segment: numbers [G], or multi-hot [G P] of P classes."""
    values = [segment['labels'][name] for segment in segments]
    if classes is None:
        return np.array(values, np.int32)
    # Without segments the array would have no second axis.
    return np.array(values, np.uint8).reshape(-1, classes)


def _offsets(counts: Sequence[int] | Int[np.ndarray, ' M']) -> Int64[np.ndarray, ' M_plus_1']:
    """Where the items of each record begin, and the number of all items."""
    # np.cumsum of an empty list is float64, and makes the concatenation so.
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _owners(counts: Sequence[int] | Int[np.ndarray, ' M']) -> Int32[np.ndarray, ' items']:
    """The record of each item."""
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def _ranges(
    offsets: Int64[np.ndarray, ' M_plus_1'], rows: Int[np.ndarray, ' m']
) -> tuple[Int64[np.ndarray, ' m_plus_1'], Int64[np.ndarray, ' items']]:
    """Offsets of these records' items when they stand alone, and the numbers of the items."""
    first = offsets[rows]  # [m]
    last = offsets[rows + 1]  # [m]
    items = [np.zeros(0, np.int64)]  # np.concatenate refuses an empty list
    for begin, end in zip(first, last):
        items.append(np.arange(begin, end))
    return _offsets(last - first), np.concatenate(items).astype(np.int64)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    # A rename replaces the file in one step: a reader finds the old one or the new one.
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    os.replace(temporary, path)
