"""Text on any terminal: characters that it cannot show, and names that would control it."""

from __future__ import annotations

import codecs
import io
import sys

# Stand-ins in ASCII for what messages and tables contain.
_STAND_INS = {
    '…': '...',
    '→': '->',
    '×': 'x',
    '±': '+-',
    '–': '-',
    '—': '-',
    '−': '-',
    '·': '*',
    '≤': '<=',
    '≥': '>=',
    '≈': '~',
    '²': '^2',
    'µ': 'u',
    '‘': "'",
    '’': "'",
    '“': '"',
    '”': '"',
}
# Name of the error handler of the codecs.
_PLAIN = 'vatt_jax.plain'


def printable(text: str) -> str:
    """Text in one line and without control characters, which a file name may contain.

    A line break, an escape code or a byte that is no UTF-8 is written as Python writes it: `\\n`.
    """
    characters = []
    for character in text:
        characters.append(character if character.isprintable() else _escape(character))
    return ''.join(characters)


def use_plain_characters() -> None:
    """Has standard output and errors replace characters that their encoding lacks.

    Otherwise the first arrow or accent ends a program on a terminal that knows ASCII alone.
    """
    for stream in (sys.stdout, sys.stderr):
        # Notebooks and tests put streams of their own there, which take everything.
        if isinstance(stream, io.TextIOWrapper) and stream.errors != _PLAIN:
            stream.reconfigure(errors=_PLAIN)


def _escape(character: str) -> str:
    # Python presents byte b of a name that is not UTF-8 as U+DC00 + b (PEP 383).
    if '\udc80' <= character <= '\udcff':
        return f'\\x{ord(character) - 0xDC00:02x}'
    return character.encode('unicode_escape').decode('ascii')


def _replace_unknown(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: the stand-in of what cannot be encoded, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    stand_ins = []
    for character in unknown:
        stand_ins.append(_STAND_INS.get(character) or _escape(character))
    return ''.join(stand_ins), error.end


codecs.register_error(_PLAIN, _replace_unknown)
