"""CoOp: learnt vectors among the words of a sentence (Zhou et al. 2022).

M vectors stand before the name of a class, behind the begin mark, the same for all classes:

    begin, v1 … vM, name, end, padding

Positions of the tower are added afterwards, and the sentence is read at its end mark. A sentence
too long for its new places is cut before the end mark. Initial values are normal with deviation
0.02 (the authors' code, as remembered).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vatt_jax.config import ConfigError, check_range
from vatt_jax.models.adapters.base import Adapter, Tower
from vatt_jax.parallel.sharding import logical

DEFAULTS: dict[str, Any] = {
    'name': 'coop',
    # The one tower that has words.
    'modalities': (),
    # M, vectors before the name.
    'context': 16,
}


def check(config: Any, where: str) -> None:
    """Check the fields.

    Raises:
        ConfigError: one of them has a value that makes no sense.
    """
    check_range(config['context'], 1, 1 << 16, f'{where}.context')


def arrange(
    x: Float[Array, 'R L D'],
    read: Int[Array, ' R'],
    slots: Float[Array, 'L D'],
    prefix: int,
    postfix: int,
    num_marks: int,
) -> tuple[Float[Array, 'R L D'], Int[Array, ' R']]:
    """Put the words of sentences among learnt vectors.

    Args:
        x: words; the first `num_marks` stay where they are.
        read: the place of each sentence's end.
        slots: a vector for every place.
        prefix: by how many places the name moves.
        postfix: how much further the end moves.
        num_marks: tokens before the name.

    Returns:
        The sentences, and the new places of their ends.
    """
    num_places = x.shape[1]
    end = jnp.minimum(read + prefix + postfix, num_places - 1)[:, None]  # [R 1]
    place = jnp.arange(num_places)[None]  # [1 L]
    source = place - prefix  # of the name's words
    is_name = (source >= num_marks) & (source < read[:, None]) & (place < end)
    source = jnp.where(place < num_marks, place, source)
    source = jnp.where(place == end, read[:, None], source)
    is_word = (place < num_marks) | is_name | (place == end)
    words = jnp.take_along_axis(x, jnp.clip(source, 0, num_places - 1)[..., None], axis=1)
    return jnp.where(is_word[..., None], words, slots.astype(x.dtype)), end[:, 0]


class CoOp(Adapter):
    """The vectors [M D]."""

    @classmethod
    def misfit(cls, tower: Tower) -> str:
        return '' if tower.context else 'it is no text tower of CLIP'

    def setup(self) -> None:
        num_vectors, tower = self.config['context'], self.tower
        check_room(num_vectors, tower, 'context')
        init = logical(jax.nn.initializers.normal(0.02), None, 'embed')
        self.vectors = self.param('vectors', init, (num_vectors, tower.width), jnp.float32)

    def words(
        self, x: Float[Array, 'R L D'], read: Int[Array, ' R']
    ) -> tuple[Float[Array, 'R L D'], Int[Array, ' R']]:
        num_vectors, num_marks = self.config['context'], self.tower.marks
        # Behind the end, where a causal tower does not look, the padding's vectors would do as
        # well; zeros take their place.
        slots = jnp.zeros(x.shape[1:], jnp.float32)
        slots = slots.at[num_marks : num_marks + num_vectors].set(self.vectors)
        return arrange(x, read, slots, num_vectors, 0, num_marks)


def check_room(num_vectors: int, tower: Tower, field: str) -> None:
    """Check that a name and its end fit behind learnt vectors.

    Raises:
        ConfigError: they do not.
    """
    room = tower.context - tower.marks - 2
    if num_vectors > room:
        raise ConfigError(
            f'config.model.adapter.{field}: expected at most {room} learnt vectors in sentences of '
            f'{tower.context} tokens (config.model.inputs.text.words), got {num_vectors}'
        )
