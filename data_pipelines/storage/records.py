"""A prepared folder: random access to its raw records.

Each is checked against the index written with it.
"""

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
from data_pipelines.storage import (
    byte_offsets,
    piece_tables,
    record_files,
    record_messages,
    version_1,
)
from data_pipelines.storage import record_index as indices
from data_pipelines.storage.array_record_files import array_records
from data_pipelines.storage.piece_tables import PiecesWriter
from data_pipelines.storage.record_index import Index
from data_pipelines.storage.remote_folder import RemoteFolder
from vatt_jax.object_store import StoreSettings, is_url

SPLITS = ('train', 'validation', 'test')
# The one stored split of a dataset that is divided in several ways.
CLIPS = 'clips'
# Of an entry of config.data.train, with their defaults; a field's type is its default's.
FIELDS = {
    'path': '',
    'split': 'train',
    'weight': 1.0,
    'share': 0.0,
    'fold': 0,
    'label': 'class',
    'per_class': 0,
}
# Of config.data.eval.
_EVAL_FIELDS = {'path': '', 'fold': 0}


def read_entries(config: ConfigDict) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Read which prepared folders a run uses.

    Returns:
      {name: entry} of config.data.train with all fields, and config.data.eval likewise, its path ''
      if there is none. An entry of the former without a path reads what config.data.make makes.

    Raises:
      DataError: naming the wrong entry.
    """
    made_path = config.data.make.get('path', '')
    if made_path:
        made_path = os.path.join(made_path, 'records')
    mixture = {}
    for name, given in config.data.train.items():
        where = f'config.data.train.{name}'
        entry = _with_defaults(where, given, FIELDS)
        entry['path'] = entry['path'] or made_path
        if not entry['path']:
            raise DataError(
                f'{where} has no path; give the folder that python -m data_pipelines.prepare made'
            )
        mixture[name] = entry
    return mixture, _with_defaults('config.data.eval', config.data.eval, _EVAL_FIELDS)


def _with_defaults(where: str, entry: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with all fields; DataError, naming it as `where`, if it has a wrong one."""
    # A ConfigDict is no Mapping.
    if not isinstance(entry, Mapping | ConfigDict):
        raise DataError(
            f"{where}: expected a group of fields, such as {{'path': FOLDER}}, got {entry!r}"
        )
    for name, value in entry.items():
        if name not in fields:
            raise DataError(f'{where} has no field {name!r}; fields are {", ".join(fields)}')
        expected = type(fields[name])
        accepted = (int, float) if expected is float else (expected,)
        # A bool is an int in Python, and never meant as one here.
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise DataError(
                f'{where}.{name}: expected {expected.__name__}, such as {fields[name]!r}, '
                f'got {value!r}'
            )
    return {**fields, **entry}


def shards(folder: str | os.PathLike, split: str) -> list[str]:
    """Paths of a split's ArrayRecord files, in record order."""
    # Their numbers are padded with zeros: the order of the names is that of the numbers.
    return sorted(str(path) for path in pathlib.Path(folder).glob(f'*-{split}.array_record-*-of-*'))


def pieces_writer(folder: pathlib.Path, split: str, rate: int, has_flow: bool) -> PiecesWriter:
    """Of the records of `prepare`, whose files are in the folder."""
    # Sound is int16.
    second_bytes = 2 * rate
    paths = shards(folder, split)
    return PiecesWriter(folder, split, paths, second_bytes, piece_tables.EXAMPLE, has_flow)


def write_byte_offsets(
    folder: pathlib.Path, split: str, rate: int, has_flow: bool
) -> Iterator[tuple[str, int]]:
    """Read all records of a split once and write the table of `piece_tables`.

    The table is there behind the last record: only for a caller that exhausts the iterator.

    Args:
      folder: of the records.
      split: which records.
      rate: samples a second.
      has_flow: whether the records hold optical flow.

    Yields:
      (id, crc32) of each record, in record order.
    """
    paths = shards(folder, split)
    with pieces_writer(folder, split, rate, has_flow) as writer:
        for shard, path in enumerate(paths):
            for offset, raw in array_records(path):
                record_id, pieces = record_messages.pieces_of_example(raw, rate)
                writer.add(shard, offset, len(raw), *pieces)
                yield record_id, zlib.crc32(raw)


class Prepared:
    """The folder that `prepare` made.

    A dataset with several official divisions into splits ("folds") has the split `clips` too, of
    all clips, and for every division a label fold1, … with the classes of SPLITS.

    Attributes:
      path: the folder; may be a URL.
      folder: the same on this machine: of one on an object store, a copy without the records.
      settings: timeouts and tries of an object store.
      meta: its index.json.
      version: of its layout and tables.
      format: how a record is laid out.
      fold: which division holds, from 1; 0: the dataset has only one.
      splits: that can be opened.
      labels: {name: classes}.
    """

    def __init__(
        self, path: str | os.PathLike, fold: int = 0, settings: StoreSettings | None = None
    ):
        """Open a prepared folder.

        Args:
          path: the folder, here or on an object store.
          fold: which of several divisions into splits holds, from 1; 0: the first, where there are
            several.
          settings: timeouts and tries of an object store; None: the defaults.

        Raises:
          DataError: the folder is missing or incomplete, or has no such fold.
          StoreError: the object store cannot be read.
        """
        self.settings = settings or StoreSettings()
        self._remote: RemoteFolder | None = None
        if is_url(path):
            self._remote = RemoteFolder(os.fspath(path), self.settings)
            self.path: str | pathlib.Path = os.fspath(path)
            self.folder = self._remote.folder
        else:
            self.path = self.folder = pathlib.Path(path)
        self._check_finished()
        self.meta = self._json('index.json')
        self.version = self._version()
        # Older folders do not name their layout.
        self.format = self.meta.get('format', {'kind': 'example'})
        folds = self.meta.get('folds', [])  # names of the splits, of each division
        if fold and not 1 <= fold <= len(folds):
            available = f'the folds 1 to {len(folds)}' if folds else 'none: leave the field out'
            raise DataError(f'{self.path} has no fold {fold}; it has {available}')
        self.fold = fold or min(1, len(folds))
        if folds:
            self.splits = (*folds[self.fold - 1], CLIPS)
        else:
            self.splits = tuple(self.meta['splits'])
        # Which split a clip is in is a label too, so that one pass over all clips serves every
        # fold.
        self.labels = dict(self.meta['labels'])
        for number in range(1, len(folds) + 1):
            self.labels[f'fold{number}'] = list(SPLITS)

    def _version(self) -> int:
        """The version of the folder's layout; DataError if it is not among the known ones."""
        version = self.meta.get('version')
        if isinstance(version, int) and 1 <= version <= indices.VERSION:
            return version
        raise DataError(
            f'{self.path} was prepared by another version of this code: expected index version 1 '
            f'to {indices.VERSION}, got {version}; read it with the code that made it, or prepare '
            'it again with --overwrite'
        )

    def _check_finished(self) -> None:
        hint = self._place_nearby()
        if not self.folder.is_dir():
            raise DataError(
                f'the prepared dataset {self.path} does not exist; make it with '
                f'python -m data_pipelines.prepare --out={self.path} (docs/data.md){hint}'
            )
        # prepare.json is written last: without it the other files may be incomplete.
        has_files = [(self.folder / name).is_file() for name in ('prepare.json', 'index.json')]
        if all(has_files):
            return
        if (self.folder / '.staging').exists():
            raise DataError(f'{self.path} is not finished; run the same prepare command again')
        raise DataError(
            f'{self.path} is not a folder made by python -m data_pipelines.prepare{hint}'
        )

    def _place_nearby(self) -> str:
        """What a message adds where the dataset is in the folder above or below."""
        # Both are usual: data/NAME, and data/NAME/records beside the media.
        places = [self.folder / 'records']
        if self.folder.name == 'records':
            places.append(self.folder.parent)
        for place in places:
            if (place / 'prepare.json').is_file():
                return f'; there is one in {place}: name that path'
        return ''

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.folder / name).read_text(encoding='utf-8'))
        except (OSError, ValueError) as e:
            raise DataError(
                f'{self.folder / name} cannot be read ({e}); prepare the data again with '
                '--overwrite'
            ) from None

    def tokenizer(self) -> dict[str, Any]:
        """The spec of the tokenizer trained on its training captions."""
        return self._json('tokenizer.json')

    @property
    def is_ours(self) -> bool:
        """Whether `prepare` wrote its records; else they are DMVR's, which stay where they are."""
        return self.format['kind'] == 'example'

    @property
    def flow(self) -> dict[str, Any]:
        """How its optical flow was computed: `method`, and the `bound` in pixels; {} without."""
        return self.meta.get('flow', {})

    @property
    def again(self) -> str:
        """How to make it again, for the ends of errors."""
        if self.is_ours:
            return 'prepare it again with --overwrite'
        return 'run python -m data_pipelines.dmvr again with --overwrite'

    def index(self, split: str) -> Index:
        """The index of a stored split."""
        self._fetch_tables(split)
        if self.version == 1:
            return version_1.load_index(version_1.index_path(self.folder, split))
        return Index.open(indices.folder_of(self.folder, split), self.again)

    @property
    def is_remote(self) -> bool:
        """Whether the records are on an object store, whose answers take a while."""
        if self.is_ours:
            return self._remote is not None
        return any(is_url(path) for files in self.meta['files'].values() for path, _ in files)

    def _fetch_tables(self, split: str) -> None:
        """Have the tables of a stored split on this machine."""
        if self._remote:
            self._remote.fetch_tables(split)

    def files(self, split: str) -> record_files.RecordFiles:
        """The files that hold a stored split's records."""
        if not self.is_ours:
            paths = [path for path, _ in self.meta['files'][split]]
            return record_files.open_files(paths, self.settings)
        if self._remote:
            return self._remote.files(split)
        return record_files.LocalFiles(shards(self.folder, split))

    def pieces(self, split: str, index: Index) -> byte_offsets.Pieces:
        """Random access to a stored split's records."""
        files = self.files(split)
        what = f'split {split!r} of {self.path}'
        tables = self.tables(split, index)
        return byte_offsets.Pieces(tables, files, self.is_ours, what, self.again)

    def tables(self, split: str, index: Index) -> byte_offsets.Tables:
        """Where the frames and the sound of a stored split's records are."""
        self._fetch_tables(split)
        if self.version == 1:
            has_tables = version_1.places_path(self.folder, split).is_file()
            if has_tables or not self.is_ours:
                return version_1.PieceTables(
                    self.folder, split, index.frames, index.samples, self.meta['rate'], self.again
                )
            self.add_byte_offsets(split)
        return piece_tables.PieceTables(self.folder, split, index.frames, self.again)

    def pieces_writer(self, split: str) -> PiecesWriter:
        """Writes the table of a stored split's byte offsets."""
        rate = self.meta['rate']
        if self.is_ours:
            return pieces_writer(self.folder, split, rate, bool(self.flow))
        paths = self.files(split).paths
        # Sound is float32.
        return PiecesWriter(self.folder, split, paths, 4 * rate, piece_tables.SEQUENCE_EXAMPLE)

    def add_byte_offsets(self, split: str) -> None:
        """Add the table to a folder that was prepared before there were tables of byte offsets."""
        if piece_tables.folder_of(self.folder, split).is_dir() or not self.files(split).paths:
            return
        if self._remote:
            raise DataError(
                f'{self.path} was prepared before pieces-{split} was written with it; open it once '
                'on the machine that has it as a folder, and copy it to the store again'
            )
        try:
            # The ids are of no use here; exhausting the iterator writes the tables.
            for _ in write_byte_offsets(self.folder, split, self.meta['rate'], bool(self.flow)):
                pass
        except OSError as e:
            raise DataError(
                f'{self.path} was prepared before pieces-{split} was written with it, and it '
                f'cannot be added now ({e}); make the folder writable once, or prepare it again '
                'with --overwrite'
            ) from None

    def check(self, inputs: Mapping[str, Mapping[str, Any]]) -> None:
        """Check the stored rates and sizes against config.model.inputs.

        Frames may be thinned, never invented; sound is taken as it is.

        Raises:
          DataError: naming the field that does not fit.
        """
        where = 'config.model.inputs'
        again = f'prepare {self.path} again with'
        pictures = ['video'] if 'video' in inputs else []
        # A dataset without flow may be part of a mixture; its flow counts as missing.
        if 'flow' in inputs and self.flow:
            pictures.append('flow')
        stored_fps = self.meta['fps']
        stored_size = self.meta['size']
        for modality in pictures:
            fps = inputs[modality]['fps']
            # Equality up to rounding: rates such as 30000 / 1001 are given as decimals.
            if fps > stored_fps * (1 + 1e-6):
                raise DataError(
                    f'{where}.{modality}.fps is {fps:g} and {self.path} stores {stored_fps:g} '
                    f'frames per second; {again} --fps={fps:g} or more, or set the field to at '
                    f'most {stored_fps:g}'
                )
            # Displacements are those from one stored frame to the next.
            if modality == 'flow' and fps < stored_fps * (1 - 1e-6):
                raise DataError(
                    f'{where}.flow.fps is {fps:g} and {self.path} stores the flow between frames '
                    f'at {stored_fps:g} per second; {again} --fps={fps:g}, or set the field to '
                    f'{stored_fps:g}'
                )
            size = inputs[modality]['size']
            if size > stored_size:
                raise DataError(
                    f'{where}.{modality}.size is {size} and {self.path} stores frames of '
                    f'{stored_size} pixels; {again} --size={size} or more, or set the field to at '
                    f'most {stored_size}'
                )
        if 'audio' in inputs:
            rate = inputs['audio']['rate']
            stored_rate = self.meta['rate']
            if rate != stored_rate:
                raise DataError(
                    f'{where}.audio.rate is {rate} and {self.path} stores {stored_rate} samples '
                    f'per second; {again} --rate={rate}, or set the field'
                )


class Split:
    """One split of a prepared folder. `read` is safe from several threads.

    Attributes:
      prepared: the folder.
      split: its name.
      name: of the dataset.
      index: of the split's records alone.
    """

    def __init__(self, prepared: Prepared, split: str, name: str = ''):
        self.prepared = prepared
        self.split = split
        self.name = name or prepared.meta['name']
        if split not in prepared.splits:
            raise DataError(
                f'{prepared.path} has no split {split!r}; it has {", ".join(prepared.splits)}'
            )
        # With folds all clips are stored once, and a split is a selection of them.
        stored_split = CLIPS if prepared.fold else split
        self.index = prepared.index(stored_split)
        self._pieces = prepared.pieces(stored_split, self.index)
        # Row of each of this split's records among the stored ones; None: they are the stored ones.
        self._rows: np.ndarray | None = None
        if prepared.fold:
            folds = self.index.folds  # [M F]
            assert folds is not None  # the index of a dataset with folds has them
            self.index = _with_fold_labels(self.index, folds)
            if split != CLIPS:
                # -1, a clip that is in none of the splits in this fold, equals no number.
                is_member = folds[:, prepared.fold - 1] == SPLITS.index(split)  # [M]
                self._rows = np.flatnonzero(is_member)
                self.index = self.index.take(self._rows)

    def _row(self, number: int) -> int:
        """Row of a record among the stored ones."""
        return number if self._rows is None else int(self._rows[number])

    def __len__(self) -> int:
        return len(self.index)

    def read(self, numbers: Sequence[int] | np.ndarray) -> tuple[list[bytes], list[str]]:
        """Read whole records.

        Returns:
          The records and reasons: an unreadable record is b'' with the reason, the others have
          reason ''.
        """
        records = []
        reasons = []
        for number in numbers:
            raw, reason = self._read_one(int(number))
            records.append(raw)
            reasons.append(reason)
        return records, reasons

    def _read_one(self, number: int) -> tuple[bytes, str]:
        # Damage is reported, not raised: one bad record does not end a run.
        try:
            raw = self._pieces[self._row(number)]
        except OSError as e:
            return b'', str(e)
        if zlib.crc32(raw) != int(self.index.crc[number]):
            return b'', 'its bytes are not those that were written (crc32)'
        return raw, ''

    def clip(
        self, number: int, frames: Sequence[int], seconds: Sequence[int], flows: Sequence[int] = ()
    ) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """Read parts of one record.

        Args:
          number: of the record.
          frames: numbers of stored frames, ascending.
          seconds: numbers of the pieces of sound, of a second each, ascending.
          flows: numbers of the optical flows, ascending.

        Returns:
          The frames, the pieces of sound and the flows.

        Raises:
          ValueError: one is damaged.
          OSError: the file cannot be read.
          StoreError: the object store cannot be read: nothing is known about the record.
        """
        contents = self._pieces.read(self._row(number), frames, seconds, flows)
        first_flow = len(frames) + len(seconds)
        return contents[: len(frames)], contents[len(frames) : first_flow], contents[first_flow:]


def _with_fold_labels(index: Index, folds: np.ndarray) -> Index:
    """Add to the segments' labels the split their record is in, in each fold.

    Args:
      index: of all clips.
      folds: number of the split in SPLITS [M F].
    """
    labels = dict(index.labels)
    for number, split_of_record in enumerate(folds.T, 1):
        labels[f'fold{number}'] = split_of_record[index.segment_record].astype(np.int32)  # [G]
    return dataclasses.replace(index, labels=labels)
