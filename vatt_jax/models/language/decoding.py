"""Text, word by word: the likeliest one, or one that is drawn.

Prompts of a batch may differ in length. A mask says which of their tokens are there, wherever the
padding lies; before the first step every row is moved so that all end at the same column, from
where they are written on together.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from vatt_jax.config import ConfigError, check_range
from vatt_jax.models.language.cache import Cache
from vatt_jax.models.language.sampling import draw
from vatt_jax.rng import Rng

# A CausalLM, or another module with its fields and methods (media_language.FlamingoLM).
LanguageModel = Any


@dataclasses.dataclass(frozen=True)
class Rules:
    """How words are chosen, and when a text ends.

    Attributes:
        new_tokens: most words to write.
        ends: numbers that end a text; (): it ends with `new_tokens`.
        temperature: of what is drawn; 0: the likeliest word, always.
        top_k: how many words may be drawn, the likeliest; 0: all.
        top_p: how much probability these have together (nucleus); 1: all.
    """

    new_tokens: int
    ends: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.new_tokens, 1, math.inf, 'Rules.new_tokens')
        check_range(self.temperature, 0, math.inf, 'Rules.temperature')
        check_range(self.top_k, 0, math.inf, 'Rules.top_k')
        check_range(self.top_p, 0, 1, 'Rules.top_p')
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise ConfigError(
                'Rules.temperature: expected more than 0 where top_k or top_p choose among words, '
                'got 0, which always takes the likeliest'
            )

    @property
    def filler(self) -> int:
        """What stands behind an end."""
        return self.ends[0] if self.ends else 0


@flax.struct.dataclass
class Generated:
    """What was written, L the most words.

    Attributes:
        tokens: int32 [B L]; behind its end a row is filled with the first of `Rules.ends`.
        lengths: int32 [B], words before the end.
        log_probabilities: float32 [B], of these words and the end, as the model has them: without
            temperature, top-k and top-p.
    """

    tokens: Any
    lengths: Any
    log_probabilities: Any


@functools.partial(jax.jit, static_argnames=('model', 'rules'))
def generate(
    model: LanguageModel,
    variables: Any,
    prompt: jax.Array,
    mask: jax.Array | None = None,
    rng: Rng | None = None,
    *,
    rules: Rules,
    cache: Any = None,
) -> Generated:
    """Write on from prompts. Jitted.

    Args:
        model: the module.
        variables: {'params': …} of it.
        prompt: numbers of words [B N], or embeddings [B N D].
        mask: bool [B N], tokens of the prompt that are there, at least one in a row; None: all.
        rng: of the rows, where words are drawn: a row's draws depend on its example and the step.
        rules: how words are chosen.
        cache: to begin with, as of `prefill`.

    Raises:
        ConfigError: words are to be drawn without an rng, or prompt and new words are longer than
            the model's context.
    """
    if rules.temperature and rng is None:
        raise ConfigError('generate: a temperature draws words, which needs an rng, got None')
    logits, cache = prefill(model, variables, prompt, mask, rules.new_tokens, cache)
    num_rows = len(logits)
    state = (
        jnp.int32(0),
        logits,
        cache,
        Generated(
            jnp.full((num_rows, rules.new_tokens), rules.filler, jnp.int32),
            jnp.zeros(num_rows, jnp.int32),
            jnp.zeros(num_rows, jnp.float32),
        ),
        jnp.zeros(num_rows, bool),
    )

    def goes_on(state: Any) -> jax.Array:
        step, _, _, _, is_done = state
        return (step < rules.new_tokens) & ~is_done.all()

    def write_one(state: Any) -> Any:
        step, logits, cache, written, is_done = state
        token = _choose(logits, rng, step, rules)
        token = jnp.where(is_done, rules.filler, token)
        written = _append(written, step, token, logits, is_done, rules)
        is_done = is_done | is_end(token, rules.ends)
        logits, cache = next_logits(model, variables, token, cache)
        return step + 1, logits, cache, written, is_done

    return jax.lax.while_loop(goes_on, write_one, state)[3]


def prefill(
    model: LanguageModel,
    variables: Any,
    prompt: jax.Array,
    mask: jax.Array | None,
    new_tokens: int,
    cache: Any = None,
) -> tuple[Float32[Array, 'B V'], Any]:
    """Logits of the word after each prompt, and a cache with room for `new_tokens` more.

    The cache is an empty one, or one that holds what else the model reads (pictures, in
    `media_language`) and has room for the prompt too.

    Raises:
        ConfigError: the cache that is given has not.
    """
    num_rows, num_tokens = prompt.shape[:2]
    if mask is not None:
        prompt, mask = move_right(prompt, mask)
    slots = num_tokens + new_tokens
    if cache is None:
        cache = Cache.create(model.form, num_rows, slots, model.dtype)
    if cache.slots < slots:
        raise ConfigError(
            f'cache: expected at least {slots} slots ({num_tokens} tokens of the prompt, '
            f'{new_tokens} to write), got {cache.slots}'
        )
    prompted: Any = model.apply(variables, prompt, mask, cache, method='hidden')
    hidden, filled = prompted
    # All rows end at the last column; logits of the others are not needed.
    logits: Any = model.apply(variables, hidden[:, -1:], method='logits')
    return logits[:, 0], filled


def next_logits(
    model: LanguageModel, variables: Any, tokens: Int[Array, ' R'], cache: Any
) -> tuple[Float32[Array, 'R V'], Any]:
    """One step: logits of the word after these, and the cache with them."""
    outputs: Any = model.apply(variables, tokens[:, None], None, cache)
    return outputs.logits[:, 0], outputs.cache


def move_right(prompt: jax.Array, mask: Bool[Array, 'B N']) -> tuple[jax.Array, Bool[Array, 'B N']]:
    """Prompts [B N …] with the tokens that are there at the end, in their order."""
    order = jnp.argsort(mask, axis=1, stable=True)
    expanded = order.reshape(*order.shape, *(1,) * (prompt.ndim - 2))
    return jnp.take_along_axis(prompt, expanded, axis=1), jnp.take_along_axis(mask, order, axis=1)


def is_end(tokens: Int[Array, '*shape'], ends: tuple[int, ...]) -> Bool[Array, '*shape']:
    """Which of the words end a text."""
    found = jnp.zeros(tokens.shape, bool)
    for end in ends:
        found = found | (tokens == end)
    return found


def _choose(
    logits: Float32[Array, 'R V'], rng: Rng | None, step: jax.Array, rules: Rules
) -> Int[Array, ' R']:
    if not rules.temperature:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    assert rng is not None
    of_step = rng.at('word').at(step)
    return draw(logits, of_step, rules.temperature, rules.top_k, rules.top_p)


def _append(
    written: Generated,
    step: jax.Array,
    token: Int[Array, ' R'],
    logits: Float32[Array, 'R V'],
    is_done: Bool[Array, ' R'],
    rules: Rules,
) -> Generated:
    """What was written, with one more word of the rows that are not done."""
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    gained = jnp.take_along_axis(log_probabilities, token[:, None], axis=1)[:, 0]
    counts = ~is_done & ~is_end(token, rules.ends)
    return Generated(
        written.tokens.at[:, step].set(token),
        written.lengths + counts,
        written.log_probabilities + jnp.where(is_done, 0.0, gained),
    )
