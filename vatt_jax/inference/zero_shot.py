"""Class names as classifiers: sentences made of them, and their mean in a common space."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from jaxtyping import Float

from vatt_jax.config import ConfigError

# The name alone; others as ('a video of {}', 'someone is {}').
TEMPLATES = ('{}',)


def class_words(name: str) -> str:
    """The words of a class name.

    'brush_hair' -> 'brush hair', 'ApplyEyeMakeup' -> 'Apply Eye Makeup'. Tokenizers delete
    punctuation, which would leave one word that no vocabulary has.
    """
    name = re.sub(r'[_/\-]+', ' ', name)
    # A capital after a small letter or a digit begins a word.
    name = re.sub(r'(?<=[a-z0-9])(?=[A-Z])', ' ', name)
    return ' '.join(name.split())


def prompts(names: Any, templates: Any, where: str) -> list[str]:
    """Every template of every name, name by name.

    Args:
        names: of P classes.
        templates: K sentences with {} where the name goes.
        where: of the call or config entry, for messages.

    Raises:
        ConfigError: names or templates are none.
    """
    names = check_names(names, where)
    if isinstance(templates, str):
        templates = [templates]
    templates = list(templates)
    if not templates:
        raise ConfigError(f'{where}.templates: expected sentences with {{}}, got none')
    for template in templates:
        if not isinstance(template, str) or '{}' not in template:
            raise ConfigError(
                f"{where}.templates: expected sentences such as 'a video of {{}}', got {template!r}"
            )
    sentences = []
    for name in names:
        # `replace`, not `format`: a name or a template may hold other braces.
        sentences += [template.replace('{}', class_words(name)) for template in templates]
    return sentences


def check_names(names: Any, where: str) -> list[str]:
    """Class names as a list.

    Raises:
        ConfigError: they are no list of several strings.
    """
    if isinstance(names, str) or not np.iterable(names):
        raise ConfigError(f'{where}.names: expected a list of class names, got {names!r}')
    names = list(names)
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f'{where}.names: expected class names, got {name!r}')
    if len(names) < 2:
        raise ConfigError(f'{where}.names: expected two classes or more, got {names}')
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise ConfigError(f'{where}.names: {repeated[0]!r} occurs more than once')
    return names


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
