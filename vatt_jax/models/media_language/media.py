"""Which media each word sees, and which words count in the loss (Flamingo, section 2.4).

A tag stands in the text for each medium, in their order: the k-th tag is that of medium k, from 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from vatt_jax.config import choose

# immediate: the last medium before a word. all_previous: all of them.
ATTEND = ('immediate', 'all_previous')


def seen_media(
    num_tags: Int[Array, 'B N'], num_media: int, attend: str = 'immediate'
) -> Bool[Array, 'B N M']:
    """Which media each word sees.

    A tag counts from its own word on, so it sees its own medium. No word sees a medium whose tag
    comes later; a word before all tags sees none, and neither does (immediate) one whose last tag
    has no medium.

    Args:
        num_tags: tags up to and with each word.
        num_media: M.
        attend: entry of ATTEND.
    """
    choose(attend, ATTEND, 'attend')
    medium = jnp.arange(1, num_media + 1)
    if attend == 'immediate':
        return num_tags[:, :, None] == medium
    return num_tags[:, :, None] >= medium


def counted_words(
    ids: Int[Array, 'B N'], mask: Bool[Array, 'B N'], tag: int, end: int | None
) -> Bool[Array, 'B N']:
    """Which words count as targets of the loss (open_flamingo's rule for interleaved pages).

    Not padding, tags, what comes before the first tag, and what comes between the end of a chunk
    and the next tag. The end itself counts: it is to be written.

    Args:
        ids: numbers of words.
        mask: words that are there.
        tag: number of the media tag.
        end: number of the end of a chunk; None: chunks end with the next tag.
    """
    column = jnp.arange(ids.shape[1])
    is_tag = (ids == tag) & mask
    last_tag = jax.lax.cummax(jnp.where(is_tag, column, -1), axis=1)
    if end is None:
        return mask & ~is_tag & (last_tag >= 0)
    is_end = (ids == end) & mask
    last_end = jax.lax.cummax(jnp.where(is_end, column, -1), axis=1)
    # The last end before each word, not counting the word itself.
    last_end = jnp.pad(last_end, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return mask & ~is_tag & (last_tag > last_end)
