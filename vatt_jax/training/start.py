"""Where a run starts: at its own newest checkpoint, else at another run's weights, else fresh."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vatt_jax import config as configs
from vatt_jax import phase_folders
from vatt_jax.config import ConfigError
from vatt_jax.inputs import word_vectors
from vatt_jax.objectives.base import Objective
from vatt_jax.parallel import distributed
from vatt_jax.run_folder import RunFolder, write_atomically
from vatt_jax.training import (
    checkpoint,
    frozen_base,
    frozen_models,
    host_tables,
    provenance,
    starting_values,
)
from vatt_jax.training.build import Built
from vatt_jax.training.checkpoint import Checkpoints
from vatt_jax.training.columns import Columns, as_declared, writable
from vatt_jax.training.run_lock import RunLock
from vatt_jax.training.starting_values import OtherRun
from vatt_jax.training.train_state import TrainState

# A run folder belongs to one choice of these fields ...
IDENTITY = ('model.', 'objective.', 'optimizer.name', 'optimizer.frozen')
# ... save for those that only say how the same numbers are computed.
HOW_IT_IS_COMPUTED = (
    'model.attention',
    'model.scan',
    'model.remat',
    'model.packed',
    'objective.method',
    'objective.block',
)

# What stands for "none" and "an error" where processes agree on a step, which is one integer.
NO_STEP = -1
ALL_DAMAGED = -2


@dataclasses.dataclass
class TrainingRun:
    """A run as it stands: all that changes from step to step, and is saved.

    Attributes:
        state: parameters, statistics, slots, on the mesh.
        step: optimizer steps taken.
        consumed: training examples consumed.
        order: digest of the records seen so far, in their order.
        columns: name -> [M ...], what the last refresh said of each training record.
        tables: name -> [M ...], those of the host, which steps write (host_tables.py).
        weights: names of the columns by which records are drawn.
        origin: where the run started, in words.
        base: what checkpoints say of the frozen model (`checkpoint.describe_base`); {}: none.
    """

    state: TrainState
    step: int
    consumed: int = 0
    order: str = ''
    columns: Columns = dataclasses.field(default_factory=dict)
    tables: Columns = dataclasses.field(default_factory=dict)
    weights: tuple[str, ...] = ()
    origin: str = ''
    base: dict[str, Any] = dataclasses.field(default_factory=dict)


def start(
    config: ConfigDict, built: Built, data: Any, workdir: pathlib.Path, lock: RunLock
) -> tuple[TrainingRun, Checkpoints]:
    """Start order: the run's own newest checkpoint; else config.init_from; else scratch.

    To be called inside `jax.set_mesh(built.mesh)`. From here on the run folder exists.

    Args:
        config: of the run.
        built: of that config.
        data: the data object of docs/architecture.md.
        workdir: the run folder.
        lock: of the run folder; taken here, and given back by the caller.

    Returns:
        The run as it goes on, and the run's checkpoints, open for saving.

    Raises:
        ConfigError: a checkpoint cannot be read or does not fit, or all are damaged; or another
            process trains in this folder.
    """
    folder = RunFolder(workdir)
    # Before checkpoints are looked at: one that another process is deleting would seem damaged.
    lock.take()
    saved_step = newest_sound(workdir)
    if saved_step is not None:
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
        run = _continue(config, checkpoints, saved_step, built)
    else:
        run = _begin(config, built, data)
        # Only now, so that a mistake in the config leaves no folder behind.
        workdir.mkdir(parents=True, exist_ok=True)
        lock.take()
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)

    if distributed.is_main():
        # Also of a continued run: fields that may change (steps, batch size) are now those of this
        # config.
        # Phases of one run name one another, so that it may be moved.
        stored_config = phase_folders.with_references(config, workdir)
        write_atomically(folder.config, configs.to_json(stored_config))
        if run.step < config.steps:
            # Of a run that was shorter: this one is not done.
            folder.done.unlink(missing_ok=True)
            write_atomically(folder.provenance, json.dumps(provenance.describe(), indent=1))
    return run, checkpoints


def _continue(
    config: ConfigDict, checkpoints: Checkpoints, saved_step: int, built: Built
) -> TrainingRun:
    # Straight onto this run's mesh, which need not be the one that saved it.
    state, meta, columns = frozen_base.restore(checkpoints, saved_step, built, config)
    # In a checkpoint they are columns: arrays by record, a piece a host.
    tables = {name: writable(columns.pop(name)) for name in built.tables}
    return TrainingRun(
        state,
        step=int(state.step),
        consumed=int(meta['consumed']),
        order=meta['order'],
        columns=as_declared(columns, built.objective.columns()),
        tables=tables,
        weights=tuple(meta['weights']),
        origin=f'continuing from step {saved_step}',
        base=meta.get('base') or {},
    )


def _begin(config: ConfigDict, built: Built, data: Any) -> TrainingRun:
    state = built.init()
    origin = 'starting from scratch'
    other = None
    base: dict[str, Any] = {}
    if config.base:
        state, base = frozen_base.begin(config, state)
        origin = f'beside the model of {config.base}'
    if config.init_from:
        starting_values.check_trees(config.init_trees, state.params['objective'], state.objective)
        starting_values.check_fields(config.init_trees, config.init_rename, config.init_skip)
        other = starting_values.read(
            config.init_from,
            config.init_trees,
            tables=built.tables,
            rename=config.init_rename,
            skip=config.init_skip,
        )
        # Optimizer slots and step stay fresh.
        state = _with_params(config, state, other)
        origin = f'starting from {config.init_from}'

    # Pretrained word vectors lie over whatever the parameters were until now.
    if config.init_words:
        params, message = word_vectors.fill(
            config.init_words, state.params['model'], data.info['tokenizer']
        )
        state = _with_model_params(config, state, params)
        origin += f', {message}'
    elif not config.init_from and not config.base:
        frozen = [name for name, t in config.model.towers.items() if t.get('frozen_words')]
        if frozen:
            origin += (
                ', random word vectors that stay so (config.init_words is empty and '
                f'config.model.towers.{frozen[0]}.frozen_words is set)'
            )
    state = _with_copies_of_the_model(built, state)
    tables = host_tables.first(built.objective, built.tables, config.seed)
    if other is not None:
        # After the copies: where memories and teachers are taken too, they count.
        if 'state' in config.init_trees:
            state = _with_state(built, state, other)
            for name, table in tables.items():
                tables[name] = writable(other.take_table(name, table))
        other.check_taken()
        if other.skipped:
            origin += f', {len(other.skipped)} parameters fresh'
    state = _with_models_of_other_runs(built, state)
    return TrainingRun(state, step=int(state.step), tables=tables, origin=origin, base=base)


def _with_params(config: ConfigDict, state: TrainState, other: OtherRun) -> TrainState:
    """The state with the parameters, and the model's statistics, of another run."""
    if 'model' in config.init_trees:
        params = other.take('params', state.params['model'])
        batch_stats = other.take('batch_stats', state.batch_stats)
        state = _with_model_params(config, state, params).replace(batch_stats=batch_stats)
    if 'objective' in config.init_trees:
        objective_params = other.take('objective', state.params['objective'])
        state = state.replace(params={**state.params, 'objective': objective_params})
    return state


def _with_copies_of_the_model(built: Built, state: TrainState) -> TrainState:
    """The state whose objective has begun (`Objective.begin`)."""
    objective = built.objective
    if type(objective).begin is Objective.begin:
        return state

    def begin(state: TrainState) -> Any:
        whole = state.variables()
        begun = objective.begin(whole['params'], whole['batch_stats'], state.objective)
        # Copies: jit hands an input that it returns unchanged on as it is, and a buffer that occurs
        # twice in the state cannot be donated to the step.
        return jax.tree.map(jnp.copy, begun)

    begun = jax.jit(begin, out_shardings=built.shardings.objective)(state)
    return state.replace(objective=begun)


def _with_state(built: Built, state: TrainState, other: OtherRun) -> TrainState:
    """The state whose objective remembers what that of another run did."""
    # Frozen models come from the runs that they are of.
    frozen = built.objective.frozen_models()
    own = {name: part for name, part in state.objective.items() if name not in frozen}
    return state.replace(objective={**state.objective, **other.take('state', own)})


def _with_models_of_other_runs(built: Built, state: TrainState) -> TrainState:
    """The state whose objective holds the models that it names (`Objective.frozen_models`)."""
    for name, run in built.objective.frozen_models().items():
        model = frozen_models.read(name, run, state.objective[name])
        state = state.replace(objective={**state.objective, name: model})
    return state


def _with_model_params(config: ConfigDict, state: TrainState, params: Any) -> TrainState:
    """The state with other model parameters; averages begin at them."""
    ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema else {}
    return state.replace(params={**state.params, 'model': params}, ema=ema)


def newest(workdir: pathlib.Path) -> int | None:
    """Step of the run's newest complete checkpoint, if any; the same on every process."""
    saved = checkpoint.steps(RunFolder(workdir).checkpoints)
    # Another process may see the shared folder a moment later; all follow the main one.
    step = distributed.broadcast_from_main(max(saved, default=NO_STEP))
    return None if step == NO_STEP else step


def newest_sound(workdir: pathlib.Path) -> int | None:
    """Step of the newest checkpoint whose files are what was written, if any.

    Newer ones that are not are reported and set aside. The main process looks, and the others
    learn its answer.

    Raises:
        ConfigError: every checkpoint is damaged.
    """
    message, step = '', NO_STEP
    if distributed.is_main():
        try:
            found = checkpoint.newest_sound(RunFolder(workdir).checkpoints)
        # Raised on one process alone, it would leave the others waiting in `agree`.
        except ConfigError as error:
            message, step = str(error), ALL_DAMAGED
        else:
            step = NO_STEP if found is None else found
    step = distributed.broadcast_from_main(step)
    if step == ALL_DAMAGED:
        # Only the main process knows the reasons; the others say the short form.
        raise ConfigError(message or f'every checkpoint in {workdir} is damaged')
    return None if step == NO_STEP else step


def _check_writable(workdir: pathlib.Path) -> None:
    """Checks that a run may write its folder, without writing anything.

    Raises:
        ConfigError: the folder, or what is to hold it, is a file or not the user's to write.
    """
    try:
        existing = workdir
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
    # PermissionError where a folder above cannot even be looked into; a name that is too long.
    except (OSError, ValueError) as error:
        raise _unusable(workdir, str(error)) from error
    if not existing.is_dir():
        if existing == workdir:
            raise ConfigError(f'--workdir={workdir}: expected a folder, this is a file')
        raise _unusable(workdir, f'{existing} is a file')
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _unusable(workdir, f'{existing} may not be written by this user')


def _unusable(workdir: pathlib.Path, why: str) -> ConfigError:
    return ConfigError(
        f'--workdir={workdir}: expected a folder that can be written, but {why}; choose another '
        '--workdir'
    )


def check_run_folder(config: ConfigDict, workdir: pathlib.Path, evaluating: bool = False) -> None:
    """A run folder belongs to one model and objective: never continue it with another.

    Args:
        config: about to be run in the folder.
        workdir: the run folder; it need not exist.
        evaluating: the model may be shown other sizes and rates of its inputs than in training
            (where a parameter's shape follows from them, reading it will tell).

    Raises:
        ConfigError: the folder holds a run of another model or objective.
    """
    if not evaluating:
        _check_writable(workdir)
    if newest(workdir) is None:
        return
    stored = configs.stored(workdir)
    if stored is None:
        return
    # A config that has yet to find out what its frozen models are does not differ in them.
    config = config.copy_and_resolve_references()
    frozen_models.recall(config, workdir)
    old_values, new_values = dict(configs.flatten(stored)), dict(configs.flatten(config))
    for field in configs.differing_fields(stored, config):
        # Rates, steps, batch size, data and mesh may change between two starts.
        if not field.startswith(IDENTITY) or field.startswith(HOW_IT_IS_COMPUTED):
            continue
        if field not in old_values and not field.startswith(configs.OPEN):
            continue  # the run is older than the field
        if field.endswith('.vocab') and new_values.get(field) == 0:
            continue  # 0 is whatever the data say (`resolve`), and they are not open yet
        if evaluating and field.startswith('model.inputs.'):
            continue
        old, new = (values.get(field, 'absent') for values in (old_values, new_values))
        raise ConfigError(
            f'--workdir={workdir} holds a run with config.{field}={old!r} and this config has '
            f'{new!r}; choose another --workdir, or start from its weights with --config.init_from'
        )
