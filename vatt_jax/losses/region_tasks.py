"""Losses of the tasks that ViLBERT and UNITER are fine-tuned for.

VCR, NLVR2 and referring expressions as UNITER has them are cross entropies over candidates,
pictures' pairs or regions: `classification.softmax_cross_entropy`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vatt_jax.losses.arguments import AnyArray, as_mask, check_shape, wide

# UNITER's, of scores in (0, 1).
MARGIN = 0.2


def soft_answers(
    logits: Float[AnyArray, 'B P'],
    targets: Float[AnyArray, 'B P'],
    is_there: Bool[AnyArray, 'B P'] | None = None,
    *,
    valid: Bool[AnyArray, ' B'] | None = None,
) -> Float[Array, '']:
    """Binary cross entropies against soft scores, summed over answers, mean over examples.

    VQA: the answers and how many people gave them. ViLBERT's referring expressions: regions, and
    their IoU with the true box, 0 where it is below one half.

    Args:
        logits: of each answer.
        targets: in [0, 1].
        is_there: answers that count, such as regions that are no padding; None: all.
        valid: examples that count; None: all. With none that counts the loss is 0.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_shape(targets, logits.shape, 'targets')
    counts = as_mask(is_there, logits.shape, 'is_there')
    counts &= as_mask(valid, (len(logits),), 'valid')[:, None]
    logits = jnp.where(counts, wide(logits), 0)
    targets = jnp.where(counts, wide(targets), 0)
    # Of a logit x and target t: max(x, 0) - x t + log(1 + exp(-|x|)), which cannot overflow.
    each = jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    num_examples = jnp.sum(counts.any(-1))
    return jnp.sum(jnp.where(counts, each, 0)) / jnp.maximum(num_examples, 1)


def ranking_margin(
    scores: Float[AnyArray, 'B K'],
    *,
    margin: float = MARGIN,
    valid: Bool[AnyArray, ' B'] | None = None,
) -> Float[Array, '']:
    """Triplet loss of retrieval: mean of max(0, margin + σ(negative) - σ(positive)).

    Args:
        scores: of the pair that matches, which is the first, and of K - 1 that do not.
        margin: between both, after the sigmoid σ.
        valid: rows that count; None: all. With none that counts the loss is 0.

    Raises:
        ValueError: there is no negative.
    """
    num_negatives = scores.shape[1] - 1
    if num_negatives < 1:
        raise ValueError(f'scores: expected a negative beside the positive, got {scores.shape}')
    counts = as_mask(valid, (len(scores),), 'valid')[:, None]
    probability = jax.nn.sigmoid(jnp.where(counts, wide(scores), 0))
    lacking = jnp.maximum(margin + probability[:, 1:] - probability[:, :1], 0)
    num_pairs = jnp.maximum(jnp.sum(counts) * num_negatives, 1)
    return jnp.sum(jnp.where(counts, lacking, 0)) / num_pairs
