"""Several processes: start, one voice, and stopping together."""
from __future__ import annotations

import os
import signal
from typing import Any

import jax
import numpy as np

from vatt_jax.config import ConfigError


def initialize() -> None:
    """Joins the other processes when VATT_COORDINATOR (host:port), VATT_PROCESSES and VATT_PROCESS say there are any."""
    address = os.environ.get('VATT_COORDINATOR')
    if not address:
        return
    count, own = (os.environ.get(name, '') for name in ('VATT_PROCESSES', 'VATT_PROCESS'))
    if not (count.isdigit() and own.isdigit() and int(own) < int(count)):
        raise ConfigError(f'VATT_COORDINATOR={address} with VATT_PROCESSES={count!r} and VATT_PROCESS={own!r}: give the number of '
                          'processes and the place of this one among them, 0 to one less')
    jax.distributed.initialize(address, int(count), int(own))


def is_main() -> bool:
    """True on the one process that writes logs."""
    return jax.process_index() == 0


def agree(value: int) -> int:
    """The main process's value on every process. What is read from the run folder is read once: another process would see the files
    of a moment later, go another way and leave the others waiting in a collective."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


class Stop:
    """SIGTERM (preemption, a scheduler's time limit) asks the loop to save and leave after the step under way. A context: outside
    of it the signal does what it did before."""

    def __enter__(self) -> Stop:
        self._asked = False
        if jax.process_count() == 1:  # with several, jax.distributed has installed its own handler
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        self._asked = True

    @property
    def asked(self) -> bool:
        """Whether this process was asked; others may not know yet."""
        return self._asked

    def now(self, step: int) -> bool:
        """The same answer on every process at the same step."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils
        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_: Any) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)
