"""Evaluators: frozen encoders in, numbers out. A new one is a class and an entry here."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from vatt_jax.config import choose
from vatt_jax.evals import gallery
from vatt_jax.evals.base import Evaluator, FeatureView, Result
from vatt_jax.evals.captions import Captions
from vatt_jax.evals.changes import CHANGES, change_of
from vatt_jax.evals.classification import Classification
from vatt_jax.evals.cluster_sizes import ClusterSizes
from vatt_jax.evals.clustering import Clustering
from vatt_jax.evals.detection import Detection
from vatt_jax.evals.linear_probe import LinearProbe, SimpleProbe
from vatt_jax.evals.localisation import Localisation
from vatt_jax.evals.masked_words import MaskedWords
from vatt_jax.evals.matching import Matching
from vatt_jax.evals.neighbours import Neighbours
from vatt_jax.evals.region_words import RegionWords
from vatt_jax.evals.retrieval import Retrieval
from vatt_jax.evals.stage_probe import StageProbe
from vatt_jax.evals.synchrony import Sync
from vatt_jax.evals.zero_shot import ZeroShot
from vatt_jax.run_folder import writing

# The key is the field `type` of an entry of config.evals; names of entries are free, so a type may
# occur several times.
EVALUATORS: dict[str, type[Evaluator]] = {
    'retrieval': Retrieval,
    'linear_probe': LinearProbe,
    'stage_probe': StageProbe,
    'simple_probe': SimpleProbe,
    'sync': Sync,
    'classification': Classification,
    'clustering': Clustering,
    'cluster_sizes': ClusterSizes,
    'neighbours': Neighbours,
    'localisation': Localisation,
    'zero_shot': ZeroShot,
    'detection': Detection,
    'masked_words': MaskedWords,
    'matching': Matching,
    'captions': Captions,
    'region_words': RegionWords,
}

__all__ = [
    'CHANGES',
    'EVALUATORS',
    'Evaluator',
    'Result',
    'FeatureView',
    'build',
    'check',
    'gallery',
    'load',
    'run_all',
    'save',
]


def build(name: str, config: Any) -> Evaluator:
    """Build the evaluator of an entry of `config.evals`.

    Args:
      name: of the entry.
      config: the entry; its field `type` selects an entry of EVALUATORS.

    Raises:
      ConfigError: for an unknown type, field or change.
    """
    where = f'config.evals.{name}'
    # `type` has no default: an entry without it is a mistake.
    kind = choose(config.get('type', ''), EVALUATORS, f'{where}.type')
    evaluator = EVALUATORS[kind](config, where)
    # Not every evaluator has this field.
    change = evaluator.config.get('change', '')
    if change:
        change_of(change, f'{where}.change')
    return evaluator


def check(config: Any, data: Any, outputs: Any) -> None:
    """Check `config.evals` against the data and the model: mistakes show before training.

    Args:
      config: the group `config.evals`.
      data: the data object of docs/architecture.md.
      outputs: the model's Outputs; abstract ones do.

    Raises:
      ConfigError: for an evaluator that asks for a split, label, stream or space that the data or
        the model lack, and for mistakes of its entry alone.
    """
    for name in config:
        # Outputs come from `jax.eval_shape`, so this costs no forward pass.
        build(name, config[name]).check(data, outputs)


def run_all(config: Any, view: FeatureView, baseline: bool = False) -> dict[str, Result]:
    """Run every entry of `config.evals`, in order of its name.

    Args:
      config: the group `config.evals`.
      view: where features come from.
      baseline: run only those whose field `baseline` is True.
    """
    # All are built first, so that a mistake in the last one shows before the first one has run.
    # In a fixed order, as every host must enter the same collectives.
    evaluators = {name: build(name, config[name]) for name in sorted(config)}
    results = {}
    for name, evaluator in evaluators.items():
        if evaluator.config.baseline or not baseline:
            results[name] = evaluator.run(view)
    return results


def save(
    results: dict[str, Result],
    folder: str | pathlib.Path,
    also: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Write <folder>/results.json (scalars, small artifacts) and arrays.npz.

    The folder appears whole or not at all.

    Args:
      results: evaluator -> what it found.
      folder: where to write; one that exists is replaced.
      also: writes more files into the folder it is given.

    Raises:
      NotWritten: for want of room or permission; what was there before stays.
    """
    folder = pathlib.Path(folder)
    with writing(folder):
        _save(results, folder, also)


def _save(
    results: dict[str, Result],
    folder: pathlib.Path,
    also: Callable[[pathlib.Path], None] | None,
) -> None:
    # Beside the folder, not in /tmp: a rename is atomic only within a file system.
    temporary = folder.with_name(folder.name + '.tmp')
    # What a killed run may have left.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    small = {}
    arrays = {}
    # Arrays as text would be large and slow to read, so JSON has only the rest.
    for name, result in results.items():
        small_artifacts = {}
        for key, value in result.artifacts.items():
            if isinstance(value, np.ndarray):
                arrays[f'{name}/{key}'] = value
            else:
                small_artifacts[key] = value
        small[name] = {'scalars': result.scalars, 'artifacts': small_artifacts}
    (temporary / 'results.json').write_text(json.dumps(small, indent=1))
    np.savez_compressed(temporary / 'arrays.npz', **arrays)  # type: ignore[arg-type]  # stubs: a flag
    if also is not None:
        also(temporary)
    # `os.replace` refuses a target folder that is not empty.
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def load(folder: str | pathlib.Path) -> dict[str, Result]:
    """Read what `save` wrote."""
    folder = pathlib.Path(folder)
    results = {}
    for name, stored in json.loads((folder / 'results.json').read_text()).items():
        results[name] = Result(stored['scalars'], stored['artifacts'])
    with np.load(folder / 'arrays.npz') as arrays:
        # An npz file is read lazily, one array at a time, while it is open.
        for key in arrays.files:
            # Only the first slash separates: names of artifacts have slashes of their own.
            name, artifact = key.split('/', 1)
            results[name].artifacts[artifact] = arrays[key]
    return results
