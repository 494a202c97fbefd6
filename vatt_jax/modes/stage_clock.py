"""How long the stages of a run took."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator

from vatt_jax.parallel import distributed
from vatt_jax.run_folder import RunFolder, write_atomically


class StageClock:
    """Seconds of each stage, which `save` adds to those in <workdir>/timings.json.

    They add up over restarts. A run that stops before it began writes nothing.
    """

    def __init__(self, workdir: pathlib.Path):
        self.path = RunFolder(workdir).timings
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures its body; one that fails does not count."""
        began = time.monotonic()
        yield
        # No try/finally: a stage that failed is repeated, and would be counted twice.
        self.seconds[name] = time.monotonic() - began

    def save(self) -> None:
        if distributed.is_main():
            # Of earlier starts of the same run.
            total = json.loads(self.path.read_text()) if self.path.exists() else {}
            for name, seconds in self.seconds.items():
                total[name] = total.get(name, 0) + seconds
            rounded = {name: round(seconds, 1) for name, seconds in total.items()}
            write_atomically(self.path, json.dumps(rounded, indent=1))
        # What is saved must not be added again by the next call.
        self.seconds = {}
