"""Noise-contrastive estimation: data against noise, one yes/no question for each score."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vatt_jax.losses.arguments import AnyArray, Scalar, Valid, as_mask, check_shape, wide


def noise_contrastive(
    positive: Float[AnyArray, 'B P'],
    negative: Float[AnyArray, 'B K'],
    *,
    log_z: Scalar,
    valid: Valid = None,
) -> Float[Array, '']:
    """True NCE (Gutmann and Hyvärinen), as AVID has it; not InfoNCE.

    A score s is of data rather than of K noise samples with probability e^s / (e^s + K Z), which is
    sigmoid(s - log K - log Z). For each clip

        loss = mean over its positives of -log P(data | s) - sum over its negatives of
               log P(noise | s)

    and the mean over valid clips. Positives are averaged, negatives are summed (the authors' code).

    Args:
        positive: scores s, over the temperature, of each clip's positives.
        negative: the same of its negatives.
        log_z: log of the constant Z that normalises exp(s).
        valid: bool [B], which clips count; no valid clip: loss 0.

    Returns:
        float32 [].

    Raises:
        ValueError: the shapes do not fit, or there is no score.
    """
    check_shape(negative, (len(positive), negative.shape[-1]), 'negative')
    if not positive.size or not negative.size:
        raise ValueError(
            f'expected scores of positives and negatives, got {positive.shape} and {negative.shape}'
        )
    is_valid = as_mask(valid, (len(positive),), 'valid')
    # Masked rows are cut out before anything is computed from them, so that not even 0 * NaN
    # reaches their gradient.
    positive = jnp.where(is_valid[:, None], wide(positive), 0)
    negative = jnp.where(is_valid[:, None], wide(negative), 0)
    log_noise = math.log(negative.shape[-1]) + log_z  # log(K Z)
    # softplus(x) = log(1 + e^x) = -log sigmoid(-x), computed so that nothing overflows.
    is_data = jax.nn.softplus(log_noise - positive).mean(-1)  # [B]
    is_noise = jax.nn.softplus(negative - log_noise).sum(-1)  # [B]
    loss = jnp.where(is_valid, is_data + is_noise, 0)
    return loss.sum() / jnp.maximum(is_valid.sum(), 1)
