"""Class names as sentences."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

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
