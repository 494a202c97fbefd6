"""Subtitle files (SRT, WebVTT, SBV) -> sentences with times, and which file is of which video.

Cues are read by hand: what matters here is what no parser of the formats does, undoing the
repetitions of automatic subtitles and bearing with files that keep to no standard.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.preparation import folder_listing, plain_text, text_files

SUFFIXES = ('.srt', '.vtt', '.sbv')
# Kinds that are not read; told, because a user who has them expects sentences.
_OTHER_SUFFIXES = (
    '.ass',
    '.ssa',
    '.ttml',
    '.dfxp',
    '.smi',
    '.lrc',
    '.json3',
    '.srv1',
    '.srv2',
    '.srv3',
)

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
_TRACK_WORDS = ('auto', 'asr', 'generated', 'manual', 'forced', 'sdh', 'cc', 'default')
_AUTOMATIC_WORDS = ('auto', 'asr', 'generated', 'orig')
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


# ---- Many files.


@dataclasses.dataclass(frozen=True)
class _Track:
    """A subtitle file of a video.

    Attributes:
        id: path below the folder.
        path: of the file.
        language: primary subtag in lower case, '' without.
        is_automatic: whether its name says so.
    """

    id: str
    path: pathlib.Path
    language: str
    is_automatic: bool


@dataclasses.dataclass
class Found:
    """What the subtitle files of a folder say.

    Attributes:
        sentences: media file id -> sentences.
        unknown_names: subtitle files that no media file answers to.
        skipped: subtitle file -> reason why it cannot be used.
        remarks: what the user should know, a sentence each.
        digest: of the files that were used; '' if there are none.
    """

    sentences: dict[str, list[dict[str, Any]]]
    unknown_names: list[str]
    skipped: dict[str, str]
    remarks: list[str]
    digest: str


def split_name(name: str) -> tuple[str, list[str]]:
    """'ID.en.vtt' -> ('ID', ['en']): what a subtitle file is of, and which one it is."""
    stem = name.rpartition('.')[0]
    tags: list[str] = []
    while '.' in stem:
        rest, _, tag = stem.rpartition('.')
        if not (_LANGUAGE.fullmatch(tag) or tag.lower() in _TRACK_WORDS):
            break
        stem = rest
        tags.insert(0, tag)
    return stem, tags


def find(
    folder: pathlib.Path,
    file_ids: Iterable[str],
    resolver: Callable[[str], str | None],
    encoding: str = '',
) -> Found:
    """Read the subtitle files below a folder, one for each media file.

    A file is of the media file beside it that is called so, or of the one that answers to its name.
    Of several, the one without a language comes first, then the language that most videos have
    (of equal ones English), then what people wrote before what was recognised.

    Args:
        folder: searched through.
        file_ids: of the media files.
        resolver: which media file a name means.
        encoding: of files that are neither UTF-8 nor UTF-16, '' to skip them.
    """
    by_stem: dict[str, list[str]] = {}
    for file_id in file_ids:
        # Sound that lies beside its pictures has the same sentences.
        by_stem.setdefault(file_id.rpartition('.')[0], []).append(file_id)
        by_stem.setdefault(file_id, []).append(file_id)

    found = Found({}, [], {}, [], '')
    tracks_of: dict[str, list[_Track]] = {}
    others = []
    paths = _walk(folder)
    for subtitle_id in sorted(paths):
        if not subtitle_id.lower().endswith(SUFFIXES):
            others.append(subtitle_id)
            continue
        media_ids, tags = _media_of(subtitle_id, by_stem, resolver)
        if not media_ids:
            found.unknown_names.append(subtitle_id)
        for media_id in media_ids:
            track = _track(subtitle_id, paths[subtitle_id], tags)
            tracks_of.setdefault(media_id, []).append(track)

    used, num_choices = _read_best(tracks_of, found, encoding)
    _remark_on(found, used, num_choices, others)
    digest = hashlib.sha256()
    for track in sorted(set(used.values()), key=lambda track: track.id):
        content_digest = hashlib.sha256(track.path.read_bytes()).hexdigest()
        digest.update(f'{track.id} {content_digest}\n'.encode())
    found.digest = digest.hexdigest() if used else ''
    return found


def _walk(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """{path below the folder: path} of all files that may be subtitles, without hidden ones."""
    paths = {}
    for root, entries in folder_listing.walk(folder):
        for entry in entries:
            if entry.lower().endswith((*SUFFIXES, *_OTHER_SUFFIXES)):
                path = pathlib.Path(root, entry)
                paths[folder_listing.readable(path.relative_to(folder).as_posix())] = path
    return paths


def _media_of(
    subtitle_id: str, by_stem: Mapping[str, list[str]], resolver: Callable[[str], str | None]
) -> tuple[list[str], list[str]]:
    """The media files that a subtitle file is of, and what else its name says."""
    parent, slash, name = subtitle_id.rpartition('/')
    # The longest first: a title may end in what looks like a language.
    stem, tags = split_name(name)
    stems = []
    for i in range(len(tags), -1, -1):
        stems.append(('.'.join([stem, *tags[:i]]), tags[i:]))
    for candidate, rest in stems:
        beside = by_stem.get(f'{parent}{slash}{candidate}')
        if beside:
            return beside, rest
    for candidate, rest in stems:
        media_id = resolver(f'{parent}{slash}{candidate}') or resolver(candidate)
        if media_id:
            return [media_id], rest
    return [], []


def _track(subtitle_id: str, path: pathlib.Path, tags: Sequence[str]) -> _Track:
    words: list[str] = []
    for tag in tags:
        words += re.split('[-_]', tag.lower())
    languages = [tag for tag in tags if tag.lower() not in _TRACK_WORDS]
    language = re.split('[-_]', languages[0].lower())[0] if languages else ''
    is_automatic = any(word in _AUTOMATIC_WORDS for word in words)
    return _Track(subtitle_id, path, language, is_automatic)


def _read_best(
    tracks_of: Mapping[str, list[_Track]], found: Found, encoding: str
) -> tuple[dict[str, _Track], int]:
    """Read the best track of each media file into `found`.

    Returns:
        Media file id -> the track that was read, and the number of media files with several
        tracks.
    """
    counts: collections.Counter[str] = collections.Counter()
    for tracks in tracks_of.values():
        counts.update({track.language for track in tracks})

    def rank(track: _Track) -> tuple[Any, ...]:
        is_english = track.language in ('en', 'eng')
        return (
            track.language != '',
            -counts[track.language],
            not is_english,
            track.language,
            track.is_automatic,
            # Of one track in two formats, the one with more in it.
            not track.id.lower().endswith('.vtt'),
            len(track.id),
            track.id,
        )

    used: dict[str, _Track] = {}
    for media_id, tracks in tracks_of.items():
        # Below the best are only those that are read if it cannot be.
        for track in sorted(tracks, key=rank):
            try:
                sentences = parse(text_files.read_text(track.path, encoding), track.path)
            except DataError as error:
                # What precedes the colon is the kind of reason, under which it is counted.
                found.skipped[track.id] = f'subtitles: {error}'
                continue
            if sentences:
                found.sentences[media_id] = sentences
                used[media_id] = track
                break
    num_choices = 0
    for tracks in tracks_of.values():
        # One track in several formats, as speech recognition writes it, is no choice.
        names = {track.id.rpartition('.')[0] for track in tracks}
        num_choices += len(names) > 1
    return used, num_choices


def _remark_on(
    found: Found, used: Mapping[str, _Track], num_choices: int, others: Sequence[str]
) -> None:
    if used:
        languages = collections.Counter(track.language or 'no language' for track in used.values())
        listed = ', '.join(f'{count} {name}' for name, count in languages.most_common())
        found.remarks.append(
            f'sentences from the subtitle files of {len(used)} media files ({listed}); '
            '--captions=none leaves them out'
        )
    if num_choices:
        example = next(iter(used.values()), None)
        read = f', for example {example.id!r}' if example else ''
        found.remarks.append(
            f'{num_choices} media files have several subtitle files, of which one is read{read}; '
            'for others, give --captions=FOLDER with only those'
        )
    if others:
        found.remarks.append(
            f'{len(others)} subtitle files are of kinds that are not read (such as {others[0]!r}); '
            'convert them to SRT: ffmpeg -i FILE FILE.srt, or yt-dlp --convert-subs=srt'
        )
