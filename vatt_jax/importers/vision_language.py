"""Weights of ViLBERT and UNITER in and out, by the names of their releases; BERT to begin with.

    weights = vision_language.read('pytorch_model_9.bin', Vilbert(VILBERT['base']))
    outputs = model.apply({'params': weights.params}, words, regions, rng, False)

Files are .bin, .pth and .pt of torch.save, read without executing anything, and safetensors.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from vatt_jax.config import ConfigError
from vatt_jax.importers import parameter_map
from vatt_jax.importers.clip import read_arrays
from vatt_jax.importers.messages import escaped, listed
from vatt_jax.importers.parameter_map import Path
from vatt_jax.importers.pickles import torch_writer
from vatt_jax.importers.vision_language_layouts import BERT, LAYOUTS, Layout, entries
from vatt_jax.inputs.regions import Regions, Words
from vatt_jax.models.vision_language import Uniter, Vilbert
from vatt_jax.rng import Rng

Model = Vilbert | Uniter
ADVICE = 'build the model with the sizes of the config beside the file (from_release)'
# BERT's first releases, which were converted from TensorFlow.
OLD_LEAVES = {'gamma': 'weight', 'beta': 'bias'}
# Part of a name -> switch of ViLBERT's training commands that made it. Its config does not say so.
ABSENT_OPTIONS = {
    'embeddings.task_embeddings.': 'task_specific_tokens',
    '.dyLinear_': 'dynamic_attention',
}


@dataclasses.dataclass
class Weights:
    """What was read of a file.

    Attributes:
        params: the model's parameters.
        read: number of variables of the file that they are made of.
        unused: {name: array} of the file that the model has no place for, such as the heads of
            other tasks, and layers that the release has and never uses. `write` takes them back.
        kept: our variables that the file lacks; they are as they were.
    """

    params: dict[str, Any]
    read: int
    unused: dict[str, np.ndarray]
    kept: list[str]


def read(path: str | os.PathLike, model: Model) -> Weights:
    """Read the file of a release.

    Args:
        path: the file.
        model: of the same sizes.

    Raises:
        ConfigError: the file is of another kind or damaged, lacks a variable, or has one of
            another shape.
    """
    where = str(path)
    return from_state_dict(read_arrays(pathlib.Path(path), where), model, where)


def from_state_dict(
    arrays: Mapping[str, np.ndarray], model: Model, where: str = 'state dict'
) -> Weights:
    """The parameters that a release's state dict holds.

    Args:
        arrays: {name: array}.
        model: of the same sizes.
        where: what to call it in errors.

    Raises:
        ConfigError: it lacks a variable, has one of another shape, or ties two that differ.
    """
    expected = abstract(model)
    ours, unused = _to_ours(arrays, LAYOUTS[_kind(model)], expected, where)
    return Weights(_tree(ours), len(arrays) - len(unused), unused, [])


def start_from(
    path: str | os.PathLike, model: Model, params: Mapping[str, Any], *, bert: bool = False
) -> Weights:
    """Put what a file has of a model in the place of its initial values.

    Args:
        path: a file of a release, some of whose heads may be missing; or a BERT's.
        model: of the same sizes.
        params: initial values, which stay where the file has nothing.
        bert: whether the file is a BERT's (Hugging Face's names): its words and layers.

    Raises:
        ConfigError: the file cannot be read, has a variable of another shape, or none at all that
            fits.
    """
    where = str(path)
    arrays = renamed(read_arrays(pathlib.Path(path), where))
    layout = (BERT if bert else LAYOUTS)[_kind(model)]
    expected = abstract(model)
    found = {
        line.ours: expected[line.ours]
        for line in entries(layout, expected)
        if line.theirs in arrays
    }
    if not found:
        raise ConfigError(
            f'{where}: expected variables of {_kind(model)}{" or BERT" * bert}, got '
            f'{listed(arrays)}'
        )
    ours, unused = _to_ours(arrays, layout, found, where)
    kept = sorted('/'.join(path[1:]) for path in set(expected) - set(found))
    initial = {('params', *path): leaf for path, leaf in flatten_dict(dict(params)).items()}
    return Weights(_tree({**initial, **ours}), len(arrays) - len(unused), unused, kept)


def to_state_dict(
    params: Mapping[str, Any], model: Model, unused: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Parameters by the names of the release, tied variables by both of theirs.

    Args:
        params: of the model.
        model: likewise.
        unused: what else belongs into the file (`Weights.unused`).
    """
    layout = LAYOUTS[_kind(model)]
    ours = {('params', *path): leaf for path, leaf in flatten_dict(dict(params)).items()}
    theirs = parameter_map.to_theirs(ours, entries(layout, abstract(model)))
    for second, first in layout.tied.items():
        theirs[second] = theirs[first]
    return {**theirs, **(unused or {})}


def write(
    path: str | os.PathLike,
    params: Mapping[str, Any],
    model: Model,
    unused: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a file that torch.load reads; arguments as those of `to_state_dict`.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        torch_writer.write(path, to_state_dict(params, model, unused))
    except OSError as error:
        raise parameter_map.not_written(pathlib.Path(path), error) from error


@functools.cache
def abstract(model: Model) -> dict[Path, jax.ShapeDtypeStruct]:
    """{('params', …): shape and type} of a model's variables, traced once; to be read only."""
    sizes = model.sizes
    form = 5 if isinstance(model, Vilbert) else 7
    words = Words(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    features = jnp.zeros((1, 2, sizes.feature_width))
    regions = Regions(features, jnp.zeros((1, 2, form)), jnp.ones((1, 2), bool))
    rng = Rng.create(0, 0, jnp.zeros(1))

    def init() -> Any:
        return model.init(jax.random.key(0), words, regions, rng, False)

    shapes: Any = meta.unbox(jax.eval_shape(init))['params']
    return {('params', *path): leaf for path, leaf in flatten_dict(shapes).items()}


def renamed(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """State dict with today's names of norms' variables."""
    names = {}
    for name in arrays:
        stem, _, leaf = name.rpartition('.')
        names[name] = f'{stem}.{OLD_LEAVES.get(leaf, leaf)}' if stem else name
    return {names[name]: array for name, array in arrays.items()}


def _kind(model: Model) -> str:
    """Name of the model's layout."""
    return 'vilbert' if isinstance(model, Vilbert) else 'uniter'


def _to_ours(
    arrays: Mapping[str, np.ndarray],
    layout: Layout,
    expected: Mapping[Path, jax.ShapeDtypeStruct],
    where: str,
) -> tuple[dict[Path, np.ndarray], dict[str, np.ndarray]]:
    """({our path: array}, what is left of the file)."""
    arrays = renamed(arrays)
    _check_options(arrays, where)
    lines = entries(layout, expected)
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    ours, _ = parameter_map.to_ours(
        arrays.__getitem__, shapes, lines, where, expected, lambda name: False, advice=ADVICE
    )
    used = {line.theirs for line in lines}
    for second, first in layout.tied.items():
        if second in arrays and first in used:
            _check_tied(arrays, second, first, where)
            used.add(second)
    unused = {name: array for name, array in arrays.items() if name not in used}
    return ours, unused


def _check_options(arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Check that a file is of no option that changes every output, and that no config tells of."""
    for part, option in ABSENT_OPTIONS.items():
        names = [name for name in arrays if part in name]
        if names:
            raise ConfigError(
                f'{where}: {escaped(names[0])}: the file was trained with --{option}, which these '
                'models do not have; try a release without it'
            )


def _check_tied(arrays: Mapping[str, np.ndarray], second: str, first: str, where: str) -> None:
    """Check that two names of a variable hold the same numbers."""
    if not np.array_equal(arrays[second], arrays[first]):
        raise ConfigError(
            f'{where}: {escaped(second)}: expected the numbers of {escaped(first)}, to which the '
            'model ties it, got others'
        )


def _tree(ours: Mapping[Path, Any]) -> dict[str, Any]:
    """{('params', …): leaf} as the tree that a model takes."""
    tree: dict[str, Any] = unflatten_dict({path[1:]: leaf for path, leaf in ours.items()})
    return tree
