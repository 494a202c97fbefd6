"""What every importer shares: tables between two layouts of parameters, and run folders.

A table says which variable of a foreign checkpoint is which of ours. It is used in both directions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from vatt_jax import models, objectives
from vatt_jax.config import ConfigError, from_json, to_json
from vatt_jax.importers.messages import MOST_NAMES, escaped, listed, shown
from vatt_jax.inputs import preprocess, tokenizer
from vatt_jax.models.embeddings import spline_matrix
from vatt_jax.parallel import sharding
from vatt_jax.run_folder import RunFolder
from vatt_jax.training import checkpoint, train_state

# A variable of ours: 'params', 'head', 'video_va', 'kernel', for example.
Path = tuple[str, ...]

MOST_DIFFERENCES = 8  # fields named in one error; the others are counted
ADVICE = (
    'set these fields as the checkpoint has them, or leave out --config: its sizes are then read '
    'from the checkpoint'
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a table: a variable of theirs, and where it is in our tree.

    Attributes:
        ours: path ('params' | 'batch_stats' | 'objective', …).
        layer: which row of our variable it is, where layers are stacked; else None.
        theirs: key in their file.
        shape: of their variable.
        fields: the config field behind each of its dimensions, '' where there is none.
        order: theirs is ours, cut into the axes `axes`, with these axes in this order; (): a
            reshape alone.
        axes: lengths of these axes.
        part: (i, n): theirs holds n variables of ours end to end along an axis, of which this is
            the i-th.
        part_axis: this axis of theirs.
    """

    ours: Path
    layer: int | None
    theirs: str
    shape: tuple[int, ...]
    fields: tuple[str, ...]
    order: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    part: tuple[int, int] = (0, 1)
    part_axis: int = 0

    def from_theirs(self, value: np.ndarray) -> np.ndarray:
        """Return what of their array is this variable, in our order of numbers."""
        part, num_parts = self.part
        if num_parts > 1:
            value = np.split(value, num_parts, axis=self.part_axis)[part]
        if not self.order:
            return value
        value = value.reshape([self.axes[axis] for axis in self.order])
        return value.transpose(np.argsort(self.order))

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        """Return our array as (their part of) their variable."""
        if self.order:
            value = value.reshape(self.axes).transpose(self.order)
        _, num_parts = self.part
        shape = list(self.shape)
        if num_parts > 1:
            shape[self.part_axis] //= num_parts
        return value.reshape(shape)


@dataclasses.dataclass
class Report:
    """What an import did.

    Attributes:
        read: number of variables read.
        resized: position tables of another length, as 'name: 8 → 4 rows'.
        unused: variables of the checkpoint that nothing took.
        bookkeeping: number of variables of optimizer, counters and the like, left alone.
        not_finite: variables read that hold a NaN or an infinity, as they are in the checkpoint.
        assumed: what a checkpoint does not record and was taken as the published models have it.
        unreadable: variables of optimizer, counters and the like that are lost in the file.
    """

    read: int
    resized: list[str]
    unused: list[str]
    bookkeeping: int
    not_finite: list[str] = dataclasses.field(default_factory=list)
    assumed: list[str] = dataclasses.field(default_factory=list)
    unreadable: list[str] = dataclasses.field(default_factory=list)


# ---- the table at work
def to_ours(
    read: Callable[[str], np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    entries: list[Entry],
    where: str,
    expected: Mapping[Path, jax.ShapeDtypeStruct],
    bookkeeping: Callable[[str], bool],
    differences: Sequence[str] = (),
    advice: str = ADVICE,
) -> tuple[dict[Path, np.ndarray], Report]:
    """Bring the variables of a checkpoint into our layout.

    Position tables of another length are resized by spline.

    Args:
        read: reads the array of one key.
        shapes: {key: shape} of the checkpoint.
        entries: the table.
        where: the checkpoint, for errors.
        expected: our variables; the table must have these and no others.
        bookkeeping: whether an unused key needs no mention.
        differences: 'config.field=ours (checkpoint: theirs)', known from elsewhere; any of them is
            an error.
        advice: what to try where sizes differ.

    Returns:
        {our path: array}, and what was read, resized and left out.

    Raises:
        ConfigError: the checkpoint does not fit; lists differences, missing variables, those
            whose shape does not fit (both shapes, the config field behind the difference) and
            unused ones: the first few of each, and how many there are. Or an array is not of real
            numbers. Or the table and `expected` differ.
    """
    used = {entry.theirs for entry in entries}
    rest = sorted(key for key in shapes if key not in used)
    unused = [key for key in rest if not bookkeeping(key)]
    # Shapes are known without reading arrays, so a misfit costs nothing.
    _check_shapes(shapes, entries, where, unused, differences, advice)

    arrays: dict[Path, np.ndarray] = {}
    resized = []
    not_finite = []
    for entry in entries:
        # Reported below, together with what the table lacks.
        if entry.ours not in expected:
            continue
        like = expected[entry.ours]
        shape = tuple(shapes[entry.theirs])
        value = _as_numbers(read(entry.theirs), like.dtype, entry.theirs, where)
        if not np.isfinite(value).all():
            not_finite.append(entry.theirs)
        if shape != entry.shape:
            # `_fits` let this pass, so it is a position table: [rows D]. In float64, rounded once.
            matrix = spline_matrix(shape[0], entry.shape[0])
            value = (matrix @ value.astype(np.float64)).astype(like.dtype)
            resized.append(f'{entry.theirs}: {shape[0]} → {entry.shape[0]} rows')
        # What is left are reshapes (heads and their width, axes of length 1).
        value = entry.from_theirs(value)
        if entry.layer is None:
            arrays[entry.ours] = value.reshape(like.shape)
        else:
            # Layers are stacked along the first axis, for lax.scan.
            stacked = arrays.setdefault(entry.ours, np.zeros(like.shape, like.dtype))
            stacked[entry.layer] = value.reshape(like.shape[1:])

    # A parameter of ours without an entry would silently be absent from the run.
    different = _unshared_paths(expected, entries)
    if different:
        raise ConfigError(
            f'this config has parameters that the official layout does not: {listed(different)}'
        )
    num_bookkeeping = len(rest) - len(unused)
    return arrays, Report(len(entries), resized, unused, num_bookkeeping, not_finite)


def _as_numbers(value: Any, dtype: Any, name: str, where: str) -> np.ndarray:
    """An array of a checkpoint in our type, which must lose nothing but digits."""
    value = np.asarray(value)
    # Custom types such as bfloat16 have the kind V of raw bytes.
    is_real = value.dtype.kind in 'fiu' or jax.dtypes.issubdtype(value.dtype, np.floating)
    if not is_real:
        raise ConfigError(
            f'{where}: {escaped(name)}: expected real numbers, got {value.dtype} of shape '
            f'{list(value.shape)}'
        )
    # A number too large for float32 becomes an infinity, which is reported as one.
    with np.errstate(over='ignore'):
        converted = value.astype(dtype)
    if np.issubdtype(dtype, np.integer) and not np.array_equal(converted, value):
        raise ConfigError(
            f'{where}: {escaped(name)}: expected whole numbers ({np.dtype(dtype)}), got '
            f'{shown(value.ravel()[:1].tolist())}'
        )
    return converted


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    entries: list[Entry],
    where: str,
    unused: list[str],
    differences: Sequence[str],
    advice: str,
) -> None:
    """Raise one error for everything that does not fit: a wrong config is wrong in many places."""
    missing = [entry.theirs for entry in entries if entry.theirs not in shapes]
    misfits = []
    for entry in entries:
        if entry.theirs in shapes and not _fits(entry, tuple(shapes[entry.theirs])):
            misfits.append(entry)
    if not (differences or missing or misfits):
        return
    first_line = f'{where} does not fit this config'
    if differences:
        first_line += f': {listed(differences, MOST_DIFFERENCES)}'
    if differences or misfits:
        first_line += f'; {advice}'
    lines = [first_line]
    if missing:
        lines.append(
            f'lacks {len(missing)} of the {len(entries)} variables this config expects: '
            f'{listed(missing)}'
        )
    lines += [_misfit(entry, tuple(shapes[entry.theirs])) for entry in misfits[:MOST_NAMES]]
    if len(misfits) > MOST_NAMES:
        lines.append(f'and {len(misfits) - MOST_NAMES} more shapes that do not fit')
    # No error by themselves, but a variable that is missing may be among them by another name.
    if unused:
        lines.append(f'not used: {listed(unused)}')
    raise ConfigError('\n'.join(lines))


def _fits(entry: Entry, shape: tuple[int, ...]) -> bool:
    """Whether a shape is that of the table, or a position table's, which can be resized."""
    if shape == entry.shape:
        return True
    return entry.ours[-1].endswith('_positions') and shape[1:] == entry.shape[1:]


def _misfit(entry: Entry, shape: tuple[int, ...]) -> str:
    """Describe a wrong shape, with the fields that decide the dimensions that differ."""
    fields = []
    # With another number of dimensions there is no telling which of them correspond.
    if len(shape) == len(entry.shape):
        for field, theirs, ours in zip(entry.fields, shape, entry.shape):
            if theirs != ours and field:
                fields.append(field)
    hint = ''
    if fields:
        # A field may decide several dimensions; name it once, in the order of the dimensions.
        hint = f'; set config.{" and config.".join(dict.fromkeys(fields))}'
    return (
        f'{entry.theirs} has shape {shown(list(shape))}, this config expects {list(entry.shape)} '
        f'(for {"/".join(entry.ours)}){hint}'
    )


def to_theirs(ours: Mapping[Path, np.ndarray], entries: list[Entry]) -> dict[str, np.ndarray]:
    """Return {their key: array}: the inverse of `to_ours`."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    axes = {entry.theirs: entry.part_axis for entry in entries}
    for entry in entries:
        value = np.asarray(ours[entry.ours])
        if entry.layer is not None:
            value = np.asarray(value[entry.layer])  # a number, of a layer's scalar
        parts.setdefault(entry.theirs, {})[entry.part[0]] = entry.to_theirs(value)
    theirs = {}
    for key, by_number in parts.items():
        values = [by_number[number] for number in sorted(by_number)]
        theirs[key] = values[0] if len(values) == 1 else np.concatenate(values, axes[key])
    return theirs


def _unshared_paths(paths: Iterable[Path], entries: list[Entry]) -> list[str]:
    """Our variables that a table lacks, and those of the table that we lack."""
    # The symmetric difference; stacked layers have one path of ours in common.
    in_table = {entry.ours for entry in entries}
    return sorted('/'.join(path) for path in set(paths) ^ in_table)


# ---- run folders
def check_new(out: str | os.PathLike) -> pathlib.Path:
    """Return the folder as a path. Raises ConfigError where it already is a run."""
    out = pathlib.Path(out)
    folder = RunFolder(out).checkpoints
    # What an import left unfinished, on a full disk for example, is no checkpoint.
    if folder.exists() and any('.orbax-checkpoint-tmp' not in p.name for p in folder.iterdir()):
        raise ConfigError(f'--out={out} already holds checkpoints; name another folder')
    if RunFolder(out).config.exists():
        raise ConfigError(f'--out={out} is the folder of a run; name another folder')
    if out.exists() and not out.is_dir():
        raise ConfigError(f'--out={out} is a file; expected the name of a folder to make')
    return out


def check_export(out: pathlib.Path, files: Sequence[pathlib.Path], overwrite: bool) -> None:
    """Check that an export may write.

    Args:
        out: where to, as the user named it.
        files: what it would write, or replace.
        overwrite: whether the user said that it may replace them.

    Raises:
        ConfigError: one of them exists, or a folder is in its place.
    """
    for path in files:
        if path.is_dir():
            raise ConfigError(f'--out={out}: {path} is a folder; expected the name of a file')
        if path.exists() and not overwrite:
            raise ConfigError(
                f'--out={out}: {path} exists and is left as it is; name another place, or add '
                '--overwrite'
            )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f'--out={out}: folder {out.parent} cannot be made ({error.strerror}); name another '
            'place'
        ) from error


def not_written(out: pathlib.Path, error: Exception) -> ConfigError:
    """The error for a place that cannot be written, or not to the end."""
    # What says so of a run folder wraps the system's own error.
    if isinstance(error.__cause__, OSError):
        error = error.__cause__
    return ConfigError(
        f'--out={out} cannot be written ({type(error).__name__}: {escaped(str(error), 200)}); name '
        'another place, or make room'
    )


def abstract_state(
    config: ConfigDict, labels: Mapping[str, Sequence[str]], with_objective: bool = True
) -> Any:
    """Return the TrainState that a config makes, shapes only.

    Args:
        config: the whole config.
        labels: {name of a label: its classes}.
        with_objective: whether the checkpoint has parameters of the objective; without, the model
            must have towers alone.
    """
    objective = objectives.Objective(config.objective)
    if with_objective:
        objective = objectives.build(config.objective)
    model = models.build(config.model, config.compute_dtype)
    # None stands for the whole batch: a stream for each tower.
    streams = objective.streams() or tuple(config.model.towers)
    batch = preprocess.abstract(config.model.inputs, streams, 2, config.compute_dtype)
    num_classes = {name: len(classes) for name, classes in labels.items()}
    spec = train_state.abstract(model, batch, 1, num_classes)
    # One device: an import does not depend on the mesh that the config asks for.
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, (1, 1, 1, 1))))
    return train_state.create(config, model, objective, spec, mesh)[1]


def variables(state: Any) -> dict[Path, Any]:
    """Return parameters and statistics of a TrainState as a table has them.

    Returns:
        {('params' | 'batch_stats' | 'objective', …): leaf}.
    """
    return _flat(
        {
            'params': state.params['model'],
            'batch_stats': state.batch_stats,
            'objective': state.params['objective'],
        }
    )


def _flat(groups: Mapping[str, Any]) -> dict[Path, Any]:
    """{group: tree} as {(group, *path): leaf}."""
    flat = {}
    for group, tree in groups.items():
        for path, leaf in flatten_dict(tree).items():
            flat[(group, *path)] = leaf
    return flat


def write_run(
    out: pathlib.Path,
    config: ConfigDict,
    state: Any,
    arrays: Mapping[Path, np.ndarray],
    info: Mapping[str, Any],
    vocabulary: Sequence[str] | None = None,
) -> None:
    """Make a run folder that holds arrays as step 0, with fresh optimizer slots.

    Args:
        out: the folder.
        config: of the run.
        state: the abstract TrainState of that config.
        arrays: {our path: array}, all of them.
        info: what a checkpoint says of labels and sources.
        vocabulary: words in the order of the word table, <pad> first.

    Raises:
        ConfigError: no tokenizer can be made of the vocabulary, its length is not that of the word
            table, or the folder cannot be made.
        CheckpointNotSaved: there is no room for the checkpoint.
    """
    info = dict(info)  # the caller's stays as it is
    if vocabulary is not None:
        _check_vocabulary(vocabulary, arrays)
        try:
            info['tokenizer'] = tokenizer.Words.from_table(vocabulary).to_spec()
        except ValueError as error:
            raise ConfigError(f'--vocabulary: {error}') from error

    def tree_of(group: str) -> dict[str, Any]:
        return unflatten_dict({path[1:]: v for path, v in arrays.items() if path[0] == group})

    # Optimizer slots and counters begin at zero, so the optimizer need not be run to make them.
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
    params = tree_of('params')
    state = zeros.replace(
        params={'model': params, 'objective': tree_of('objective')},
        batch_stats=tree_of('batch_stats'),
        # The average begins at the imported weights: zeros would take long to forget.
        ema=params if config.optimizer.ema else {},
    )
    # As if a run had saved before its first batch.
    meta = {
        'step': 0,
        'consumed': 0,
        'order': '',
        'weights': [],
        'config': config.to_dict(),
        'info': info,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        checkpoints = checkpoint.Checkpoints(RunFolder(out).checkpoints, config.checkpoint)
        checkpoints.save(0, state, meta, {})
        checkpoints.wait()  # saving goes on in the background
        checkpoints.close()
        RunFolder(out).config.write_text(to_json(config))
    except OSError as error:
        raise not_written(out, error) from error


def _check_vocabulary(vocabulary: Sequence[str], arrays: Mapping[Path, np.ndarray]) -> None:
    tables = [array for path, array in arrays.items() if path[-1] == 'word_table']
    if not tables:
        raise ConfigError('--vocabulary: this model has no word table; leave it out')
    num_rows = len(tables[0])
    # A word beyond the last row would silently get the vector of another one.
    if len(vocabulary) != num_rows:
        raise ConfigError(
            f'--vocabulary: expected {num_rows} words, one for each row of the word table, got '
            f'{len(vocabulary)}; give the file that belongs to this checkpoint'
        )


def read_run(run: str | os.PathLike) -> tuple[ConfigDict, dict[str, Any], dict[Path, np.ndarray]]:
    """Read the newest model of a run folder, or the model of one checkpoint folder.

    Returns:
        The config, the info and the variables {our path: array}.

    Raises:
        ConfigError: there is no checkpoint, or it is damaged.
    """
    # `sound` compares digests of the files, so that no damaged model is exported.
    path = checkpoint.find_verified(pathlib.Path(run))
    meta = checkpoint.read_meta(path)
    model = checkpoint.read_model(path, objective=True)
    ours = _flat({group: model[group] for group in ('params', 'batch_stats', 'objective')})
    # Through JSON, which is where the tuples of a config and its renamed fields are restored.
    config = from_json(json.dumps(meta['config']))
    # What was read is the whole model.
    config.base = ''
    return config, meta['info'], ours


def check_same(run: str | os.PathLike, ours: Mapping[Path, Any], entries: list[Entry]) -> None:
    """Check that a table has all variables of a run, and no others."""
    different = _unshared_paths(ours, entries)
    if different:
        raise ConfigError(
            f'{run} has parameters that the official layout does not, or lacks some of its: '
            f'{listed(different)}'
        )
