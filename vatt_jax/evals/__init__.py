"""Evaluators: frozen encoders in, numbers out. A new one is a class with run(view) and an entry here."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from vatt_jax.config import ConfigError, choose
from vatt_jax.evals import gallery
from vatt_jax.evals.base import CHANGES, Result, View
from vatt_jax.evals.classification import Classification
from vatt_jax.evals.clustering import Clustering
from vatt_jax.evals.linear_probe import LinearProbe, SimpleProbe
from vatt_jax.evals.neighbours import Neighbours
from vatt_jax.evals.retrieval import Retrieval, Sync

EVALUATORS = {
    'retrieval': Retrieval,
    'linear_probe': LinearProbe,
    'simple_probe': SimpleProbe,
    'sync': Sync,
    'classification': Classification,
    'clustering': Clustering,
    'neighbours': Neighbours,
}

__all__ = [
    'CHANGES',
    'EVALUATORS',
    'Result',
    'View',
    'build',
    'check',
    'gallery',
    'load',
    'run_all',
    'save',
]


def build(name: str, config) -> Any:
    """The evaluator of the entry `name` of `config.evals`. Raises ConfigError for an unknown type or field."""
    where = f'config.evals.{name}'
    evaluator = EVALUATORS[choose(config.get('type', ''), EVALUATORS, f'{where}.type')](
        config, where
    )
    change = evaluator.config.get('change', '')
    if change:
        choose(change, CHANGES, f'{where}.change')
    return evaluator


def check(config, data, outputs) -> None:
    """Raises ConfigError for an evaluator of `config.evals` that asks for a split, label, stream or space that the data or the model lack, so that
    it shows before training and not after it. outputs: the model's Outputs, abstract ones do."""
    of = lambda streams: {s.split('.')[0] for s in streams}
    towers, spaces = (
        of(outputs.encoded),
        {space: of(streams) for space, streams in outputs.spaces.items()},
    )
    for name in config:
        c, where = build(name, config[name]).config, f'config.evals.{name}'
        for field in (
            'limit',
            'train_limit',
            'test_limit',
            'windows',
            'crops',
            'epochs',
            'iterations',
        ):
            if c.get(field, 1) < 1:
                raise ConfigError(f'{where}.{field}={c[field]}: a positive number is wanted')
        if not all(isinstance(x, (int, float)) and x > 0 for x in c.get('strengths', ())):
            raise ConfigError(f'{where}.strengths={c.strengths}: positive numbers are wanted')
        for field in ('split', 'train', 'test'):
            if field in c and not data.size(c[field], 'segments'):
                raise ConfigError(
                    f'{where}.{field}={c[field]!r}: the data have no such split; {WITHOUT}'
                )
        if 'label' in c and c.label not in data.info.get('labels', {}):
            raise ConfigError(
                f'{where}.label={c.label!r}: the data have {", ".join(data.info.get("labels", {})) or "no labels"}; {WITHOUT}'
            )
        if c.type == 'linear_probe' and not of([c.stream]) <= towers:
            raise ConfigError(
                f'{where}.stream={c.stream!r}: the model encodes {", ".join(sorted(towers))}; {WITHOUT}'
            )
        pairs = c.get('pairs', ()) if c.type != 'sync' else (('video', 'audio', c.space),)
        for pair in pairs:
            if len(pair) != 3:
                raise ConfigError(
                    f"{where}.pairs has {pair!r}; (query, gallery, space) is wanted, such as ('text', 'video', 'vat')"
                )
            *streams, space = pair
            if not of(streams) <= spaces.get(space, set()):
                have = (
                    '; '.join(f'{k}: {", ".join(sorted(v))}' for k, v in spaces.items()) or 'none'
                )
                raise ConfigError(
                    f'{where}: {" and ".join(streams)} do not meet in space {space!r}; spaces are {have}; {WITHOUT}'
                )


WITHOUT = "name another, or leave this evaluator out of config.evals (--config.evals=\"{'NAME': {'type': …}}\" replaces them all)"


def run_all(config, view: View, baseline: bool = False) -> dict[str, Result]:
    """Every entry of `config.evals`, in order of its name. baseline: only those whose field `baseline` is True."""
    evaluators = {name: build(name, config[name]) for name in sorted(config)}
    return {
        name: e.run(view) for name, e in evaluators.items() if e.config.baseline or not baseline
    }


def save(
    results: dict[str, Result],
    folder: str | pathlib.Path,
    also: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """<folder>/results.json (scalars, small artifacts) and arrays.npz, and what `also` writes into the folder it is given; the folder
    appears whole or not at all."""
    folder = pathlib.Path(folder)
    temporary = folder.with_name(folder.name + '.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    small, arrays = {}, {}
    for name, r in results.items():
        small[name] = {
            'scalars': r.scalars,
            'artifacts': {k: v for k, v in r.artifacts.items() if not isinstance(v, np.ndarray)},
        }
        arrays |= {f'{name}/{k}': v for k, v in r.artifacts.items() if isinstance(v, np.ndarray)}
    (temporary / 'results.json').write_text(json.dumps(small, indent=1))
    np.savez_compressed(temporary / 'arrays.npz', **arrays)
    if also is not None:
        also(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def load(folder: str | pathlib.Path) -> dict[str, Result]:
    """What `save` wrote."""
    folder = pathlib.Path(folder)
    out = {
        name: Result(v['scalars'], v['artifacts'])
        for name, v in json.loads((folder / 'results.json').read_text()).items()
    }
    with np.load(folder / 'arrays.npz') as arrays:
        for key in arrays.files:
            name, artifact = key.split('/', 1)
            out[name].artifacts[artifact] = arrays[key]
    return out
