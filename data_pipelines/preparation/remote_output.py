"""`prepare --out=s3://…`: prepared in the cache folder of this machine, then uploaded whole.

The file that makes a dataset whole goes last, as in a local folder: whoever opens the URL earlier
is told that it is not finished. A command that was killed goes on where it was when it is started
again on the same machine: decoded files are still there.
"""

from __future__ import annotations

import functools
import inspect
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

import filelock

from data_pipelines.errors import DataError
from vatt_jax.object_store import Store, is_url, last_name
from vatt_jax.object_store.local_copies import folder_of
from vatt_jax.object_store.store import move_side_by_side

# Written last: a folder without it is unfinished.
_FINISHED_FILE = 'prepare.json'
# Beside the local folder: the URL that it goes to.
_DESTINATION_FILE = 'vatt_jax_destination'

Function = TypeVar('Function', bound=Callable[..., Any])


def uploaded(prepare: Function) -> Function:
    """Decorator of `prepare`: its argument `out` may be a URL."""
    signature = inspect.signature(prepare)

    @functools.wraps(prepare)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        url = bound.arguments.get('out', '')
        # Of another type: `prepare` says what is wrong with it.
        if not isinstance(url, str) or not is_url(url):
            return prepare(*args, **kwargs)
        parent = folder_of('prepared', url)
        parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(parent / 'lock'):
            output = RemoteOutput(url, parent)
            bound.arguments['out'] = str(output.folder)
            result = prepare(*bound.args, **bound.kwargs)
            output.upload(result['fresh'])
        return result

    return call  # type: ignore[return-value]  # functools.wraps keeps the signature


def place_of(folder: pathlib.Path) -> str:
    """Where a dataset can be read when all is done: its URL if it is uploaded, else the folder."""
    destination = folder.parent / _DESTINATION_FILE
    if destination.is_file():
        return destination.read_text(encoding='utf-8')
    return str(folder)


class RemoteOutput:
    """A dataset that is prepared here and belongs on an object store.

    Attributes:
        url: where it belongs.
        folder: where it is prepared.
    """

    def __init__(self, url: str, parent: pathlib.Path):
        """Have the local folder as an earlier command left it, here or on the store.

        Args:
            url: where the dataset belongs.
            parent: of the local folder.

        Raises:
            DataError: there are other files at the URL.
            StoreError: the store cannot be read.
        """
        self.url = url.rstrip('/')
        # Of the same name, which names the dataset where --name does not.
        self.folder = parent / last_name(url)
        self._store = Store(self.url)
        self._files = self._store.files()
        # What was found there: whether it is replaced is up to `prepare`.
        self._is_from_store = False
        (parent / _DESTINATION_FILE).write_text(self.url, encoding='utf-8')
        self._find_earlier()

    def _find_earlier(self) -> None:
        own_files = [path.name for path in self.folder.glob('*')]
        if own_files == [_FINISHED_FILE]:
            # Of a command that ended before it prepared anything.
            (self.folder / _FINISHED_FILE).unlink()
            own_files = []
        if own_files or not self._files:
            return
        if _FINISHED_FILE not in self._files:
            raise DataError(f'--out={self.url} holds other files; choose a new or empty folder')
        self._is_from_store = True
        finished = self._files[_FINISHED_FILE]
        self._store.download(_FINISHED_FILE, self.folder / _FINISHED_FILE, finished)

    def upload(self, fresh: bool) -> None:
        """Upload the dataset, and remove the local folder.

        Args:
            fresh: whether it was prepared just now.

        Raises:
            StoreError: the store cannot be written; the local folder stays.
        """
        if fresh or not self._is_from_store:
            names = [
                path.relative_to(self.folder).as_posix()
                for path in self.folder.rglob('*')
                if path.is_file() and path.name != _FINISHED_FILE
            ]
            replaced = self._replaced_files()
            # Until the new one is whole, there is none.
            self._store.delete([_FINISHED_FILE] if _FINISHED_FILE in self._files else [])
            move_side_by_side(lambda name: self._store.upload(self.folder / name, name), names)
            self._store.delete(sorted(replaced - set(names)))
            self._store.upload(self.folder / _FINISHED_FILE, _FINISHED_FILE)
        shutil.rmtree(self.folder.parent)

    def _replaced_files(self) -> set[str]:
        """Files on the store that the dataset which is replaced wrote."""
        if _FINISHED_FILE not in self._files:
            return set()
        entries = set(json.loads(self._store.read(_FINISHED_FILE))['files'])
        return {name for name in self._files if name.partition('/')[0] in entries}
