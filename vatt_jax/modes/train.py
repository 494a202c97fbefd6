"""--mode=train: trains, and where the config asks for it evaluates and reports."""

from __future__ import annotations

import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from vatt_jax.modes import evaluate, report
from vatt_jax.modes.stage_clock import StageClock
from vatt_jax.parallel import distributed
from vatt_jax.planning import preflight
from vatt_jax.run_folder import RunFolder
from vatt_jax.training import frozen_models, loop


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
    """
    frozen_models.recall(config, workdir)
    # Before the data are made, which may take minutes; the loop checks again, with the data's
    # fields.
    loop.check_run_folder(config, workdir)
    clock = StageClock(workdir)
    with clock.stage('data'):
        data = open_data(config)
        # Opening data may take longer on one host than on another. Without the barrier it would be
        # the first collective that times out, with a message about anything but data.
        distributed.barrier('data')
    with clock.stage('training'):

        def say(line: str) -> None:
            if distributed.is_main():
                print(line, flush=True)

        def before(built: loop.Built) -> None:
            # Nothing to say of a run whose steps are all taken.
            if loop.newest(workdir) != config.steps:
                preflight.before_training(config, built, data, workdir, say)

        say('building the model …')
        built, _ = loop.train(config, data, workdir, quiet=quiet, before=before)
    clock.save()

    # done.json is written by the main process, and others may not see it yet.
    is_done = distributed.broadcast_from_main(RunFolder(workdir).done.exists())
    if not (config.report and is_done):
        return
    # All is saved: SIGTERM may end the process where it is, and the same command makes what is
    # missing.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    with clock.stage('evaluation and report'):
        evaluate.compare(config, data, workdir, built)
    clock.save()
    distributed.leave()
    if distributed.is_main():
        report.run(workdir)
