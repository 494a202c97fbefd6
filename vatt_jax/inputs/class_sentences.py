"""Class names as sentences."""

from __future__ import annotations

import collections
import re
from typing import Any

import numpy as np

from vatt_jax.config import ConfigError

# The name alone; others as ('a video of {}', 'someone is {}').
TEMPLATES = ('{}',)
# Where the name goes: {} as in CLIP's own lists, {c} as in CLIP_benchmark's.
_SLOT = re.compile(r'\{c?\}')


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
        names: of P classes; underscores and the like become words (`class_words`).
        templates: K sentences with {} or {c} where the name goes.
        where: of the call or config entry, for messages.

    Raises:
        ConfigError: names or templates are none.
    """
    names = check_names(names, where)
    templates = check_templates(templates, where)
    sentences = []
    for name in names:
        sentences += fill(templates, class_words(name))
    return sentences


def fill(templates: list[str], name: str) -> list[str]:
    """The sentences of one class: each template with its name, as it is written."""
    # No `format`: a name or a template may hold other braces. A function, so that backslashes of
    # the name stay what they are.
    return [_SLOT.sub(lambda _: name, template) for template in templates]


def check_templates(templates: Any, where: str) -> list[str]:
    """Templates as a list; a single one may be given as a string.

    Raises:
        ConfigError: they are no sentences with a place for the name.
    """
    if isinstance(templates, str):
        templates = [templates]
    templates = list(templates)
    if not templates:
        raise ConfigError(f'{where}.templates: expected sentences with {{}}, got none')
    for template in templates:
        if not isinstance(template, str) or not _SLOT.search(template):
            raise ConfigError(
                f"{where}.templates: expected sentences such as 'a video of {{}}', got {template!r}"
            )
    return templates


def check_names(names: Any, where: str, may_repeat: bool = False) -> list[str]:
    """Class names as a list.

    Args:
        names: of the classes.
        where: of the call or config entry, for messages.
        may_repeat: whether two classes may have one name, as in CLIP's list of ImageNet.

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
    repeats = repeated(names)
    if repeats and not may_repeat:
        raise ConfigError(f'{where}.names: {repeats[0]!r} occurs more than once')
    return names


def repeated(names: list[str]) -> list[str]:
    """Names that occur more than once, each once."""
    counts = collections.Counter(names)
    return [name for name, count in counts.items() if count > 1]
