"""Parameters of a stack of equal layers: the leaves of one layer with a dimension in front."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax


def stacked_params(
    module: nn.Module, name: str, init_layer: Callable[[jax.Array], Any], layers: int
) -> Any:
    """Declare the parameters of all layers as one tree of a module, its leaves [layers …].

    Args:
        module: whose parameters they are.
        name: of the tree.
        init_layer: key -> parameters of one layer, boxed with their logical axes.
        layers: how many.

    Raises:
        ValueError: the module was given stacks of another number of layers.
    """
    if module.has_variable('params', name):
        # Flax's own `param` would trace the initial values of all layers in every call, to compare
        # shapes. A layer compares its own when it is applied.
        stacked: Any = nn.meta.unbox(module.get_variable('params', name))
        _check_layers(stacked, name, layers)
        return stacked

    def init(key: jax.Array) -> Any:
        stacked = jax.vmap(init_layer)(jax.random.split(key, layers))
        # vmap added a dimension; the boxes with the logical names learn of it here.
        return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: 'layers'})

    return module.param(name, init)


def _check_layers(stacked: Any, name: str, layers: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(stacked):
        if leaf.shape[:1] != (layers,):
            raise ValueError(
                f'{name}{jax.tree_util.keystr(path)}: expected parameters of {layers} layers, got '
                f'an array of shape {leaf.shape}'
            )
