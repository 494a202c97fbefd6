"""One training at a time in a run folder: two would write over each other's checkpoints."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import socket
import sys

from vatt_jax.config import ConfigError
from vatt_jax.parallel import distributed
from vatt_jax.run_folder import RunFolder

# What the system says where another process holds the lock; anything else is about missing locks.
HELD = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """A lock on a run folder, for as long as this process trains in it.

    It is the system's own (fcntl) and ends with the process, however that ends. Where the file
    system or the operating system has none, there is no protection.

    Args:
        workdir: the run folder.
    """

    def __init__(self, workdir: pathlib.Path):
        self._workdir = workdir
        self._file: int | None = None

    def acquire(self) -> None:
        """Takes the lock, unless it is held already or the folder is not there yet.

        Raises:
            ConfigError: another process trains in this folder.
        """
        if self._file is not None or sys.platform == 'win32' or not self._workdir.is_dir():
            return
        import fcntl

        try:
            file = os.open(RunFolder(self._workdir).lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return
        try:
            # Not flock: processes that are forked here, such as readers of data, would keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 200).decode(errors='replace').strip() or 'another process'
            os.close(file)
            if error.errno not in HELD:
                return
            raise ConfigError(
                f'--workdir={self._workdir}: expected a folder that no other run is writing, and '
                f'{holder} trains in it; wait for its end, or choose another --workdir'
            ) from error
        self._file = file
        # For the message alone: a full disk need not end the run.
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
            os.write(file, f'process {os.getpid()} on {socket.gethostname()}\n'.encode())

    def take(self) -> None:
        """`acquire` on the main process; all of them raise where it is held elsewhere."""
        message = ''
        if distributed.is_main():
            try:
                self.acquire()
            except ConfigError as error:
                message = str(error)
        if distributed.broadcast_from_main(int(bool(message))):
            raise ConfigError(
                message or f'--workdir={self._workdir}: another run is writing this folder'
            )

    def close(self) -> None:
        """Gives the lock back. Its file stays: another process may be opening it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
