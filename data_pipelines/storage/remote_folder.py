"""A prepared folder on an object store: its tables in the cache folder, its records where they are.

The tables are mapped into memory, so they have to be files of this machine. They are fetched once a
machine, split by split, and again only when they have been written anew.
"""

from __future__ import annotations

import re

from data_pipelines.errors import DataError
from data_pipelines.storage.record_files import StoreFiles
from vatt_jax.object_store import Store, StoreSettings
from vatt_jax.object_store.local_copies import Snapshot

# data-train.array_record-00000-of-00001
_RECORDS = re.compile(r'-(\w+)\.array_record-\d+-of-\d+$')


class RemoteFolder:
    """A prepared folder on an object store.

    Attributes:
      folder: on this machine; has what `fetch_tables` fetched, and the JSON files.
    """

    def __init__(self, url: str, settings: StoreSettings):
        """Fetch the files that describe the folder.

        Args:
          url: of the folder.
          settings: timeouts and tries.

        Raises:
          DataError: there is no such folder.
          StoreError: the store cannot be read.
        """
        self._store = Store(url, settings)
        files = self._store.files()
        if not files:
            raise DataError(
                f'the prepared dataset {url} does not exist; prepare it on this machine and copy '
                'the folder there, or give its URL as --out (docs/object_stores.md)'
            )
        self._records = {name: file for name, file in files.items() if _RECORDS.search(name)}
        # All versions name the copy, those of the records too: a table of one version beside
        # records of another would be read as damage.
        self._snapshot = Snapshot(self._store, files, 'records')
        self.folder = self._snapshot.folder
        self._snapshot.fetch(lambda name: '/' not in name and name.endswith('.json'))

    def fetch_tables(self, split: str) -> None:
        """Have the index and the tables of a stored split on this machine.

        Raises:
          StoreError: one cannot be read.
        """
        # index-train.npz of an older folder, index-train/… and pieces-train/… of a newer one.
        of_split = re.compile(rf'\w+-{re.escape(split)}[./]')
        self._snapshot.fetch(lambda name: bool(of_split.match(name)) and name not in self._records)

    def files(self, split: str) -> StoreFiles:
        """The files of a stored split's records, in record order."""
        names = sorted(name for name in self._records if _split_of(name) == split)
        return StoreFiles(self._store, {name: self._records[name] for name in names})


def _split_of(name: str) -> str:
    match = _RECORDS.search(name)
    assert match is not None  # of the names of records only
    return match[1]
