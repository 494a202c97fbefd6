"""The run folder of a command as a local folder, wherever --workdir is."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

from vatt_jax.object_store import StoreError, StoreSettings, is_url, run_mirror
from vatt_jax.object_store.local_copies import VARIABLE, folder_of

# Mode -> what it needs of the checkpoints. Training goes on to delete old ones, so it needs to know
# of all.
_CHECKPOINTS = {
    'train': run_mirror.ALL,
    'report': run_mirror.NEWEST,
    'plan': run_mirror.NONE,
}
# Modes of one process, which never join others.
_ALONE = ('report', 'plan', 'search')
# What the main process sends where its own start failed.
_FAILED = -1


def with_config(workdir: str) -> pathlib.Path:
    """A local folder with the stored config of a run, if it has one.

    Raises:
        StoreError: the store cannot be read.
    """
    return run_mirror.fetch_config(workdir) if is_url(workdir) else pathlib.Path(workdir)


def for_compiled(workdir: str) -> pathlib.Path:
    """The local folder that compiled programs of a run are kept in: they are of this machine."""
    return folder_of('compiled', workdir) if is_url(workdir) else pathlib.Path(workdir)


@contextlib.contextmanager
def opened(workdir: str, mode: str, settings: StoreSettings) -> Iterator[pathlib.Path]:
    """The run folder as a local folder; one on a store is kept equal to it.

    To be entered by every process of a run, once they have found one another.

    Args:
        workdir: value of --workdir.
        mode: value of --mode.
        settings: of config.object_store.

    Raises:
        StoreError: the store cannot be read or written, or hosts do not share the local folder.
    """
    if not is_url(workdir):
        yield pathlib.Path(workdir)
        return
    mirror, is_writer = _join_mirror(workdir, mode, settings)
    if not is_writer:
        yield mirror.folder
        return
    mirror.start()
    try:
        yield mirror.folder
    finally:
        mirror.close()


def _join_mirror(
    workdir: str, mode: str, settings: StoreSettings
) -> tuple[run_mirror.RunMirror, bool]:
    """The mirror of a run, filled; and whether this process uploads what changes in it."""
    checkpoints = _CHECKPOINTS.get(mode, run_mirror.NEWEST)
    if mode in _ALONE:
        mirror = run_mirror.RunMirror(workdir, settings)
        mirror.pull(checkpoints, trains=False)
        return mirror, True
    from vatt_jax.parallel import distributed

    if distributed.is_main():
        try:
            mirror = run_mirror.RunMirror(workdir, settings)
            mirror.pull(checkpoints, trains=mode == 'train')
        except BaseException:
            distributed.broadcast_from_main(_FAILED)
            raise
        distributed.broadcast_from_main(mirror.number)
        return mirror, True
    number = distributed.broadcast_from_main(0)
    if number == _FAILED:
        raise StoreError(f'{workdir}: the main process could not open it, see its message')
    mirror = run_mirror.RunMirror(workdir, settings, number)
    # Orbax needs one folder that all processes see.
    if not mirror.folder.is_dir():
        raise StoreError(
            f'--workdir={workdir} with processes on several hosts: expected a local copy that all '
            f'of them see, and {mirror.folder} is not on this one; set {VARIABLE} to a folder of a '
            'shared file system'
        )
    return mirror, False
