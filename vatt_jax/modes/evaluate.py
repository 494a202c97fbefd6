"""--mode=eval: the newest checkpoint beside the same network before training."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError
from vatt_jax.modes.own_tokenizer import with_own_tokenizer
from vatt_jax.parallel import distributed
from vatt_jax.reporting import report
from vatt_jax.run_folder import RANDOM_INIT, RunFolder, evaluation_name
from vatt_jax.training import checkpoint, frozen_base, frozen_models, loop


def run(config: ConfigDict, workdir: pathlib.Path, open_data: Callable[[ConfigDict], Any]) -> None:
    """Evaluates a run anew and prints the table of results.

    Args:
        config: of the run, or one that evaluates it otherwise.
        workdir: the run folder.
        open_data: config -> data object.

    Raises:
        ConfigError: the folder holds no checkpoint, or one of another model.
    """
    checkpoint.find(workdir)  # before the data are made
    frozen_models.recall(config, workdir)
    data = open_data(with_own_tokenizer(config, workdir))
    compare(config, data, workdir, again=True)
    if distributed.is_main():
        print(report.table(workdir), flush=True)


def compare(
    config: ConfigDict,
    data: Any,
    workdir: pathlib.Path,
    built: loop.Built | None = None,
    again: bool = False,
) -> None:
    """Evaluates the newest checkpoint, and the same network at random initialisation beside it.

    A gallery of retrievals is kept for the report.

    Args:
        config: of the run.
        data: the data object of docs/architecture.md.
        workdir: the run folder.
        built: of this config, if it has been built.
        again: also where results are there already.

    Raises:
        ConfigError: the folder holds no checkpoint, or one of another model.
    """
    if built is None:
        built = loop.build(config, data)
    loop.check_run_folder(config, workdir, evaluating=again)
    step = loop.newest_sound(workdir)
    if step is None:
        raise ConfigError(f'--workdir={workdir} holds no checkpoint; train first')
    if not config.evals:
        return
    folder = RunFolder(workdir)

    # On every process as on the main one: evaluating takes all of them.
    def is_due(name: str) -> bool:
        return again or not distributed.broadcast_from_main(folder.has_evaluation(name))

    with jax.set_mesh(built.mesh):
        if is_due(evaluation_name(step)):
            # Restored onto the mesh of this config, which need not be that of the training.
            checkpoints = checkpoint.Checkpoints(folder.checkpoints, config.checkpoint)
            state, _, _ = frozen_base.restore(checkpoints, step, built, config)
            checkpoints.close()
            loop.evaluate(config, built, state, data, workdir, step, gallery=True, again=again)
        if is_due(RANDOM_INIT):
            # The very values that training began with: they depend on config.seed alone. With
            # config.init_from it is still the random network, so that the baseline is one without
            # training.
            state = built.init()
            loop.evaluate(config, built, state, data, workdir, 0, tag=RANDOM_INIT, again=again)
