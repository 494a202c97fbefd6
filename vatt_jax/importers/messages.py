"""Names and values of foreign files in error messages: short, escaped, never walked whole.

A file may hold a name of megabytes, one with line breaks and terminal codes, or a list of lists
whose full text would not fit into memory. All importers show such things through this file.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

MOST_NAMES = 5  # named in one error; the others are counted
LONGEST_NAME = 300  # characters
MOST_BITS = 256  # of an integer that is written out


class _Shortened(reprlib.Repr):
    """Python's bounded repr, which shows no value of a type that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxtuple = 6  # axes of the largest kernel, and one more
        self.maxset = self.maxfrozenset = self.maxdict = 4
        self.maxstring = 60

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out integers of thousands of digits.
        if x.bit_length() > MOST_BITS:
            return f'<integer of {x.bit_length()} bits>'
        return repr(x)

    def repr_bytes(self, x: bytes, level: int) -> str:
        if len(x) > self.maxstring:
            return f'{bytes(x[: self.maxstring])!r}…'
        return repr(bytes(x))

    repr_bytearray = repr_bytes

    def repr_instance(self, x: Any, level: int) -> str:
        if x is None or type(x) in (bool, float):
            return repr(x)
        # An instance may say what it stands for, in a text that its class bounds.
        describe = getattr(type(x), 'described', None)
        return describe(x) if describe else f'<{type(x).__name__}>'


_SHORTENED = _Shortened()


def shown(value: Any, most: int = 80) -> str:
    """Return the repr of anything, cut to `most` characters, at a bounded cost."""
    text = _SHORTENED.repr(value)
    if len(text) > most:
        text = f'{text[:most]}…'
    return text


def escaped(name: str, most: int = LONGEST_NAME) -> str:
    """Return a name without quotes, cut, with what a terminal would obey or not show escaped."""
    text = name[:most]
    if not text.isprintable():
        text = repr(text)[1:-1]
    if len(name) > most:
        text += f'… ({len(name)} characters)'
    return text


def listed(names: Iterable[str], most: int = MOST_NAMES) -> str:
    """Join names: the first few, and how many there are besides."""
    names = list(names)
    text = ', '.join(escaped(name) for name in names[:most])
    if len(names) > most:
        text += f', and {len(names) - most} more'
    return text
