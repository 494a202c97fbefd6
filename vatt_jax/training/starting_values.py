"""Values that a run starts from, out of another run: config.init_from and frozen models."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vatt_jax import optim
from vatt_jax.config import ConfigError, choose
from vatt_jax.models.embeddings import spline_matrix
from vatt_jax.objectives.memory.table import num_rows
from vatt_jax.training import checkpoint

# What config.init_trees may list -> its groups here: the name of a group in `read_model`.
TREES = {'model': ('params', 'batch_stats'), 'objective': ('objective',), 'state': ('state',)}
# Group -> what its paths begin with where patterns see them.
_PREFIXES = {
    'params': '',
    'batch_stats': '',
    'objective': 'objective/',
    'state': 'state/',
    'tables': 'state/',
}


class OtherRun:
    """The newest checkpoint of another run, whose values are taken where names and shapes agree.

    Position tables of another length are resized by spline.

    Attributes:
        path: the run, as it was named.
        skipped: paths that `skip` has left so far.
        num_taken: number of arrays taken so far.
    """

    def __init__(
        self,
        path: str,
        variables: Mapping[str, Any],
        rename: Sequence[Any] = (),
        skip: Sequence[str] = (),
        field: str = 'config.init_from',
        remedy: str = '; map it with config.init_rename, leave it out with config.init_skip, or '
        'change the config',
    ):
        """See `read`, which makes them.

        Args:
            path: of the other run, for messages.
            variables: of `checkpoint.read_model`; perhaps `tables`, {name: [M …]}.
            rename: ((regex, replacement), …), applied in this order to a path of this run to get
                the path in the other checkpoint.
            skip: regular expressions of the paths left at their initial values.
            field: that names the run, for messages.
            remedy: what to try where an array is absent there or has another shape.
        """
        self.path = path
        self.skipped: list[str] = []
        self.num_taken = 0
        self._rename = tuple(rename)
        self._skip = tuple(skip)
        self._field = field
        self._remedy = remedy
        # (group, path) -> array.
        self._arrays: dict[tuple[str, str], np.ndarray] = {}
        for group, tree in variables.items():
            names = jax.tree.leaves(optim.paths(tree))
            for name, array in zip(names, jax.tree.leaves(tree), strict=True):
                self._arrays[group, _PREFIXES[group] + name] = array

    def take(self, group: str, tree: Any) -> Any:
        """A tree of this run with the other one's values.

        Args:
            group: params, batch_stats, objective or state.
            tree: arrays with shardings, or abstract ones; those that `skip` names stay as they are.

        Raises:
            ConfigError: an array is absent there or has another shape.
        """

        def take_leaf(path: str, initial: Any) -> Any:
            name = _PREFIXES[group] + path
            if optim.matches(name, self._skip):
                self.skipped.append(name)
                return initial
            value = self._value(group, name, initial.shape)
            self.num_taken += 1
            # In this run's dtype and layout, whichever the other run had.
            return jax.device_put(np.asarray(value, initial.dtype), initial.sharding)

        return jax.tree.map(take_leaf, optim.paths(tree), tree)

    def take_table(self, name: str, table: np.ndarray) -> np.ndarray:
        """The other run's rows for a table of the host: of its own, or of the one on its devices.

        Args:
            name: of the table, which is its path in a state that has it on the devices.
            table: [M …] of this run, which `skip` keeps.

        Raises:
            ConfigError: it is absent there or has another shape.
        """
        path = _PREFIXES['state'] + name
        if optim.matches(path, self._skip):
            self.skipped.append(path)
            return table
        self.num_taken += 1
        if ('tables', path) in self._arrays:
            return self._value('tables', path, table.shape)
        # On devices there are rows of padding.
        shape = (num_rows(len(table)), *table.shape[1:])
        return self._value('state', path, shape)[: len(table)]

    def check(self, group: str, tree: Any) -> None:
        """Raises what `take` would of a tree of abstract arrays."""
        names = jax.tree.leaves(optim.paths(tree))
        for path, leaf in zip(names, jax.tree.leaves(tree), strict=True):
            name = _PREFIXES[group] + path
            if not optim.matches(name, self._skip):
                self._value(group, name, leaf.shape)

    def _value(self, group: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The other run's value for our array `name`."""
        source_name = name
        for pattern, replacement in self._rename:
            # Each pattern sees what the one before it made.
            source_name = re.sub(pattern, replacement, source_name)
        value = self._arrays.get((group, source_name))
        if value is None:
            kind = 'array' if group in ('state', 'tables') else 'parameter'
            raise ConfigError(
                f'{self._field}={self.path}: it has no {kind} {source_name!r} (for {name!r})'
                f'{self._remedy}'
            )
        # [N D]: only the number of positions may differ.
        is_position_table = name.endswith('_positions') and value.shape[1:] == shape[1:]
        if is_position_table and len(value) != shape[0]:
            # Another grid of patches: resized by the rule of the official implementation, in
            # float64.
            value = spline_matrix(len(value), shape[0]) @ np.asarray(value, np.float64)
        if value.shape != shape:
            owner = 'model' if group in TREES['model'] else 'objective'
            raise ConfigError(
                f'{self._field}={self.path}: {source_name} has shape {value.shape}, this {owner} '
                f'wants {shape}{self._remedy}'
            )
        return value

    def check_taken(self) -> None:
        """Raises ConfigError where nothing was taken."""
        # Most likely a mistake in a pattern; training from scratch in silence would cost days.
        if not self.num_taken:
            raise ConfigError(
                f'{self._field}={self.path}: config.init_skip={self._skip} leaves every parameter '
                'out'
            )


def read(
    path: str, trees: Sequence[str] = ('model',), tables: Collection[str] = (), **rules: Any
) -> OtherRun:
    """Reads trees of another run.

    Args:
        path: of the run, see `checkpoint.find`.
        trees: of TREES.
        tables: names of this run's tables of the host, which belong to the state.
        rules: of OtherRun.

    Raises:
        ConfigError: the checkpoint cannot be read.
    """
    folder = checkpoint.find_verified(path)
    # NumPy on the host: the other run's whole model need not fit on one device.
    variables = checkpoint.read_model(
        folder, objective='objective' in trees, state='state' in trees
    )
    if 'state' in trees and tables:
        variables['tables'] = checkpoint.read_columns(folder, tables)
    return OtherRun(path, variables, **rules)


def check_model(config: ConfigDict, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Checks that a model can start from another one, before any of the two is there.

    Args:
        config: of this run.
        theirs: abstract variables of the model of config.init_from, {'params', 'batch_stats'}.
        ours: of this run's.

    Raises:
        ConfigError: what `OtherRun.take` would raise.
    """
    # They take no memory, and have shapes as real ones.
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), dict(theirs))
    other = OtherRun(config.init_from, zeros, config.init_rename, config.init_skip)
    for group in TREES['model']:
        other.check(group, ours[group])


def check_fields(trees: Sequence[str], rename: Sequence[Any], skip: Sequence[str]) -> None:
    """Checks config.init_trees, config.init_rename and config.init_skip.

    Raises:
        ConfigError: one of them is malformed.
    """
    if not trees:
        raise ConfigError('config.init_trees=(): expected some of model, objective, state')
    for tree in trees:
        choose(tree, TREES, 'config.init_trees')
    optim.check_patterns(skip, 'config.init_skip')
    for pair in rename:
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise ConfigError(
                f'config.init_rename has {pair!r}; expected pairs of a pattern and its '
                "replacement, such as (('^fronts_', 'patches_'),)"
            )
    optim.check_patterns([pattern for pattern, _ in rename], 'config.init_rename')


def check_trees(trees: Sequence[str], params: Any, state: Any) -> None:
    """Checks that this run has the trees which it is to take.

    Args:
        trees: config.init_trees.
        params: the objective's parameters.
        state: the objective's state.

    Raises:
        ConfigError: it lacks one.
    """
    for name, tree in (('objective', params), ('state', state)):
        if name in trees and not jax.tree.leaves(tree):
            what = 'parameters' if name == 'objective' else 'state'
            raise ConfigError(
                f'config.init_trees={tuple(trees)}: the objective of this config has no {what}; '
                f'leave {name!r} out'
            )
