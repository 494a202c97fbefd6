"""Reading of several files side by side, ahead of whoever takes what is read."""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# Items that each file may be ahead.
AHEAD = 2
# How often a full queue is looked at, to see whether anybody still reads, in seconds.
POLL_SECONDS = 0.1


def read_ahead(
    readers: Iterable[Callable[[], Iterator[Any]]], files: int
) -> Iterator[tuple[int, Any]]:
    """Yield what readers yield, one reader after the other, while the next ones are under way.

    Memory is bounded by `files` times AHEAD items, however many readers there are and however much
    each yields. What a reader raises is raised here.

    Args:
        readers: each is called in a thread of its own.
        files: how many run at a time.

    Yields:
        (number of the reader, item).
    """
    waiting = enumerate(readers)
    running: collections.deque[tuple[int, _Reading]] = collections.deque()
    try:
        while True:
            while len(running) < files:
                following = next(waiting, None)
                if following is None:
                    break
                number, reader = following
                running.append((number, _Reading(reader)))
            if not running:
                return
            number, reading = running[0]
            for item in reading:
                yield number, item
            running.popleft()
    finally:
        for _, reading in running:
            reading.stop()


class _Reading:
    """One reader in its thread. Iterating gives what it yields."""

    def __init__(self, reader: Callable[[], Iterator[Any]]):
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(AHEAD)
        self._is_stopped = threading.Event()
        threading.Thread(target=self._run, args=(reader,), daemon=True).start()

    def _run(self, reader: Callable[[], Iterator[Any]]) -> None:
        try:
            for item in reader():
                if not self._put('item', item):
                    return
            self._put('end', None)
        except BaseException as error:
            # Whatever it is, it belongs to whoever waits for the items.
            self._put('error', error)

    def _put(self, kind: str, content: Any) -> bool:
        """Whether it was taken over; False once nobody reads any more."""
        while not self._is_stopped.is_set():
            try:
                self._queue.put((kind, content), timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Any]:
        while True:
            kind, content = self._queue.get()
            if kind == 'error':
                raise content
            if kind == 'end':
                return
            yield content

    def stop(self) -> None:
        self._is_stopped.set()
