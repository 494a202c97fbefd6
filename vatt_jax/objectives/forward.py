"""The two passes of a training step through the model, both with new batch statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from vatt_jax.models import Encoded
from vatt_jax.rng import Rng


def run_towers(
    model: Any, variables: Any, batch: Mapping[str, Any], rng: Rng
) -> tuple[dict[str, jax.Array], Any]:
    """The towers in training mode, without projections to common spaces.

    These belong to `compute_loss`, since their batch norm takes statistics over all clips together.

    Args:
        model: the Linen module.
        variables: {'params', 'batch_stats'} of the model, or of a teacher.
        batch: the device batch; all of its streams are encoded.
        rng: random bits of these clips.

    Returns:
        ({stream: pooled features [B(,K) D]}, new batch statistics).
    """
    pooled, updates = model.apply(
        variables, batch, train=True, rng=rng, mutable=['batch_stats'], method=_pooled_features
    )
    # Flax leaves a mutable collection out of `updates` if no module has variables in it.
    return pooled, updates.get('batch_stats', {})


def _pooled_features(
    model: Any, batch: Mapping[str, Any], *, train: bool, rng: Rng
) -> dict[str, jax.Array]:
    """stream -> pooled features [B(,K) D]; a method for `model.apply`."""
    encoded = model.interact(model.encode_all(batch, train=train, rng=rng))
    # Without token maps, which would otherwise be held for every microbatch.
    return {name: stream.pooled for name, stream in encoded.items()}


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
