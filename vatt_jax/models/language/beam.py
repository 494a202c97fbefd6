"""Beam search: the likeliest texts, as far as the beam is wide."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from vatt_jax.config import ConfigError
from vatt_jax.models.language.decoding import LanguageModel, Rules, is_end, next_logits, prefill


@flax.struct.dataclass
class Beams:
    """K texts of every row, the best first. Where there are fewer, the score of the rest is -inf.

    Attributes:
        tokens: int32 [B K L]; behind its end a text is filled with the first of `Rules.ends`.
        lengths: int32 [B K], words before the end.
        log_probabilities: float32 [B K], of these words and the end.
        scores: float32 [B K], by which they are ordered.
    """

    tokens: Any
    lengths: Any
    log_probabilities: Any
    scores: Any


@flax.struct.dataclass
class _State:
    """Of the loop: prefixes that go on, with the logits after each, and texts that have ended."""

    step: Any
    tokens: Any  # [B K L]
    log_probabilities: Any  # [B K]
    logits: Any  # [B K V]
    cache: Any  # of B·K rows
    ended: Beams


@functools.partial(jax.jit, static_argnames=('model', 'rules', 'width', 'length_power'))
def beam_search(
    model: LanguageModel,
    variables: Any,
    prompt: jax.Array,
    mask: jax.Array | None = None,
    *,
    rules: Rules,
    width: int,
    length_power: float = 1.0,
    cache: Any = None,
) -> Beams:
    """The `width` best texts that go on from each prompt. Jitted.

    A text's score is log p / n^length_power, n its words with the end. In every step the K
    likeliest ends of the K prefixes are texts, and the K likeliest longer prefixes go on. Those
    that have not ended after `new_tokens` words are texts as well. The search stops early once no
    prefix can reach the K texts that its row has.

    Args:
        model: the module.
        variables: {'params': …} of it.
        prompt: as of `decoding.generate`.
        mask: as of `decoding.generate`.
        rules: most words and ends; nothing is drawn.
        width: K.
        length_power: 0: the likeliest text; larger ones favour longer texts.
        cache: as of `decoding.generate`.

    Raises:
        ConfigError: the rules draw words, or the width is below 1.
    """
    if rules.temperature:
        raise ConfigError('beam_search draws no words: expected Rules.temperature=0')
    if width < 1:
        raise ConfigError(f'beam_search: expected a width of at least 1, got {width}')
    logits, cache = prefill(model, variables, prompt, mask, rules.new_tokens, cache)
    num_rows = len(logits)
    # All K prefixes begin as the prompt; only the first of them counts, or all K would be one.
    first_only = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf)
    nothing = jnp.full((num_rows, width), -jnp.inf)
    tokens = jnp.full((num_rows, width, rules.new_tokens), rules.filler, jnp.int32)
    state = _State(
        step=jnp.int32(0),
        tokens=tokens,
        log_probabilities=jnp.broadcast_to(first_only, (num_rows, width)),
        logits=jnp.repeat(logits[:, None], width, axis=1),
        cache=cache.take_rows(jnp.repeat(jnp.arange(num_rows), width)),
        ended=Beams(tokens, jnp.zeros((num_rows, width), jnp.int32), nothing, nothing),
    )

    def goes_on(state: _State) -> jax.Array:
        can_improve = _bound(state, rules.new_tokens, length_power) > state.ended.scores[:, -1]
        return (state.step < rules.new_tokens) & can_improve.any()

    def advance(state: _State) -> _State:
        return _advance(model, variables, state, rules, length_power)

    state = jax.lax.while_loop(goes_on, advance, state)
    return _with_unfinished(state, rules, length_power)


def _advance(
    model: LanguageModel, variables: Any, state: _State, rules: Rules, length_power: float
) -> _State:
    """End each prefix, and go on with the K likeliest longer ones."""
    num_rows, width, vocab = state.logits.shape
    total = state.log_probabilities[:, :, None] + jax.nn.log_softmax(state.logits, axis=-1)
    ends = is_end(jnp.arange(vocab), rules.ends)  # [V]
    ending = _extend(state, jnp.where(ends, total, -jnp.inf))
    lengths = jnp.full((num_rows, width), state.step, jnp.int32)
    scores = _score(ending.log_probabilities, state.step + 1, length_power)
    ended = Beams(ending.tokens, lengths, ending.log_probabilities, scores)

    longer = _extend(state, jnp.where(ends, -jnp.inf, total))
    # Of the B·K rows of the cache, those that are gone on from.
    rows = jnp.arange(num_rows)[:, None] * width + longer.parent
    cache = state.cache.take_rows(rows.reshape(-1))
    logits, cache = next_logits(model, variables, longer.word.reshape(-1), cache)
    return _State(
        step=state.step + 1,
        tokens=longer.tokens,
        log_probabilities=longer.log_probabilities,
        logits=logits.reshape(num_rows, width, vocab),
        cache=cache,
        ended=_best(state.ended, ended),
    )


class _Extended(NamedTuple):
    """The K likeliest of all prefixes with one more word, the likeliest first; all [B K]."""

    log_probabilities: jax.Array
    parent: jax.Array  # which of the K prefixes it goes on from
    word: jax.Array
    tokens: jax.Array  # [B K L]


def _extend(state: _State, total: Float32[Array, 'B K V']) -> _Extended:
    """Add a word to the prefixes; `total` is the log probability of each with each word."""
    num_rows, width, vocab = total.shape
    log_probabilities, chosen = jax.lax.top_k(total.reshape(num_rows, width * vocab), width)
    parent, word = chosen // vocab, (chosen % vocab).astype(jnp.int32)
    tokens = _take(state.tokens, parent).at[:, :, state.step].set(word)
    return _Extended(log_probabilities, parent, word, tokens)


def _with_unfinished(state: _State, rules: Rules, length_power: float) -> Beams:
    """The best K when the prefixes that are left count as texts, if they are as long as can be."""
    is_last = state.step == rules.new_tokens
    log_probabilities = jnp.where(is_last, state.log_probabilities, -jnp.inf)
    lengths = jnp.full(log_probabilities.shape, rules.new_tokens, jnp.int32)
    scores = _score(log_probabilities, rules.new_tokens, length_power)
    return _best(state.ended, Beams(state.tokens, lengths, log_probabilities, scores))


def _best(one: Beams, other: Beams) -> Beams:
    """The K best of 2K texts."""
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), one, other)
    _, order = jax.lax.top_k(both.scores, one.scores.shape[1])
    return jax.tree.map(lambda x: _take(x, order), both)


def _take(x: jax.Array, order: Int[Array, 'B K']) -> jax.Array:
    """Entries of axis 1 of [B M …], chosen for each row."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


def _score(
    log_probabilities: Float32[Array, 'B K'], length: Any, length_power: float
) -> Float32[Array, 'B K']:
    return log_probabilities / jnp.asarray(length, jnp.float32) ** length_power


def _bound(state: _State, new_tokens: int, length_power: float) -> Float32[Array, ' B']:
    """More than this no text can score that goes on from a prefix.

    Further words only lose probability, and the division by a power of the length is monotonous:
    the shortest or the longest possible text would be the best.
    """
    best = state.log_probabilities.max(axis=1, keepdims=True)
    shortest = _score(best, state.step + 1, length_power)
    longest = _score(best, new_tokens, length_power)
    return jnp.maximum(shortest, longest)[:, 0]
