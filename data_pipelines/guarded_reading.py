"""Media files read in a process of their own: one that crashes its decoder ends that process alone.

Decoders are C code, which a file that is damaged in the wrong place can bring to its end, and with
it the process that called them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.media import MediaError
from data_pipelines.preparation.worker_processes import Worker, WorkerCrashed

# As preparation has it of such a file.
CRASHED = 'corrupt: it crashes the decoder'


class GuardedReader:
    """Calls functions that read media files in a worker process, one after the other.

    Where no process can be started, they are called in this one.
    """

    def __init__(self) -> None:
        self._worker = Worker()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns, which runs in the worker process.

        Args:
            function: of a module, so that the worker can import it.
            arguments: of the function; they and what it returns can be pickled.

        Raises:
            MediaError: the process crashed; the next call starts another one.
        """
        try:
            return self._worker.call(function, *arguments)
        except WorkerCrashed as error:
            raise MediaError(CRASHED) from error
        except DataError:
            return function(*arguments)

    def iterate(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
        """Yield what a generator function yields, which runs in the worker process.

        Args:
            function: of a module, so that the worker can import it.
            arguments: of the function; they and what it yields can be pickled.

        Raises:
            MediaError: the process crashed; the next call starts another one.
        """
        try:
            self._worker.call(_begin, function, arguments)
        except WorkerCrashed as error:
            raise MediaError(CRASHED) from error
        except DataError:
            yield from function(*arguments)
            return
        while items := self.call(_next):
            yield from items

    def close(self) -> None:
        """Ends the process."""
        self._worker.close()


# ---- In the worker process, which has one iterator under way.

_under_way: Iterator[Any] = iter(())


def _begin(function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> None:
    global _under_way
    _under_way = function(*arguments)


def _next() -> list[Any]:
    """The next item in a list; an empty one at the end."""
    for item in _under_way:
        return [item]
    return []
