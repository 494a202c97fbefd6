"""Splits of prepared folders that are opened when they are first read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.storage.frame_shapes import Shapes, frame_shapes
from data_pipelines.storage.record_index import Index
from data_pipelines.storage.records import Prepared, Split


class LazySplit:
    """A split whose tables are opened by the first look at a record.

    A mixture may have hundreds of sources, and until then `index.json` says enough of each: how
    many records and segments it has, and the shapes of its frames. Safe from several threads.

    Attributes:
      prepared: the folder.
      split: its name.
      name: of the dataset.
    """

    def __init__(self, prepared: Prepared, split: str, name: str = ''):
        """See the class.

        Raises:
          DataError: the folder has no such split.
        """
        self.prepared = prepared
        self.split = split
        self.name = name or prepared.meta['name']
        if split not in prepared.splits:
            raise DataError(
                f'{prepared.path} has no split {split!r}; it has {", ".join(prepared.splits)}'
            )
        # What `prepare` said of it. Of a fold only the number of records is known.
        self._description: dict[str, Any] = {}
        if prepared.fold:
            counts = prepared.meta['folds'][prepared.fold - 1]
            if split in counts:
                self._description = {'records': counts[split]}
        else:
            self._description = prepared.meta['splits'][split]
        self._opened: Split | None = None
        self._lock = threading.Lock()

    def open(self) -> Split:
        """The split with its tables.

        Raises:
          DataError: a table is missing, damaged or not the one that index.json describes.
        """
        with self._lock:
            if self._opened is None:
                opened = Split(self.prepared, self.split, self.name)
                self._check_size(len(opened))
                self._opened = opened
            return self._opened

    def _check_size(self, found: int) -> None:
        expected = self._description.get('records', found)
        if expected != found:
            # The order of examples was made for the other number.
            raise DataError(
                f'{self.prepared.path}: index.json says that split {self.split!r} has {expected} '
                f'records and its index has {found}; put back the index.json that was written with '
                'it, or prepare it again with --overwrite'
            )

    @property
    def index(self) -> Index:
        """The index of the split's records."""
        return self.open().index

    def __len__(self) -> int:
        if 'records' in self._description:
            return self._description['records']
        return len(self.open())

    @property
    def num_segments(self) -> int:
        """Segments of all records."""
        if 'segments' in self._description:
            return self._description['segments']
        return len(self.index.segment_record)

    def frame_shapes(self) -> Shapes:
        """All (height, width) of the stored frames."""
        # Folders that were prepared before it was written down have to be looked through.
        if 'frame_shapes' not in self._description:
            index = self.index
            return frame_shapes(index.frames, index.height, index.width)
        return {(height, width) for height, width in self._description['frame_shapes']}

    def clip(
        self, number: int, frames: Sequence[int], seconds: Sequence[int], flows: Sequence[int] = ()
    ) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """Read parts of one record, see `Split.clip`."""
        return self.open().clip(number, frames, seconds, flows)
