"""Training batches, joined with what the last refresh said of their records."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vatt_jax.objectives.base import Objective, select_streams
from vatt_jax.training import columns
from vatt_jax.training.build import process_position
from vatt_jax.training.metrics import Meter
from vatt_jax.training.start import TrainingRun


class TrainBatches:
    """This host's rows of the training batches.

    Args:
        config: of the run.
        data: the data object of docs/architecture.md.
        objective: whose streams are loaded.
        meter: the time that steps wait for data is added to it.
    """

    def __init__(self, config: ConfigDict, data: Any, objective: Objective, meter: Meter):
        self.config = config
        self.data = data
        self.objective = objective
        self.meter = meter
        # source -> number of its first record among all
        self.first_record = data.offsets('train', by='records')
        # Opened by the first `next`: where to begin and with what weights is known by then only.
        self.iterator: Any = None

    def next(self, run: TrainingRun) -> dict[str, Any]:
        """The host batch of the run's next step."""
        if self.iterator is None:
            # Weighted drawing needs the weights of all records before the first one is drawn, so a
            # refresh that changes them closes this iterator, and it is opened anew here.
            weights = {name: run.columns[name] for name in run.weights}
            self.iterator = self.data.train(
                run.consumed,
                self.config.batch_size,
                process=process_position(),
                columns=weights or None,
            )
        began = time.monotonic()
        # Streams that the objective does not read are dropped here, before they cross to the
        # device.
        batch = select_streams(next(self.iterator), self.objective.streams())
        # An index counts within its source; records run over all sources, one after the other.
        record = self.first_record[batch['source']] + batch['index']  # [B]
        batch['record'] = record.astype(np.int32)
        if run.columns:
            batch['columns'] = columns.lookup(run.columns, record)
        # The host's wait only. The device may be busy with the step before all the while.
        self.meter.waited += time.monotonic() - began
        return batch

    def close(self) -> None:
        """Drops what is prefetched; `next` opens the data anew."""
        if self.iterator is not None:
            self.iterator.close()
            self.iterator = None
