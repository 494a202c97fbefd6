"""The passes of a training step through the model: towers, fusion, projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vatt_jax.config import ConfigError
from vatt_jax.inputs.batch import modality_of
from vatt_jax.models import Encoded
from vatt_jax.models.towers.stages import COLLECTION as STAGES
from vatt_jax.rng import Rng


def map_of(stream: str) -> str:
    """The name under which `run_towers` returns the map of a stream."""
    return f'{stream}/map'


def stage_of(stream: str, number: int) -> str:
    """The name under which `run_towers` returns the features after a stage of a stream's tower."""
    return f'{stream}/stage_{number}'


def tokens_of(stream: str) -> str:
    """The name under which `encode_tokens` returns the tokens of a stream."""
    return f'{stream}/tokens'


def mask_of(stream: str) -> str:
    """The name under which `encode_tokens` says which tokens of a stream are words."""
    return f'{stream}/mask'


def run_towers(
    model: Any,
    variables: Any,
    batch: Mapping[str, Any],
    rng: Rng,
    maps: tuple[str, ...] = (),
    stages: tuple[tuple[str, int], ...] = (),
) -> tuple[dict[str, jax.Array], Any]:
    """The towers in training mode, without projections to common spaces.

    These belong to `compute_loss`, since their batch norm takes statistics over all clips together.

    Args:
        model: the Linen module.
        variables: {'params', 'batch_stats'} of the model, or of a teacher.
        batch: the device batch; all of its streams are encoded.
        rng: random bits of these clips.
        maps: streams whose features before pooling are returned too, as `map_of(stream)`.
        stages: (stream, number of a stage of its tower) of features that are returned too, as
            `stage_of(stream, number)`.

    Returns:
        ({stream: pooled features [B(,K) D], map_of(stream): [B grid… D], stage_of(stream, number):
        mean over the positions [B D]}, new batch statistics).

    Raises:
        ConfigError: a tower of `maps` drops tokens, so that what is left is no grid.
    """
    features, updates = model.apply(
        variables,
        batch,
        train=True,
        rng=rng,
        maps=maps,
        stages=stages,
        # Towers hand out their stages where they may write them down.
        mutable=['batch_stats', STAGES] if stages else ['batch_stats'],
        method=_features,
    )
    # Flax leaves a mutable collection out of `updates` if no module has variables in it.
    return features, updates.get('batch_stats', {})


def _features(
    model: Any,
    batch: Mapping[str, Any],
    *,
    train: bool,
    rng: Rng,
    maps: tuple[str, ...],
    stages: tuple[tuple[str, int], ...],
) -> dict[str, jax.Array]:
    """See `run_towers`; a method for `model.apply`."""
    encoded = model.encode_all(batch, train=train, rng=rng, features=bool(maps))
    valid = {name: batch[name]['valid'] for name in encoded}
    encoded = model.interact(encoded, valid=valid, train=train, rng=rng)
    features = {name: stream.pooled for name, stream in encoded.items()}
    # Of these streams alone: maps would otherwise be held for every microbatch.
    for name in maps:
        if encoded[name].kept is not None:
            raise ConfigError(
                f'config.model.towers.{modality_of(name)}.drop_token: this objective reads the '
                'whole grid of features, expected 0'
            )
        tokens = encoded[name].tokens  # [B N D]
        features[map_of(name)] = tokens.reshape(len(tokens), *encoded[name].grid, -1)
    for name, number in stages:
        stage = encoded[name].stages[number]  # [B grid… D]
        features[stage_of(name, number)] = stage.mean(range(1, stage.ndim - 1))
    return features


def encode_tokens(
    model: Any, variables: Any, batch: Mapping[str, Any], rng: Rng
) -> tuple[dict[str, jax.Array], Any]:
    """The towers in training mode with all their tokens, before streams interact.

    For objectives that change what meets: pairs of clips that do not belong together.

    Args:
        model: the Linen module.
        variables: {'params', 'batch_stats'} of the model.
        batch: the device batch; all of its streams are encoded.
        rng: random bits of these clips.

    Returns:
        ({stream: pooled features [B(,K) D], tokens_of(stream): [B(,K) N D], mask_of(stream):
        float32 [B(,K) N], 1 for a word, of streams that have a mask}, new batch statistics).
    """
    encoded, batch_stats = encode_streams(model, variables, batch, rng, train=True)
    features = {}
    for name, stream in encoded.items():
        features[name] = stream.pooled
        features[tokens_of(name)] = stream.tokens
        if stream.mask is not None:
            # Floats: exact accumulation differentiates by all that is returned here.
            features[mask_of(name)] = stream.mask.astype(jnp.float32)
    return features, batch_stats


def encode_streams(
    model: Any, variables: Any, batch: Mapping[str, Any], rng: Rng, train: bool
) -> tuple[dict[str, Encoded], Any]:
    """The towers with all their tokens, before streams interact.

    Args:
        model: the Linen module.
        variables: {'params', 'batch_stats'} of the model, or of a teacher.
        batch: the device batch; all of its streams are encoded.
        rng: random bits of these clips.
        train: whether dropout, DropToken and batch statistics are on.

    Returns:
        ({stream: Encoded}, new batch statistics).
    """
    encoded, updates = model.apply(
        variables,
        batch,
        train=train,
        rng=rng,
        features=True,
        mutable=['batch_stats'],
        method='encode_all',
    )
    return encoded, updates.get('batch_stats', {})


def interact(
    model: Any,
    variables: Any,
    features: Mapping[str, Any],
    valid: Mapping[str, Any],
    rng: Rng,
) -> dict[str, Encoded]:
    """Let streams attend to each other in training mode.

    Args:
        model: the Linen module.
        variables: {'params', 'batch_stats'} of the model.
        features: what `encode_tokens` returns, clips maybe exchanged.
        valid: {stream: bool [B]}, the clips that have it.
        rng: random bits of the step.
    """
    encoded = {}
    for name in valid:
        mask = features.get(mask_of(name))
        encoded[name] = Encoded(
            features[name], features[tokens_of(name)], None if mask is None else mask > 0
        )
    fused: dict[str, Encoded] = model.apply(
        variables, encoded, valid=dict(valid), train=True, rng=rng, method='interact'
    )
    return fused


def project(
    model: Any, variables: Any, pooled: Mapping[str, Any], valid: Mapping[str, Any]
) -> tuple[dict[str, dict[str, jax.Array]], Any]:
    """The projections to common spaces in training mode, of all clips together.

    Args:
        model: the Linen module.
        variables: {'params', 'batch_stats'} of the model, or of a teacher.
        pooled: stream -> features of its tower [B(,K) D].
        valid: stream -> bool [B], the clips that count in batch statistics.

    Returns:
        ({space: {stream: float32 [B(,K) E]}}, un-normalised; new batch statistics).
    """
    spaces, updates = model.apply(
        variables,
        {stream: Encoded(features) for stream, features in pooled.items()},
        valid=dict(valid),
        train=True,
        mutable=['batch_stats'],
        method='project',
    )
    return spaces, updates.get('batch_stats', {})
