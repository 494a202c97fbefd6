"""Corruption for masked modelling: words and regions that are hidden, and are to be told.

Words as in BERT (Devlin et al. 2019): of those chosen some become the mask token, some another
word, and some stay. Regions, or patches, become zeros, as in UNITER (Chen et al. 2020) and ViLBERT
(Lu et al. 2019). Draws are keyed by example (`rng.py`), so that they are the same on any mesh.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from vatt_jax.config import ConfigError, check_range, choose
from vatt_jax.rng import Rng

AnyArray = Array | np.ndarray

# The label of a word that is not to be told.
IGNORED = -1

# What is corrupted at once. Joint: both sides of every example. Conditional: one of them, drawn for
# each, so that the other is whole. Words, regions: that side of all (UNITER draws a task a step).
SCHEMES = ('joint', 'conditional', 'words', 'regions')


@dataclasses.dataclass(frozen=True)
class WordMasking:
    """How words are masked.

    Attributes:
        mask_id: number of the mask token.
        vocabulary: (first, end) of the numbers that random words are drawn from, special tokens
            left out.
        share: of the words that are chosen.
        mask_share: of those, how many become the mask token.
        random_share: of those, how many become a random word. The rest stays.
        at_least_one: where none is chosen, the first word becomes the mask token (UNITER).

    Raises:
        ConfigError: a share is out of range, or the vocabulary is empty.
    """

    mask_id: int
    vocabulary: tuple[int, int]
    share: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    at_least_one: bool = False

    def __post_init__(self) -> None:
        check_range(self.share, 0, 1, 'word masking: share')
        check_range(self.mask_share, 0, 1, 'word masking: mask_share')
        check_range(self.random_share, 0, 1, 'word masking: random_share')
        both = self.mask_share + self.random_share
        check_range(both, 0, 1, 'word masking: mask_share + random_share')
        first, end = self.vocabulary
        if not 0 <= first < end:
            raise ConfigError(
                f'word masking: vocabulary: expected (first, end) with 0 <= first < end, got '
                f'{self.vocabulary}'
            )


@dataclasses.dataclass(frozen=True)
class RegionMasking:
    """How regions or patches are masked.

    Attributes:
        share: of the regions that are chosen.
        zero_share: of those, how many become zeros; the rest stays and is to be told all the same
            (ViLBERT: 0.9).
        at_least_one: where none is chosen, one is drawn (UNITER).

    Raises:
        ConfigError: a share is out of range.
    """

    share: float = 0.15
    zero_share: float = 1.0
    at_least_one: bool = True

    def __post_init__(self) -> None:
        check_range(self.share, 0, 1, 'region masking: share')
        check_range(self.zero_share, 0, 1, 'region masking: zero_share')


# The forms of the released code.
UNITER_REGIONS = RegionMasking()
VILBERT_REGIONS = RegionMasking(zero_share=0.9, at_least_one=False)


class MaskedWords(NamedTuple):
    """Words after corruption.

    Attributes:
        ids: int32 [B L], what the model reads.
        labels: int32 [B L], the word that was there where it is to be told, elsewhere IGNORED.
        is_masked: bool [B L], words that are to be told.
    """

    ids: Int32[Array, 'B L']
    labels: Int32[Array, 'B L']
    is_masked: Bool[Array, 'B L']


class MaskedRegions(NamedTuple):
    """Regions after corruption.

    Attributes:
        features: [B N D], what the model reads; zeros where a region is hidden.
        is_masked: bool [B N], regions that are to be told.
        is_hidden: bool [B N], those of them that became zeros: where UNITER adds its mask vector.
    """

    features: Float[Array, 'B N D']
    is_masked: Bool[Array, 'B N']
    is_hidden: Bool[Array, 'B N']


def mask_words(
    ids: Int[AnyArray, 'B L'],
    maskable: Bool[AnyArray, 'B L'],
    options: WordMasking,
    rng: Rng,
    examples: Bool[AnyArray, ' B'] | None = None,
) -> MaskedWords:
    """Corrupts the words of B sentences.

    Args:
        ids: numbers of the words.
        maskable: words that may be chosen: no padding and no special tokens.
        options: how many, and what they become.
        rng: of these sentences.
        examples: sentences that are corrupted at all (`corrupted_sides`); None: all.
    """
    rng = rng.at('masked_words')
    ids = jnp.asarray(ids, jnp.int32)
    maskable = _of_examples(maskable, examples)
    is_masked = _choose(maskable, options.share, rng)

    kind = rng.at('kind').uniform(ids.shape[1:])  # [B L]
    becomes_mask = kind < options.mask_share
    becomes_random = ~becomes_mask & (kind < options.mask_share + options.random_share)
    if options.at_least_one:
        is_first = maskable & (jnp.cumsum(maskable, -1) == 1)
        is_added = is_first & ~is_masked.any(-1, keepdims=True)
        is_masked |= is_added
        becomes_mask |= is_added

    first, end = options.vocabulary
    # Of 2^32 bit patterns the remainder favours some words by less than one in 10^5.
    offset = rng.at('word').bits(ids.shape[1:]) % jnp.uint32(end - first)
    replaced = jnp.where(becomes_random, first + offset.astype(jnp.int32), ids)
    replaced = jnp.where(becomes_mask, options.mask_id, replaced)
    corrupted = jnp.where(is_masked, replaced, ids)
    return MaskedWords(corrupted, jnp.where(is_masked, ids, IGNORED), is_masked)


def mask_regions(
    features: Float[AnyArray, 'B N D'],
    valid: Bool[AnyArray, 'B N'],
    options: RegionMasking,
    rng: Rng,
    examples: Bool[AnyArray, ' B'] | None = None,
) -> MaskedRegions:
    """Corrupts the regions, or patches, of B pictures.

    Args:
        features: of each region.
        valid: regions that may be chosen: no padding, and no global one.
        options: how many, and what they become.
        rng: of these pictures.
        examples: pictures that are corrupted at all (`corrupted_sides`); None: all.
    """
    rng = rng.at('masked_regions')
    features = jnp.asarray(features)
    maskable = _of_examples(valid, examples)
    is_masked = _choose(maskable, options.share, rng)
    if options.at_least_one:
        order = jnp.where(maskable, rng.at('one').uniform(maskable.shape[1:]), -1)
        is_drawn = jnp.arange(maskable.shape[1]) == jnp.argmax(order, -1, keepdims=True)
        is_masked |= is_drawn & maskable & ~is_masked.any(-1, keepdims=True)
    becomes_zero = rng.at('kind').uniform(maskable.shape[1:]) < options.zero_share
    is_hidden = is_masked & becomes_zero
    return MaskedRegions(jnp.where(is_hidden[..., None], 0, features), is_masked, is_hidden)


def covered_regions(
    overlaps: Float[AnyArray, 'B N N'], is_masked: Bool[AnyArray, 'B N'], threshold: float = 0.4
) -> Bool[Array, 'B N']:
    """Regions that show too much of a masked one, itself included.

    ViLBERT leaves them out of the number that it divides its global feature by.

    Args:
        overlaps: IoU of each two boxes of a picture.
        is_masked: see `MaskedRegions`.
        threshold: IoU above which a region is covered.
    """
    covers = jnp.asarray(is_masked)[:, :, None] & (jnp.asarray(overlaps) > threshold)
    return jnp.any(covers, 1)


def corrupted_sides(scheme: str, rng: Rng) -> tuple[Bool[Array, ' B'], Bool[Array, ' B']]:
    """Which examples' words and which examples' regions are corrupted.

    Args:
        scheme: entry of SCHEMES.
        rng: of the examples.

    Returns:
        `examples` of `mask_words` and of `mask_regions`.

    Raises:
        ConfigError: there is no such scheme.
    """
    choose(scheme, SCHEMES, 'masking: scheme')
    everyone = jnp.ones(rng.examples.shape, bool)
    if scheme == 'joint':
        return everyone, everyone
    if scheme == 'words':
        return everyone, ~everyone
    if scheme == 'regions':
        return ~everyone, everyone
    of_words = rng.at('corrupted_side').uniform() < 0.5
    return of_words, ~of_words


def _of_examples(
    maskable: Bool[AnyArray, 'B N'], examples: Bool[AnyArray, ' B'] | None
) -> Bool[Array, 'B N']:
    """What may be chosen of the examples that are corrupted."""
    maskable = jnp.asarray(maskable)
    return maskable if examples is None else maskable & jnp.asarray(examples)[:, None]


def _choose(maskable: Bool[Array, 'B N'], share: float, rng: Rng) -> Bool[Array, 'B N']:
    """Each by itself with this probability."""
    return maskable & (rng.at('chosen').uniform(maskable.shape[1:]) < share)
