"""Which of the words may come next, and one of them drawn. Logits [R V] in, one row each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from vatt_jax.rng import Rng


def keep_top_k(logits: Float32[Array, 'R V'], k: int) -> Float32[Array, 'R V']:
    """The k largest logits, -inf for all others; those equal to the smallest of them stay too."""
    if k >= logits.shape[-1]:
        return logits
    smallest = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def keep_top_p(logits: Float32[Array, 'R V'], p: float) -> Float32[Array, 'R V']:
    """The likeliest words whose probabilities together reach p, -inf for all others.

    The nucleus of Holtzman et al. 2020: the fewest words of at least that probability. Those equal
    to the last of them stay too.
    """
    if p >= 1:
        return logits
    falling = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(falling, axis=-1)
    # What all likelier words have together; the first one always stays, also where p is 0.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    is_kept = (before < p) | (jnp.arange(logits.shape[-1]) == 0)
    smallest = jnp.where(is_kept, falling, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def draw(
    logits: Float32[Array, 'R V'], rng: Rng, temperature: float, top_k: int, top_p: float
) -> Int[Array, ' R']:
    """A word of each row.

    Args:
        logits: of the words.
        rng: of the rows and of this step.
        temperature: logits are divided by it first.
        top_k: how many words may come, the likeliest; 0: all.
        top_p: then how much probability they have together; 1: all.
    """
    logits = logits / temperature
    if top_k:
        logits = keep_top_k(logits, top_k)
    logits = keep_top_p(logits, top_p)
    # The largest of the sums with Gumbel noise has the distribution of the softmax. A draw of 0
    # makes a noise of -inf: a word that does not come.
    noise = -jnp.log(-jnp.log(rng.uniform((logits.shape[-1],))))
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
