"""Models of other runs that an objective reads (`Objective.frozen_models`): found, built, filled.

The other run is read twice as a run begins: its config, to build the module, and its values. From
then on the run folder has both, the config in config.objective and the values in its checkpoints.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from vatt_jax import config as configs
from vatt_jax import models, objectives
from vatt_jax.config import ConfigError
from vatt_jax.inputs.batch import modality_of
from vatt_jax.models import attention
from vatt_jax.object_store import is_url
from vatt_jax.objectives.base import Objective
from vatt_jax.objectives.memory.frozen import FrozenModel
from vatt_jax.training import checkpoint, starting_values


def resolve(config: ConfigDict, info: dict[str, Any]) -> None:
    """Fills in place what the objective's frozen models are: `config.objective.<name>_model`.

    Args:
        config: of the run; a model that is there already is left as it is.
        info: what the data say of themselves.

    Raises:
        ConfigError: a run cannot be read, or its model expects other inputs than this one's.
    """
    objective = objectives.build(config.objective)
    for name, run in objective.frozen_models().items():
        if not config.objective.get(f'{name}_model'):
            where = f'config.objective.{name}'
            model_config, other_info = _read_config(name, run)
            streams = objective.frozen_streams()
            check_inputs(f'{where}={run}', model_config, config, streams)
            check_tokenizer(f'{where}={run}', other_info, info, streams)
            config.objective[f'{name}_model'] = model_config


def recall(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Fills in place what the run in this folder has found of its frozen models, if there is one.

    So a run that goes on does not need their folders.
    """
    stored = configs.stored(pathlib.Path(workdir))
    if stored is None or stored.objective.name != config.objective.name:
        return
    for name, run in objectives.build(config.objective).frozen_models().items():
        found = stored.objective.get(f'{name}_model')
        is_same_run = stored.objective.get(name) == run
        if found and is_same_run and not config.objective.get(f'{name}_model'):
            config.objective[f'{name}_model'] = found


def build(config: ConfigDict, objective: Objective) -> dict[str, FrozenModel]:
    """The modules of the objective's frozen models, by name.

    Args:
        config: of the run, after `resolve`.
        objective: of that config.
    """
    frozen = {}
    for name in objective.frozen_models():
        # A run trained with another platform's attention kernel is read with this one's.
        model_config = attention.portable(config.objective[f'{name}_model'])
        # The device stage makes the batch in this run's type.
        frozen[name] = FrozenModel(models.build(model_config, config.compute_dtype))
    return frozen


def read(name: str, run: str, variables: dict[str, Any]) -> dict[str, Any]:
    """The values of a frozen model, laid out as `variables` are.

    Args:
        name: of the model.
        run: the run folder.
        variables: {'params', 'batch_stats'}, arrays with shardings.

    Raises:
        ConfigError: the checkpoint cannot be read or does not fit.
    """
    try:
        saved = checkpoint.read_model(checkpoint.find_verified(run))
    except ConfigError as error:
        raise ConfigError(f'config.objective.{name}: {error}') from error
    other = starting_values.OtherRun(
        run,
        saved,
        field=f'config.objective.{name}',
        remedy=f'; it does not fit config.objective.{name}_model, choose another --workdir',
    )
    return {group: other.take(group, tree) for group, tree in variables.items()}


def _read_config(name: str, run: str) -> tuple[ConfigDict, dict[str, Any]]:
    """`config.model` of a run, and what its data said of themselves."""
    if not run:
        raise ConfigError(
            f'config.objective.{name}: expected the folder of a run whose model is read, got none; '
            f'set --config.objective.{name}=RUN_FOLDER'
        )
    try:
        return read_config(f'config.objective.{name}', run)
    except ConfigError:
        # A plan is made before that run has trained: its config is there alone.
        stored = None if is_url(run) else configs.stored(run)
        if stored is None:
            raise
        return stored.model, {}


def read_config(where: str, run: str) -> tuple[ConfigDict, dict[str, Any]]:
    """`config.model` of a run that has a checkpoint, and what its data said of themselves.

    Args:
        where: the field that names the run.
        run: its folder.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        meta = checkpoint.read_meta(checkpoint.find_verified(run))
    except ConfigError as error:
        raise ConfigError(f'{where}: {error}') from error
    return configs.from_json(json.dumps(meta['config'])).model, meta['info']


def check_inputs(
    where: str, model_config: ConfigDict, config: ConfigDict, streams: Sequence[str]
) -> None:
    """Checks that another run's model has towers for streams, and expects inputs as this run's.

    Args:
        where: field=run, for the message.
        model_config: `config.model` of the other run.
        config: of this run.
        streams: that it is to encode.

    Raises:
        ConfigError: naming the tower, or the first field that differs.
    """
    for stream in streams:
        modality = modality_of(stream)
        if modality not in model_config.towers:
            raise ConfigError(
                f'{where}: expected a model with a tower for the stream {stream!r}, got one for '
                f'{", ".join(model_config.towers)}'
            )
        if modality not in config.model.inputs:
            raise ConfigError(
                f'config.model.inputs: expected {modality!r}, which the model of {where} reads, '
                f'got {", ".join(config.model.inputs)}'
            )
        own = dict(configs.flatten(config.model.inputs[modality]))
        expected = dict(configs.flatten(model_config.inputs[modality]))
        for field in sorted(own.keys() | expected.keys()):
            if own.get(field) != expected.get(field):
                raise ConfigError(
                    f'config.model.inputs.{modality}.{field}: expected {expected.get(field)!r}, '
                    f'as the model of {where} was trained with, got {own.get(field)!r}'
                )


def check_tokenizer(
    where: str, other_info: dict[str, Any], info: dict[str, Any], streams: Sequence[str]
) -> None:
    """Checks that words have the same numbers in both runs, where the other model reads text.

    Args:
        where: field=run, for the message.
        other_info: what the data of the other run said of themselves; {}: unknown.
        info: the same of this run.
        streams: that the other model is to encode.

    Raises:
        ConfigError: the vocabularies differ.
    """
    reads_text = 'text' in [modality_of(stream) for stream in streams]
    if not reads_text or not other_info:
        return
    # As JSON, which a checkpoint went through: it turns tuples into lists.
    specs = [json.dumps(found.get('tokenizer'), sort_keys=True) for found in (other_info, info)]
    if specs[0] != specs[1]:
        raise ConfigError(
            f'{where}: its model was trained with another vocabulary than '
            'that of these data; train it on the same dataset'
        )
