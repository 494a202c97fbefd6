"""A prepared folder: random access to its raw records, each checked against the index written with it."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.errors import DataError
from data_pipelines.storage import byte_offsets
from data_pipelines.storage import record_index as indices
from data_pipelines.storage.record_index import Index

SPLITS = ('train', 'validation', 'test')
CLIPS = 'clips'  # the one stored split of a dataset that is divided in several ways
FIELDS = {
    'path': '',
    'split': 'train',
    'weight': 1.0,
    'share': 0.0,
    'fold': 0,
    'label': 'class',
    'per_class': 0,
}  # of an entry of config.data.train


def read_from(config) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """({name: entry} of config.data.train with all fields, config.data.eval likewise, its path '' if there is none). An entry of the former
    without a path reads what config.data.make makes. Raises DataError naming the wrong entry."""
    made = config.data.make.get('path', '')
    made = os.path.join(made, 'records') if made else ''

    def filled(where: str, entry: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(entry, Mapping | ConfigDict):
            raise DataError(
                f"{where} is {entry!r}; a group of fields is wanted, such as {{'path': FOLDER}}"
            )
        for name, value in entry.items():
            if name not in fields:
                raise DataError(f'{where} has no field {name!r}; fields are {", ".join(fields)}')
            kind = type(fields[name])
            if isinstance(value, bool) or not isinstance(
                value, (int, float) if kind is float else kind
            ):
                raise DataError(
                    f'{where}.{name} is {value!r}; a {kind.__name__} is wanted, such as {fields[name]!r}'
                )
        return {**fields, **entry}

    mixture = {}
    for name, entry in config.data.train.items():
        mixture[name] = filled(f'config.data.train.{name}', entry, FIELDS)
        mixture[name]['path'] = mixture[name]['path'] or made
        if not mixture[name]['path']:
            raise DataError(
                f'config.data.train.{name} has no path; give the folder that python -m data_pipelines.prepare made'
            )
    return mixture, filled('config.data.eval', config.data.eval, {'path': '', 'fold': 0})


def shards(folder: str | os.PathLike, split: str) -> list[str]:
    """Paths of a split's ArrayRecord files, in record order."""
    return sorted(str(p) for p in pathlib.Path(folder).glob(f'*-{split}.array_record-*-of-*'))


def note_places(folder: pathlib.Path, split: str, rate: int) -> Iterator[tuple[str, int]]:
    """(id, crc32) of each record of a split, in record order; then the tables of `places` are there."""
    paths, rows, pieces = shards(folder, split), [], []
    for number, path in enumerate(paths):
        for offset, raw in byte_offsets.array_records(path):
            name, table = byte_offsets.of_example(raw, rate)
            rows.append((number, offset, len(raw)))
            pieces.append(table)
            yield name, zlib.crc32(raw)
    byte_offsets.save(folder, split, paths, rows, pieces)


class Prepared:
    """The folder that `prepare` made. meta: its index.json. Raises DataError if it is missing or incomplete.

    fold: which of a dataset's official divisions into splits holds, from 1 (0: the first, where there are several). Such a dataset has the split
    `clips` too, of all clips, and for every division a label fold1, … with the classes of SPLITS.
    """

    def __init__(self, path: str | os.PathLike, fold: int = 0):
        self.path = pathlib.Path(path)
        if not self.path.is_dir():
            raise DataError(
                f'the prepared dataset {self.path} does not exist; make it with python -m data_pipelines.prepare '
                f'--out={self.path} (docs/data.md)'
            )
        if not (self.path / 'prepare.json').is_file() or not (self.path / 'index.json').is_file():
            what = (
                'is not finished; run the same prepare command again'
                if (self.path / '.staging').exists()
                else ('is not a folder made by python -m data_pipelines.prepare')
            )
            raise DataError(f'{self.path} {what}')
        self.meta = self._json('index.json')
        if self.meta.get('version') != indices.VERSION:
            raise DataError(
                f'{self.path} was prepared by another version of this code (index version '
                f'{self.meta.get("version")}, wanted {indices.VERSION}); prepare it again with --overwrite'
            )
        self.format = self.meta.get('format', {'kind': 'example'})  # how a record is laid out
        folds = self.meta.get('folds', [])
        if fold and not 1 <= fold <= len(folds):
            raise DataError(
                f'{self.path} has no fold {fold}; it has '
                + (f'the folds 1 to {len(folds)}' if folds else 'none: leave the field out')
            )
        self.fold = fold or min(1, len(folds))
        self.splits = (*folds[self.fold - 1], CLIPS) if folds else tuple(self.meta['splits'])
        # which split a clip is in is a label too, so that one pass over all clips serves every fold
        self.labels = {
            **self.meta['labels'],
            **{f'fold{i}': list(SPLITS) for i, _ in enumerate(folds, 1)},
        }

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / name).read_text(encoding='utf-8'))
        except (OSError, ValueError) as e:
            raise DataError(
                f'{self.path / name} cannot be read ({e}); prepare the data again with --overwrite'
            ) from None

    def tokenizer(self) -> dict[str, Any]:
        """The spec of the tokenizer trained on its training captions."""
        return self._json('tokenizer.json')

    def index(self, split: str) -> Index:
        return Index.load(self.path / f'index-{split}.npz')

    def pieces(self, split: str, index: Index) -> byte_offsets.Pieces:
        """Random access to a stored split's records."""
        ours = self.format['kind'] == 'example'
        paths = (
            shards(self.path, split) if ours else [path for path, _ in self.meta['files'][split]]
        )
        if (
            ours and paths and not (self.path / f'places-{split}.npz').is_file()
        ):  # prepared before these tables were there
            try:
                for _ in note_places(self.path, split, self.meta['rate']):
                    pass
            except OSError as e:
                raise DataError(
                    f'{self.path} was prepared before places-{split}.npz was written with it, and it cannot be added now ({e}); '
                    'make the folder writable once, or prepare it again with --overwrite'
                ) from None
        again = (
            'prepare it again with --overwrite'
            if ours
            else 'run python -m data_pipelines.dmvr again with --overwrite'
        )
        return byte_offsets.Pieces(
            self.path,
            split,
            paths,
            byte_offsets.firsts(index.frames, index.samples, self.meta['rate']),
            ours,
            again,
        )

    def check(self, inputs: Mapping[str, Mapping[str, Any]]) -> None:
        """Stored rates against config.model.inputs: frames may be thinned, never invented; sound is taken as it is."""
        again = f'prepare {self.path} again with'
        if 'video' in inputs:
            fps, size = inputs['video']['fps'], inputs['video']['size']
            if fps > self.meta['fps'] * (1 + 1e-6):
                raise DataError(
                    f'config.model.inputs.video.fps is {fps:g} and {self.path} stores {self.meta["fps"]:g} frames per '
                    f'second; {again} --fps={fps:g} or more, or set the field to at most {self.meta["fps"]:g}'
                )
            if size > self.meta['size']:
                raise DataError(
                    f'config.model.inputs.video.size is {size} and {self.path} stores frames of {self.meta["size"]} '
                    f'pixels; {again} --size={size} or more, or set the field to at most {self.meta["size"]}'
                )
        if 'audio' in inputs and inputs['audio']['rate'] != self.meta['rate']:
            raise DataError(
                f'config.model.inputs.audio.rate is {inputs["audio"]["rate"]} and {self.path} stores '
                f'{self.meta["rate"]} samples per second; {again} --rate={inputs["audio"]["rate"]}, or set the field'
            )


class Split:
    """One split of a prepared folder. `read` is safe from several threads."""

    def __init__(self, prepared: Prepared, split: str, name: str = ''):
        self.prepared, self.split, self.name = prepared, split, name or prepared.meta['name']
        if split not in prepared.splits:
            raise DataError(
                f'{prepared.path} has no split {split!r}; it has {", ".join(prepared.splits)}'
            )
        stored = CLIPS if prepared.fold else split
        self.index = prepared.index(stored)
        self._rows = np.arange(len(self.index))  # places of these records among the stored ones
        self._pieces = prepared.pieces(stored, self.index)
        if prepared.fold:
            own = {
                f'fold{i}': of[self.index.segment_record].astype(np.int32)
                for i, of in enumerate(self.index.folds.T, 1)
            }
            self.index = dataclasses.replace(self.index, labels={**self.index.labels, **own})
        if prepared.fold and split != CLIPS:
            self._rows = np.flatnonzero(
                self.index.folds[:, prepared.fold - 1] == SPLITS.index(split)
            )
            self.index = self.index.take(self._rows)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, numbers: np.ndarray) -> tuple[list[bytes], list[str]]:
        """(whole records, reasons): an unreadable record is b'' with the reason, the others have reason ''."""
        raw, reasons = [], []
        for n in map(int, numbers):
            try:
                one, reason = self._pieces[int(self._rows[n])], ''
                if zlib.crc32(one) != int(self.index.crc[n]):
                    one, reason = b'', 'its bytes are not those that were written (crc32)'
            except OSError as e:
                one, reason = b'', str(e)
            raw.append(one)
            reasons.append(reason)
        return raw, reasons

    def clip(
        self, number: int, frames: Sequence[int], seconds: Sequence[int]
    ) -> tuple[list[bytes], list[bytes]]:
        """Of one record: the stored frames, and the pieces of sound of a second each, with these numbers (ascending). Raises ValueError or OSError
        if one is damaged."""
        own = int(self.index.frames[number])
        got = self._pieces.read(int(self._rows[number]), [*frames, *(own + s for s in seconds)])
        return got[: len(frames)], got[len(frames) :]
