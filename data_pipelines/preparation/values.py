"""Cells and JSON values as strangers write them: nothing, texts, times."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.preparation import plain_text

# (start, end) in seconds of an entry without times: the whole file.
WHOLE = (0.0, float('inf'))

# What programs write where there is nothing.
_MISSING_WORDS = ('', 'nan', 'NaN', 'null', 'NULL', 'None', '<NA>', 'N/A', '#N/A', '\\N')
# Characters of a malformed entry that an error message quotes.
_MAX_QUOTE = 60


def quote(value: Any) -> str:
    """The beginning of a value, for messages."""
    return str(value)[:_MAX_QUOTE]


def is_missing(value: Any) -> bool:
    """Whether a value says that there is nothing: null, NaN, an empty cell, or a word for them."""
    if isinstance(value, str):
        return value.strip() in _MISSING_WORDS
    return value is None or (isinstance(value, float) and math.isnan(value))


def checked_text(text: Any, where: str) -> str:
    """The text of a sentence; DataError, naming the entry as `where`, if it is none."""
    is_number = isinstance(text, int | float) and not isinstance(text, bool)
    if not isinstance(text, str) and not is_number:
        raise DataError(f'{where}: expected a sentence, got {quote(text)}')
    return storable(plain_text.plain(str(text)))


def storable(text: str) -> str:
    """Text with halves of characters replaced, as JSON has where somebody cut an emoji in two."""
    return text.encode('utf-8', 'replace').decode()


# ---- Times.


def times(entry: Mapping[str, Any], where: str) -> dict[str, float]:
    """'start' and 'end' of an entry; of one without them, those of the whole file."""
    start, end = entry.get('start'), entry.get('end')
    if entry.get('times') is not None:
        start, end = pair(entry['times'], where)
    begin = seconds_of(start, WHOLE[0], where)
    finish = seconds_of(end, WHOLE[1], where)
    # A duration beside a start is that of the sentence; by itself it may be that of the file.
    if is_missing(end) and not is_missing(start):
        finish = begin + seconds_of(entry.get('duration'), WHOLE[1], where)
    # Equal ones are allowed: an event that has a moment and no length.
    if finish < begin:
        raise DataError(f'{where}: it ends ({finish:g} s) before it starts ({begin:g} s)')
    return {'start': begin, 'end': finish}


def pair(value: Any, where: str) -> tuple[Any, Any]:
    """Start and end of a list of two; DataError, naming the entry as `where`, if it is none."""
    if value is None:
        return None, None
    if not isinstance(value, list) or len(value) != 2:
        raise DataError(f'{where}: expected [start, end] in seconds, got {quote(value)}')
    return value[0], value[1]


def seconds_of(value: Any, default: float, where: str) -> float:
    """Seconds of a number, or of a text like 1.5, 0:01.5 or 1:02:03; `default` where missing."""
    # An empty cell of CSV, null, or NaN.
    if is_missing(value):
        return default
    seconds = None
    if isinstance(value, str):
        seconds = _parse_time(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    if seconds is None:
        raise DataError(
            f'{where}: {value!r} is not a time in seconds; expected a number such as 1.5, or '
            'minutes and hours such as 0:01.5 and 1:02:03'
        )
    # A sentence may go on to the end of the file, but not begin there.
    if not seconds >= 0 or (math.isinf(seconds) and not math.isinf(default)):
        raise DataError(f'{where}: {value!r} is not a time in seconds from the beginning')
    return seconds


def is_time(text: str) -> bool:
    return _parse_time(text) is not None


def _parse_time(text: str) -> float | None:
    """Seconds of a time as people write it; None if it is no time."""
    # 1,5 as in most of Europe, and 00:00:01,500 as in SRT. A comma before three digits may separate
    # thousands instead, except where minutes stand before it.
    text = text.strip()
    is_decimal_comma = ':' in text or not re.fullmatch(r'\d{1,3},\d{3}', text)
    if is_decimal_comma and text.count(',') == 1 and '.' not in text:
        text = text.replace(',', '.')
    number = re.fullmatch(r'(-?\d+\.?\d*(?:e[-+]?\d+)?|-?\.\d+|inf(?:inity)?)\s*s?', text, re.I)
    if number:
        return float(number[1])
    # 1h02m03s, as in the addresses of videos.
    words = re.fullmatch(r'(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d*)?)s)?', text, re.I)
    if words and text:
        return int(words[1] or 0) * 3600 + int(words[2] or 0) * 60 + float(words[3] or 0)
    clock = re.fullmatch(r'(?:(\d+):)?(\d+):(\d\d?(?:\.\d*)?)', text)
    if clock is None:
        return None
    hours, minutes, seconds = int(clock[1] or 0), int(clock[2]), float(clock[3])
    # 90:00 are ninety minutes, but an hour has sixty.
    if seconds >= 60 or (clock[1] is not None and minutes >= 60):
        return None
    return hours * 3600 + minutes * 60 + seconds
