"""Checkpoints through orbax: asynchronous, exact, onto any mesh, partial and renamed.

Only this file and columns_handler.py know orbax. Layout of a run folder:

    checkpoints/<step>/state          parameters, statistics, optimizer and objective state
    checkpoints/<step>/meta           JSON: examples consumed, digest of the order so far, the
                                      resolved config, the data's info (tokenizer, class names),
                                      name and digest of the model of config.base
    checkpoints/<step>/columns        per-record arrays of the objective, a piece a host
    checkpoints/<step>/manifest.json  digests of these files, without which flipped bits would be
                                      read as parameters

A checkpoint folder alone is therefore enough to load a model, unless config.base names the one that
it was trained beside: of that it holds no values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as managers

from vatt_jax import phases
from vatt_jax.config import ConfigError, choose, differing_fields, flatten, from_json
from vatt_jax.models import adapters
from vatt_jax.object_store import is_url, run_mirror
from vatt_jax.objectives.memory import teacher as teachers
from vatt_jax.parallel import sharding
from vatt_jax.run_folder import RunFolder, evaluation_name, free_space, readable_size
from vatt_jax.training import columns as record_columns
from vatt_jax.training.columns_handler import ColumnsRestore, ColumnsSave

# Orbax logs every file it writes, warns of metadata that it does not need, and logs pages of every
# error that it raises anyway.
logging.getLogger('absl').setLevel(logging.CRITICAL)

ITEMS = ('state', 'meta', 'columns')
MANIFEST = 'manifest.json'
# Orbax writes it last.
COMPLETE = '_CHECKPOINT_METADATA'


class CheckpointNotSaved(RuntimeError):
    """A checkpoint could not be written. The message says why and what is left."""


def _ignore_closed_event_loops() -> None:
    """Keep one kind of error from being printed: that of a write that nobody waits for any more.

    When one file of a checkpoint cannot be written, orbax closes its event loop, and TensorStore
    then prints a traceback for every other file. What failed is raised all the same.
    """
    print_error = sys.unraisablehook
    if getattr(print_error, 'ignores_closed_event_loops', False):
        return

    def filtered(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not isinstance(error, RuntimeError) or str(error) != 'Event loop is closed':
            print_error(unraisable)

    # So that the next run in this process does not wrap it once more.
    filtered.ignores_closed_event_loops = True  # type: ignore[attr-defined]
    sys.unraisablehook = filtered


@dataclasses.dataclass
class Best:
    """Orbax preservation policy: keep the step with the highest evaluation result.

    Of equal results the earlier step is preserved.

    Attributes:
        run_folder: The run, whose evaluations hold the results.
        scalar: The result to compare, 'evaluator/name'.
    """

    run_folder: RunFolder
    scalar: str

    def value(self, step: int) -> float:
        """Return the result of a step, -inf where it was not (or not yet) evaluated."""
        evaluator, _, name = self.scalar.partition('/')
        try:
            # Read anew each time: the evaluation of a step comes after its save, so its result
            # appears at a later call only.
            results = json.loads(self.run_folder.results(evaluation_name(step)).read_text())
            return float(results[evaluator]['scalars'][name])
        except (OSError, ValueError, KeyError, TypeError):
            return -math.inf

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return for each checkpoint, oldest first, whether it stays (orbax calls this)."""
        values = [self.value(saved.step) for saved in checkpoints]
        best = max(values, default=-math.inf)
        preserved = [False] * len(values)
        if best > -math.inf:
            # index() finds the first of equal values, so a result must be beaten to move the mark.
            preserved[values.index(best)] = True
        return preserved


class Checkpoints:
    """The checkpoints of one run. Old ones are deleted when a new one is complete."""

    def __init__(self, folder: str | pathlib.Path, config: ConfigDict):
        """Open or create the folder.

        Args:
            folder: `<workdir>/checkpoints`.
            config: `config.checkpoint`.
        """
        # Orbax refuses relative paths.
        folder = pathlib.Path(folder).absolute()
        # A checkpoint stays if any policy preserves it (AnyPreservationPolicy below).
        _ignore_closed_event_loops()
        policies: list[Any] = [managers.LatestN(max(1, config.keep))]
        if config.keep_every:
            policies.append(managers.EveryNSteps(config.keep_every))
        if config.get('best'):
            policies.append(Best(RunFolder(folder.parent), config.best))
        self.saving: int | None = None  # the step being written
        self.num_bytes = 0  # of its arrays

        def seal() -> None:
            # Runs before orbax renames the temporary folder, so that the checkpoint and its
            # manifest appear together.
            if jax.process_index() == 0:
                for temporary in folder.glob(f'{self.saving}.orbax-checkpoint-tmp*'):
                    write_manifest(temporary)

        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            # Training goes on once the arrays are copied to the host; a thread writes them.
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=seal),
        )
        self.manager = ocp.CheckpointManager(folder, options=options, item_names=ITEMS)

    def folder(self, step: int) -> pathlib.Path:
        """Return the folder of a step."""
        return pathlib.Path(self.manager.directory) / str(step)

    def latest(self) -> int | None:
        """Return the newest step, None without a checkpoint."""
        return self.manager.latest_step()

    def save(
        self, step: int, state: Any, meta: dict[str, Any], columns: record_columns.SavedColumns
    ) -> None:
        """Start an asynchronous save, after waiting for the previous one.

        A step that is already saved is left alone.

        Args:
            step: Optimizer steps taken.
            state: The TrainState.
            meta: JSON-able description, see the top of this file.
            columns: Per-record host arrays of the objective, which are not changed any more, or
                snapshots of tables.

        Raises:
            CheckpointNotSaved: The previous or this checkpoint could not be written.
        """
        # At the end of a run the last step may be a multiple of checkpoint.every as well.
        if self.manager.latest_step() == step:
            return
        # One save at a time: `saving` names the step in errors and in `seal`, which runs in orbax's
        # thread.
        self.wait()
        self.saving = step
        self.num_bytes = size_of((state, columns))
        self._check_space()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave(meta),
            columns=ColumnsSave(columns),
        )
        with self._report_write_errors():
            # force: without it orbax applies its own rule of which steps are worth saving.
            self.manager.save(step, args=items, force=True)

    @contextlib.contextmanager
    def _report_write_errors(self) -> Iterator[None]:
        """Raise CheckpointNotSaved for whatever goes wrong in writing."""
        try:
            yield
        except Exception as error:
            raise self._not_saved(_cause(error)) from error

    def _check_space(self) -> None:
        """Raise CheckpointNotSaved where the disk has clearly too little room.

        Before anything is written: a save that fails half-way would fill the disk for others.
        """
        free = free_space(pathlib.Path(self.manager.directory))
        # Parameters are compressed by less than a tenth, zeros to nothing.
        if free is not None and free < 0.5 * self.num_bytes:
            raise self._not_saved(f'{readable_size(free)} are free')

    def _not_saved(self, why: str) -> CheckpointNotSaved:
        folder = pathlib.Path(self.manager.directory)
        # Read off the disk: only complete folders can be gone back to.
        earlier = [step for step in steps(folder) if step != self.saving]
        if earlier:
            remaining = (
                f'the checkpoint of step {earlier[-1]} is whole, and the same command '
                'continues from there'
            )
        else:
            remaining = 'there is none before it'
        return CheckpointNotSaved(
            f'the checkpoint of step {self.saving} could not be written to {folder} ({why}); '
            f'it takes up to {readable_size(self.num_bytes)}. Make room; {remaining}'
        )

    def restore(
        self, step: int, shape: Any, shardings: Any, config: ConfigDict | None = None
    ) -> tuple[Any, dict[str, Any], dict[str, np.ndarray]]:
        """Read one step, laid out as `shardings` whatever mesh saved it.

        Args:
            step: The step to read.
            shape: Abstract state, a tree of arrays or ShapeDtypeStructs.
            shardings: Sharding of every leaf of `shape`.
            config: Of this run; where the checkpoint does not fit, the message then names the
                fields that changed since it was saved.

        Returns:
            state, meta and columns, as they were given to `save`.

        Raises:
            ConfigError: The checkpoint cannot be read, or does not fit; then the message names the
                first parameter that differs.
        """

        def abstract_leaf(leaf: Any, leaf_sharding: Any) -> jax.ShapeDtypeStruct:
            # Orbax reads each device's part straight from disk when the target names a sharding.
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf_sharding)

        target = jax.tree.map(abstract_leaf, shape, shardings)
        path = self.folder(step)
        # Before the restore, whose own message would be about the first mismatch of its internals.
        saved = _saved_tree(path)
        _check_fits(path, saved, target, config)
        # The saved tree with our shapes and shardings: what only groups leaves, such as the empty
        # states of optimizers, may differ between the two.
        by_name = {_path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(target)}
        saved_target = jax.tree_util.tree_map_with_path(
            lambda key_path, _: by_name[_path_name(key_path)], saved
        )
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(saved_target),
            meta=ocp.args.JsonRestore(),
            columns=ColumnsRestore(),
        )
        try:
            restored = self.manager.restore(step, args=items)
        except Exception as error:
            raise _unreadable(path, error) from error
        restored_by_name = {
            _path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(restored.state)
        }
        restored_state = jax.tree_util.tree_map_with_path(
            lambda key_path, _: restored_by_name[_path_name(key_path)], target
        )

        def copy_tree(tree: Any) -> Any:
            return jax.tree.map(jax.numpy.copy, tree)

        # Orbax hands back buffers that it may still own; the train step donates its state, which
        # needs arrays of our own.
        state = jax.jit(copy_tree, out_shardings=shardings)(restored_state)
        return state, restored.meta, restored.columns

    def wait(self) -> None:
        """Wait for the save under way. Raises CheckpointNotSaved where it failed."""
        with self._report_write_errors():
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Release orbax's threads."""
        self.manager.close()


# Names of checkpoints as orbax writes them. int() also reads '003' and digits of other scripts.
STEP_NAME = re.compile('0|[1-9][0-9]{0,9}')


def _numbered_folders(folder: pathlib.Path, member: str = '') -> list[int]:
    """Return the numbers, ascending, that name folders here with `member` in them."""
    if not folder.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in folder.iterdir()
        if STEP_NAME.fullmatch(path.name) and path.is_dir() and (path / member).exists()
    )


def steps(folder: pathlib.Path) -> list[int]:
    """Return the steps of the complete checkpoints of a folder, ascending."""
    # Orbax writes into <step>.orbax-checkpoint-tmp… and renames it at the end, so a folder whose
    # name is a number is complete; its metadata file tells it from a folder of another making.
    return _numbered_folders(folder, COMPLETE)


def _file_digests(folder: pathlib.Path) -> dict[str, str]:
    """Return path -> SHA-256 of every file below a checkpoint folder.

    Left out are the manifest itself and the file in which orbax records the time of saving.
    """
    skipped = (MANIFEST, f'{MANIFEST}.tmp', COMPLETE)
    digests = {}
    for path in sorted(folder.rglob('*')):
        if not path.is_file() or path.name in skipped:
            continue
        with path.open('rb') as file:
            # Streams the file: checkpoints may be larger than memory.
            file_hash = hashlib.file_digest(file, 'sha256')
        digests[str(path.relative_to(folder))] = file_hash.hexdigest()
    return digests


def write_manifest(folder: pathlib.Path) -> None:
    """Write the digests of a finished checkpoint's files, beside them."""
    temporary = folder / f'{MANIFEST}.tmp'
    # Renamed into place, so that a manifest is never half there: `find_damage` would call that
    # damaged.
    temporary.write_text(json.dumps(_file_digests(folder), indent=0))
    os.replace(temporary, folder / MANIFEST)


def find_damage(folder: pathlib.Path) -> str:
    """Compare a checkpoint's files with its manifest.

    Returns:
        What is wrong, '' for nothing. A checkpoint without a manifest is older than manifests and
        counts as sound where its parts are there.
    """
    try:
        recorded = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        # Copies and deletions that stopped half-way may have taken the manifest too.
        absent = [item for item in ('state', 'meta') if not (folder / item).is_dir()]
        return f'{absent[0]} is missing' if absent else ''
    except (OSError, ValueError) as error:
        return f'{MANIFEST} cannot be read: {_first_line(error)}'
    if not isinstance(recorded, dict):
        return f'{MANIFEST} cannot be read: expected file names with digests'
    found = _file_digests(folder)
    # Files beyond the manifest's do no harm.
    missing = sorted(set(recorded) - set(found))
    if missing:
        return f'{missing[0]} is missing'
    changed = sorted(name for name in recorded if recorded[name] != found[name])
    if changed:
        return f'{changed[0]} is not what was written'
    return ''


def newest_sound(folder: pathlib.Path, say: Callable[[str], object] = print) -> int | None:
    """Return the newest step whose files are what was written.

    Damaged checkpoints above it are reported and renamed to `<step>.damaged`. Those that something
    else has renamed are reported: a run would go back behind them in silence.

    Args:
        folder: `<workdir>/checkpoints`.
        say: Receives one line for each damaged or renamed checkpoint.

    Returns:
        The step, None when there is no checkpoint.

    Raises:
        ConfigError: All checkpoints are damaged or renamed; then the folder stays as it is.
    """
    damages: dict[int, str] = {}
    # Newest first. Nothing is renamed until a sound one is found: with none, the folder stays as it
    # is. Incomplete ones count: orbax takes any folder with a number for a saved step.
    for step in reversed(_numbered_folders(folder)):
        path = folder / str(step)
        reason = find_damage(path)
        if not reason and not (path / COMPLETE).exists():
            reason = f'{COMPLETE} is missing'
        if not reason:
            _report_renamed(folder, step, say)
            for damaged in sorted(damages):
                say(
                    f'checkpoint {folder / str(damaged)} is damaged ({damages[damaged]}): '
                    f'set aside as {damaged}.damaged, going back to step {step}'
                )
                _set_aside(folder, damaged)
            return step
        damages[step] = reason
    if damages:
        reasons = '; '.join(f'{step}: {reason}' for step, reason in damages.items())
        raise ConfigError(
            f'every checkpoint in {folder} is damaged ({reasons}); restore them from a copy, or '
            'choose another --workdir'
        )
    renamed = _checkpoints_by_name(folder)
    if renamed:
        raise ConfigError(
            f'{folder} holds checkpoints under other names than their steps, first '
            f'{renamed[-1].name!r}; rename each to the number of its step to continue, or choose '
            'another --workdir'
        )
    return None


def _report_renamed(folder: pathlib.Path, newest: int, say: Callable[[str], object]) -> None:
    """Say which checkpoints seem newer than the newest one and have other names than a step."""
    for path in _checkpoints_by_name(folder):
        # Synchronised folders know '3 (1)', and people step_3.
        number = re.search('[0-9]+', path.name)
        if number and not STEP_NAME.fullmatch(path.name) and int(number[0]) > newest:
            say(
                f'checkpoint {path} is left out, since its name is not the number of its step, and '
                f'step {newest} is used; rename it to {int(number[0])} and start again if it is '
                'meant'
            )


def _set_aside(folder: pathlib.Path, step: int) -> None:
    """Rename a checkpoint, so that orbax no longer takes it for one."""
    target = folder / f'{step}.damaged'
    # From an earlier damage of the same step; os.replace cannot replace a folder that is not empty.
    shutil.rmtree(target, ignore_errors=True)
    if target.is_symlink() or target.is_file():
        target.unlink()
    os.replace(folder / str(step), target)


def _first_line(error: BaseException) -> str:
    """Return the type and the first line of a library's message, which may be pages long."""
    lines = str(error).strip().splitlines() or ['']
    return f'{type(error).__name__}: {lines[0][:200]}'


def _cause(error: BaseException) -> str:
    """Return why something could not be written: the system's reason where the message has it."""
    # TensorStore: 'Error writing … [OS error 28: No space left on device]' in a long message.
    found = re.search(r'OS error (\d+)', str(error))
    number = int(found[1]) if found else getattr(error, 'errno', None)
    if number:
        return os.strerror(number)
    return _first_line(error)


def size_of(tree: Any) -> int:
    """Return the bytes of all arrays of a tree; abstract ones do."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _saved_tree(path: pathlib.Path) -> Any:
    """Return the tree of a saved state, with descriptions of arrays as leaves."""
    try:
        with ocp.StandardCheckpointer() as reader:
            return dict(reader.metadata(path / 'state').item_metadata)
    except Exception as error:
        raise _unreadable(path, error) from error


def saved_shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every array of a checkpoint's state, 'params/model/…' for example.

    Raises:
        ConfigError: The checkpoint cannot be read.
    """
    return _shapes(_saved_tree(path))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        _path_name(key_path): tuple(leaf.shape)
        for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_fits(
    path: pathlib.Path, saved: Any, target: Any, config: ConfigDict | None = None
) -> None:
    """Raise ConfigError for the first array in which the checkpoint and `target` differ.

    Args:
        path: The checkpoint.
        saved: Its tree, see `_saved_tree`.
        target: Abstract state of this run.
        config: Of this run, for the message; None: not known.
    """
    saved_by_name, shapes = _shapes(saved), _shapes(target)
    # Optimizer and objective state follow from the parameters, whose names say more.
    for name in sorted(shapes, key=lambda name: (not name.startswith('params'), name)):
        if name not in saved_by_name:
            raise _misfit(path, f'has no {name}', config)
        if saved_by_name[name] != shapes[name]:
            raise _misfit(
                path,
                f'has {name} of shape {saved_by_name[name]}, and this config makes {shapes[name]}',
                config,
            )
    # What the checkpoint has beyond it would be lost with the next save.
    for name in sorted(saved_by_name):
        if name not in shapes:
            raise _misfit(path, f'has {name}, which this config does not keep', config)


# What a field decides of the state -> what it means to change it.
MEANINGS = {
    'optimizer.ema': 'the average of the parameters begins with the run',
    'optimizer.': 'the optimizer of this config keeps other moments',
}


def _misfit(path: pathlib.Path, difference: str, config: ConfigDict | None) -> ConfigError:
    """Return the error of a checkpoint that is sound and does not fit the config."""
    changes = []
    meaning = ''
    if config is not None:
        saved_config = from_json(json.dumps(read_meta(path)['config']))
        old, new = dict(flatten(saved_config)), dict(flatten(config))
        for field in differing_fields(saved_config, config):
            # No other field shapes the state.
            if not field.startswith(('model.', 'objective.', 'optimizer.')):
                continue
            if field.startswith('optimizer.schedule.'):
                continue
            changes.append(f'config.{field} was {old.get(field)!r} and is {new.get(field)!r} now')
            for prefix, text in MEANINGS.items():
                if field.startswith(prefix) and not meaning:
                    meaning = f' ({text})'
    since = f'Since it was saved, {"; ".join(changes[:5])}{meaning}. ' if changes else ''
    return ConfigError(
        f'checkpoint {path} is sound and belongs to another config: it {difference}. {since}'
        'Continue with the config that the run was started with, or choose another --workdir and '
        f'start from these weights with --config.init_from={path}'
    )


def _unreadable(path: pathlib.Path, error: Exception) -> ConfigError:
    return ConfigError(
        f'checkpoint {path} cannot be read ({_first_line(error)}); nothing was changed. Name '
        'another one, or move it out of its run folder to go back to the one before'
    )


def _path_name(key_path: Sequence[Any]) -> str:
    """Return 'params/model/kernel' for a key path of JAX, whatever kinds of keys it holds."""
    parts = []
    for key in key_path:
        # Live states have GetAttrKeys (a dataclass), what orbax returns has DictKeys: both must
        # give one name.
        for attribute in ('key', 'name', 'idx'):  # of DictKey, GetAttrKey and SequenceKey
            if hasattr(key, attribute):
                key = getattr(key, attribute)
                break
        parts.append(str(key))
    return '/'.join(parts)


def find(path: str | pathlib.Path) -> pathlib.Path:
    """Return the newest checkpoint folder of a run folder, or the checkpoint folder itself.

    Of a run with phases that of the last finished phase.

    Args:
        path: A run folder, its `checkpoints` folder or one checkpoint folder; one on an object
            store is copied to this machine.

    Raises:
        ConfigError: There is no checkpoint.
        StoreError: The object store cannot be read.
    """
    if is_url(path):
        path = run_mirror.fetch_run(os.fspath(path))
    path = pathlib.Path(path)
    if (path / 'meta').is_dir() and (path / 'state').is_dir():
        return path.absolute()
    path = folder = phases.model_folder(path)
    if RunFolder(path).checkpoints.is_dir():
        folder = RunFolder(path).checkpoints
    available = _numbered_folders(folder, 'state')
    if available:
        _report_renamed(folder, available[-1], warnings.warn)
        return (folder / str(available[-1])).absolute()
    # A checkpoint that was taken out of its run, under whatever name.
    alone = _checkpoints_by_name(folder)
    if len(alone) == 1:
        return alone[0].absolute()
    raise ConfigError(f'{path} holds no checkpoint: {_what_is_there(path, alone)}')


def _checkpoints_by_name(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the checkpoint folders inside a folder, complete ones, whatever they are called."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if (path / 'meta').is_dir()
        and (path / 'state').is_dir()
        and '.orbax-checkpoint-tmp' not in path.name
        and not path.name.endswith('.damaged')
    )


def _what_is_there(path: pathlib.Path, checkpoints: Sequence[pathlib.Path]) -> str:
    """Return what a path is that `find` cannot use, and what to do."""
    expected = 'expected a run folder (with checkpoints/<step>) or one checkpoint folder'
    if checkpoints:
        names = ', '.join(folder.name for folder in checkpoints[:3])
        return f'{expected}, got a folder with {len(checkpoints)} of them ({names}, …); name one'
    if path.is_file() or path.with_name(f'{path.name}.index').is_file():
        return (
            f'{expected}, got a file; official checkpoints are imported first, with python -m '
            'vatt_jax.importers'
        )
    if path.is_dir():
        runs = sorted(run.name for run in path.iterdir() if RunFolder(run).checkpoints.is_dir())
        if runs:
            return f'{expected}, got a folder of runs; name one of {", ".join(runs[:5])}'
        return f'{expected}, got a folder without one'
    return f'{expected}, and there is no such folder'


def find_verified(path: str | pathlib.Path) -> pathlib.Path:
    """Return what `find` returns, once its files are checked.

    Raises:
        ConfigError: There is no checkpoint, or its files are not what was written.
    """
    path = find(path)
    reason = find_damage(path)
    if reason:
        raise ConfigError(
            f'checkpoint {path} is damaged ({reason}); name another one of {path.parent}'
        )
    return path


def read_meta(path: pathlib.Path) -> dict[str, Any]:
    """Return `meta` of a checkpoint folder. Raises ConfigError where it cannot be read."""
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            return reader.restore(path / 'meta')
    except Exception as error:
        raise _unreadable(path, error) from error


def _has_leaves(tree: Any) -> bool:
    return bool(jax.tree.leaves(tree))


def _read_variables(
    path: pathlib.Path, with_heads: bool, with_state: bool, with_teacher: bool
) -> dict[str, Any]:
    """Read the parts of a checkpoint that a model needs, as NumPy, and leave the rest on disk."""
    with ocp.StandardCheckpointer() as reader:
        saved = dict(reader.metadata(path / 'state').item_metadata)
    params = {'model': saved['params'].get('model') or {}}
    if with_heads:
        for name, tree in saved['params'].items():
            if name == 'model' or _has_leaves(tree):
                params[name] = tree
    parts = {
        'params': {name: tree for name, tree in params.items() if _has_leaves(tree)},
        'batch_stats': saved['batch_stats'],
        'ema': saved['ema'] or {},
    }
    if with_state:
        parts['objective'] = saved['objective']
    elif with_teacher:
        parts['objective'] = {'teacher': _teacher_of(path, saved)}
    # Orbax cannot restore a tree without leaves.
    parts = {name: tree for name, tree in parts.items() if _has_leaves(tree)}
    if not parts:
        # Of a run beside a frozen model in which nothing of the model is new.
        return {}
    # Scalars as placeholders: only the tree and the dtypes of the target count, shapes are the
    # saved ones.
    target = jax.tree.map(lambda metadata: np.zeros((), metadata.dtype), parts)
    # Without a restore type orbax would place the arrays on the devices that saved them.
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(
            path / 'state',
            # partial_restore: what the target does not name, optimizer slots above all, is not
            # read.
            args=ocp.args.PyTreeRestore(target, restore_args=as_numpy, partial_restore=True),
        )


def _teacher_of(path: pathlib.Path, saved: dict[str, Any]) -> Any:
    """Return the momentum copy in the tree of a saved state (`Objective.teacher`)."""
    teacher = (saved.get('objective') or {}).get('teacher')
    if teacher is None:
        raise ConfigError(
            f"{path}: expected a run whose objective keeps a teacher, for which='teacher', got one "
            "without; read which='student'"
        )
    return teacher


def read_model(
    path: pathlib.Path,
    objective: bool = False,
    state: bool = False,
    which: str = 'student',
    base: str | pathlib.Path = '',
) -> dict[str, Any]:
    """Read the model of a checkpoint as NumPy arrays.

    Args:
        path: A checkpoint folder.
        objective: Also read the parameters of the objective's heads.
        state: Also read the objective's state.
        which: student, or teacher: the momentum copy, where the objective keeps one.
        base: Where the model of config.base is now, if the run has one; '': where it was.

    Returns:
        'params' (the averaged ones where the run averaged them) and 'batch_stats' of the model;
        with `objective` also 'objective', the heads' parameters; with `state` also 'state'.

    Raises:
        ConfigError: The checkpoint cannot be read, or has no teacher; or the model that it was
            trained beside is not to be found, or another one.
    """
    choose(which, ('student', 'teacher'), 'which')
    try:
        restored = _read_variables(
            path, with_heads=objective, with_state=state, with_teacher=which == 'teacher'
        )
    except ConfigError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    params = restored.get('params', {})
    variables = {
        # Averages where there are some: they are what evaluation uses.
        'params': restored.get('ema') or params.get('model', {}),
        'batch_stats': restored.get('batch_stats', {}),
    }
    identity = read_meta(path).get('base')
    if identity:
        frozen = read_base(path, identity, base)
        variables = {
            group: adapters.merge(tree, frozen[group]) for group, tree in variables.items()
        }
    if which == 'teacher':
        # A teacher without batch norm has no statistics, and so no such entry in the checkpoint.
        saved_teacher = {'batch_stats': {}, **restored['objective']['teacher']}
        variables = teachers.variables(saved_teacher, variables['params'])
    if objective:
        variables['objective'] = params.get('objective', {})
    if state:
        variables['state'] = restored.get('objective', {})
    return variables


def describe_base(run: str, folder: pathlib.Path, variables: dict[str, Any]) -> dict[str, Any]:
    """Return what the checkpoints of a run say of the model that it is trained beside.

    Args:
        run: config.base.
        folder: The checkpoint that was found there.
        variables: Its model, {'params', 'batch_stats'}.
    """
    meta = read_meta(folder)
    return {
        'run': run,
        'name': meta['config']['name'],
        'step': meta['step'],
        'digest': digest({group: variables[group] for group in ('params', 'batch_stats')}),
    }


def read_base(
    path: pathlib.Path, identity: dict[str, Any], run: str | pathlib.Path = ''
) -> dict[str, Any]:
    """Read the model that a run was trained beside.

    Args:
        path: A checkpoint of the run, for messages.
        identity: What it says of that model (`describe_base`).
        run: Where the model is now; '': where it was.

    Raises:
        ConfigError: There is no checkpoint, or it holds another model.
    """
    expected = f'{identity["name"]!r} of step {identity["step"]}'
    remedy = (
        f'{path} was trained beside the model {expected} (digest {identity["digest"][:12]}); name '
        'its run folder with --config.base=FOLDER, or vatt_jax.load(…, base=FOLDER)'
    )
    try:
        folder = find_verified(run or identity['run'])
        # That run may have gone on since.
        same_step = folder.parent / str(identity['step'])
        if same_step.is_dir():
            folder = find_verified(same_step)
        variables = read_model(folder)
        found = describe_base(os.fspath(run), folder, variables)
    except ConfigError as error:
        raise ConfigError(f'{error}. {remedy}') from error
    if found['digest'] != identity['digest']:
        raise ConfigError(
            f'{folder} holds the model {found["name"]!r} of step {found["step"]} (digest '
            f'{found["digest"][:12]}). {remedy}'
        )
    return variables


def read_columns(path: pathlib.Path, names: Collection[str]) -> record_columns.Columns:
    """Read some of a checkpoint's columns, those that there are.

    Args:
        path: A checkpoint folder.
        names: Of the columns.

    Raises:
        ConfigError: The checkpoint cannot be read.
    """
    folder = path / 'columns'
    try:
        if not record_columns.has_pieces(folder):
            return {}
        return record_columns.read_pieces(folder, names)
    except Exception as error:
        raise _unreadable(path, error) from error


def load_model(
    path: str | pathlib.Path,
    mesh: Mesh,
    objective: bool = False,
    which: str = 'student',
    base: str | pathlib.Path = '',
) -> tuple[ConfigDict, dict[str, Any], dict[str, Any]]:
    """Load the model of a run folder or a checkpoint folder.

    Args:
        path: See `find`.
        mesh: The variables are replicated over it.
        objective: Also read the parameters of the objective's heads, as `read_model` does.
        which: See `read_model`.
        base: See `read_model`.

    Returns:
        The run's config, the variables of the model, and `info`, what the data object said about
        itself: {'tokenizer': spec, 'labels': {name: [class names]}, …}.

    Raises:
        ConfigError: There is no checkpoint, or it cannot be read.
    """
    path = find_verified(path)
    meta = read_meta(path)
    variables = read_model(path, objective, which=which, base=base)
    variables = jax.device_put(variables, sharding.replicated(mesh))
    # By way of JSON, as a stored config is read: tuples are restored and renamed fields moved.
    return from_json(json.dumps(meta['config'])), variables, meta['info']


def digest(tree: Any) -> str:
    """Return the SHA-256 over names, shapes, dtypes and bytes of every leaf.

    Equal digests mean equal trees, bit for bit.
    """
    tree_hash = hashlib.sha256()
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(jax.device_get(leaf))
        # Without shapes and dtypes, arrays of the same bytes would be taken for one another.
        tree_hash.update(f'{_path_name(key_path)}{array.shape}{array.dtype}'.encode())
        # As bytes without a copy: tables of the host may be larger than memory.
        tree_hash.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return tree_hash.hexdigest()
