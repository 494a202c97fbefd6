"""ViLBERT (Lu et al. 2019): masked words, masked regions and matching, all at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from vatt_jax.config import check_range, choose
from vatt_jax.inputs import masking
from vatt_jax.inputs.masking import WordMasking
from vatt_jax.inputs.regions import Regions, Words, add_global
from vatt_jax.losses import masked_regions
from vatt_jax.losses.detection import intersection_over_union
from vatt_jax.models.vision_language import VilbertOutputs
from vatt_jax.objectives.region_pretraining.pairs import (
    Pairs,
    Told,
    hide,
    match_loss,
    needed_classes,
)
from vatt_jax.rng import Rng

# What is told of a masked region: the detector's classes, its feature, or which one it is.
DIVERGENCE, FEATURES, CONTRAST = 'divergence', 'features', 'contrast'
VILBERT_TARGETS = (DIVERGENCE, FEATURES, CONTRAST)
# Names of the losses.
WORDS, REGIONS, MATCH = 'words', 'regions', 'match'


@dataclasses.dataclass(frozen=True)
class VilbertLosses:
    """Which losses ViLBERT has.

    Attributes:
        target: entry of VILBERT_TARGETS, what is told of a masked region.
        matched_only: words and regions of mismatched pairs are not to be told.
        match: whether matching counts.
        region_weight: of the loss of regions.

    Raises:
        ConfigError: a field is wrong.
    """

    target: str = DIVERGENCE
    matched_only: bool = False
    match: bool = True
    region_weight: float = 1.0

    def __post_init__(self) -> None:
        choose(self.target, VILBERT_TARGETS, 'target')
        check_range(self.region_weight, 0, float('inf'), 'region_weight')


def vilbert_inputs(
    pairs: Pairs,
    words: WordMasking,
    rng: Rng,
    *,
    regions: masking.RegionMasking = masking.VILBERT_REGIONS,
    scheme: str = 'joint',
) -> tuple[Words, Regions, Told]:
    """Hide words and regions, and add the global region.

    Args:
        pairs: whose boxes begin with x0 y0 x1 y1.
        words: how words are hidden.
        rng: of the batch.
        regions: how regions are hidden.
        scheme: entry of masking.SCHEMES; ViLBERT's is joint.

    Returns:
        What the model reads, and what it is to tell. Regions of both have the global one first.
    """
    of_words, of_regions = masking.corrupted_sides(scheme, rng)
    seen_words, seen, told = hide(pairs, words, regions, rng, of_words, of_regions)
    return seen_words, *with_global(seen, told)


def with_global(seen: Regions, told: Told) -> tuple[Regions, Told]:
    """Put the global region first, of which nothing is to be told.

    Args:
        seen: regions that the model reads, whose boxes begin with x0 y0 x1 y1.
        told: what it is to tell of them.
    """
    corners = jnp.asarray(seen.boxes)[..., :4]
    overlaps = intersection_over_union(corners[:, :, None], corners[:, None, :])
    is_covered = masking.covered_regions(overlaps, told.is_masked_region)
    told = dataclasses.replace(
        told,
        # The global region is never to be told: what stands in its place does not matter.
        features=_with_first(told.features),
        classes=None if told.classes is None else _with_first(told.classes),
        is_masked_region=_with_first(told.is_masked_region),
        is_region=_with_first(told.is_region),
    )
    return add_global(seen, is_covered), told


def vilbert_losses(
    outputs: VilbertOutputs, told: Told, options: VilbertLosses | None = None
) -> dict[str, Array]:
    """ViLBERT's three losses, and their sum.

    Args:
        outputs: of the model.
        told: of `vilbert_inputs`.
        options: which losses there are; None: the published ones.

    Returns:
        {'loss': the sum, and 'words', 'regions', 'match'}.

    Raises:
        ConfigError: the target needs probabilities of classes, and there are none.
    """
    options = options or VilbertLosses()
    counts = jnp.ones_like(told.is_match)
    if options.matched_only:
        counts = told.is_match
    is_masked_word = told.is_masked_word & counts[:, None]
    is_masked_region = told.is_masked_region & counts[:, None]
    losses = {
        WORDS: masked_regions.class_cross_entropy(outputs.word_logits, told.words, is_masked_word),
        REGIONS: _vilbert_regions(outputs.region_logits, told, is_masked_region, options.target),
        # Label 0 is a pair that matches.
        MATCH: match_loss(outputs.match_logits, ~told.is_match, told.valid),
    }
    total = losses[WORDS] + options.region_weight * losses[REGIONS]
    if options.match:
        total = total + losses[MATCH]
    return {'loss': total, **losses}


def _vilbert_regions(
    predicted: Array, told: Told, is_masked: Bool[Array, 'B N'], target: str
) -> Array:
    """The loss of masked regions."""
    if target == FEATURES:
        return masked_regions.feature_regression(predicted, told.features, is_masked)
    if target == CONTRAST:
        return masked_regions.region_nce(predicted, told.features, is_masked, told.is_region)
    return masked_regions.class_divergence(predicted, needed_classes(told.classes), is_masked)


def _with_first(x: Any) -> Array:
    """[B N …] -> [B 1+N …], zeros (False) first."""
    x = jnp.asarray(x)
    return jnp.pad(x, ((0, 0), (1, 0), *((0, 0),) * (x.ndim - 2)))
