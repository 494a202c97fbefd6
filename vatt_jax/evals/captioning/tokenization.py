"""Words of a caption, as the evaluation of COCO captions finds them.

That evaluation runs Stanford's PTBTokenizer (Java), makes the tokens lower case and drops a list of
punctuation. Here are the rules of that tokenizer which matter to captions, written anew; where they
differ is told in docs/captioning.md. As there, the longest match wins, and the first of equal ones.
"""

from __future__ import annotations

import functools
import re

# Tokens that are dropped. The released list has brackets in capitals, -LRB-, while the tokens are
# lower case by then: brackets stay, here as there.
DROPPED = frozenset(["''", "'", '``', '`', '.', '?', '!', ',', ':', '-', '--', '...', ';'])

BRACKETS = {
    '(': '-lrb-',
    ')': '-rrb-',
    '[': '-lsb-',
    ']': '-rsb-',
    '{': '-lcb-',
    '}': '-rcb-',
}

# Typographic quotes and dashes -> those of ASCII. Double quotes are dropped in all forms.
_PLAIN = str.maketrans(
    {
        '\u2018': "'",
        '\u2019': "'",
        '\u201c': '"',
        '\u201d': '"',
        '\u2013': '--',
        '\u2014': '--',
        '\u2026': '...',
        # The tokenizer skips them.
        '|': ' ',
        '\\': ' ',
        '\u200b': '',
        '\ufeff': '',
    }
)

# Abbreviations that keep their full stop wherever they stand, single letters among them.
_ABBREVIATIONS = 'mrs?|ms|drs?|profs?|sens?|gens?|col|lt|sgt|capt|rev|mt|ste?|ave|vs|[a-z]'

# Each rule's group 1 is the token. What follows the group must be there, counts in the length of
# the match, and is left for the next token.
_RULES = [
    re.compile(rule, re.DOTALL)
    for rule in (
        # Two words in one.
        r'(can)not',
        r'(gon|wan)na',
        r'(got)ta',
        r'(lem|gim)me',
        # Before a contraction: the cat's, they're, don't.
        r"([^\W\d_]+)'(?:[msd]|re|ve|ll)(?![a-z])",
        r"([a-z]*[a-mo-z])n't",
        r"('(?:[msd]|re|ve|ll))(?![a-z])",
        r"(n't)",
        # One letter and an apostrophe: o'clock.
        r"([a-hj-xz]'[^\W\d_]{2,})",
        r"('\d0s)",
        r'((?:https?://|www\.)[^\s"<>()]*[^\s"<>().,!?{}-])',
        r'([+-]?(?:\d*(?:[.:,]\d+)+|\d+))',
        r'(-[lr][rsc]b-)',
        # and/or, 1/2
        r'([a-z0-9]+(?:-[a-z]+){0,2}(?:/[a-z0-9]+(?:-[a-z]+){0,2}){1,2})',
        # u.s., p.m.
        r'([a-z](?:\.[a-z])+\.?)(?![a-z])',
        rf'((?:{_ABBREVIATIONS})\.)',
        # Hyphens stay inside words: black-and-white, 2.5-inch.
        r'([^\W_]+(?:[-_][^\W_]+)*)',
        r'([a-z0-9][a-z0-9.,]*(?:-[a-z0-9]+)+)',
        # at&t
        r'([a-z]+(?:[+&][a-z]+)+)',
        r'(\.{3,5}|-+|[?!]+|@+|#+|_+|\*+)',
        r"('')",
        r'(.)',
    )
]


def tokenize(caption: str) -> str:
    """The words of a caption in lower case, with a space between each two.

    Args:
        caption: as people write it.
    """
    words: list[str] = []
    # No rule crosses white space.
    for part in caption.translate(_PLAIN).lower().split():
        words += _split(part)
    return ' '.join(words)


@functools.lru_cache(maxsize=100_000)
def _split(part: str) -> tuple[str, ...]:
    """The words of what stands between white space."""
    words = []
    start = 0
    while start < len(part):
        matches = [match for rule in _RULES if (match := rule.match(part, start))]
        longest = max(matches, key=lambda match: match.end())
        start = longest.end(1)
        words.append(BRACKETS.get(longest[1], longest[1]))
    return tuple(word for word in words if not _is_dropped(word))


def _is_dropped(word: str) -> bool:
    # Longer runs of hyphens and full stops are -- and ... to the tokenizer, and " is `` or ''.
    return word in DROPPED or word == '"' or word.strip('-') == '' or word.strip('.') == ''
