"""Cross entropy of words, as causal language models are trained by."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int


def words(
    logits: Float[Array, 'B N V'], ids: Int[Array, 'B N'], counted: Bool[Array, 'B N']
) -> Float32[Array, '']:
    """Mean cross entropy over the words that count, of all rows; 0 where none does.

    Args:
        logits: of these words.
        ids: the words. Number 0 is a word like any other, so that padding is told by `counted`.
        counted: which of them count.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    of_words = jnp.take_along_axis(log_probabilities, ids[:, :, None], axis=-1)[:, :, 0]
    total = jnp.sum(jnp.where(counted, of_words, 0.0))
    return -total / jnp.maximum(counted.sum(), 1)


def next_words(
    logits: Float[Array, 'B N V'], ids: Int[Array, 'B N'], counted: Bool[Array, 'B N']
) -> Float32[Array, '']:
    """`words`, for logits of the word after each column. The first word has none and never counts.

    Args:
        logits: those of column n are of word n + 1.
        ids: the words.
        counted: which of them count as targets.
    """
    return words(logits[:, :-1], ids[:, 1:], counted[:, 1:])
