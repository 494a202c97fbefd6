"""Fusion: what `config.model.fusion` says, checked and built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vatt_jax.config import LARGEST_COUNT, ConfigError, check_range, choose, with_defaults
from vatt_jax.inputs.batch import modality_of
from vatt_jax.models.attention import IMPLEMENTATIONS
from vatt_jax.models.fusion.blocks import BlockOptions, CrossBlock
from vatt_jax.models.fusion.layer import (
    ASYMMETRIC,
    MERGED,
    PASSIVE,
    SELF,
    SPECIFIC,
    TYPES,
    FusionLayer,
    sources,
)
from vatt_jax.models.fusion.stack import WHERE, Fusion, FusionStack
from vatt_jax.models.layers import ACTIVATIONS
from vatt_jax.models.transformer import BLOCK_INITS, REMAT

__all__ = [
    'ASYMMETRIC',
    'DEFAULTS',
    'MERGED',
    'PASSIVE',
    'SPECIFIC',
    'TYPES',
    'BlockOptions',
    'CrossBlock',
    'Fusion',
    'FusionLayer',
    'FusionStack',
    'build',
    'sources',
]

DEFAULTS: dict[str, Any] = {
    # Streams that meet, two or more. (): one of each tower.
    'streams': (),
    # Attention type of each layer, entries of TYPES; mixed ones too.
    'types': ('merged',) * 6,
    # Stream that attends to the others in asymmetric layers.
    'query': '',
    # What the others do there: self (attend to themselves) | identity (stay as they are)
    'passive': SELF,
    # That every stream is projected to before the first layer. 0: each keeps its tower's.
    'width': 0,
    'mlp': 3072,  # hidden width of the feed-forward part
    'heads': 12,
    'head_width': 64,
    'dropout': 0.1,
    'attention_dropout': 0.1,
    'bias': True,
    # Norms before each part (VATT) or after its residual sum (BERT).
    'pre_norm': True,
    'eps': 1e-6,  # of all norms, added to the variance
    'activation': 'gelu',  # entry of layers.ACTIVATIONS
    'init': 'glorot',  # entry of transformer.BLOCK_INITS
}
# Field -> smallest and largest number.
RANGES = {
    'width': (0, LARGEST_COUNT),
    'mlp': (1, LARGEST_COUNT),
    'heads': (1, LARGEST_COUNT),
    'head_width': (1, LARGEST_COUNT),
    'eps': (0, 1),
}
EXAMPLE = "('specific', 'specific', 'merged')"


def build(model: Mapping[str, Any], dtype: str) -> Fusion | None:
    """Build the fusion of a model.

    Args:
        model: config.model.
        dtype: of activations.

    Returns:
        None where config.model.fusion is empty: streams do not meet.

    Raises:
        ConfigError: a field is wrong.
    """
    # Configs of runs from before this field do not have it.
    if not model.get('fusion'):
        return None
    fields = with_defaults(model['fusion'], DEFAULTS, WHERE)
    streams = fields.streams or tuple(model['towers'])
    check(fields, streams, model['towers'])
    choose(model['attention'], IMPLEMENTATIONS, 'config.model.attention')
    choose(model['remat'], REMAT, 'config.model.remat')
    options = BlockOptions(
        mlp=fields.mlp,
        heads=fields.heads,
        head_width=fields.head_width,
        dropout=fields.dropout,
        attention_dropout=fields.attention_dropout,
        bias=fields.bias,
        pre_norm=fields.pre_norm,
        eps=fields.eps,
        activation=fields.activation,
        kernel_init=fields.init,
        depth=len(fields.types),
        implementation=model['attention'],
        dtype=dtype,
    )
    # parent=None: it becomes a part of `Fusion`, not of the module that this is called in.
    stack = FusionStack(
        streams=tuple(streams),
        types=tuple(fields.types),
        options=options,
        query=fields.query,
        passive=fields.passive,
        width=fields.width,
        remat=model['remat'],
        parent=None,
    )
    return Fusion(stack)


def check(fields: ConfigDict, streams: Sequence[str], towers: Mapping[str, Any]) -> None:
    """Check the fields of config.model.fusion.

    Args:
        fields: complete.
        streams: that meet.
        towers: of the model, by modality.

    Raises:
        ConfigError: one of them is wrong.
    """
    for stream in streams:
        if modality_of(stream) not in towers:
            raise ConfigError(
                f'{WHERE}.streams: expected streams of the towers {", ".join(towers)}, got '
                f'{stream!r}'
            )
    if len(set(streams)) < 2 or len(set(streams)) != len(streams):
        raise ConfigError(
            f'{WHERE}.streams: expected at least two different streams, got '
            f'{", ".join(streams) or "none"}'
        )
    if not fields.types:
        raise ConfigError(f'{WHERE}.types: expected a type for each layer, such as {EXAMPLE}')
    for kind in fields.types:
        choose(kind, TYPES, f'{WHERE}.types')
    choose(fields.passive, PASSIVE, f'{WHERE}.passive')
    if ASYMMETRIC in fields.types:
        choose(fields.query, streams, f'{WHERE}.query')
    choose(fields.activation, ACTIVATIONS, f'{WHERE}.activation')
    choose(fields.init, BLOCK_INITS, f'{WHERE}.init')
    for field, (low, high) in RANGES.items():
        check_range(fields[field], low, high, f'{WHERE}.{field}')
    for field in ('dropout', 'attention_dropout'):
        # A rate of 1 would leave nothing.
        check_range(fields[field], 0, math.nextafter(1, 0), f'{WHERE}.{field}')
