"""Checkpoints through orbax: asynchronous, exact, onto any mesh, partial and renamed. Only this file knows orbax.

Layout of a run folder: `checkpoints/<step>/{state,meta,columns}` and `manifest.json`, the digests of these files, without which flipped bits would
be read as parameters. `meta` is JSON: examples consumed, digest of the order so far,
the resolved config and the data's info (tokenizer, class names), so a checkpoint folder alone is enough to load a model.
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
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as managers

from vatt_jax import optim
from vatt_jax.config import ConfigError, from_json
from vatt_jax.models.embeddings import spline_matrix
from vatt_jax.parallel import sharding

logging.getLogger('absl').setLevel(
    logging.ERROR
)  # orbax tells each file it writes, and warns of metadata it does not need
ITEMS = ('state', 'meta', 'columns')
MANIFEST = 'manifest.json'


class Unsaved(RuntimeError):
    """A checkpoint could not be written. The message says why and what is left."""


@dataclasses.dataclass
class Best:
    """Preserves the step with the highest `scalar` ('evaluator/name') among the results in `evals`; the earlier of equal ones."""

    evals: pathlib.Path
    scalar: str

    def value(self, step: int) -> float:
        evaluator, _, name = self.scalar.partition('/')
        try:
            found = json.loads((self.evals / f'step_{step:06d}' / 'results.json').read_text())
            return float(found[evaluator]['scalars'][name])
        except (OSError, ValueError, KeyError, TypeError):
            return -math.inf

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        values = [self.value(c.step) for c in checkpoints]
        best = max(values, default=-math.inf)
        return [v == best and v > -math.inf and v not in values[:i] for i, v in enumerate(values)]


class Checkpoints:
    """The checkpoints of one run. folder: `<workdir>/checkpoints`. config: `config.checkpoint`. Old ones go when a new one is whole."""

    def __init__(self, folder: str | pathlib.Path, config: ConfigDict):
        folder = pathlib.Path(folder).absolute()
        keep: list[Any] = [managers.LatestN(max(1, config.keep))]
        if config.keep_every:
            keep.append(managers.EveryNSteps(config.keep_every))
        if config.get('best'):
            keep.append(Best(folder.parent / 'evals', config.best))
        self.saving = None

        def seal():  # before the folder takes its name, so that both appear together
            if jax.process_index() == 0:
                for temporary in folder.glob(f'{self.saving}.orbax-checkpoint-tmp*'):
                    write_manifest(temporary)

        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(keep),
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=seal),
        )
        self.manager = ocp.CheckpointManager(folder, options=options, item_names=ITEMS)

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(
        self, step: int, state: Any, meta: dict[str, Any], columns: dict[str, np.ndarray]
    ) -> None:
        """Starts an asynchronous save; the previous one is waited for. A step that is already saved is left alone."""
        if self.manager.latest_step() == step:
            return
        self.wait()
        self.saving = step
        with self._told():
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    meta=ocp.args.JsonSave(meta),
                    columns=ocp.args.StandardSave({'_': np.zeros((), np.int8), **columns}),
                ),
                force=True,
            )

    @contextlib.contextmanager
    def _told(self):
        """Raises Unsaved for whatever goes wrong in writing."""
        try:
            yield
        except Exception as error:
            rest = [s for s in steps(pathlib.Path(self.manager.directory)) if s != self.saving]
            left = (
                f'the checkpoint of step {rest[-1]} is whole, and the same command continues from there'
                if rest
                else 'there is none before it'
            )
            raise Unsaved(
                f'the checkpoint of step {self.saving} could not be written ({_first_line(error)}); {left}. Is the disk full?'
            ) from error

    def restore(
        self, step: int, shape: Any, shardings: Any
    ) -> tuple[Any, dict[str, Any], dict[str, np.ndarray]]:
        """(state, meta, columns) of a step, laid out as `shardings` whatever mesh saved it.

        shape: abstract state. Raises ConfigError when the checkpoint cannot be read or does not fit, naming the first
        parameter that differs.
        """
        want = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shape, shardings
        )
        path = pathlib.Path(self.manager.directory) / str(step)
        _check_shapes(path, want)
        try:
            got = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(want),
                    meta=ocp.args.JsonRestore(),
                    columns=ocp.args.StandardRestore(),
                ),
            )
        except Exception as error:
            raise ConfigError(
                f'checkpoint {path} cannot be read ({_first_line(error)}); remove that folder to '
                'go back to the one before, or choose another --workdir'
            ) from error
        # Orbax hands back buffers that it may still own; donation needs arrays of ours.
        state = jax.jit(lambda x: jax.tree.map(jax.numpy.copy, x), out_shardings=shardings)(
            got.state
        )
        return state, got.meta, {k: np.array(v) for k, v in got.columns.items() if k != '_'}

    def wait(self) -> None:
        with self._told():
            self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()


def steps(folder: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints of a folder, ascending."""
    return (
        sorted(
            int(p.name)
            for p in folder.glob('*')
            if p.name.isdigit() and (p / '_CHECKPOINT_METADATA').exists()
        )
        if folder.is_dir()
        else []
    )


def _files(folder: pathlib.Path) -> dict[str, str]:
    """Path -> SHA-256 of every file below a checkpoint folder, but the manifest and what orbax notes of the time of saving."""
    out = {}
    for path in sorted(
        p
        for p in folder.rglob('*')
        if p.is_file() and p.name not in (MANIFEST, f'{MANIFEST}.tmp', '_CHECKPOINT_METADATA')
    ):
        with path.open('rb') as file:
            out[str(path.relative_to(folder))] = hashlib.file_digest(file, 'sha256').hexdigest()
    return out


def write_manifest(folder: pathlib.Path) -> None:
    """Digests of a finished checkpoint's files, beside them."""
    temporary = folder / f'{MANIFEST}.tmp'
    temporary.write_text(json.dumps(_files(folder), indent=0))
    os.replace(temporary, folder / MANIFEST)


def damage(folder: pathlib.Path) -> str:
    """What is wrong with a checkpoint's files by its manifest, '' if nothing (or if it has none, being older than manifests)."""
    try:
        wanted = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return ''
    except (OSError, ValueError) as error:
        return f'{MANIFEST} cannot be read: {_first_line(error)}'
    there = _files(folder)
    missing = sorted(set(wanted) - set(there))
    changed = sorted(f for f in wanted if f in there and wanted[f] != there[f])
    return (
        f'{missing[0]} is missing'
        if missing
        else f'{changed[0]} is not what was written'
        if changed
        else ''
    )


def newest_sound(folder: pathlib.Path, say=print) -> int | None:
    """Step of the newest checkpoint whose files are what was written, None when there is no checkpoint. Damaged ones above it are told and set
    aside as `<step>.damaged`. Raises ConfigError when all are damaged."""
    found = steps(folder)
    broken = {}
    for step in reversed(found):
        broken[step] = damage(folder / str(step))
        if not broken[step]:
            for other in found[found.index(step) + 1 :]:
                say(
                    f'checkpoint {folder / str(other)} is damaged ({broken[other]}): set aside as {other}.damaged, going back to step {step}'
                )
                shutil.rmtree(folder / f'{other}.damaged', ignore_errors=True)
                os.replace(folder / str(other), folder / f'{other}.damaged')
            return step
    if broken:
        raise ConfigError(
            f'every checkpoint in {folder} is damaged ({"; ".join(f"{s}: {why}" for s, why in broken.items())}); restore them from a '
            'copy, or choose another --workdir'
        )
    return None


def _first_line(error: BaseException) -> str:
    return f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0][:200]}'


def _check_shapes(path: pathlib.Path, want: Any) -> None:
    try:
        with ocp.StandardCheckpointer() as reader:
            saved = reader.metadata(path / 'state').item_metadata
        have = {
            _key(p): tuple(m.shape) for p, m in jax.tree_util.tree_leaves_with_path(dict(saved))
        }
    except Exception as error:
        raise ConfigError(f'checkpoint {path} cannot be read ({_first_line(error)})') from error
    for p, leaf in jax.tree_util.tree_leaves_with_path(want):
        name = _key(p)
        if name.startswith('params') and have.get(name, leaf.shape) != leaf.shape:
            raise ConfigError(
                f'checkpoint {path}: {name} has shape {have[name]} and this config makes {leaf.shape}; '
                'use the config the run was started with, or another --workdir'
            )
        if name.startswith('params') and name not in have:
            raise ConfigError(
                f'checkpoint {path} has no {name}; use the config the run was started with, or another --workdir'
            )


def _key(path: Any) -> str:
    return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def find(path: str | pathlib.Path) -> pathlib.Path:
    """The newest checkpoint folder of a run folder, or the checkpoint folder itself."""
    path = pathlib.Path(path)
    if (path / 'meta').is_dir() and (path / 'state').is_dir():
        return path.absolute()
    folder = path / 'checkpoints' if (path / 'checkpoints').is_dir() else path
    steps = (
        sorted(int(p.name) for p in folder.glob('*') if p.name.isdigit() and (p / 'state').is_dir())
        if folder.is_dir()
        else []
    )
    if not steps:
        raise ConfigError(
            f'{path} holds no checkpoint; a run folder (with checkpoints/<step>) or one checkpoint folder is wanted'
        )
    return (folder / str(steps[-1])).absolute()


def sound(path: str | pathlib.Path) -> pathlib.Path:
    """The same. Raises ConfigError where its files are not what was written."""
    path = find(path)
    if why := damage(path):
        raise ConfigError(
            f'checkpoint {path} is damaged ({why}); name another one of {path.parent}'
        )
    return path


def read_meta(path: pathlib.Path) -> dict[str, Any]:
    """`meta` of a checkpoint folder."""
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            return reader.restore(path / 'meta')
    except Exception as error:
        raise ConfigError(f'checkpoint {path} cannot be read ({_first_line(error)})') from error


def read_model(path: pathlib.Path, objective: bool = False) -> dict[str, Any]:
    """{'params', 'batch_stats'} of the model of a checkpoint, as NumPy; averaged parameters where they were kept. objective: also
    'objective', the parameters of its heads."""
    try:
        with ocp.StandardCheckpointer() as reader:
            tree = dict(reader.metadata(path / 'state').item_metadata)
        params = {
            k: v
            for k, v in tree['params'].items()
            if k == 'model' or objective and jax.tree.leaves(v)
        }
        item = {'params': params, 'batch_stats': tree['batch_stats'], 'ema': tree['ema'] or {}}
        item = {k: v for k, v in item.items() if jax.tree.leaves(v)}
        like = jax.tree.map(lambda m: np.zeros((), m.dtype), item)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            got = reader.restore(
                path / 'state',
                args=ocp.args.PyTreeRestore(
                    like,
                    restore_args=jax.tree.map(
                        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like
                    ),
                    partial_restore=True,
                ),
            )
    except Exception as error:
        raise ConfigError(f'checkpoint {path} cannot be read ({_first_line(error)})') from error
    heads = {'objective': got['params'].get('objective', {})} if objective else {}
    return {
        'params': got.get('ema') or got['params']['model'],
        'batch_stats': got.get('batch_stats', {}),
        **heads,
    }


def load_model(path: str | pathlib.Path, mesh) -> tuple[ConfigDict, dict[str, Any], dict[str, Any]]:
    """(config, variables on the mesh (replicated), info) of a run folder or a checkpoint folder.

    info: what the data object told about itself: {'tokenizer': spec, 'labels': {name: [class names]}, …}.
    Raises ConfigError when there is none or it cannot be read.
    """
    path = sound(path)
    meta = read_meta(path)
    variables = jax.device_put(read_model(path), sharding.replicated(mesh))
    return from_json(json.dumps(meta['config'])), variables, meta['info']


def init_from(path: str, params: Any, batch_stats: Any, rename, skip) -> tuple[Any, Any, list[str]]:
    """Model parameters and statistics taken from another run where names and shapes agree.

    params, batch_stats: this run's model trees (arrays with shardings). rename: ((regex, replacement), …) applied to our path to get
    the path in the other checkpoint. skip: paths (regex) left at their initial values. Position tables of another length are resized by
    spline. Returns the trees and the paths left.
    Raises ConfigError when a wanted parameter is absent there or has another shape, or when nothing was taken.
    """
    optim.check_patterns(skip, 'config.init_skip')
    for pair in rename:
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise ConfigError(
                f'config.init_rename has {pair!r}; pairs of a pattern and its replacement are wanted, such as '
                "(('^fronts_', 'patches_'),)"
            )
    optim.check_patterns([p for p, _ in rename], 'config.init_rename')
    folder = sound(path)
    other = read_model(folder)
    flat = {
        f'{group}/{name}': x
        for group, tree in (('params', other['params']), ('batch_stats', other['batch_stats']))
        for name, x in zip(jax.tree.leaves(optim.paths(tree)), jax.tree.leaves(tree), strict=True)
    }
    left: list[str] = []
    taken = 0

    def take(group):
        def one(name, mine):
            nonlocal taken
            if optim.matches(name, skip):
                left.append(name)
                return mine
            theirs = name
            for pattern, replacement in rename:
                theirs = re.sub(pattern, replacement, theirs)
            value = flat.get(f'{group}/{theirs}')
            if value is None:
                raise ConfigError(
                    f'config.init_from={path}: it has no parameter {theirs!r} (wanted for {name!r}); '
                    'map it with config.init_rename or leave it out with config.init_skip'
                )
            if (
                name.endswith('_positions')
                and value.shape[1:] == mine.shape[1:]
                and len(value) != len(mine)
            ):
                value = spline_matrix(len(value), len(mine)) @ np.asarray(
                    value, np.float64
                )  # another grid: the official rule
            if value.shape != mine.shape:
                raise ConfigError(
                    f'config.init_from={path}: {theirs} has shape {value.shape}, this model wants {mine.shape}; '
                    f'leave it out with config.init_skip=({name!r},) or change the config'
                )
            taken += 1
            return jax.device_put(np.asarray(value, mine.dtype), mine.sharding)

        return one

    params = jax.tree.map(take('params'), optim.paths(params), params)
    batch_stats = jax.tree.map(take('batch_stats'), optim.paths(batch_stats), batch_stats)
    if not taken:
        raise ConfigError(
            f'config.init_from={path}: config.init_skip={tuple(skip)} leaves every parameter out'
        )
    return params, batch_stats, left


def digest(tree: Any) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of every leaf: equal digests, equal trees, bit for bit."""
    h = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        x = np.asarray(jax.device_get(leaf))
        h.update(f'{_key(path)}{x.shape}{x.dtype}'.encode())
        h.update(np.ascontiguousarray(x).tobytes())
    return h.hexdigest()
