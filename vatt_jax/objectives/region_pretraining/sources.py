"""Pairs of a training batch: a sentence with its marks, and the regions of its picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from vatt_jax.config import ConfigError
from vatt_jax.inputs.regions import Regions, Words, box_numbers
from vatt_jax.inputs.tokenizer import PAD, UNKNOWN
from vatt_jax.objectives.region_pretraining.pairs import Pairs
from vatt_jax.rng import Rng

# The entry of a batch that holds regions which were found before: `features` [B N F], `corners`
# [B N 4] (x0 y0 x1 y1, shares of the picture), `mask` bool [B N], and maybe `classes` [B N P], the
# detector's probabilities.
REGIONS = 'regions'
# Marks of a sentence that the tokenizers of this project do not have: [CLS], [SEP], [MASK].
NUM_MARKS = 3


@dataclasses.dataclass(frozen=True)
class Marks:
    """Numbers of the marks, and of proper words.

    Attributes:
        begin: [CLS].
        end: [SEP].
        mask: [MASK].
        words: (first, end) of the numbers that random words are drawn from.
        table: rows of the word table.
    """

    begin: int
    end: int
    mask: int
    words: tuple[int, int]
    table: int


def marks_of(special: tuple[int, ...], first_word: int, num_words: int) -> Marks:
    """The marks of a tokenizer.

    Args:
        special: numbers of [CLS], [SEP] and [MASK] in it; (): it has none, and they come behind its
            words.
        first_word: the smallest number of a proper word.
        num_words: numbers of words, and of marks that are among them.

    Raises:
        ConfigError: they are not three numbers of the tokenizer.
    """
    if not first_word < num_words:
        raise ConfigError(
            f'config.objective.first_word: expected a number below the {num_words} of '
            f'words, got {first_word}'
        )
    if not special:
        begin, end, mask = range(num_words, num_words + NUM_MARKS)
        return Marks(begin, end, mask, (first_word, num_words), num_words + NUM_MARKS)
    if len(set(special)) != NUM_MARKS or not all(UNKNOWN < x < num_words for x in special):
        raise ConfigError(
            'config.objective.special: expected the numbers of [CLS], [SEP] and [MASK] among '
            f'{num_words} of words, or (), got {special}'
        )
    begin, end, mask = special
    return Marks(begin, end, mask, (first_word, num_words), num_words)


def drawn_sentence(
    stream: Mapping[str, Any], rng: Rng | None
) -> tuple[Int[Array, 'B L'], Bool[Array, ' B']]:
    """One of each clip's sentences, and which clips have any.

    Args:
        stream: of words, [B K L].
        rng: of the batch; None: the first sentence is taken.
    """
    mask = jnp.asarray(stream['mask'])  # [B K]
    order = mask.astype(jnp.float32)
    if rng is not None:
        order = jnp.where(mask, 1 + rng.at('sentence').uniform(mask.shape[1:]), 0)
    chosen = jnp.argmax(order, axis=-1)  # [B]
    ids = jnp.take_along_axis(jnp.asarray(stream['data']), chosen[:, None, None], axis=1)[:, 0]
    return ids, mask.any(-1)


def marked_words(ids: Int[Array, 'B L'], marks: Marks) -> tuple[Words, Bool[Array, 'B M']]:
    """Sentences between [CLS] and [SEP], M = L + 2, and which of their words may be hidden.

    Args:
        ids: numbers of the words, PAD behind the last.
        marks: of the tokenizer.
    """
    length = jnp.sum(ids != PAD, axis=-1, keepdims=True)  # [B 1]
    column = jnp.arange(ids.shape[1] + 2)
    marked = jnp.pad(ids, ((0, 0), (1, 1)), constant_values=PAD)
    marked = jnp.where(column == 0, marks.begin, marked)
    marked = jnp.where(column == length + 1, marks.end, marked)
    is_word = (column > 0) & (column <= length)
    return Words(marked, column <= length + 1), is_word


def cells(rows: int, columns: int) -> Float32[np.ndarray, 'N 4']:
    """Corners of the cells of a grid, row by row: x0 y0 x1 y1 as shares of the picture."""
    y, x = np.divmod(np.arange(rows * columns), columns)
    corners = [x / columns, y / rows, (x + 1) / columns, (y + 1) / rows]
    return np.stack(corners, axis=-1).astype(np.float32)


def regions_of_map(feature_map: Float[Array, 'B T h w D'], form: int) -> Regions:
    """A tower's map as regions, a cell each. Of several frames the mean is taken.

    Args:
        feature_map: of a clip.
        form: numbers of a box, see `box_numbers`.
    """
    num_clips, _, rows, columns, width = feature_map.shape
    features = feature_map.astype(jnp.float32).mean(axis=1).reshape(num_clips, -1, width)
    boxes = box_numbers(cells(rows, columns), form)
    boxes = jnp.broadcast_to(boxes, (num_clips, *boxes.shape))
    return Regions(features, boxes, jnp.ones(features.shape[:2], bool))


def regions_of_records(entry: Mapping[str, Any], form: int) -> Regions:
    """Regions that were found before.

    Args:
        entry: `batch[REGIONS]`.
        form: numbers of a box, see `box_numbers`.
    """
    features = jnp.asarray(entry['features'], jnp.float32)
    return Regions(features, box_numbers(entry['corners'], form), jnp.asarray(entry['mask']))


def make_pairs(
    stream: Mapping[str, Any],
    regions: Regions,
    classes: Any,
    valid: Bool[Array, ' B'],
    marks: Marks,
    rng: Rng | None,
) -> Pairs:
    """Sentences beside the regions of their pictures.

    Args:
        stream: of words, [B K L].
        regions: of each clip.
        classes: [B N P], a detector's probabilities; None: there are none.
        valid: clips that have a picture.
        marks: of the tokenizer.
        rng: see `drawn_sentence`.
    """
    ids, has_sentence = drawn_sentence(stream, rng)
    words, maskable = marked_words(ids, marks)
    mask = jnp.asarray(regions.mask)
    has_region = mask.any(-1)
    # Cut out before a network reads them: not even NaN reaches its gradient.
    is_there = (mask & valid[:, None])[..., None]  # [B N 1]
    regions = dataclasses.replace(
        regions,
        features=jnp.where(is_there, regions.features, 0),
        boxes=jnp.where(is_there, regions.boxes, 0),
    )
    if classes is not None:
        classes = jnp.where(is_there, classes, 0)
    return Pairs(
        words=words,
        maskable=maskable,
        regions=regions,
        classes=classes,
        valid=valid & jnp.asarray(stream['valid']) & has_sentence & has_region,
    )
