"""--mode=deflate: a network for images out of one for video (MMV)."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from vatt_jax.adaptation import deflation
from vatt_jax.config import ConfigError
from vatt_jax.importers import parameter_map
from vatt_jax.parallel import sharding

# Steps of the fit between two lines of it.
PRINT_EVERY = 100


def run(
    config: ConfigDict,
    workdir: pathlib.Path,
    open_data: Callable[[ConfigDict], Any],
    out: str,
    # n-def of the paper; without it, def.
    naive: bool = False,
    fit_steps: int = 1000,
    fit_rate: float = 1e-3,
) -> None:
    """Makes `out` a run folder with the deflated model of a run's newest checkpoint.

    Args:
        config: names data, mesh and batch size of the fit; its pictures are frames of
            config.data.train.
        workdir: the run folder of the video network.
        open_data: config -> data object.
        out: the run folder to make.
        naive: sum the kernels, and fit nothing.
        fit_steps: steps in which the batch norms are fitted, of config.batch_size pictures.
        fit_rate: first learning rate of these steps.

    Raises:
        ConfigError: wrong arguments, or a model that cannot be deflated.
    """
    _check_flags(out, fit_steps, fit_rate)
    # Both before minutes of work: the target must be free, and the source must hold a run.
    new_folder = parameter_map.check_new(out)
    video_config, info, variables = parameter_map.read_run(workdir)
    # The model is the stored run's; where and on what to fit it is this command's.
    video_config.data = config.data
    video_config.mesh = config.mesh
    video_config.batch_size = config.batch_size
    image_config = deflation.still_config(video_config)

    # read_run gives flat paths, (group, module, …, name) -> array.
    video_params = _group(variables, 'params')
    image_params = deflation.naive(video_config, video_params)
    losses: list[float] = []
    if not naive:
        # image_config asks for one frame a clip, so the training clips are read as pictures.
        pictures = open_data(image_config).train(0, config.batch_size)

        def report(step: int, loss: float) -> None:
            if step % PRINT_EVERY == 0 or step == fit_steps:
                print(f'step {step}: mean |difference| {loss:.5f}', flush=True)

        image_params, losses = deflation.refit(
            video_config,
            {'params': video_params, 'batch_stats': _group(variables, 'batch_stats')},
            image_config,
            image_params,
            pictures,
            fit_steps,
            fit_rate,
            sharding.make_mesh(dict(config.mesh)),
            report,
        )
        # Its threads would go on decoding while the result is written.
        pictures.close()

    # Statistics and the objective's parameters stay those of the video network.
    arrays = {path: array for path, array in variables.items() if path[0] != 'params'}
    for path, array in flatten_dict(image_params).items():
        arrays['params', *path] = array
    info = {**info, 'deflated': _summary(workdir, naive, losses)}
    # Shapes of the image model's TrainState: `write_run` makes its slots and counters as zeros.
    state = parameter_map.abstract_state(image_config, info.get('labels', {}))
    parameter_map.write_run(new_folder, image_config, state, arrays, info)
    print(f'{"naively " if naive else ""}deflated {workdir} → {new_folder}')


def _check_flags(out: str, fit_steps: int, fit_rate: float) -> None:
    if not out:
        raise ConfigError('--mode=deflate makes a new run folder; name it with --out')
    if jax.process_count() > 1:
        raise ConfigError(
            '--mode=deflate works in one process, this is one of '
            f'{jax.process_count()}; all devices of one machine are used'
        )
    if fit_steps < 1:
        raise ConfigError(
            f'--fit: expected a positive number, got {fit_steps}; --naive fits nothing'
        )
    if fit_rate <= 0:
        raise ConfigError(
            f'--rate: expected a positive number, got {fit_rate:g}; --naive fits nothing'
        )


def _group(variables: Mapping[tuple[str, ...], Any], name: str) -> dict[str, Any]:
    """One group of flat variables, 'params' or 'batch_stats', as a tree."""
    flat = {path[1:]: array for path, array in variables.items() if path[0] == name}
    return unflatten_dict(flat)


def _summary(workdir: pathlib.Path, naive: bool, losses: Sequence[float]) -> dict[str, Any]:
    """What the new run's info says of its making."""
    first_and_last = []
    if losses:
        # Of ten steps each: a single batch says little.
        first_and_last = [float(np.mean(losses[:10])), float(np.mean(losses[-10:]))]
    return {
        'fitted': not naive,
        'from': workdir.name,
        'steps': len(losses),
        'loss': first_and_last,
    }
