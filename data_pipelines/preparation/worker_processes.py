"""Worker processes that may crash: plain Python processes that are sent functions to call.

The pools of the standard library run the caller's script again in each worker. That fails where the
script has no main guard, comes from standard input, or is itself a worker of such a pool. These
workers know nothing of the caller but `sys.path`. Each has one call under way, so that it is known
which one crashed it.
"""

from __future__ import annotations

import concurrent.futures as futures
import contextlib
import itertools
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from typing import IO, Any, TypeVar

from data_pipelines.errors import DataError

# What a worker runs. Its argument is the caller's sys.path.
_PROGRAM = (
    # First of all: Ctrl-C reaches every process of a terminal, and the caller ends this one.
    'import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); '
    'import json, sys; sys.path[:] = json.loads(sys.argv[1]); '
    'from data_pipelines.preparation import worker_processes; worker_processes.serve()'
)

# Seconds until a worker that should leave is killed.
_MAX_SECONDS_TO_END = 5.0
# Bytes of a message: more is something that was printed where messages should be.
_MAX_MESSAGE = 1 << 32

Item = TypeVar('Item')


class WorkerCrashed(DataError):
    """A worker process ended during a call."""


class Worker:
    """A process that calls one function at a time; started by the first call.

    Attributes:
        is_closed: whether `close` was called.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self.is_closed = False

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the worker process.

        Args:
            function: of a module, so that the worker can import it.
            arguments: of the function; anything that can be pickled.

        Returns:
            What the function returns. What it raises is raised here.

        Raises:
            WorkerCrashed: the process ended meanwhile. The next call starts another one.
            DataError: no worker process can be started.
        """
        process = self._started()
        try:
            _send(process.stdin, (function, arguments))
            has_returned, result = _receive(process.stdout)
        except (EOFError, BrokenPipeError, ValueError):
            # ValueError: the pipe was closed by `close` of another thread.
            code = self._end()
            raise WorkerCrashed(
                f'a worker process ended unexpectedly (exit code {code}); where memory ran out, '
                'fewer processes help'
            ) from None
        if not has_returned:
            raise result
        return result

    def close(self) -> None:
        """End the process, whatever it is doing. Further calls raise WorkerCrashed."""
        self.is_closed = True
        self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self.is_closed:
            raise WorkerCrashed('the worker process was closed')
        if self._process is None:
            paths = [path for path in sys.path if isinstance(path, str)]
            command = [sys.executable or 'python', '-c', _PROGRAM, json.dumps(paths)]
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
                # The greeting: from here on, an end is the fault of a call.
                _receive(self._process.stdout)
            except (OSError, EOFError, pickle.UnpicklingError) as error:
                code = self._end()
                raise DataError(
                    f'a worker process could not be started with sys.executable={sys.executable!r} '
                    f'({_cause(error, code)}); processes=1 works in this process instead'
                ) from error
        return self._process

    def _end(self) -> int | None:
        """End the process; returns its exit code, None if there is none."""
        process = self._process
        self._process = None
        if process is None:
            return None
        assert process.stdin is not None and process.stdout is not None
        # At the end of its input, a worker leaves at once, also from within a call.
        with contextlib.suppress(BrokenPipeError):  # what was not sent to a process that is gone
            process.stdin.close()
        try:
            code = process.wait(_MAX_SECONDS_TO_END)
        except subprocess.TimeoutExpired:  # a decoder that hangs lets no other thread run
            process.kill()
            code = process.wait()
        # Only now, since a thread that still reads holds it.
        process.stdout.close()
        return code


def _cause(error: BaseException, code: int | None) -> str:
    return f'it ended with exit code {code}' if code is not None else str(error)


def for_each(items: Iterable[Item], processes: int, work: Callable[[Worker, Item], None]) -> None:
    """Do something with every item, side by side.

    Args:
        items: in the order in which they are begun; taken when a worker is free.
        processes: number of workers.
        work: called in a thread of this process with a worker and an item.

    Raises:
        Exception: the first that `work` raises; nothing more is begun then.
    """
    waiting = iter(items)
    taking = threading.Lock()
    is_given_up = threading.Event()
    workers = [Worker() for _ in range(processes)]

    def work_off(worker: Worker) -> None:
        while not is_given_up.is_set():
            # One by one, since there may be a million: an iterator serves one thread at a time.
            with taking:
                remaining = list(itertools.islice(waiting, 1))
            if not remaining:
                return
            work(worker, remaining[0])

    with futures.ThreadPoolExecutor(len(workers)) as threads:
        tasks = [threads.submit(work_off, worker) for worker in workers]
        try:
            for task in futures.as_completed(tasks):
                task.result()
        finally:
            # After an error or Ctrl-C nothing more is begun, and calls under way are given up.
            is_given_up.set()
            for worker in workers:
                worker.close()


# ---- In the worker process.


def serve() -> None:
    """Call what arrives at standard input until its end; the results go to standard output."""
    # A copy, while what libraries print goes to standard error.
    results = os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    _send(results, 'ready')
    while True:
        request = requests.get()
        try:
            function, arguments = pickle.loads(request)
            _send(results, (True, function(*arguments)))
        except BrokenPipeError:
            return
        except Exception as error:  # passed on, whatever it is
            _send(results, (False, _picklable(error)))


def _read_requests(requests: queue.SimpleQueue[bytes]) -> None:
    """Pass requests on; ends the process when the caller is gone, although a call is under way."""
    while True:
        try:
            requests.put(_receive_bytes(sys.stdin.buffer))
        except EOFError:
            # sys.exit would end nothing but this thread.
            os._exit(0)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of a class that has arguments of its own
        return RuntimeError(f'{type(error).__name__}: {error}')
    return error


# ---- Messages: 8 bytes of length, and a pickle.


def _send(stream: IO[bytes] | None, message: Any) -> None:
    assert stream is not None
    content = pickle.dumps(message)
    stream.write(len(content).to_bytes(8, 'little') + content)
    stream.flush()


def _receive(stream: IO[bytes] | None) -> Any:
    assert stream is not None
    return pickle.loads(_receive_bytes(stream))


def _receive_bytes(stream: IO[bytes]) -> bytes:
    """Raises EOFError where the other side is gone."""
    header = stream.read(8)
    length = int.from_bytes(header, 'little')
    if len(header) < 8 or length > _MAX_MESSAGE:
        raise EOFError
    content = stream.read(length)
    if len(content) < length:
        raise EOFError
    return content
