"""Files of a store in the cache folder of this machine.

The cache folder is $VATT_JAX_CACHE, else ~/.cache/vatt_jax. Each copy lies in a folder that is
named after its content's versions, so what was opened never changes below a reader.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Mapping

import filelock

from vatt_jax.object_store import urls
from vatt_jax.object_store.store import Store, StoredFile, move_side_by_side

# Environment variable with the cache folder.
VARIABLE = 'VATT_JAX_CACHE'


def cache_folder() -> pathlib.Path:
    """Where copies of remote files are kept on this machine."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return pathlib.Path(chosen).expanduser().absolute()
    return pathlib.Path.home() / '.cache' / 'vatt_jax'


def folder_of(kind: str, url: str, version: str = '') -> pathlib.Path:
    """The folder for the copy of a URL. It need not exist.

    Args:
        kind: what is copied, such as 'records'.
        url: of the folder on the store.
        version: of its content; '' where it may change.
    """
    digest = hashlib.sha256(f'{url.rstrip("/")}\n{version}'.encode()).hexdigest()[:16]
    # The name is for whoever looks into the cache; the digest tells folders apart.
    name = re.sub(r'[^\w.-]', '_', urls.last_name(url))[:50]
    return cache_folder() / kind / f'{name}-{digest}'


def version_of(files: Mapping[str, StoredFile]) -> str:
    """Another string whenever any of these files is written anew."""
    lines = [f'{name} {file.size} {file.version}' for name, file in sorted(files.items())]
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()


class Snapshot:
    """Some files of a store as they were at one moment, copied when they are asked for.

    Several processes may share it: each file is fetched once a machine.

    Attributes:
        store: where the files are.
        files: what may be asked for.
        folder: of the copies, with the paths that the files have on the store.
    """

    def __init__(self, store: Store, files: Mapping[str, StoredFile], kind: str):
        """Nothing is copied yet.

        Args:
            store: where the files are.
            files: of `store.files`, all or some.
            kind: what they are, which names a folder of the cache.
        """
        self.store = store
        self.files = dict(files)
        self.folder = folder_of(kind, store.url, version_of(self.files))

    def fetch(self, is_wanted: Callable[[str], bool]) -> None:
        """Copy files that are not here yet.

        Args:
            is_wanted: whether a file, by its path below the folder, is to be copied.

        Raises:
            StoreError: one cannot be read.
            OSError: it cannot be written here.
        """
        wanted = [name for name in self.files if is_wanted(name)]
        if not self._missing(wanted):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # The first process copies, the others find all there.
        with filelock.FileLock(self.folder.with_suffix('.lock')):
            move_side_by_side(self._fetch_one, self._missing(wanted))

    def _missing(self, names: list[str]) -> list[str]:
        missing = []
        for name in names:
            copy = self.folder / name
            # A copy takes its name when it is whole; its size is compared all the same, because a
            # cache may have been tidied up by hand.
            if not copy.is_file() or copy.stat().st_size != self.files[name].size:
                missing.append(name)
        return missing

    def _fetch_one(self, name: str) -> None:
        self.store.download(name, self.folder / name, self.files[name])
