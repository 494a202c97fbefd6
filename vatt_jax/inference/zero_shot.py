"""Class names as classifiers: the mean of their sentences in a common space."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from vatt_jax.config import ConfigError


def class_embeddings(
    sentences: Float[np.ndarray, 'PK E'], num_classes: int
) -> Float[np.ndarray, 'P E']:
    """The direction between the sentences of each class, of unit length.

    Args:
        sentences: of unit length, in the order of `prompts`.
        num_classes: P.
    """
    by_class = sentences.reshape(num_classes, -1, sentences.shape[-1])
    mean = by_class.mean(1)
    # Sentences may cancel out.
    return mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)


def common_space(spaces: dict[str, set[str]], stream: str, space: str | None, where: str) -> str:
    """The space in which a stream is compared with text.

    Args:
        spaces: the modalities of each space.
        stream: modality of what is classified.
        space: the one that was asked for; None: the only one there is.
        where: of the call or config entry, for messages.

    Raises:
        ConfigError: there is none, or there are several.
    """
    shared = [name for name, members in spaces.items() if {stream, 'text'} <= members]
    if space is None and len(shared) == 1:
        return shared[0]
    if space in shared:
        return str(space)
    got = 'none was named' if space is None else f'got {space!r}'
    raise ConfigError(
        f'{where}.space: expected a common space of {stream} and text '
        f'({", ".join(shared) or "this model has none"}), {got}'
    )
