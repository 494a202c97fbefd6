"""Parameter paths and the regular expressions that select them in a config."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import jax

from vatt_jax.config import ConfigError


def paths(tree: Any) -> Any:
    """Return the tree with each leaf replaced by its path, 'model/video/encoder/mlp/kernel'."""

    def path_of_leaf(key_path: tuple[Any, ...], _: Any) -> str:
        names = []
        # JAX has a class for each kind of container: dicts of parameters, dataclasses (TrainState)
        # and named tuples of optax, lists and tuples.
        for key in key_path:
            # DictKey has a key, GetAttrKey a name; a SequenceKey is written as JAX prints it.
            name = getattr(key, 'key', getattr(key, 'name', key))
            names.append(str(name))
        return '/'.join(names)

    return jax.tree.map_with_path(path_of_leaf, tree)


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Return whether any of the regular expressions is found in the path."""
    # search, not match: 'bias$' needs no '.*' before it, and '^' anchors where that is meant.
    return any(re.search(pattern, path) for pattern in patterns)


def check_patterns(patterns: Iterable[Any], where: str) -> None:
    """Check that each pattern is a regular expression.

    Args:
        patterns: What the config holds.
        where: The field, for the message.

    Raises:
        ConfigError: One of them is none.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ConfigError(
                f'{where}: {pattern!r} is not a regular expression ({error}); parameter paths are '
                r"matched, such as '^model/encoders_video/' or 'bias$'"
            ) from error
