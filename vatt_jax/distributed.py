"""Several processes: start, one voice, and stopping together."""
from __future__ import annotations

import os
import signal

import jax


def initialize() -> None:
    """Joins the other processes when VATT_COORDINATOR, VATT_PROCESSES and VATT_PROCESS say there are any."""
    address = os.environ.get('VATT_COORDINATOR')
    if address:
        jax.distributed.initialize(address, int(os.environ['VATT_PROCESSES']), int(os.environ['VATT_PROCESS']))


def is_main() -> bool:
    """True on the one process that writes logs."""
    return jax.process_index() == 0


class Stop:
    """SIGTERM (preemption, a scheduler's time limit) asks the loop to save and leave after the step under way."""

    def __init__(self):
        self._asked = False
        if jax.process_count() == 1:  # with several, jax.distributed has installed its own handler
            self._previous = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_):
        self._asked = True

    def now(self, step: int) -> bool:
        """The same answer on every process at the same step."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils
        return multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)
