"""Losses over masked regions or patches: what was there is regressed, classified or found again.

The four forms of ViLBERT (Lu et al. 2019) and UNITER (Chen et al. 2020, section 3.3). Predictions
and targets lie over all N regions of a picture; the mask says which ones count, and what the others
hold does not matter. Each loss is the mean over the masked regions of the whole batch, 0 without
any. Targets carry no gradient: they are inputs, or a teacher's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vatt_jax.losses.arguments import AnyArray, Scalar, as_mask, check_shape, wide
from vatt_jax.losses.classification import softmax_cross_entropy
from vatt_jax.losses.info_nce import Keys, info_nce
from vatt_jax.losses.similarity import AUTO, How


def feature_regression(
    predicted: Float[AnyArray, 'B N D'],
    target: Float[AnyArray, 'B N D'],
    is_masked: Bool[AnyArray, 'B N'],
) -> Float[Array, '']:
    """Squared error, averaged over the masked regions and their D numbers (UNITER's MRFR).

    Args:
        predicted: features that the model infers.
        target: features that were masked.
        is_masked: regions that count.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_shape(target, predicted.shape, 'target')
    mask = as_mask(is_masked, predicted.shape[:2], 'is_masked')
    # Selected before anything is computed: not even NaN of other regions reaches a gradient.
    predicted = jnp.where(mask[..., None], wide(predicted), 0)
    target = jax.lax.stop_gradient(jnp.where(mask[..., None], wide(target), 0))
    return _mean(jnp.mean((predicted - target) ** 2, -1), mask)


def best_classes(
    probabilities: Float[AnyArray, '*shape P'], background: int | None = 0
) -> Int[Array, '*shape']:
    """Hard labels of a detector's soft ones: the best class that is not the background.

    Args:
        probabilities: of each class.
        background: number of the class that is no object; None: there is none.
    """
    if background is None:
        return jnp.argmax(probabilities, -1)
    is_background = jnp.arange(probabilities.shape[-1]) == background
    return jnp.argmax(jnp.where(is_background, -jnp.inf, probabilities), -1)


def class_cross_entropy(
    logits: Float[AnyArray, 'B N P'],
    classes: Int[AnyArray, 'B N'],
    is_masked: Bool[AnyArray, 'B N'],
) -> Float[Array, '']:
    """Cross entropy of the masked regions' classes (UNITER's MRC); masked words' are the same.

    Args:
        logits: of each class, or word.
        classes: see `best_classes`; numbers of the words that were there. Any number elsewhere.
        is_masked: regions, or words, that count.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_shape(classes, logits.shape[:2], 'classes')
    mask = as_mask(is_masked, logits.shape[:2], 'is_masked')
    logits = jnp.where(mask[..., None], logits, 0)
    flat = logits.reshape(-1, logits.shape[-1])
    return softmax_cross_entropy(flat, jnp.ravel(classes), weight=mask.ravel())


def class_divergence(
    logits: Float[AnyArray, 'B N P'],
    teacher: Float[AnyArray, 'B N P'],
    is_masked: Bool[AnyArray, 'B N'],
    *,
    mean_over_classes: bool = False,
) -> Float[Array, '']:
    """KL(teacher ‖ model) over classes (ViLBERT's loss; UNITER's MRC-kl).

    Args:
        logits: of each class.
        teacher: probabilities, such as a detector's; classes of probability 0 add nothing.
        is_masked: regions that count.
        mean_over_classes: divide by P too, as UNITER's trainer does: with P = 1601 its loss is that
            much smaller than the divergence.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_shape(teacher, logits.shape, 'teacher')
    mask = as_mask(is_masked, logits.shape[:2], 'is_masked')
    logits = jnp.where(mask[..., None], wide(logits), 0)
    teacher = jax.lax.stop_gradient(jnp.where(mask[..., None], wide(teacher), 0))
    log_probs = jax.nn.log_softmax(logits, -1)
    # xlogy(0, 0) is 0.
    divergence = jnp.sum(jax.scipy.special.xlogy(teacher, teacher) - teacher * log_probs, -1)
    if mean_over_classes:
        divergence = divergence / logits.shape[-1]
    return _mean(divergence, mask)


def region_nce(
    predicted: Float[AnyArray, 'B N D'],
    target: Float[AnyArray, 'B N D'],
    is_masked: Bool[AnyArray, 'B N'],
    valid: Bool[AnyArray, 'B N'] | None = None,
    *,
    own_picture: bool = True,
    temperature: Scalar = 1.0,
    normalise: bool = False,
    how: How = AUTO,
) -> Float[Array, '']:
    """The prediction for a masked region must find its features among the batch's regions.

        loss = mean over masked regions of  log Σ_regions exp s - s(own),   s = ⟨predicted, target⟩

    Args:
        predicted: features that the model infers.
        target: features of all regions, masked ones included.
        is_masked: regions that count.
        valid: regions that are there, the others being padding; None: all. Those that are masked
            must be among them, or they are left out.
        own_picture: the other regions of the same picture are negatives; False: those of other
            pictures alone.
        temperature: scores are divided by it; the released code has none.
        normalise: compare unit vectors.
        how: how the sums are computed; see `similarity.py`. No array of all scores is made.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_shape(target, predicted.shape, 'target')
    num_pictures, num_regions, width = predicted.shape
    mask = as_mask(is_masked, (num_pictures, num_regions), 'is_masked').ravel()
    is_there = as_mask(valid, (num_pictures, num_regions), 'valid').ravel()
    queries = jnp.reshape(predicted, (-1, width))
    targets = jnp.reshape(target, (-1, width))
    further: tuple[Keys, ...] = ()
    pictures = None
    if not own_picture:
        pictures = jnp.repeat(jnp.arange(num_pictures), num_regions)
        further = (Keys(targets, valid=is_there, apart=pictures),)
    return info_nce(
        queries,
        targets,
        x_valid=mask,
        y_valid=is_there,
        ids=pictures,
        keys=further,
        in_batch=own_picture,
        temperature=temperature,
        normalise=normalise,
        how=how,
    )


def _mean(values: Float[Array, 'B N'], mask: Bool[Array, 'B N']) -> Float[Array, '']:
    """Over the regions that count; 0 without any."""
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)
