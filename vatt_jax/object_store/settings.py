"""How object stores are read and written: the fields of config.object_store."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict


class StoreError(RuntimeError):
    """An object store did not do what was asked. The message is one sentence that says why.

    Neither an OSError nor a ValueError: those of a record mean that the record is damaged, and this
    one says nothing about it.
    """


@dataclasses.dataclass(frozen=True)
class StoreSettings:
    """Timeouts, tries and how much is read at once.

    Attributes:
        timeout: seconds that a request may take, in addition to those that its bytes need at
            1 MB/s.
        tries: how often a request is sent before its failure counts.
        backoff: seconds before the second try; twice as many before each further one.
        bandwidth: of reading records, in MB/s; with the latency it says how many requests are under
            way at once. 0: measured.
        memory: MB that the requests under way may hold, at most.
    """

    timeout: float = 30.0
    tries: int = 5
    backoff: float = 0.5
    bandwidth: float = 0.0
    memory: int = 256

    @classmethod
    def from_config(cls, config: ConfigDict) -> StoreSettings:
        """The settings of a run.

        Args:
            config: the whole config; one that is older than these fields has the defaults.
        """
        fields: dict[str, Any] = dict(config.get('object_store', {}))
        return cls(**fields)
