"""Pairs of a sentence and a picture: those that do not match, and what is hidden of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vatt_jax.config import ConfigError, choose
from vatt_jax.inputs import masking
from vatt_jax.inputs.masking import RegionMasking, WordMasking
from vatt_jax.inputs.regions import Regions, Words
from vatt_jax.losses.arguments import AnyArray
from vatt_jax.losses.classification import softmax_cross_entropy
from vatt_jax.objectives.heads import unit as unit_vectors
from vatt_jax.objectives.partners import draw_partners
from vatt_jax.rng import Rng

# What a mismatched pair has of another one.
SIDES = ('words', 'regions')


@flax.struct.dataclass
class Pairs:
    """Sentences and pictures.

    Attributes:
        words: of each pair.
        maskable: bool [B L], words that may be hidden: no padding, no special tokens.
        regions: of each pair, without a global one; features as the detector has them.
        classes: [B N P], the detector's probabilities of each region; None where no task needs
            them.
        is_match: bool [B], pairs whose two sides belong together; None: all.
        valid: bool [B], pairs that count; None: all.
    """

    # Any: JAX rebuilds this tree with other things than arrays as leaves.
    words: Any
    maskable: Any
    regions: Any
    classes: Any = None
    is_match: Any = None
    valid: Any = None


@flax.struct.dataclass
class Told:
    """What is to be told of a batch.

    Attributes:
        words: int32 [B L], the words that were there.
        is_masked_word: bool [B L], those that are to be told.
        features: [B N F], the features that were there, of all regions that the model sees.
        classes: [B N P], the detector's probabilities; None: none.
        is_masked_region: bool [B N], those that are to be told.
        is_region: bool [B N], regions of pairs that count: no padding, and no global one.
        is_match: bool [B].
        valid: bool [B], pairs that count in matching.
    """

    words: Any
    is_masked_word: Any
    features: Any
    classes: Any
    is_masked_region: Any
    is_region: Any
    is_match: Any
    valid: Any


def mismatched(
    pairs: Pairs,
    record: Int[AnyArray, ' B'],
    side: str,
    rng: Rng,
    share: float | Array = 0.5,
    candidates: int = 1,
) -> Pairs:
    """Give some pairs a side of another pair of the global batch.

    Args:
        pairs: that all match.
        record: of which picture each is; others of the same are no negatives.
        side: 'words' (ViLBERT replaces the caption) or 'regions' (UNITER the picture).
        rng: of the batch.
        share: probability of each pair. A pair without a partner stays as it is.
        candidates: how many other pairs are looked at, of which the one is taken whose picture is
            most like the own (hard negatives). 1: any.

    Raises:
        ConfigError: there is no such side.
    """
    choose(side, SIDES, 'side')
    rng = rng.at('mismatched')
    valid = counted(pairs)
    likeness = _likeness(pairs.regions) if candidates > 1 else None
    partner, has_partner = draw_partners(jnp.asarray(record), valid, rng, likeness, candidates)
    is_replaced = (rng.at('coin').uniform() < share) & has_partner & valid
    row = jnp.where(is_replaced, partner, jnp.arange(len(valid)))

    def take(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.asarray(x)[row], tree)

    if side == 'words':
        pairs = dataclasses.replace(pairs, words=take(pairs.words), maskable=take(pairs.maskable))
    else:
        pairs = dataclasses.replace(pairs, regions=take(pairs.regions), classes=take(pairs.classes))
    return dataclasses.replace(pairs, is_match=~is_replaced)


def _likeness(regions: Any) -> Float[Array, 'B B']:
    """Cosines of the mean features of pictures."""
    mask = jnp.asarray(regions.mask)[..., None]
    # The length of a vector does not matter here: the sum does for the mean.
    total = jnp.sum(jnp.where(mask, regions.features, 0), axis=1, dtype=jnp.float32)
    unit = unit_vectors(jax.lax.stop_gradient(total))
    return unit @ unit.T


def hide_words(
    pairs: Pairs, options: WordMasking, rng: Rng, examples: Bool[Array, ' B']
) -> tuple[Words, Bool[Array, 'B L']]:
    """(words that the model reads, those that it is to tell).

    Args:
        pairs: of the batch.
        options: how words are hidden.
        rng: of the batch.
        examples: pairs whose words are hidden at all.
    """
    maskable = jnp.asarray(pairs.maskable) & counted(pairs)[:, None]
    masked = masking.mask_words(pairs.words.ids, maskable, options, rng, examples)
    return pairs.words.replace(ids=masked.ids), masked.is_masked


def hide(
    pairs: Pairs,
    words: WordMasking,
    regions: RegionMasking,
    rng: Rng,
    of_words: Bool[Array, ' B'],
    of_regions: Bool[Array, ' B'],
) -> tuple[Words, Regions, Told]:
    """Hide words and regions of a batch.

    Args:
        pairs: of the batch.
        words: how words are hidden.
        regions: how regions are hidden.
        rng: of the batch.
        of_words: pairs whose words are hidden at all.
        of_regions: likewise of regions.

    Returns:
        What the model reads, and what it is to tell.
    """
    seen_words, is_masked_word = hide_words(pairs, words, rng, of_words)
    valid = jnp.asarray(pairs.regions.mask) & counted(pairs)[:, None]
    hidden = masking.mask_regions(pairs.regions.features, valid, regions, rng, of_regions)
    seen = pairs.regions.replace(features=hidden.features, is_hidden=hidden.is_hidden)
    told = Told(
        words=pairs.words.ids,
        is_masked_word=is_masked_word,
        features=pairs.regions.features,
        classes=pairs.classes,
        is_masked_region=hidden.is_masked,
        is_region=valid,
        is_match=matches(pairs),
        valid=counted(pairs),
    )
    return seen_words, seen, told


def match_loss(logits: Array, labels: Bool[Array, ' B'], valid: Bool[Array, ' B']) -> Array:
    """Cross entropy of whether pairs match, over those that count."""
    return softmax_cross_entropy(logits, labels.astype(jnp.int32), weight=valid)


def needed_classes(classes: Any) -> Array:
    """The detector's probabilities [B N P].

    Raises:
        ConfigError: there are none.
    """
    if classes is None:
        raise ConfigError(
            'classes: expected the probabilities that a detector gave each region, got none; '
            'choose features where there are none'
        )
    return jnp.asarray(classes)


def matches(pairs: Pairs) -> Array:
    """bool [B], pairs whose two sides belong together."""
    if pairs.is_match is None:
        return jnp.ones(len(pairs.maskable), bool)
    return jnp.asarray(pairs.is_match)


def counted(pairs: Pairs) -> Array:
    """bool [B], pairs that count."""
    if pairs.valid is None:
        return jnp.ones(len(pairs.maskable), bool)
    return jnp.asarray(pairs.valid)
