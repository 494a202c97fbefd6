"""Subtitle files (SRT, WebVTT, SBV) -> sentences with times.

Cues are read by hand: what matters here is what no parser of the formats does, undoing the
repetitions of automatic subtitles and bearing with files that keep to no standard.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.preparation import plain_text

SUFFIXES = ('.srt', '.vtt', '.sbv')
_TIME = r'(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)'
# As it should be, as people type it, and as word processors mend it.
_ARROW = '(?:-->|->|[–—]>|→)'
# 00:00:01,000 --> 00:00:02,000 of SRT and WebVTT, which has the place on the screen behind it.
_CUE = re.compile(rf'\s*{_TIME}\s*{_ARROW}\s*{_TIME}(?:\s.*)?')
# 0:00:01.000,0:00:02.000
_SBV_CUE = re.compile(rf'\s*{_TIME},{_TIME}\s*')
# Times of a cue, however malformed: taken for words, they would join two cues.
_LIKE_CUE = re.compile(rf'.*\d:\d.*-->.*\d:\d.*|[-\d:;.,\s]*\d\s*{_ARROW}\s*-?\d[-\d:;.,\s]*')
# What is left of the times of a cue where a file was cut short.
_CUT_CUE = re.compile(r'\s*\d+:\d\d:\d\d[.,]\d*(?:\s*-{0,2}>?[\s\d:.,]*)')
# New lines and spaces of ASS, new lines of SBV.
_BREAK = re.compile(r'\\[Nh]|\[br\]')
# A cue of pictures to choose a moment from.
_THUMBNAIL = re.compile(r'\S+#xywh=\S+')
# Blocks of WebVTT that hold no speech.
_COMMENTS = ('NOTE', 'STYLE', 'REGION')

# Part of a name between the video and the suffix: a language (en, en-US, pt-BR, en-orig) or a word.
_LANGUAGE = re.compile(r'[a-z]{2,3}([-_][a-z0-9_-]+)*', re.I)
TRACK_WORDS = ('auto', 'asr', 'generated', 'manual', 'forced', 'sdh', 'cc', 'default')
# Share of the cues that begin with lines of the one before, above which a file repeats itself.
_ROLLING_SHARE = 0.25
# Seconds between two cues that follow one another at once, and of a cue that nobody could read.
_TOUCHING = 0.1
_FLASH = 0.1


@dataclasses.dataclass
class _Cue:
    """Lines that are shown together, from `start` to `end` seconds; `source` has their tags."""

    start: float
    end: float
    lines: list[str]
    source: str


# ---- One file.


def parse(text: str, path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the sentences of a subtitle file, each as a dict of 'text', 'start', 'end' (seconds).

    Automatic subtitles repeat themselves: lines roll over the screen, grow word by word, or come
    again for each word that is highlighted. Here every line comes once.

    Args:
        text: of the file, its lines ending in newlines.
        path: for messages.

    Raises:
        DataError: if there is text, but no times, or times are malformed.
    """
    cues = _cues(text, path)
    if not cues and not text.lstrip().startswith('WEBVTT') and text.strip():
        first_line = text.strip().partition('\n')[0][:60]
        raise DataError(
            f'{path}: expected subtitles with lines such as 00:00:01.000 --> 00:00:02.500, '
            f'got {first_line!r}'
        )
    cues = _joined(cues, _is_highlighted)
    num_growing = sum(_is_grown(before, cue) for before, cue in zip(cues, cues[1:]))
    if num_growing > _ROLLING_SHARE * len(cues):
        cues = _joined(cues, _is_grown)
    if _is_rolling(cues):
        cues = _without_repetitions(cues)
    sentences = []
    for cue in cues:
        sentence = ' '.join(' '.join(cue.lines).split())
        if sentence:
            sentences.append({'text': sentence, 'start': cue.start, 'end': cue.end})
    return sentences


def _cues(text: str, path: str | os.PathLike) -> list[_Cue]:
    """All cues with any text, in the order of their times."""
    lines = text.split('\n')
    # The names of cues in WebVTT are anything, in SRT they are numbers.
    has_names = text.lstrip().startswith('WEBVTT')
    pattern = _CUE if any(map(_CUE.fullmatch, lines)) else _SBV_CUE
    # Times are what cannot be missed; blank lines are missing or too many in files made by hand.
    times = []
    for line_number, line in enumerate(lines):
        match = pattern.fullmatch(line)
        if match:
            times.append((line_number, match))
        elif _LIKE_CUE.fullmatch(line):
            raise DataError(
                f'{path}, line {line_number + 1}: expected times such as 00:00:01.000 --> '
                f'00:00:02.500, got {line.strip()[:60]!r}'
            )
    # Of each cue, the line with the times of the next.
    next_lines = [line_number for line_number, _ in times[1:]]
    cues = []
    for (line_number, match), next_line in itertools.zip_longest(times, next_lines):
        body = lines[line_number + 1 : next_line]
        if next_line is not None:
            body = _without_name(body, has_names)
        elif body and _CUT_CUE.fullmatch(body[-1]):
            body = _without_name(body[:-1], has_names)
        spoken = _spoken_lines(body)
        start, end = _seconds(match, 1), _seconds(match, 4)
        if spoken:
            # Some end before they start: they have a moment and no length.
            cues.append(_Cue(start, max(start, end), spoken, '\n'.join(body)))
    return sorted(cues, key=lambda cue: cue.start)


def _seconds(match: re.Match[str], group: int) -> float:
    hours, minutes, seconds = match.group(group, group + 1, group + 2)
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds.replace(',', '.'))


def _without_name(lines: list[str], has_names: bool) -> list[str]:
    """Lines between the times of two cues, without the number or name of the second."""
    if not lines or not lines[-1].strip():
        return lines
    is_number = lines[-1].strip().isdigit()
    # Behind a blank line: otherwise it is the last line of what is said.
    is_name = has_names and len(lines) > 1 and not lines[-2].strip()
    return lines[:-1] if is_number or is_name else lines


def _spoken_lines(lines: Sequence[str]) -> list[str]:
    """Lines of a cue that hold words, without tags."""
    spoken = []
    for i, line in enumerate(lines):
        # A comment begins behind a blank line and takes all that follows, up to the next cue.
        if i > 0 and not lines[i - 1].strip() and line.split(' ')[0].strip() in _COMMENTS:
            break
        # \xa0 and \u200b fill empty lines.
        words = plain_text.plain(_BREAK.sub(' ', line))
        words = words.replace('\xa0', ' ').replace('\u200b', '')
        if words.strip() and not _THUMBNAIL.fullmatch(words.strip()):
            spoken.append(' '.join(words.split()))
    return spoken


def _is_touching(before: _Cue, cue: _Cue) -> bool:
    return cue.start <= before.end + _TOUCHING


def _is_highlighted(before: _Cue, cue: _Cue) -> bool:
    """Whether a cue is the one before with another word in a tag."""
    has_tags = plain_text.has_tags(before.source) and plain_text.has_tags(cue.source)
    is_same = before.lines == cue.lines and before.source.strip() != cue.source.strip()
    return has_tags and is_same and _is_touching(before, cue)


def _is_grown(before: _Cue, cue: _Cue) -> bool:
    """Whether a cue is the one before with more words behind it."""
    # Words of the same line: a new line is one that rolls in.
    is_longer = cue.lines[-1].startswith(before.lines[-1] + ' ')
    return is_longer and cue.lines[:-1] == before.lines[:-1] and _is_touching(before, cue)


def _joined(cues: Sequence[_Cue], continues: Callable[[_Cue, _Cue], bool]) -> list[_Cue]:
    """The cues, where each that continues the one before takes its place."""
    joined: list[_Cue] = []
    for cue in cues:
        if joined and continues(joined[-1], cue):
            joined[-1] = dataclasses.replace(cue, start=joined[-1].start)
        else:
            joined.append(cue)
    return joined


def _overlap(before: _Cue, cue: _Cue) -> int:
    """Number of lines at the beginning of a cue that the one before ends with."""
    if not _is_touching(before, cue):
        return 0
    for count in range(min(len(before.lines), len(cue.lines)), 0, -1):
        if before.lines[-count:] == cue.lines[:count]:
            return count
    return 0


def _is_rolling(cues: Sequence[_Cue]) -> bool:
    """Whether lines roll over the screen: cues repeat the last ones and add new ones.

    A sentence that is said twice does not count, as nothing is added to it; but a repetition that
    is too short to be read does: with these, YouTube moves a line up.
    """
    num_rolling = 0
    for before, cue in zip(cues, cues[1:]):
        repeated = _overlap(before, cue)
        is_flash = cue.end - cue.start < _FLASH
        if repeated and (repeated < len(cue.lines) or is_flash):
            num_rolling += 1
    return num_rolling > _ROLLING_SHARE * max(len(cues) - 1, 1)


def _without_repetitions(cues: Sequence[_Cue]) -> list[_Cue]:
    """The cues with the lines that are new in each; those without any are left out."""
    kept = []
    for i, cue in enumerate(cues):
        repeated = _overlap(cues[i - 1], cue) if i else 0
        if repeated < len(cue.lines):
            kept.append(dataclasses.replace(cue, lines=cue.lines[repeated:]))
    return kept


# ---- Names of files.


def split_name(name: str) -> tuple[str, list[str]]:
    """'ID.en.vtt' -> ('ID', ['en']): what a subtitle file is of, and which one it is."""
    stem = name.rpartition('.')[0]
    tags: list[str] = []
    while '.' in stem:
        rest, _, tag = stem.rpartition('.')
        if not (_LANGUAGE.fullmatch(tag) or tag.lower() in TRACK_WORDS):
            break
        stem = rest
        tags.insert(0, tag)
    return stem, tags
