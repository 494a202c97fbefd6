"""A run folder on an object store: a local folder that is kept equal to it.

Everything that reads and writes a run folder (orbax, TensorBoard, the report) works on the local
folder. It lies below the cache folder, is filled from the store at the start, and what changes in
it is uploaded: every few seconds by a thread, and once more at the end. Not all of it could be
written to a store directly: orbax writes to gs:// only, and nothing can be appended to a file of a
store.

The store is the truth. What a killed process had not uploaded yet is uploaded by the next start on
the same machine, if no other training has taken over in between; else it is set aside.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterable

import filelock

from vatt_jax.object_store.local_copies import Snapshot, folder_of
from vatt_jax.object_store.settings import StoreError, StoreSettings
from vatt_jax.object_store.store import Store, StoredFile, move_side_by_side
from vatt_jax.run_folder import write_atomically

# Seconds between two looks at what has changed.
_EVERY = 10.0
# With this file a checkpoint counts as complete (checkpoint.steps): last to come, first to go.
_LAST_FILE = '_CHECKPOINT_METADATA'
# Below a run folder, or below its folder of checkpoints; each phase of a run has a run folder.
_OF_CHECKPOINT = re.compile(r'((?:phases/[^/]+/)?(?:checkpoints/)?)(\d+)/')
# Names the training that wrote to the store last. Of the store alone.
_SESSION = '.session'
# Half-written files of this project and of orbax; compiled programs and the lock of a training,
# which are of one machine.
_LOCAL_ONLY = re.compile(
    r'(^|/)([^/]*\.tmp|[^/]*\.orbax-checkpoint-tmp[^/]*)(/|$)|^compiled/|(^|/)run\.lock$'
)
# Local folders that the commands on one machine may use of one run at the same time.
_MOST_FOLDERS = 64

# What a command needs of the checkpoints.
ALL, NEWEST, NONE = 'all', 'newest', 'none'


def select(files: Iterable[str], checkpoints: str) -> list[str]:
    """The files of a run that a command needs.

    Args:
        files: of the folder on the store, as paths below it.
        checkpoints: ALL, NEWEST or NONE. Incomplete ones are left out in any case.
    """
    files = list(files)
    # Folder of checkpoints -> steps of the complete ones.
    complete: dict[str, list[int]] = {}
    for name in files:
        match = _OF_CHECKPOINT.match(name)
        if match and name == f'{match[0]}{_LAST_FILE}':
            complete.setdefault(match[1], []).append(int(match[2]))
    wanted: set[tuple[str, int]] = set()
    for folder, steps in complete.items():
        if checkpoints == ALL:
            wanted.update((folder, step) for step in steps)
        elif checkpoints == NEWEST:
            wanted.add((folder, max(steps)))
    selected = []
    for name in files:
        match = _OF_CHECKPOINT.match(name)
        if name == _SESSION or _LOCAL_ONLY.search(name):
            continue
        if match is None or (match[1], int(match[2])) in wanted:
            selected.append(name)
    return selected


def fetch_run(url: str, settings: StoreSettings | None = None) -> pathlib.Path:
    """Copy a run folder with its newest checkpoint, or one checkpoint folder, to read it.

    Args:
        url: of the folder.
        settings: timeouts and tries; None: the defaults.

    Returns:
        The local copy, which nothing changes any more.

    Raises:
        StoreError: it cannot be read.
    """
    store = Store(url, settings)
    files = store.files()
    wanted = {name: files[name] for name in select(files, NEWEST)}
    snapshot = Snapshot(store, wanted, 'runs_to_read')
    snapshot.fetch(lambda name: True)
    return snapshot.folder


def fetch_config(url: str) -> pathlib.Path:
    """A local folder with the config.json of a run on a store, and nothing else.

    Raises:
        StoreError: it cannot be read.
    """
    store = Store(url)
    config = store.info('config.json')
    files = {} if config is None else {'config.json': config}
    snapshot = Snapshot(store, files, 'run_configs')
    snapshot.fetch(lambda name: True)
    return snapshot.folder


class RunMirror:
    """The local folder of a run on a store.

    Attributes:
        url: of the run folder.
        number: of the local folder, where several commands use the run at once.
        folder: the local folder.
    """

    def __init__(self, url: str, settings: StoreSettings | None = None, number: int | None = None):
        """Nothing is copied yet.

        Args:
            url: of the run folder.
            settings: timeouts and tries; None: the defaults.
            number: of a folder that another process of the same command has reserved; None:
                reserve one.
        """
        self.url = url
        self._store = Store(url, settings)
        # {path below the folder: (bytes, time of last change in ns)} of what is on the store too.
        self._sent: dict[str, tuple[int, int]] = {}
        # Of the same files, what the store said of them.
        self._versions: dict[str, str] = {}
        # Whether the next upload is the first of a training.
        self._begins_session = False
        self._lock: filelock.BaseFileLock | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self.number = self._reserve() if number is None else number
        self.folder = self._numbered_folder(self.number)

    def _numbered_folder(self, number: int) -> pathlib.Path:
        return folder_of('runs', self.url) / str(number) / 'run'

    def _reserve(self) -> int:
        """Lock the first local folder that no other command on this machine uses."""
        for number in range(_MOST_FOLDERS):
            parent = self._numbered_folder(number).parent
            parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(parent / 'lock')
            try:
                lock.acquire(blocking=False)
            except filelock.Timeout:
                continue
            self._lock = lock
            return number
        raise StoreError(
            f'{_MOST_FOLDERS} commands on this machine use {self.url} already; wait for one to end'
        )

    # ---- From the store.

    def pull(self, checkpoints: str, trains: bool) -> None:
        """Make the local folder equal to the store.

        Args:
            checkpoints: ALL, NEWEST or NONE: which of them this command needs.
            trains: whether this command continues the run: the store then knows it as its writer.

        Raises:
            StoreError: the store cannot be read or written.
        """
        self._load_journal()
        files = self._store.files()
        if self._unsent():
            session = self._session_file
            own_session = session.read_text() if session.exists() else ''
            if _SESSION in files and self._store.read(_SESSION).decode() == own_session:
                # Of a command that was killed, or could not reach the store at its end. Nothing is
                # deleted for it: what is missing here may have been removed by hand.
                self.push(deletes=False)
                files = self._store.files()
            else:
                self._set_aside()
        wanted = select(files, checkpoints)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_others(wanted)
        outdated = [name for name in wanted if self._versions.get(name) != files[name].version]
        move_side_by_side(lambda name: self._pull_one(name, files[name]), outdated)
        self._save_journal()
        self._begins_session = trains

    @property
    def _session_file(self) -> pathlib.Path:
        return self.folder.parent / 'session'

    def _begin_session(self) -> None:
        """Tell other commands that this one writes from now on."""
        self._begins_session = False
        files = self._store.files()
        name = uuid.uuid4().hex
        self._store.write(_SESSION, name.encode())
        write_atomically(self._session_file, name)
        # Parts of a checkpoint whose upload was cut short.
        complete = set(select(files, ALL))
        self._store.delete(
            name for name in files if _OF_CHECKPOINT.match(name) and name not in complete
        )

    def _pull_one(self, name: str, file: StoredFile) -> None:
        target = self.folder / name
        self._store.download(name, target, file)
        self._sent[name] = _size_and_time(target)
        self._versions[name] = file.version

    def _remove_others(self, wanted: Iterable[str]) -> None:
        """Remove local files that are not on the store: none of them is unsent by now."""
        wanted = set(wanted)
        for name in set(self._local_files()) - wanted:
            path = self.folder / name
            path.unlink()
            # A checkpoint folder without files would be taken for a damaged one.
            while path.parent != self.folder and not any(path.parent.iterdir()):
                path = path.parent
                path.rmdir()
        # What is not known as sent is never deleted from the store.
        self._sent = {name: state for name, state in self._sent.items() if name in wanted}
        self._versions = {name: text for name, text in self._versions.items() if name in wanted}

    def _unsent(self) -> list[str]:
        """Local files that the store does not have, or not as they are."""
        local = self._local_files()
        return [name for name in local if self._sent.get(name) != local[name]]

    def _set_aside(self) -> None:
        target = self.folder.with_name(f'left_{time.strftime("%Y%m%d_%H%M%S")}')
        os.replace(self.folder, target)
        self._sent, self._versions = {}, {}
        print(
            f'{self.url} was written by another command since; what this machine had not uploaded '
            f'is kept in {target}',
            file=sys.stderr,
            flush=True,
        )

    # ---- To the store.

    def push(self, deletes: bool = True) -> None:
        """Upload what has changed, and delete what is gone.

        Args:
            deletes: whether files that were removed here are deleted on the store.

        Raises:
            StoreError: the store cannot be written.
        """
        local = self._local_files()
        changed = [name for name in local if self._sent.get(name) != local[name]]
        gone = [name for name in self._sent if name not in local] if deletes else []
        last_files = [name for name in changed if name.endswith(_LAST_FILE)]
        others = [name for name in changed if not name.endswith(_LAST_FILE)]
        # Not earlier: a command that ends with a mistake in its config leaves nothing behind.
        if changed and self._begins_session:
            self._begin_session()
        for group in (others, last_files):
            move_side_by_side(lambda name: self._push_one(name, local[name]), group)
        # In this order no reader takes what is left of a checkpoint for a complete one.
        gone.sort(key=lambda name: not name.endswith(_LAST_FILE))
        self._store.delete(gone)
        for name in gone:
            del self._sent[name]
            self._versions.pop(name, None)
        if changed or gone:
            self._learn_versions(changed)
            self._save_journal()

    def _push_one(self, name: str, state: tuple[int, int]) -> None:
        path = self.folder / name
        try:
            self._store.upload(path, name)
        except FileNotFoundError:
            if path.exists():
                raise
            return  # an old checkpoint that was deleted in the meantime
        # As it was before: a line that was appended meanwhile is uploaded the next time.
        self._sent[name] = state

    def _learn_versions(self, names: Iterable[str]) -> None:
        files = self._store.files()
        for name in names:
            if name in files:
                self._versions[name] = files[name].version

    def _local_files(self) -> dict[str, tuple[int, int]]:
        """{path below the folder: (bytes, time of last change in ns)}."""
        files = {}
        for path in self.folder.rglob('*'):
            name = path.relative_to(self.folder).as_posix()
            if _LOCAL_ONLY.search(name):
                continue
            try:
                if path.is_file():
                    files[name] = _size_and_time(path)
            except FileNotFoundError:
                continue  # deleted in the meantime
        return files

    # ---- The journal: what the store has, for the next command on this machine.

    @property
    def _journal(self) -> pathlib.Path:
        return self.folder.parent / 'journal.json'

    def _load_journal(self) -> None:
        try:
            entries = json.loads(self._journal.read_text(encoding='utf-8'))
        except (OSError, ValueError):
            entries = {}
        local = self._local_files()
        for name, (size, changed, version) in entries.items():
            self._sent[name] = (size, changed)
            # What was changed or deleted here has to be fetched again.
            if local.get(name) == (size, changed):
                self._versions[name] = version

    def _save_journal(self) -> None:
        entries = {
            name: (*state, self._versions.get(name, '')) for name, state in self._sent.items()
        }
        write_atomically(self._journal, json.dumps(entries))

    # ---- While the command runs.

    def start(self) -> None:
        """Upload what changes from now on, in a thread."""
        self._thread = threading.Thread(target=self._push_regularly, daemon=True)
        self._thread.start()

    def _push_regularly(self) -> None:
        is_failing = False
        while not self._closing.wait(_EVERY):
            try:
                self.push()
                is_failing = False
            # A store that is away for an hour need not end a run of days.
            except (StoreError, OSError) as error:
                if not is_failing:
                    print(f'uploading waits: {error}', file=sys.stderr, flush=True)
                is_failing = True

    def close(self) -> None:
        """Upload what is left, and let the next command have the local folder.

        Raises:
            StoreError: the store cannot be written. The local folder keeps what is missing there.
        """
        self._closing.set()
        try:
            if self._thread:
                self._thread.join()
                self.push()
        except StoreError as error:
            raise StoreError(
                f'{error}; what is not on the store yet is in {self.folder}, and the same command '
                'on this machine uploads it'
            ) from error
        finally:
            if self._lock:
                self._lock.release()


def _size_and_time(path: pathlib.Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
