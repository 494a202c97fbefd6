"""The folder that is written to: made, and written by one process at a time."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

from data_pipelines.errors import DataError

try:
    import fcntl
except ImportError:  # on Windows: two processes are not told apart there
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def only_writer(out: str | os.PathLike) -> Iterator[None]:
    """Hold a folder while the context is open, so that no other process writes to it.

    The folder is made. If it is empty when the context closes, it is removed again.

    Args:
        out: the folder; '' and files are left to the checks of their arguments.

    Raises:
        DataError: another process holds the folder, or it cannot be made.
    """
    folder = pathlib.Path(out)
    # os.path, as pathlib raises for a name that is too long.
    if not os.fspath(out) or (os.path.exists(folder) and not os.path.isdir(folder)):
        yield
        return
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    make(folder)
    try:
        with _held(folder):
            yield
    finally:
        # From the inside out, as far as nothing was written.
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def make(folder: pathlib.Path) -> None:
    """Make a folder and those that it is in.

    Raises:
        DataError: it cannot be made; the message says why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f'--out: {folder} cannot be made ({error.strerror or error}); name another folder'
        ) from None


@contextlib.contextmanager
def _held(folder: pathlib.Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    # The folder itself is locked, not a file in it: nothing is left behind, and the lock ends with
    # the process, however that ends.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f'--out={folder}: another process is writing to this folder; wait until it is '
                'done, or choose another --out'
            ) from None
        except OSError:  # file systems of some networks know no locks
            pass
        yield
    finally:
        os.close(descriptor)
