"""Planned batches -> host batches, by processes beside this one: `config.data.workers`.

Python runs one thread at a time, so threads alone do not keep the cores of a large host busy. Here
each of n processes makes every n-th batch, with the very threads of `record_batches`. Grain starts
the processes, passes their batches on in shared memory, and keeps the order.

What a batch holds follows from its number alone, so the batches are those of `record_batches`, bit
for bit, whatever the number of processes.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import data_pipelines
from data_pipelines.errors import DataError
from data_pipelines.loading.batch_plan import BatchPlanner, ReadRequest
from data_pipelines.loading.data_source import Request, Rows
from data_pipelines.loading.record_reader import (
    ReadLog,
    ReadProblems,
    RecordReader,
    RowContents,
)
from vatt_jax import extras

# A process takes seconds to start (it imports TensorFlow): a pass of fewer batches for each is over
# sooner with the threads of this one.
MIN_BATCHES_OF_WORKER = 64
# Batches of training; grain counts them in int64.
_ENDLESS = 2**62
# Smaller arrays leave the shared memory at once.
_MIN_SHARED_BYTES = 1 << 20
# Where a batch carries what reading it met, until it is counted.
_READS = 'reads'

# Exit code of a process -> what it means here.
_CAUSES = {
    -signal.SIGKILL: 'killed, as the system does where memory runs out: fewer workers or a smaller '
    'config.data.prefetch take less',
    -signal.SIGBUS: 'no room in /dev/shm, through which batches travel: containers have 64 MB '
    'unless told otherwise (--shm-size)',
    1: 'its own message stands above; a script that trains needs the guard '
    "if __name__ == '__main__'",
}


def useful_workers(workers: int, num_batches: int | None) -> int:
    """How many processes are to make batches.

    Args:
      workers: config.data.workers.
      num_batches: of the pass; None: endless.

    Returns:
      0 where the threads of this process make them sooner.
    """
    if num_batches is not None and num_batches < workers * MIN_BATCHES_OF_WORKER:
        return 0
    return workers


class WorkerBatches(Iterator):
    """Iterator of host batches; close() ends its processes. After an error it is over."""

    def __init__(
        self,
        config: ConfigDict,
        request: Request,
        rows: Callable[[int], Rows],
        number: int | None,
        workers: int,
        problems: ReadProblems,
    ):
        """See the class. The processes start with the first batch.

        Args:
          config: of the run; each process opens its data anew.
          request: how rows become a batch.
          rows: batch number -> its examples; it is sent to the processes.
          number: batches until the end; None for endless ones.
          workers: processes.
          problems: counts the reads of all processes.

        Raises:
          MissingExtra: grain is not installed.
        """
        self.closed = False
        self._problems = problems
        self._workers = workers
        # `prefetch` is of all processes together. Grain holds so many in each process, and as many
        # of each in this one.
        held_by_each = math.ceil(config.data.prefetch / (2 * workers))
        make_batch = BatchMaker(config, request, rows, number, workers)
        self._iterator = _iterate_in_processes(make_batch, number, workers, held_by_each)
        # Also where close() is forgotten, and before Python ends, which waits for processes.
        self._end_processes = weakref.finalize(self, self._iterator.close)

    def __next__(self) -> dict[str, Any]:
        if self.closed:
            raise StopIteration
        try:
            batch = next(self._iterator)
            # In the order of the batches, so that the run stops at the same one however many
            # processes there are.
            for reads in batch.pop(_READS):
                self._problems.add(reads.split, reads.records, reads.reasons, reads.size)
        except BaseException as error:
            self.close()
            found = re.search(r'terminated unexpectedly with exit code (-?\d+)', str(error))
            if not found:
                raise
            raise DataError(_death_sentence(self._workers, int(found[1]))) from error
        return _map_arrays(_plain_array, batch)

    def close(self) -> None:
        """End the processes and drop what was read ahead."""
        self.closed = True
        self._end_processes()


def _iterate_in_processes(
    make_batch: Callable[[int], Any], number: int | None, workers: int, held_by_each: int
) -> Any:
    """Grain's iterator over make_batch(0), make_batch(1), …, which are called in processes.

    Args:
      make_batch: each process gets a copy.
      number: calls until the end; None for endless ones.
      workers: processes.
      held_by_each: results that a process holds ready.
    """
    with extras.needed('workers', f'config.data.workers={workers}'):
        import grain
        from absl import flags
    # Grain has options of its own on absl's command line, which is not the one of this program.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    dataset = (
        grain.MapDataset.range(_ENDLESS if number is None else number)
        .map(make_batch)
        # No threads of grain's: `make_batch` has its own.
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        .mp_prefetch(
            grain.MultiprocessingOptions(workers, held_by_each), worker_init_fn=prepare_process
        )
    )
    return iter(dataset)


def _death_sentence(workers: int, exit_code: int) -> str:
    """What is said of a process that has ended before its parent asked it to."""
    cause = _CAUSES.get(exit_code, f'exit code {exit_code}')
    return (
        f'config.data.workers={workers}: a process that reads batches ended unexpectedly '
        f'({cause}); config.data.workers=0 reads with threads instead'
    )


def _plain_array(array: np.ndarray) -> np.ndarray:
    """NumPy's own array: a view of the shared memory, which it keeps alive, or a copy."""
    # Each shared block is an open file, of which a process may have a thousand or so; and passes
    # keep the indices and labels of all their batches.
    return np.array(array) if array.nbytes < _MIN_SHARED_BYTES else np.asarray(array)


def _map_arrays(function: Callable[[np.ndarray], np.ndarray], tree: Any) -> Any:
    """A batch, or a part of it, with the function applied to each array."""
    if isinstance(tree, dict):
        return {name: _map_arrays(function, value) for name, value in tree.items()}
    return function(tree) if isinstance(tree, np.ndarray) else tree


# ---- In the worker process.


def prepare_process(index: int, count: int) -> None:
    """Make this process one that ends when its parent does, and only then.

    Args:
      index: number of this process; grain passes it.
      count: processes.
    """
    # The parent is told of Ctrl-C and of preemption, and may want batches until it has saved.
    # Schedulers send these signals to all processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # The accelerators belong to the parent. An update too: JAX has read its environment if it is
    # imported.
    os.environ['JAX_PLATFORMS'] = 'cpu'
    if 'jax' in sys.modules:
        sys.modules['jax'].config.update('jax_platforms', 'cpu')
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Returns also where the parent was killed and could tell nobody.
    parent.join()
    os._exit(1)


class BatchMaker:
    """Number of a batch -> the batch. Made by the parent, called in a worker process.

    Grain asks each of n processes for every n-th batch, in order, so that they can be read ahead.
    """

    def __init__(
        self,
        config: ConfigDict,
        request: Request,
        rows: Callable[[int], Rows],
        number: int | None,
        step: int,
    ):
        """See the class.

        Args:
          config: of the run.
          request: how rows become a batch.
          rows: batch number -> its examples.
          number: batches until the end; None for endless ones.
          step: from one batch of a process to its next.
        """
        self._config = config
        self._request = request
        self._rows_of_batch = rows
        self._number = number
        self._step = step
        # Of the worker process alone.
        self._batches: Iterator[dict[str, Any]] | None = None
        self._next_number = 0

    def __call__(self, number: int) -> dict[str, Any]:
        """The batch, with what reading it met in its entry 'reads'."""
        if self._batches is None:
            self._batches = self._open(number)
            self._next_number = number
        if number != self._next_number:
            raise ValueError(f'batch {self._next_number} was expected to follow, got {number}')
        self._next_number += self._step
        batch = next(self._batches)
        # Shared memory takes contiguous arrays only, and a reversed view is none.
        return _map_arrays(np.ascontiguousarray, batch)

    def _open(self, first: int) -> Iterator[dict[str, Any]]:
        """This process's batches: `first`, `first + step`, …"""
        # Here, since only threads need it: TensorFlow.
        from data_pipelines.loading.record_batches import RecordBatches

        config = self._config.copy_and_resolve_references()
        # Grain holds further ones ready.
        config.data.prefetch = 1
        # Opened anew: an index of millions of records is read faster than it is sent.
        planner = data_pipelines.open(config).planner(self._request)

        def own_rows(i: int) -> Rows:
            return self._rows_of_batch(first + i * self._step)

        own_number = None
        if self._number is not None:
            own_number = len(range(first, self._number, self._step))
        reader = _LoggingReader(planner)
        return RecordBatches(planner, reader, own_rows, own_number, config.data)


class _LoggingReader(RecordReader):
    """Puts what reading met into the batch."""

    def __init__(self, planner: BatchPlanner):
        self._log = ReadLog()
        super().__init__(planner, self._log)

    def read(self, rows: Rows, batch: dict[str, Any], request: ReadRequest) -> list[RowContents]:
        contents = super().read(rows, batch, request)
        batch[_READS] = self._log.take()
        return contents
