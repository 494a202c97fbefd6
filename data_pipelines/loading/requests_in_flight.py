"""Reads records of an object store side by side: as many as keep its line busy.

A request waits for its first byte much longer than it takes to arrive, so one after another would
leave the line idle. How many have to be under way is the product of bandwidth and latency. Both are
measured: latency is the shortest time that a read took, bandwidth the most that arrived in a
stretch of time. As long as more requests bring more bytes, the measured bandwidth grows, and the
number with it; it stops growing where the line is full.
"""

from __future__ import annotations

import collections
import concurrent.futures
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from vatt_jax.object_store import StoreSettings

# Reads under way before anything is measured, and the fewest at any time.
FEWEST = 8
# The most: as many threads wait for them.
MOST = 128
# How many times the measured product is under way, so that a bandwidth which was limited by the
# number of requests can turn out to be higher.
_GAIN = 2.0
# Shortest stretch of time in which bandwidth is measured, in seconds.
_STRETCH = 0.25
# Stretches whose maximum counts: a line that has become slower is noticed after so many.
_STRETCHES = 16

Item = TypeVar('Item')
Result = TypeVar('Result')


class LineEstimate:
    """Bandwidth, latency and size of reads, and the number of reads that follows."""

    def __init__(self, settings: StoreSettings, clock: Callable[[], float] = time.monotonic):
        """Nothing is measured yet.

        Args:
          settings: bandwidth, if it is known, and the memory that reads under way may take.
          clock: seconds, from any moment on.
        """
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._latency = math.inf  # seconds
        self._num_reads = 0
        self._num_bytes = 0
        self._stretch_begin = clock()
        self._stretch_bytes = 0
        self._rates: collections.deque[float] = collections.deque(maxlen=_STRETCHES)  # bytes/s

    def add(self, num_bytes: int, seconds: float) -> None:
        """Count a read.

        Args:
          num_bytes: that it brought.
          seconds: that it took.
        """
        with self._lock:
            self._latency = min(self._latency, seconds)
            self._num_reads += 1
            self._num_bytes += num_bytes
            self._stretch_bytes += num_bytes
            elapsed = self._clock() - self._stretch_begin
            # Twice the latency: in a shorter time no read that began in it would have come back.
            if elapsed >= max(_STRETCH, 2 * self._latency):
                self._rates.append(self._stretch_bytes / elapsed)
                self._stretch_begin += elapsed
                self._stretch_bytes = 0

    def number(self) -> int:
        """How many reads should be under way."""
        with self._lock:
            if not self._num_bytes:
                return FEWEST
            bytes_a_read = self._num_bytes / self._num_reads
            number = float(FEWEST)
            if self._settings.bandwidth:
                number = self._settings.bandwidth * 1e6 * self._latency / bytes_a_read
            elif self._rates:
                number = _GAIN * max(self._rates) * self._latency / bytes_a_read
            room = self._settings.memory * 1e6 / bytes_a_read
        wanted = min(MOST, max(FEWEST, math.ceil(number)))
        return max(1, min(wanted, int(room)))


class RequestsInFlight:
    """Calls a function that reads with many items, several at once. Safe from several threads."""

    def __init__(self, settings: StoreSettings):
        """`settings`: see LineEstimate."""
        self.estimate = LineEstimate(settings)
        # Threads start when they are needed, and wait for answers most of their time.
        self._pool = concurrent.futures.ThreadPoolExecutor(MOST, 'records')
        self._turn = threading.Condition()
        self._num_running = 0

    def map(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        size: Callable[[Result], int],
    ) -> list[Result]:
        """Call `function` with each item; the results are in the order of the items.

        Args:
          function: reads one.
          items: what to read.
          size: bytes that a result took.
        """

        def measured(item: Item) -> Result:
            with self._turn:
                self._turn.wait_for(self._may_run)
                self._num_running += 1
            try:
                begin = time.monotonic()
                result = function(item)
                self.estimate.add(size(result), time.monotonic() - begin)
                return result
            finally:
                with self._turn:
                    self._num_running -= 1
                    self._turn.notify_all()

        return list(self._pool.map(measured, items))

    def _may_run(self) -> bool:
        return self._num_running < self.estimate.number()
