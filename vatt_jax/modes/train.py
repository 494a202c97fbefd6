"""--mode=train: trains, and where the config asks for it evaluates and reports."""

from __future__ import annotations

import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from vatt_jax import phases
from vatt_jax.modes import evaluate, report
from vatt_jax.modes.stage_clock import StageClock
from vatt_jax.parallel import distributed
from vatt_jax.planning import preflight
from vatt_jax.run_folder import RunFolder
from vatt_jax.training import loop


def run(
    config: ConfigDict,
    workdir: pathlib.Path,
    open_data: Callable[[ConfigDict], Any],
    quiet: bool = False,
) -> None:
    """Trains to the end or to SIGTERM; the same command continues.

    Args:
        config: of the run.
        workdir: the run folder.
        open_data: config -> data object; may take minutes, as it may make the data first.
        quiet: plain log lines instead of the live one.

    Raises:
        ConfigError: the folder holds a run with phases, which this config has not.
    """
    phases.check_has_none(config, workdir)
    training = Training(config, workdir)
    if not training.run(open_data, quiet) or not config.report:
        return
    # All is saved: SIGTERM may end the process where it is, and the same command makes what is
    # missing.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    training.evaluate()
    distributed.leave()
    if distributed.is_main():
        report.run(workdir)


class Training:
    """One training and what follows it.

    Args:
        config: of the run.
        workdir: the run folder.
    """

    def __init__(self, config: ConfigDict, workdir: pathlib.Path):
        self.config, self.workdir = config, workdir
        self._clock = StageClock(workdir)
        self._data: Any = None
        self._built: loop.Built | None = None

    def run(
        self,
        open_data: Callable[[ConfigDict], Any],
        quiet: bool = False,
        before: Callable[[], object] | None = None,
    ) -> bool:
        """Trains to the end or to SIGTERM.

        Args:
            open_data: config -> data object; may take minutes, as it may make the data first.
            quiet: plain log lines instead of the live one.
            before: called once all is built and checked, and nothing is written yet.

        Returns:
            Whether it came to its end.
        """
        # Before the data are made, which may take minutes; the loop checks again, with the data's
        # fields.
        loop.check_run_folder(self.config, self.workdir)
        with self._clock.stage('data'):
            self._data = open_data(self.config)
            # Opening data may take longer on one host than on another. Without the barrier it would
            # be the first collective that times out, with a message about anything but data.
            distributed.barrier(f'data of {self.workdir.name}')
        with self._clock.stage('training'):

            def check(built: loop.Built) -> None:
                # Nothing to say of a run whose steps are all taken.
                if loop.newest(self.workdir) != self.config.steps:
                    preflight.before_training(self.config, built, self._data, self.workdir, say)
                if before is not None:
                    before()

            say('building the model …')
            self._built, _ = loop.train(
                self.config, self._data, self.workdir, quiet=quiet, before=check
            )
        self._clock.save()
        # done.json is written by the main process, and others may not see it yet.
        return bool(distributed.broadcast_from_main(RunFolder(self.workdir).done.exists()))

    def evaluate(self) -> None:
        """Evaluates what was trained beside its random initialisation, for the report."""
        with self._clock.stage('evaluation and report'):
            evaluate.compare(self.config, self._data, self.workdir, self._built)
        self._clock.save()


def say(line: str) -> None:
    """Prints a line, once for all processes."""
    if distributed.is_main():
        print(line, flush=True)
