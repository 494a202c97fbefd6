"""Features after each stage of a tower, for those who ask (probes of single layers).

A stage is a group of layers between two changes of resolution. Towers number theirs from 1; the
last one is their map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

# The one collection that Flax keeps out of a model's initial variables. A forward pass in which it
# is not mutable sows nothing, so that no one pays for stages who does not read them.
COLLECTION = 'intermediates'
PREFIX = 'stage_'


def sow_stage(module: nn.Module, number: int, x: jax.Array) -> None:
    """Hand out the features [B grid… D] after a stage."""

    def keep_last(_: Any, value: jax.Array) -> jax.Array:
        # A tower runs once for each stream of its modality, and is read after each.
        return value

    module.sow(COLLECTION, f'{PREFIX}{number}', x, reduce_fn=keep_last, init_fn=lambda: None)


def sown_stages(variables: Mapping[str, Any]) -> dict[int, jax.Array]:
    """Number -> features of the stages that a tower, or a part of it, has sown."""
    sown = flatten_dict(variables.get(COLLECTION, {}))
    found = {}
    for path, value in sown.items():
        name = str(path[-1])
        if name.startswith(PREFIX):
            found[int(name.removeprefix(PREFIX))] = value
    return dict(sorted(found.items()))
