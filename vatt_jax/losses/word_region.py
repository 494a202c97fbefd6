"""Word-region alignment (UNITER, Chen et al. 2020, section 3.3): words move to regions.

The distance of a sentence and a picture is the cost of transporting its words to its regions,
1 - cosine for each pair, along the plan of `clustering/ipot.py`. It is small where every word has
a region of its own that looks like it. The plan is a constant: gradients flow through the cost.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vatt_jax.clustering import ipot
from vatt_jax.losses.arguments import AnyArray, Valid, as_mask, check_shape, unit, wide


def transport_distance(
    words: Float[AnyArray, 'B L D'],
    regions: Float[AnyArray, 'B N D'],
    words_valid: Bool[AnyArray, 'B L'] | None = None,
    regions_valid: Bool[AnyArray, 'B N'] | None = None,
    *,
    beta: float = ipot.BETA,
    iterations: int = ipot.ITERATIONS,
) -> Float[Array, ' B']:
    """Distance of each sentence from its picture, in [0, 2].

    Args:
        words: last hidden states of the words; UNITER counts its begin and end marks among them.
        regions: last hidden states of the regions, or patches.
        words_valid: words that are no padding; None: all.
        regions_valid: the same of regions. An example that lacks either side has distance 0.
        beta: see `ipot.transport_plan`.
        iterations: see `ipot.transport_plan`.

    Raises:
        ValueError: the shapes do not fit, or a number is not positive.
    """
    if jnp.ndim(words) != 3 or jnp.ndim(regions) != 3 or words.shape[-1] != regions.shape[-1]:
        raise ValueError(
            f'expected words [B L D] and regions [B N D], got words {jnp.shape(words)} and '
            f'regions {jnp.shape(regions)}'
        )
    has_word = as_mask(words_valid, words.shape[:2], 'words_valid')
    has_region = as_mask(regions_valid, (len(words), regions.shape[1]), 'regions_valid')
    # Padding is cut out before anything is computed from it: not even NaN reaches a gradient.
    words = unit(jnp.where(has_word[..., None], wide(words), 0))
    regions = unit(jnp.where(has_region[..., None], wide(regions), 0))
    cosine = jnp.einsum('bld,bnd->bln', words, regions, precision='highest')
    plan = ipot.transport_plan(1 - cosine, has_word, has_region, beta=beta, iterations=iterations)
    return jnp.sum((1 - cosine) * plan, (1, 2))


def word_region_alignment(
    words: Float[AnyArray, 'B L D'],
    regions: Float[AnyArray, 'B N D'],
    is_match: Bool[AnyArray, ' B'],
    words_valid: Bool[AnyArray, 'B L'] | None = None,
    regions_valid: Bool[AnyArray, 'B N'] | None = None,
    *,
    valid: Valid = None,
    beta: float = ipot.BETA,
    iterations: int = ipot.ITERATIONS,
) -> Float[Array, '']:
    """Draws words to the regions of their own picture, and away from those of another one.

        loss = (sum of distances of matched pairs - sum of those of mismatched ones) / pairs

    UNITER adds it to the matching loss with weight 0.1.

    Args:
        words: see `transport_distance`.
        regions: see `transport_distance`.
        is_match: whether sentence and picture belong together.
        words_valid: see `transport_distance`.
        regions_valid: see `transport_distance`.
        valid: pairs that count; None: all. With none that counts the loss is 0.
        beta: see `ipot.transport_plan`.
        iterations: see `ipot.transport_plan`.

    Raises:
        ValueError: the shapes do not fit, or a number is not positive.
    """
    check_shape(is_match, (len(words),), 'is_match')
    counts = as_mask(valid, (len(words),), 'valid')
    # A pair that does not count is padding throughout, so that its gradient is zero too.
    has_word = as_mask(words_valid, words.shape[:2], 'words_valid') & counts[:, None]
    distance = transport_distance(
        words, regions, has_word, regions_valid, beta=beta, iterations=iterations
    )
    signed = jnp.where(is_match, distance, -distance)
    return jnp.sum(jnp.where(counts, signed, 0)) / jnp.maximum(jnp.sum(counts), 1)
