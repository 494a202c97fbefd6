"""The model of config.base: a trained model that a run stands on and does not change.

It is in the state as `frozen`, apart from what is trained: without gradients and optimizer slots.
A checkpoint holds what is new beside it, and of itself a name and a digest; who reads the
checkpoint reads the other run too, and joins the two (`checkpoint.read_model`, `restore`).
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from vatt_jax import config as configs
from vatt_jax.config import ConfigError
from vatt_jax.training import checkpoint, frozen_models, starting_values
from vatt_jax.training.checkpoint import Checkpoints
from vatt_jax.training.train_state import TrainState

FIELD = 'config.base'
# Fields of config.model that may differ from the frozen model's: how the same numbers are computed,
# and the new parameters.
MAY_DIFFER = ('attention', 'scan', 'remat', 'packed', 'adapter')


def check_fields(config: ConfigDict) -> None:
    """Check what can be known without reading the frozen model.

    Raises:
        ConfigError: another field contradicts config.base.
    """
    if config.base and config.init_words:
        raise ConfigError(
            f'config.init_words={config.init_words}: expected no word vectors, since the word '
            f'table is that of {FIELD}={config.base}; leave one of them out'
        )


def check(config: ConfigDict) -> None:
    """Check that config.model is the frozen model's.

    Raises:
        ConfigError: the run cannot be read, or naming the first field that differs.
    """
    if not config.base:
        return
    base_model, _ = frozen_models.read_config(FIELD, config.base)
    if base_model.get('adapter'):
        raise ConfigError(
            f'{FIELD}={config.base}: expected a model without adapters, got one with '
            f'{base_model.adapter.name!r}; its own base with config.init_from={config.base} '
            'continues these adapters, and config.init_from alone trains all of it'
        )
    ours, theirs = dict(configs.flatten(config.model)), dict(configs.flatten(base_model))
    for field in configs.differing_fields(base_model, config.model):
        is_older = field not in theirs and not f'model.{field}'.startswith(configs.OPEN)
        if field.split('.')[0] in MAY_DIFFER or is_older:
            continue
        raise ConfigError(
            f'config.model.{field}: expected {theirs.get(field)!r}, as the model of {FIELD}='
            f'{config.base} has it, got {ours.get(field)!r}; configs/adapt.py:{config.base} takes '
            'that model as it is'
        )


def begin(config: ConfigDict, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state of a run as it begins, with the frozen model's values.

    Args:
        config: of the run.
        state: initial; its adapters keep their values.

    Returns:
        The state, and what checkpoints say of the frozen model.

    Raises:
        ConfigError: the model cannot be read or does not fit.
    """
    try:
        folder = checkpoint.find_verified(config.base)
        values = checkpoint.read_model(folder)
    except ConfigError as error:
        raise ConfigError(f'{FIELD}: {error}') from error
    identity = checkpoint.describe_base(config.base, folder, values)
    return state.replace(frozen=_take(config, values, state.frozen)), identity


def restore(
    checkpoints: Checkpoints, step: int, built: Any, config: ConfigDict
) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
    """What `Checkpoints.restore` returns, with the frozen model's values where there is one.

    Args:
        checkpoints: of the run.
        step: to read.
        built: `shape` and `shardings` of the state.
        config: of the run.

    Raises:
        ConfigError: a checkpoint cannot be read or does not fit, or the frozen model is not the one
            that the run began with.
    """
    folder = checkpoints.folder(step)
    identity = checkpoint.read_meta(folder).get('base') or {}
    _check_both(folder, identity, config)
    # Without the frozen model, which the checkpoint does not hold.
    state, meta, columns = checkpoints.restore(
        step, built.shape.replace(frozen={}), built.shardings.replace(frozen={}), config
    )
    if identity:
        values = checkpoint.read_base(folder, identity, config.base)
        layout = jax.tree.map(_with_sharding, built.shape.frozen, built.shardings.frozen)
        state = state.replace(frozen=_take(config, values, layout))
    return state, meta, columns


def _check_both(folder: pathlib.Path, identity: Mapping[str, Any], config: ConfigDict) -> None:
    """Check that the checkpoint and the config have a frozen model, or neither."""
    if bool(identity) == bool(config.base):
        return
    if identity:
        raise ConfigError(
            f'checkpoint {folder} holds what was trained beside the model of {identity["run"]}; '
            f'expected {FIELD}={identity["run"]}, or where that run is now, got none'
        )
    raise ConfigError(
        f'checkpoint {folder} holds a whole model; expected no {FIELD}, got {config.base!r}; '
        'choose another --workdir'
    )


def _with_sharding(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _take(config: ConfigDict, values: Mapping[str, Any], layout: Mapping[str, Any]) -> Any:
    """The values of the frozen model, laid out as `layout` says: arrays, or abstract ones."""
    base = starting_values.OtherRun(
        config.base,
        values,
        field=FIELD,
        remedy=f'; configs/adapt.py:{config.base} takes the model of that run as it is',
    )
    return {group: base.take(group, tree) for group, tree in layout.items()}
