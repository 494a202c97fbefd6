"""Pairs of a sentence and a picture: those that do not match, and what is hidden of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from vatt_jax.config import ConfigError, choose
from vatt_jax.inputs import masking
from vatt_jax.inputs.masking import WordMasking
from vatt_jax.inputs.regions import Words
from vatt_jax.losses.arguments import AnyArray
from vatt_jax.losses.classification import softmax_cross_entropy
from vatt_jax.objectives.partners import draw_partners
from vatt_jax.rng import Rng


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
    pairs: Pairs, record: Int[AnyArray, ' B'], side: str, rng: Rng, share: float = 0.5
) -> Pairs:
    """Give some pairs a side of another pair of the global batch.

    Args:
        pairs: that all match.
        record: of which picture each is; others of the same are no negatives.
        side: 'words' (ViLBERT replaces the caption) or 'regions' (UNITER the picture).
        rng: of the batch.
        share: probability of each pair. A pair without a partner stays as it is.

    Raises:
        ConfigError: there is no such side.
    """
    choose(side, ('words', 'regions'), 'side')
    rng = rng.at('mismatched')
    valid = counted(pairs)
    partner, has_partner = draw_partners(jnp.asarray(record), valid, rng)
    is_replaced = (rng.at('coin').uniform() < share) & has_partner & valid
    row = jnp.where(is_replaced, partner, jnp.arange(len(valid)))

    def take(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.asarray(x)[row], tree)

    if side == 'words':
        pairs = dataclasses.replace(pairs, words=take(pairs.words), maskable=take(pairs.maskable))
    else:
        pairs = dataclasses.replace(pairs, regions=take(pairs.regions), classes=take(pairs.classes))
    return dataclasses.replace(pairs, is_match=~is_replaced)


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
