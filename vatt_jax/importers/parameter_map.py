"""What every importer shares: a table of which variable of a foreign checkpoint is which of ours, its use in both directions, and run folders."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from vatt_jax import models, objectives
from vatt_jax.config import ConfigError, from_json, to_json
from vatt_jax.inputs import preprocess, tokenizer
from vatt_jax.models.embeddings import spline_matrix
from vatt_jax.parallel import sharding
from vatt_jax.training import checkpoint, train_state

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """ours: path ('params' | 'batch_stats' | 'objective', …); layer: which row of it, for stacked layers; theirs: key in their file; shape: of
    theirs; fields: the config field behind each of its dimensions ('' where there is none)."""

    ours: Path
    layer: int | None
    theirs: str
    shape: tuple[int, ...]
    fields: tuple[str, ...]


@dataclasses.dataclass
class Report:
    """What an import did: variables read, position tables resized ('name: 8 → 4 rows'), and those of the checkpoint that nothing took."""

    read: int
    resized: list[str]
    unused: list[str]
    bookkeeping: int  # variables of optimizer, counters and the like, which are left alone


# ---- the table at work
def to_ours(
    read: Callable[[str], np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    entries: list[Entry],
    where: str,
    wanted: Mapping[Path, jax.ShapeDtypeStruct],
    bookkeeping: Callable[[str], bool],
    differences: Sequence[str] = (),
) -> tuple[dict[Path, np.ndarray], Report]:
    """({our path: array}, report). read: key -> array. shapes: of the checkpoint. wanted: ours. bookkeeping: whether an unused key needs no mention.
    differences: 'config.field=ours (checkpoint: theirs)', known from elsewhere; any of them is an error.

    Position tables of another length are resized by spline. Raises ConfigError that lists all differences, missing variables, those whose shape
    does not fit (both shapes, the config field behind the difference) and unused ones; and where the table and `wanted` differ.
    """
    used = {entry.theirs for entry in entries}
    rest = sorted(key for key in shapes if key not in used)
    unused = [key for key in rest if not bookkeeping(key)]
    missing = [entry.theirs for entry in entries if entry.theirs not in shapes]
    wrong = []
    for entry in entries:
        if entry.theirs in shapes and not _fits(entry, tuple(shapes[entry.theirs])):
            wrong.append(entry)
    if differences or missing or wrong:
        first_line = f'{where} does not fit this config'
        if differences:
            first_line += f': {", ".join(differences)}'
        if differences or wrong:
            first_line += (
                '; set these fields as the checkpoint has them, or leave out --config and let it '
                'tell its sizes'
            )
        lines = [first_line]
        if missing:
            lines.append(
                f'lacks {len(missing)} of the {len(entries)} variables this config wants: '
                f'{", ".join(missing)}'
            )
        lines += [_misfit(entry, tuple(shapes[entry.theirs])) for entry in wrong]
        if unused:
            lines.append(f'not used: {", ".join(unused)}')
        raise ConfigError('\n'.join(lines))
    out: dict[Path, np.ndarray] = {}
    resized = []
    for e in entries:
        if e.ours not in wanted:
            continue
        like, have = wanted[e.ours], tuple(shapes[e.theirs])
        x = np.asarray(read(e.theirs), like.dtype)
        if have != e.shape:
            x = (spline_matrix(have[0], e.shape[0]) @ x.astype(np.float64)).astype(like.dtype)
            resized.append(f'{e.theirs}: {have[0]} → {e.shape[0]} rows')
        if e.layer is None:
            out[e.ours] = x.reshape(like.shape)
        else:
            stacked = out.setdefault(e.ours, np.zeros(like.shape, like.dtype))
            stacked[e.layer] = x.reshape(like.shape[1:])
    lost = sorted('/'.join(k) for k in set(wanted) ^ {e.ours for e in entries})
    if lost:
        raise ConfigError(
            f'this config has parameters that the official layout does not: {listed(lost)}'
        )
    return out, Report(len(entries), resized, unused, len(rest) - len(unused))


def _fits(entry: Entry, have: tuple[int, ...]) -> bool:
    """Whether a shape is that of the table, or a position table's, which can be resized."""
    if have == entry.shape:
        return True
    return entry.ours[-1].endswith('_positions') and have[1:] == entry.shape[1:]


def _misfit(e: Entry, have: tuple[int, ...]) -> str:
    fields = (
        [f for f, a, b in zip(e.fields, have, e.shape) if a != b and f]
        if len(have) == len(e.shape)
        else []
    )
    hint = f'; set config.{" and config.".join(dict.fromkeys(fields))}' if fields else ''
    return f'{e.theirs} has shape {list(have)}, this config wants {list(e.shape)} (for {"/".join(e.ours)}){hint}'


def to_theirs(ours: Mapping[Path, np.ndarray], entries: list[Entry]) -> dict[str, np.ndarray]:
    """{their key: array}: the inverse of `to_ours`."""
    return {
        e.theirs: np.asarray(ours[e.ours] if e.layer is None else ours[e.ours][e.layer]).reshape(
            e.shape
        )
        for e in entries
    }


def listed(names: list[str], most: int = 20) -> str:
    return ', '.join(names[:most]) + (
        f', and {len(names) - most} more' if len(names) > most else ''
    )


# ---- run folders
def check_new(out: str | os.PathLike) -> pathlib.Path:
    out = pathlib.Path(out)
    if (out / 'checkpoints').exists():
        raise ConfigError(f'--out={out} already holds checkpoints; name another folder')
    return out


def abstract_state(config, labels: Mapping[str, Sequence[str]]):
    """The TrainState that `config` makes, shapes only. labels: name -> classes."""
    objective = objectives.build(config.objective)
    model = models.build(config.model, config.compute_dtype)
    streams = objective.streams() or tuple(config.model.towers)
    batch = preprocess.abstract(config.model.inputs, streams, 2, config.compute_dtype)
    spec = train_state.abstract(model, batch, 1, {k: len(v) for k, v in labels.items()})
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, (1, 1, 1, 1))))
    return train_state.create(config, model, objective, spec, mesh)[1]


def variables(state) -> dict[Path, Any]:
    """Parameters and statistics of a TrainState as a table has them: {('params' | 'batch_stats' | 'objective', …): leaf}."""
    groups = {
        'params': state.params['model'],
        'batch_stats': state.batch_stats,
        'objective': state.params['objective'],
    }
    return {(group, *k): v for group, tree in groups.items() for k, v in flatten_dict(tree).items()}


def write_run(
    out: pathlib.Path,
    config,
    state,
    arrays: Mapping[Path, np.ndarray],
    info: Mapping[str, Any],
    vocabulary: Sequence[str] | None = None,
) -> None:
    """Makes `out` a run folder that holds `arrays` as step 0, with fresh optimizer slots. state: abstract. vocabulary: words in the order of the
    word table, <pad> first."""
    info = dict(info)
    if vocabulary is not None:
        try:
            info['tokenizer'] = tokenizer.Words.from_table(vocabulary).to_spec()
        except ValueError as error:
            raise ConfigError(f'--vocabulary: {error}') from error
    group = lambda name: unflatten_dict({k[1:]: v for k, v in arrays.items() if k[0] == name})
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), state)
    params = group('params')
    state = zeros.replace(
        params={'model': params, 'objective': group('objective')},
        batch_stats=group('batch_stats'),
        ema=params if config.optimizer.ema else {},
    )
    meta = {
        'step': 0,
        'consumed': 0,
        'order': '',
        'weights': [],
        'config': config.to_dict(),
        'info': info,
    }
    keeper = checkpoint.Checkpoints(out / 'checkpoints', config.checkpoint)
    keeper.save(0, state, meta, {})
    keeper.wait()
    keeper.close()
    (out / 'config.json').write_text(to_json(config))


def read_run(run: str | os.PathLike) -> tuple[ConfigDict, dict[str, Any], dict[Path, np.ndarray]]:
    """(config, info, variables) of the newest model of a run, or of one checkpoint folder."""
    path = checkpoint.sound(run)
    meta = checkpoint.read_meta(path)
    got = checkpoint.read_model(path, objective=True)
    ours = {
        (group, *k): v
        for group in ('params', 'batch_stats', 'objective')
        for k, v in flatten_dict(got[group]).items()
    }
    return from_json(json.dumps(meta['config'])), meta['info'], ours


def check_same(run: str | os.PathLike, ours: Mapping[Path, Any], entries: list[Entry]) -> None:
    lost = sorted('/'.join(k) for k in set(ours) ^ {e.ours for e in entries})
    if lost:
        raise ConfigError(
            f'{run} has parameters that the official layout does not, or lacks some of its: {listed(lost)}'
        )
