"""How many clips a core reads and decodes: measured on the data of a run before it starts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from data_pipelines.loading.record_batches import RecordBatches
from data_pipelines.loading.record_reader import ReadProblems, RecordReader

if TYPE_CHECKING:
    from data_pipelines.loading.records_source import Records

_MIN_ROWS = 8  # of the batches that are read: small ones, to be done soon
_MIN_SECONDS = 1.0  # of CPU time over which is measured
_MAX_CLIPS = 512  # by then the mean over clips is settled, however fast they are


def clips_per_core_second(data: Records, batch_size: int) -> float:
    """Training clips that one core reads and decodes in a second.

    CPU time, not that of a clock: other processes do not change it. Takes a second or two.

    Args:
      data: whose training mixture is read, with one thread of this process.
      batch_size: of the global batch.
    """
    # A small part of every batch, as one of many hosts would read it. The batch size is that of the
    # run, since a mixture with shares does not divide by any.
    hosts = _most_hosts(batch_size)
    rows_of_batch = data.training_rows(0, batch_size, (0, hosts))
    planner = data.planner(data.training_request())
    data_config = data.config.data.copy_and_resolve_references()
    data_config.threads = data_config.prefetch = 1
    # Damaged records are counted by the run, when it meets them.
    reader = RecordReader(planner, ReadProblems(max_corrupt=1.0))
    batches = RecordBatches(planner, reader, rows_of_batch, None, data_config)
    # Two batches make the graph and the queues; from then on a batch is made for each one taken.
    for _ in range(2):
        next(batches)
    clips, seconds = 0, 0.0
    begin = time.process_time()
    while clips < _MAX_CLIPS and seconds < _MIN_SECONDS:
        clips += len(next(batches)['valid'])
        seconds = time.process_time() - begin
    batches.close()
    return clips / seconds


def _most_hosts(batch_size: int) -> int:
    """The most hosts over which a batch divides with at least `_MIN_ROWS` rows for each."""
    for hosts in range(batch_size // _MIN_ROWS, 1, -1):
        if batch_size % hosts == 0:
            return hosts
    return 1
