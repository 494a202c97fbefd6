"""The table of contents of one prepared split: what every record holds, in record order, without opening the records.

From it alone the pipeline knows which frames, samples, sentences and labels a row needs before anything is read, evaluators
know their segments, and a damaged record is noticed (crc32). NumPy only.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import DataError

VERSION = 1


class Strings(Sequence):
    """Many strings in two arrays: UTF-8 bytes [total] and offsets int64 [n + 1]."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray):
        self.data, self.offsets = data, offsets

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        encoded = [t.encode('utf-8', 'replace') for t in texts]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(e) for e in encoded], out=offsets[1:])
        return cls(np.frombuffer(b''.join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i = int(i) % len(self)
        return self.data[self.offsets[i] : self.offsets[i + 1]].tobytes().decode()


@dataclasses.dataclass
class Index:
    """M records, G segments, N sentences of one split. Times in seconds from the record's beginning."""

    id: Strings  # [M] path of the file below the folder it came from
    crc: np.ndarray  # uint32 [M] of the serialized record
    frames: np.ndarray  # int32 [M], 0 without pictures
    samples: np.ndarray  # int64 [M], 0 without sound
    height: np.ndarray  # int32 [M]
    width: np.ndarray  # int32 [M]
    duration: np.ndarray  # float64 [M]
    ground_truth: Strings  # [M] JSON
    sentence_offset: (
        np.ndarray
    )  # int64 [M + 1]: sentences of record i are offset[i] … offset[i + 1], sorted by start
    sentence_start: np.ndarray  # float32 [N]
    sentence_end: np.ndarray  # float32 [N]
    sentence_text: Strings  # [N]
    segment_offset: np.ndarray  # int64 [M + 1], as for sentences
    segment_record: np.ndarray  # int32 [G]
    segment_start: np.ndarray  # float32 [G]
    segment_end: np.ndarray  # float32 [G]
    segment_caption: Strings  # [G], '' without
    labels: dict[str, np.ndarray]  # name -> int32 [G] (-1 unknown) or uint8 [G P] multi-hot
    folds: np.ndarray | None = (
        None  # int8 [M F]: which of train, validation, test a record is in, in each fold; -1 none
    )

    def __len__(self) -> int:
        return len(self.crc)

    @classmethod
    def of(
        cls, records: Sequence[dict[str, Any]], crc: Sequence[int], multi: dict[str, int | None]
    ) -> Index:
        """From what `prepare` knows of each record, in record order. multi: label name -> classes if multi-hot, else None."""
        column = lambda name, dtype: np.array([r[name] for r in records], dtype)
        sentences = [s for r in records for s in r['sentences']]
        segments = [s for r in records for s in r['segments']]
        offset = lambda name: np.concatenate(
            [[0], np.cumsum([len(r[name]) for r in records])]
        ).astype(np.int64)
        times = lambda rows, name: np.array([row[name] for row in rows], np.float32)
        labels = {}
        for name, classes in multi.items():
            values = [s['labels'][name] for s in segments]
            labels[name] = (
                np.array(values, np.int32)
                if classes is None
                else np.array(values, np.uint8).reshape(-1, classes)
            )
        return cls(
            id=Strings.of(r['id'] for r in records),
            crc=np.array(crc, np.uint32),
            frames=column('frames', np.int32),
            samples=column('samples', np.int64),
            height=column('height', np.int32),
            width=column('width', np.int32),
            duration=column('duration', np.float64),
            ground_truth=Strings.of(r['ground_truth'] for r in records),
            sentence_offset=offset('sentences'),
            sentence_start=times(sentences, 'start'),
            sentence_end=times(sentences, 'end'),
            sentence_text=Strings.of(s['text'] for s in sentences),
            segment_offset=offset('segments'),
            segment_record=np.repeat(
                np.arange(len(records), dtype=np.int32), [len(r['segments']) for r in records]
            ),
            segment_start=times(segments, 'start'),
            segment_end=times(segments, 'end'),
            segment_caption=Strings.of(s['caption'] for s in segments),
            labels=labels,
            folds=column('folds', np.int8) if records and 'folds' in records[0] else None,
        )

    def take(self, rows: np.ndarray) -> Index:
        """The index of these records [m] alone."""
        out = {}
        for kind in ('sentence', 'segment'):
            first, last = (getattr(self, f'{kind}_offset')[rows + i] for i in (0, 1))
            out[f'{kind}_offset'] = np.concatenate([[0], np.cumsum(last - first)]).astype(np.int64)
            inner = np.concatenate(
                [np.arange(a, b) for a, b in zip(first, last)] or [np.zeros(0)]
            ).astype(np.int64)
            for field in ('start', 'end', 'text', 'caption'):
                name = f'{kind}_{field}'
                if hasattr(self, name):
                    out[name] = _pick(getattr(self, name), inner)
        out['segment_record'] = np.repeat(
            np.arange(len(rows), dtype=np.int32), np.diff(out['segment_offset'])
        )
        out['labels'] = {
            name: array[inner] for name, array in self.labels.items()
        }  # of the segments, the later of the two kinds
        for field in dataclasses.fields(self):
            if field.name not in out:
                out[field.name] = (
                    None
                    if getattr(self, field.name) is None
                    else _pick(getattr(self, field.name), rows)
                )
        return Index(**out)

    def save(self, path: str | os.PathLike) -> None:
        arrays = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Strings):
                arrays[f'{field.name}/data'], arrays[f'{field.name}/offsets'] = (
                    value.data,
                    value.offsets,
                )
            elif value is None:
                continue
            elif field.name == 'labels':
                arrays.update({f'labels/{name}': array for name, array in value.items()})
            else:
                arrays[field.name] = value
        with open(path, 'wb') as f:
            np.savez(f, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Index:
        """Raises DataError for a file that is missing, damaged or not an index."""
        try:
            with np.load(path, allow_pickle=False) as f:
                fields: dict[str, Any] = {}
                for field in dataclasses.fields(cls):
                    if field.name == 'labels':
                        fields['labels'] = {
                            n.partition('/')[2]: f[n] for n in f.files if n.startswith('labels/')
                        }
                    elif field.type == 'Strings':
                        fields[field.name] = Strings(
                            f[f'{field.name}/data'], f[f'{field.name}/offsets']
                        )
                    elif field.name != 'folds' or 'folds' in f.files:
                        fields[field.name] = f[field.name]
            return cls(**fields)
        except Exception as e:  # zip, zlib, key and value errors: all say the same to the user
            raise DataError(
                f'{os.fspath(path)} cannot be read ({e}); prepare the data again with --overwrite'
            ) from None


def _pick(values: np.ndarray | Strings, rows: np.ndarray) -> np.ndarray | Strings:
    return Strings.of(values[int(i)] for i in rows) if isinstance(values, Strings) else values[rows]


def write_json(path: pathlib.Path, value: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    os.replace(temporary, path)
