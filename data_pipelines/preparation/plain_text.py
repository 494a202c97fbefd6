"""Sentences without the markup of web pages and subtitles, which is no part of what is said."""

from __future__ import annotations

import html
import re

# By name, so that "3 < 5" stays; <00:00:01.500> is the time of a word.
_INLINE_TAG = re.compile(
    r'</?(?:c|i|b|u|s|v|lang|ruby|rt|font|em|strong|span)(?:[\s.][^<>]*)?>|<[\d:.]+>', re.I
)
# New lines and paragraphs, which stand between words.
_BREAK = re.compile(r'</?(?:br|p|div)(?:\s[^<>]*)?\s*/?>', re.I)
# {\an8}: place on the screen, in subtitles made from ASS.
_OVERRIDE = re.compile(r'\{\\[^{}]*\}')
# &amp; and &#39;. With their semicolon: "AT&T" and "R&not" are words.
_ENTITY = re.compile(r'&(?:#\d+|#x[\da-f]+|[a-z]+\d*);', re.I)


def has_tags(text: str) -> bool:
    """Whether a text has markup within a line."""
    return _INLINE_TAG.search(text) is not None


def plain(text: str) -> str:
    """Text without tags, and with the characters that entities such as &amp; stand for."""
    text = _BREAK.sub(' ', _OVERRIDE.sub('', text))
    text = _INLINE_TAG.sub('', text)
    # Twice: some programs escape what is escaped already.
    for _ in range(2):
        text = _ENTITY.sub(_character, text)
    return text


def _character(entity: re.Match[str]) -> str:
    return html.unescape(entity[0])
