"""Tables of folders that were prepared before version 2: read as they are, no longer written.

  index-SPLIT.npz: the fields of `Index`, read whole into memory.
  pieces-SPLIT.npy: uint32 [pieces 3], the offset in the record, bytes and crc32 of each piece,
    record by record, frames first. It is memory-mapped.
  places-SPLIT.npz: where each record begins.

`python -m data_pipelines.upgrade` makes tables of the present version of them.
"""

from __future__ import annotations

import contextlib
import pathlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int64, UInt32

from data_pipelines.errors import DataError
from data_pipelines.storage import record_index, record_messages
from data_pipelines.storage.columns import Strings, offsets_of
from data_pipelines.storage.piece_tables import Piece
from data_pipelines.storage.record_index import Index


def index_path(folder: pathlib.Path, split: str) -> pathlib.Path:
    return folder / f'index-{split}.npz'


def places_path(folder: pathlib.Path, split: str) -> pathlib.Path:
    return folder / f'places-{split}.npz'


def pieces_path(folder: pathlib.Path, split: str) -> pathlib.Path:
    return folder / f'pieces-{split}.npy'


def load_index(path: pathlib.Path) -> Index:
    """Read an index.

    Raises:
      DataError: a file that is missing, damaged or not an index.
    """
    with _stored(path) as stored:
        return _index(stored)


def checksums(path: pathlib.Path) -> UInt32[np.ndarray, ' M']:
    """The crc32 of the records, alone of an index; raises as `load_index`."""
    with _stored(path) as stored:
        return stored['crc']


@contextlib.contextmanager
def _stored(path: pathlib.Path) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an index file, each read when it is asked for."""
    try:
        # No pickles: a folder from elsewhere must not run code.
        with np.load(path, allow_pickle=False) as stored:
            yield stored
    except Exception as e:  # zip, zlib, key and value errors: all say the same to the user
        raise DataError(
            f'{path} cannot be read ({e}); prepare the data again with --overwrite'
        ) from None


def _index(stored: Mapping[str, np.ndarray]) -> Index:
    """The index of the arrays of its file."""
    fields: dict[str, Any] = {}
    for name in (*record_index.NUMBERS, *record_index.OFFSETS):
        fields[name] = stored[name]
    for name in record_index.TEXTS:
        fields[name] = Strings(stored[f'{name}/data'], stored[f'{name}/offsets'])
    labels = {}
    for key in stored:
        if key.startswith('labels/'):
            labels[key.partition('/')[2]] = stored[key]
    # A dataset with only one division into splits has none.
    folds = stored['folds'] if 'folds' in stored else None
    return Index(**fields, labels=labels, folds=folds)


class PieceTables:
    """Where the pieces of one split's records are; see `piece_tables.PieceTables`."""

    # crc32 is stored whole.
    crc_mask = 0xFFFFFFFF

    def __init__(
        self,
        folder: pathlib.Path,
        split: str,
        frames: Int[np.ndarray, ' M'],
        samples: Int[np.ndarray, ' M'],
        rate: int,
        again: str,
    ):
        """Open the tables of a split.

        Args:
          folder: of the tables.
          split: whose tables.
          frames: of each record, as the index says.
          samples: likewise.
          rate: samples a second.
          again: how to make the tables again; the errors end with it.

        Raises:
          DataError: tables that are missing, damaged or not of these records.
        """
        try:
            with np.load(places_path(folder, split)) as table:
                self._shard = table['shard']  # [M]
                self._offset = table['offset']  # [M]
                self._length = table['length']  # [M]
                self.file_sizes: list[int] = table['bytes'].tolist()
            # Memory-mapped: the table of a large dataset has a row for every frame, and a clip
            # needs few of them.
            self._pieces = np.load(pieces_path(folder, split), mmap_mode='r')  # [pieces 3]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
            raise DataError(
                f'the tables places-{split}.npz and pieces-{split}.npy of {folder} cannot be read '
                f'({e}); {again}'
            ) from None
        self._frames = frames
        self._firsts = firsts(frames, samples, rate)
        if len(self._offset) != len(frames) or self._pieces.shape != (self._firsts[-1], 3):
            raise DataError(
                f'{folder}: split {split!r} has {len(self._offset)} records and its index '
                f'{len(frames)}; {again}'
            )

    def __len__(self) -> int:
        return len(self._offset)

    def place(self, i: int) -> tuple[int, int, int]:
        """(number of the file, offset in it, bytes) of record i."""
        return int(self._shard[i]), int(self._offset[i]), int(self._length[i])

    def record(self, i: int) -> record_messages.Pieces:
        """All pieces of record i."""
        rows = np.asarray(self._pieces[self._firsts[i] : self._firsts[i + 1]])
        num_frames = int(self._frames[i])
        no_flows = rows[:0]
        return record_messages.Pieces(rows[:num_frames], rows[num_frames:], no_flows)

    def pieces(
        self, i: int, frames: Sequence[int], seconds: Sequence[int], flows: Sequence[int] = ()
    ) -> list[Piece]:
        """See `piece_tables.PieceTables.pieces`."""
        if len(flows):
            raise ValueError('a dataset of version 1 has no optical flow')
        record = self.record(i)
        rows = [*record.frames[frames].tolist(), *record.seconds[seconds].tolist()]
        return [Piece(*row) for row in rows]


def firsts(
    frames: Int[np.ndarray, ' M'], samples: Int[np.ndarray, ' M'], rate: int
) -> Int64[np.ndarray, ' M_plus_1']:
    """First piece of each record, and the number of all pieces.

    Args:
      frames: of each record.
      samples: of each record.
      rate: samples a second.
    """
    seconds = -(-samples // rate)  # rounded up: the last second may be short
    return offsets_of(frames.astype(np.int64) + seconds)
