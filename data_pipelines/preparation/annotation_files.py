"""Caption and annotation files -> what is known about each media file. Formats: docs/data.md."""

from __future__ import annotations

import collections
import math
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from data_pipelines import media
from data_pipelines.errors import DataError
from data_pipelines.preparation import plain_text, subtitles, text_files

# (start, end) in seconds of an entry without times: the whole file.
WHOLE = (0.0, float('inf'))

# Separators of tables, in the order in which they are tried.
_DELIMITERS = (',', ';', '\t', '|')
_TABLE_SUFFIXES = ('.csv', '.tsv', '.txt')
_JSON_SUFFIXES = ('.json', '.jsonl', '.ndjson')
# What to do about files of other kinds.
_REMEDIES = {
    'save the spreadsheet as CSV': ('.xlsx', '.xls', '.ods', '.numbers'),
    'save the table as CSV (pandas: to_csv)': ('.parquet', '.feather', '.arrow', '.pkl', '.h5'),
    'unpack it first': ('.gz', '.zip', '.bz2', '.xz', '.zst', '.tar', '.tgz', '.7z', '.rar'),
    'convert it to SRT (ffmpeg -i FILE FILE.srt, or yt-dlp --convert-subs=srt)': (
        *('.ass', '.ssa', '.ttml', '.dfxp', '.smi', '.lrc', '.xml'),
        *('.json3', '.srv1', '.srv2', '.srv3'),
    ),
    'save it as plain text': ('.docx', '.doc', '.odt', '.rtf', '.pdf', '.html'),
}

# What a column of a table, or a field of JSON, may be called: the likeliest name first.
_NAMES_OF = {
    'video': (
        'video',
        'path',
        'video_path',
        'file_path',
        'filepath',
        'filename',
        'file_name',
        'file',
        'video_file',
        'video_name',
        'video_id',
        'videoid',
        'clip',
        'clip_id',
        'youtube_id',
        'ytid',
        'id',
    ),
    'text': (
        'text',
        'caption',
        'sentence',
        'description',
        'transcript',
        'transcription',
        'texts',
        'captions',
        'sentences',
        'descriptions',
    ),
    'start': (
        'start',
        'start_time',
        'start_seconds',
        'start_sec',
        'start_s',
        'start_time_s',
        'start_time_sec',
        'time_start',
        'starttime',
        'begin',
        'from',
    ),
    'end': (
        'end',
        'end_time',
        'end_seconds',
        'end_sec',
        'end_s',
        'end_time_s',
        'end_time_sec',
        'time_end',
        'endtime',
        'stop',
        'to',
    ),
    'duration': ('duration',),
    # Pairs of start and end, in JSON.
    'times': ('timestamp', 'timestamps', 'segment', 'interval'),
    'label': ('label', 'class', 'category', 'class_name', 'label_name'),
}
# Beginnings of names that must mean times: left out in silence, a sentence would be in the wrong
# place.
_START_NAMES = ('start', 'begin', 'onset')
_END_NAMES = ('end', 'stop', 'offset')
# Lists of MSR-VTT, COCO and their like, in which every entry names its video.
_LISTS_OF_ENTRIES = ('sentences', 'captions', 'annotations', 'data')
# The id in the address of a YouTube video.
_ADDRESS = re.compile(
    r'^(?:https?://)?(?:[\w.]*\.)?(?:youtube\.com/(?:watch\?(?:.*&)?v=|shorts/|embed/|v/)|youtu\.be/)'
    r'([\w-]{11})(?![\w-])',
    re.ASCII,
)
# What programs write where there is nothing.
_MISSING_WORDS = ('', 'nan', 'NaN', 'null', 'NULL', 'None', '<NA>', 'N/A', '#N/A', '\\N')
# What spreadsheets write where they took a text, such as -abc or =abc, for a formula.
_SPREADSHEET_ERRORS = ('#NAME?', '#REF!', '#VALUE!', '#NULL!', '#NUM!', '#DIV/0!')
# Of speech recognition (Whisper): sentences with times, beside the whole text without.
_SEGMENTS = 'segments'

# Characters of a malformed entry, and of the names of columns, that an error message quotes.
_MAX_QUOTE = 60
_MAX_HEADER = 200

Content = TypeVar('Content')


# ---- Captions.


def read_captions(path: str | pathlib.Path, encoding: str = '') -> dict[str, list[dict[str, Any]]]:
    """Read captions from a table, JSON, JSON Lines, or the subtitles of one video.

    Args:
        path: the file.
        encoding: of a file that is neither UTF-8 nor UTF-16, '' to refuse it.

    Returns:
        Name in the file -> its sentences, dicts of 'text', 'start', 'end' (seconds). A name
        without any sentence has an empty list.

    Raises:
        DataError: if the file is missing or malformed; the message names line or entry.
    """
    path = _checked_path(path, 'captions', (*_TABLE_SUFFIXES, *_JSON_SUFFIXES, *subtitles.SUFFIXES))
    text = text_files.read_text(path, encoding)
    if path.suffix.lower() in subtitles.SUFFIXES:
        return {subtitles.split_name(path.name)[0]: subtitles.parse(text, path)}
    if path.suffix.lower() in _JSON_SUFFIXES:
        entries = _json_entries(text, path)
    else:
        entries = _table_entries(text, path)
    sentences: dict[str, list[dict[str, Any]]] = {}
    for video, value, where in entries:
        # Also a video without a sentence is known.
        sentences.setdefault(video, []).extend(_sentences_of(value, where))
    return sentences


def _table_entries(text: str, path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(video, fields, file and line) of each row of a table; one row is one sentence."""
    for where, fields in _read_table(text, path, ('video', 'text'), 'video,start,end,text'):
        yield fields['video'], fields, where


def _json_entries(text: str, path: pathlib.Path) -> Iterator[tuple[str, Any, str]]:
    """(video, entry, file and place) of each entry of a file of JSON or JSON Lines."""
    documents: list[tuple[str, Any]] = []
    # Programs write JSON Lines under the suffix of JSON too.
    is_lines = path.suffix.lower() != '.json' and not text.lstrip().startswith('[\n')
    if is_lines or text_files.is_json_lines(text):
        for line_number, content in text_files.parse_json_lines(text, path):
            documents.append((f'{path}, line {line_number}', content))
    else:
        documents.append((str(path), text_files.parse_json(text, path)))

    for where, content in documents:
        # Counted from 1 for people who look for the entry in the file.
        for number, (video, entry) in enumerate(_json_rows(content, where), 1):
            place = f'{where}: entry {number}' if len(documents) == 1 else where
            if video is None:
                raise DataError(
                    f'{place}: expected a video name and {{"start", "end", "text"}}, '
                    f'got {_quote(entry)}'
                )
            yield _storable(str(video)), entry, place


def _json_rows(content: Any, where: str) -> Iterator[tuple[Any, Any]]:
    """(video or None, entry) of each entry of one JSON document."""
    if _has_segments(content) and not _is_entry(content):
        # Of one video, which gave the file its name.
        yield pathlib.Path(where).stem, content
        return
    if isinstance(content, Mapping) and not _is_entry(content):
        for name in _LISTS_OF_ENTRIES:
            entries = content.get(name)
            if isinstance(entries, list) and entries and all(map(_is_entry, entries)):
                content = entries
                break
    if isinstance(content, list):
        for entry in content:
            fields = _fields(entry) if isinstance(entry, Mapping) else {}
            yield fields.get('video'), entry
    elif not isinstance(content, Mapping):
        raise DataError(
            f'{where}: expected {{video: [sentences]}} or a list of {{"video", "start", "end", '
            f'"text"}}, got {_quote(content)}'
        )
    elif _is_entry(content):
        # One entry by itself, as lines of JSON Lines are.
        yield _fields(content)['video'], content
    elif _is_nameless(content):
        yield None, content
    else:
        for video, entries in content.items():
            # A list without sentences still makes the video known.
            is_list = isinstance(entries, list) and entries
            for entry in entries if is_list else [entries]:
                yield video, entry


def _is_entry(value: Any) -> bool:
    """Whether a JSON value is an entry that names its video itself."""
    if not isinstance(value, Mapping):
        return False
    names = _names_by_meaning(value)
    return 'text' in names and 'video' in names and isinstance(value[names['video'][0]], str | int)


def _is_nameless(content: Mapping[str, Any]) -> bool:
    """Whether an object is an entry that lacks its video, and no table of videos."""
    names = _names_by_meaning(content)
    num_understood = sum(len(found) for found in names.values())
    return 'text' in names and num_understood == len(content)


def _sentences_of(value: Any, where: str) -> list[dict[str, Any]]:
    """The sentences of one entry; none where the text is missing.

    An entry is a sentence, a list of them, {"start", "end", "text"}, or the same with a list each,
    as HowTo100M has it.
    """
    fields: Mapping[str, Any] = {}
    if _has_segments(value):
        sentences = []
        for segment in value[_SEGMENTS]:
            sentences += _sentences_of(segment, where)
        return sentences
    if isinstance(value, Mapping):
        _check_names(value, where)
        fields = _fields(value)
    elif isinstance(value, str | list) or is_missing(value):
        fields = {'text': value}
    if 'text' not in fields:
        raise DataError(
            f'{where}: expected a video name and {{"start", "end", "text"}}, got {_quote(value)}'
        )
    text = fields['text']
    if isinstance(text, list):
        return _sentences_of_lists(fields, where)
    if is_missing(text):
        return []
    return [{'text': _checked_text(text, where), **_times(fields, where)}]


def _has_segments(value: Any) -> bool:
    """Whether an entry holds sentences with times in a list of its own."""
    segments = value.get(_SEGMENTS) if isinstance(value, Mapping) else None
    if not isinstance(segments, list) or not segments:
        return False
    return all(isinstance(item, Mapping) and 'text' in _fields(item) for item in segments)


def _sentences_of_lists(fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The sentences of an entry that has a list of them, and a list of times or none."""
    texts = fields['text']
    starts, ends = fields.get('start'), fields.get('end')
    if fields.get('times') is not None:
        pairs = [_pair(value, where) for value in _list_of(fields['times'], len(texts), where)]
        starts = [start for start, _ in pairs]
        ends = [end for _, end in pairs]
    durations = fields.get('duration') if ends is None else None
    if not isinstance(durations, list):
        durations = None  # of the whole file
    sentences = []
    starts = _list_of(starts, len(texts), where)
    ends = _list_of(ends, len(texts), where)
    durations = _list_of(durations, len(texts), where)
    for text, start, end, duration in zip(texts, starts, ends, durations):
        if is_missing(text):
            continue
        begin = _seconds(start, WHOLE[0], where)
        if not is_missing(duration):
            end = begin + _seconds(duration, WHOLE[1], where)
        # HowTo100M has sentences that end before they begin; those have a moment and no length.
        finish = max(begin, _seconds(end, WHOLE[1], where))
        sentences.append({'text': _checked_text(text, where), 'start': begin, 'end': finish})
    return sentences


def _list_of(value: Any, count: int, where: str) -> list[Any]:
    """A list of `count` values; what is no list counts for each of them."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise DataError(
            f'{where}: expected lists of one length, got {count} texts and {len(value)} times'
        )
    return value


def _pair(value: Any, where: str) -> tuple[Any, Any]:
    if value is None:
        return None, None
    if not isinstance(value, list) or len(value) != 2:
        raise DataError(f'{where}: expected [start, end] in seconds, got {_quote(value)}')
    return value[0], value[1]


def _checked_text(text: Any, where: str) -> str:
    is_number = isinstance(text, int | float) and not isinstance(text, bool)
    if not isinstance(text, str) and not is_number:
        raise DataError(f'{where}: expected a sentence, got {_quote(text)}')
    return _storable(plain_text.plain(str(text)))


def _storable(text: str) -> str:
    """Text with halves of characters replaced, as JSON has where somebody cut an emoji in two."""
    return text.encode('utf-8', 'replace').decode()


def is_missing(value: Any) -> bool:
    """Whether a value says that there is nothing: null, NaN, an empty cell, or a word for them."""
    if isinstance(value, str):
        return value.strip() in _MISSING_WORDS
    return value is None or (isinstance(value, float) and math.isnan(value))


# ---- Annotations.


def read_annotations(
    path: str | pathlib.Path, encoding: str = ''
) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
    """Read annotations from JSON, or from a table with the columns video,label.

    Args:
        path: the file.
        encoding: of a file that is neither UTF-8 nor UTF-16, '' to refuse it.

    Returns:
        Label name -> class names, and name in the file -> {'segments', 'ground_truth'}. A segment
        is a dict of 'start', 'end' (seconds), 'caption', and 'labels': label name -> class number,
        or a list of them.

    Raises:
        DataError: if the file is missing or malformed; the message names the entry.
    """
    path = _checked_path(path, 'annotations', (*_TABLE_SUFFIXES, '.json'))
    text = text_files.read_text(path, encoding)
    if path.suffix.lower() != '.json':
        return _annotations_from_table(text, path)

    content = text_files.parse_json(text, path)
    if not isinstance(content, Mapping) or not isinstance(content.get('videos'), Mapping):
        raise DataError(
            f'{path}: expected the form '
            '{"labels": {name: [classes]}, "videos": {path: {"segments": [...]}}}'
        )
    classes = {
        str(label): [str(name) for name in names]
        # `or {}`: files that programs write have null where there is nothing.
        for label, names in (content.get('labels') or {}).items()
    }
    annotations = {}
    for video, entry in content['videos'].items():
        where = f'{path}: videos[{video!r}]'
        if not isinstance(entry, Mapping):
            raise DataError(f'{where}: expected an object with "segments", got {_quote(entry)}')
        segments = entry.get('segments')
        # An empty list is an answer (no segment), a missing one is not.
        if segments is None and (entry.get('labels') or entry.get('caption')):
            # Labels or a caption of the file as a whole.
            segments = [{'caption': entry.get('caption'), 'labels': entry.get('labels', {})}]
        annotations[str(video)] = {
            'segments': [
                _segment(segment, classes, f'{where}.segments[{i}]')
                for i, segment in enumerate(segments or [])
            ],
            'ground_truth': entry.get('ground_truth', {}),
        }
    return classes, annotations


def _segment(
    entry: Mapping[str, Any], classes: Mapping[str, list[str]], where: str
) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise DataError(
            f'{where}: expected {{"start", "end", "caption", "labels"}}, got {_quote(entry)}'
        )
    labels: dict[str, int | list[int]] = {}
    for label, value in (entry.get('labels') or {}).items():
        if label not in classes:
            raise DataError(
                f'{where}: label {label!r} is not among "labels" ({", ".join(classes) or "none"})'
            )
        if isinstance(value, list):
            labels[label] = [_class_number(item, classes[label], label, where) for item in value]
        else:
            labels[label] = _class_number(value, classes[label], label, where)
    caption = entry.get('caption')
    return {
        **_times(entry, where),
        'caption': '' if is_missing(caption) else _checked_text(caption, where),
        'labels': labels,
    }


def _class_number(value: Any, class_names: list[str], label: str, where: str) -> int:
    """Number of a class that is given by its name or its number; -1 is an unknown class."""
    if isinstance(value, str) and value in class_names:
        return class_names.index(value)
    # In Python, True is an int.
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if is_number and -1 <= value < len(class_names):
        return value
    raise DataError(
        f'{where}: {value!r} is not a class of {label!r} '
        f'(a name or a number below {len(class_names)})'
    )


def _annotations_from_table(
    text: str, path: pathlib.Path
) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
    """One label `class`; multi-hot if any video has several rows with different labels."""
    names_by_video: dict[str, list[str]] = {}
    for _, row in _read_table(text, path, ('video', 'label'), 'video,label'):
        # A row without a label still makes the video known, with an unknown class.
        video_names = names_by_video.setdefault(row['video'], [])
        if row['label'] and row['label'] not in video_names:
            video_names.append(row['label'])

    # Alphabetical, so that class numbers do not depend on the order of the rows.
    class_names = sorted({name for names in names_by_video.values() for name in names})
    number_of = {name: i for i, name in enumerate(class_names)}
    # One form for the whole label: a batch cannot hold numbers and vectors of it at once.
    is_multi_hot = any(len(names) > 1 for names in names_by_video.values())

    annotations = {}
    for video, names in names_by_video.items():
        value: int | list[int]
        if is_multi_hot:
            value = [number_of[name] for name in names]
        elif names:
            value = number_of[names[0]]
        else:
            value = -1  # unknown
        start, end = WHOLE
        segment = {'start': start, 'end': end, 'caption': '', 'labels': {'class': value}}
        annotations[video] = {'segments': [segment], 'ground_truth': {}}
    return {'class': class_names}, annotations


def multi_hot_sizes(
    classes: Mapping[str, list[str]], annotations: Mapping[str, dict[str, Any]]
) -> dict[str, int | None]:
    """Which labels are multi-hot: those of which some segment has a list.

    Returns:
        Label name -> number of classes if it is multi-hot, else None.
    """
    multi_hot = set()
    for annotation in annotations.values():
        for segment in annotation['segments']:
            for label, value in segment['labels'].items():
                if isinstance(value, list):
                    # A list of one counts too: the author of the file says that there can be
                    # several.
                    multi_hot.add(label)
    return {label: len(names) if label in multi_hot else None for label, names in classes.items()}


# ---- Names.


class NameResolver:
    """Finds the media file that a name in a caption or annotation file means.

    A name is the path of the file below the folder, or any end of that path, or either without the
    suffix, or a path that leads to the folder and on to the file. Downloaders put the id of a video
    behind its title, `Title [ID].mp4` or `Title-ID.mp4`: the id is a name as well, and so is the
    address of the video. Each counts as long as only one file answers to it.

    Names are compared in composed form, because file systems of macOS write an accent as a
    character of its own.
    """

    def __init__(self, file_ids: Iterable[str], folder: str | pathlib.Path = ''):
        """See the class.

        Args:
            file_ids: paths below the folder.
            folder: of the files, for names that lead to it; '' without.
        """
        self._paths: dict[str, str] = {}
        self._aliases: dict[str, str | None] = {}  # None: several files answer
        self._ids: dict[str, str | None] = {}
        self._folder_parts: list[str] = []
        if folder:
            absolute = pathlib.Path(folder).absolute()
            self._folder_parts = [_composed(part) for part in absolute.parts]
        for file_id in file_ids:
            # All ends are entered once, so that each look-up is O(1): a list may have a million
            # names.
            self._paths[file_id] = file_id
            # 'a/b/c.mp4' answers to a/b/c.mp4, b/c.mp4, c.mp4, a/b/c, b/c and c.
            parts = _composed(file_id).split('/')
            for i in range(len(parts)):
                path_end = '/'.join(parts[i:])
                without_suffix = path_end.rpartition('.')[0]
                for alias in {path_end, without_suffix} - {file_id}:
                    _enter(self._aliases, alias, file_id)
            video_id = _id_in_title(parts[-1].rpartition('.')[0])
            if video_id:
                _enter(self._ids, video_id, file_id)

    def __call__(self, name: str) -> str | None:
        """The file id; None if no file, or more than one, answers to the name."""
        # The forms in which Windows and shells write relative paths.
        name = name.strip().replace('\\', '/').removeprefix('./')
        # A full path means its file, even where it is also the end of another path.
        if name in self._paths:
            return self._paths[name]
        name = _composed(name)
        # The file that is called so, before one that has it as its id only.
        if name in self._aliases:
            return self._aliases[name]
        address = _ADDRESS.search(name)
        if address:
            return self(address[1])
        return self._ids.get(name) or self._below_folder(name)

    def _below_folder(self, name: str) -> str | None:
        """The file that a path like videos/a.mp4 or /data/videos/a.mp4 means."""
        parts = name.split('/')
        if name.startswith('/'):
            parts[0] = '/'  # as pathlib has it
        for i in range(1, len(parts)):
            if self._folder_parts[-i:] == parts[:i]:
                rest = '/'.join(parts[i:])
                # From the folder on, only the whole path is meant.
                file_id = self._paths.get(rest) or self._aliases.get(rest)
                if file_id is not None and rest.count('/') == file_id.count('/'):
                    return file_id
        return None

    def ignoring_case(self, names: Iterable[str]) -> dict[str, str]:
        """{name: file id} of the names that mean a file if their case does not count.

        Only names with a suffix: the ids of two videos may differ in case alone.
        """
        files: dict[str, str | None] = {}
        for file_id in self._paths:
            parts = _composed(file_id).casefold().split('/')
            for i in range(len(parts)):
                _enter(files, '/'.join(parts[i:]), file_id)
        found = {}
        for name in names:
            path = name.strip().replace('\\', '/').removeprefix('./')
            match = files.get(_composed(path).casefold())
            if match is not None:
                found[name] = match
        return found


def _enter(table: dict[str, str | None], alias: str, file_id: str) -> None:
    """Let a file answer to an alias; None where another one does so already."""
    is_ambiguous = table.get(alias, file_id) != file_id
    table[alias] = None if is_ambiguous else file_id


def _id_in_title(stem: str) -> str:
    """The id of the video in the name of a downloaded file, '' without."""
    # yt-dlp's names: Title [abcDEF_12-3]; of one stream alone, Title [abcDEF_12-3].f137.
    found = re.fullmatch(r'.*\[([^\[\]\s]+)\](?:\.f\d+)?', stem)
    # youtube-dl's: Title-abcDEF_12-3, where ids have eleven characters.
    found = found or re.fullmatch(r'.+-([\w-]{11})', stem, re.ASCII)
    return found[1] if found else ''


def _composed(name: str) -> str:
    return unicodedata.normalize('NFC', name)


def match_to_files(
    content: Mapping[str, Content], resolver: NameResolver
) -> tuple[dict[str, Content], list[str]]:
    """Key the content of a caption or annotation file by media file.

    Sentences of two names that mean one file are joined. Names that differ from a file's in case
    alone mean it if nothing else does.

    Returns:
        File id -> content, and the names that no file answers to.

    Raises:
        DataError: if two names of annotations mean one file.
    """
    by_file: dict[str, Any] = {}
    unmatched = []
    for name, value in content.items():
        file_id = resolver(name)
        if file_id is None:
            unmatched.append(name)
        elif file_id not in by_file:
            by_file[file_id] = value
        elif isinstance(value, list):
            # A new list; += would change the caller's.
            by_file[file_id] = by_file[file_id] + value
        else:
            raise DataError(f'annotations: {name!r} and another name both mean the file {file_id}')
    if not unmatched:
        return by_file, []

    # The second pass, so that a name which is exactly right comes first.
    file_of = resolver.ignoring_case(unmatched)
    num_claims = collections.Counter(file_of.values())
    unknown_names = []
    for name in unmatched:
        file_id = file_of.get(name)
        if file_id is None or file_id in by_file or num_claims[file_id] > 1:
            unknown_names.append(name)
        else:
            by_file[file_id] = content[name]
    return by_file, unknown_names


# ---- Tables.


def _read_table(
    text: str, path: pathlib.Path, required: tuple[str, ...], form: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a table whose first row has the names of its columns.

    Args:
        text: of the file.
        path: of the file.
        required: what must be there, of the keys of _NAMES_OF.
        form: the usual header, for messages.

    Yields:
        (file and line, {what it means: cell}) of each row that is not blank.

    Raises:
        DataError: if the table is malformed, or a cell would be lost.
    """
    text, delimiter = _delimiter(text, required)
    table = list(text_files.rows(text, path, delimiter))
    if not table:
        raise DataError(f'{path}: expected the columns {form}, got an empty file')
    header, *body = table
    names = list(header.fields)
    while names and not names[-1]:
        # Spreadsheets fill all rows up to the longest.
        names.pop()
    column_of = _columns(names, path, required, form)
    # Where a comma separates fields it cannot be a decimal mark as well.
    has_decimal_comma = delimiter != ','
    text_files.check_quotes(body, path, delimiter, column_of['video'])
    for row in body:
        where = f'{path}, line {row.line_number}'
        cells = _cells(row, len(names), column_of, delimiter, where)
        fields: dict[str, Any] = {}
        for meaning, column in column_of.items():
            # Rows that are too short lack their last cells.
            fields[meaning] = cells[column] if column < len(cells) else ''
        if has_decimal_comma:
            for meaning in ('start', 'end', 'duration'):
                fields[meaning] = fields.get(meaning, '').replace(',', '.')
        for cell in cells:
            if cell in _SPREADSHEET_ERRORS:
                raise DataError(
                    f'{where}: expected a text, got {cell!r}, which a spreadsheet writes for a '
                    'formula that it cannot compute; format the column as text and enter it anew'
                )
        if not fields['video']:
            raise DataError(
                f'{where}: expected the name of a video in column {names[column_of["video"]]!r}, '
                f'got {_quote(row.source)!r}; name it in every row'
            )
        yield where, fields


def _delimiter(text: str, required: tuple[str, ...]) -> tuple[str, str]:
    """(the text without a line that only names the separator, the separator of its fields).

    It is the one with which the header has the columns.
    """
    first_line, _, rest = text.lstrip('\n').partition('\n')
    # Excel's own way of saying it; some programs put it into quotes.
    separator = re.fullmatch(r'"?sep=(.)"?\s*', first_line, re.I)
    if separator:
        # An empty line in its place, so that lines keep their numbers.
        return '\n' + rest, separator[1]
    for delimiter in _DELIMITERS:
        names = [name.strip().strip('"') for name in first_line.split(delimiter)]
        if set(required) <= set(_names_by_meaning(names)):
            return text, delimiter
    # None fits: the most frequent one shows best what is wrong.
    return text, max(_DELIMITERS, key=first_line.count)


def _columns(
    names: Sequence[str], path: pathlib.Path, required: tuple[str, ...], form: str
) -> dict[str, int]:
    """What it means -> position of the column."""
    by_name = {name: column for column, name in enumerate(names)}
    column_of = _fields(by_name)
    simplified = [_simplified(name) for name in names]
    for column in column_of.values():
        # Of two columns with one name, one would be lost.
        if simplified.count(simplified[column]) > 1:
            raise DataError(
                f'{path}: expected columns with different names, got {names[column]!r} twice'
            )
    if not set(required) <= set(column_of):
        found = ', '.join(names) or '(none)'
        raise DataError(
            f'{path}: expected the columns {form}, got {found[:_MAX_HEADER]}; the first line has '
            'the names of the columns'
        )
    if 'label' in required:
        _check_single('label', by_name, str(path))
    if 'text' in required:
        # A cell holds one time.
        if 'times' in column_of:
            raise DataError(
                f'{path}: expected times in columns start and end (seconds, or 0:01:30), got '
                f'{names[column_of["times"]]!r}'
            )
        _check_names(names, str(path))
    return column_of


def _cells(
    row: text_files.Row,
    num_columns: int,
    column_of: Mapping[str, int],
    delimiter: str,
    where: str,
) -> list[str]:
    """The cells of a row, as many as there are columns.

    A sentence with a comma that is not in quotes has too many. It is taken whole where all that is
    before it is plainly a name and times.
    """
    if not any(row.fields[num_columns:]):
        return row.fields[:num_columns]
    text_column = column_of.get('text')
    is_plain = '"' not in row.source and '\n' not in row.source
    if text_column == num_columns - 1 and is_plain:
        cells = [cell.strip() for cell in row.source.split(delimiter, text_column)]
        # Two numbers where there is one: a decimal comma, which would shift all that follows.
        starts_with_number = _is_time(row.fields[text_column])
        if _is_name_and_times(cells, column_of) and not starts_with_number:
            # Spreadsheets fill up short rows with separators.
            cells[text_column] = cells[text_column].rstrip(f'{delimiter} ')
            return cells
    raise DataError(
        f'{where}: expected {num_columns} fields, got {len(row.fields)} '
        f'({_quote(row.source)!r}); put a text that holds {delimiter!r} into double quotes, '
        'and write numbers with a decimal point'
    )


def _is_name_and_times(cells: Sequence[str], column_of: Mapping[str, int]) -> bool:
    """Whether the cells before a sentence are what their columns say."""
    for column, cell in enumerate(cells[:-1]):
        # Of another column, only a number cannot be a part of the text behind it.
        if column not in column_of.values() and cell and not _is_time(cell):
            return False
    if 'start' in column_of and 'end' in column_of:
        times = [cells[column_of['start']], cells[column_of['end']]]
        return all(time == '' or _is_time(time) for time in times)
    # Without times, only a name that ends as media files do cannot be the first half of one.
    return cells[column_of['video']].lower().endswith(media.SUFFIXES)


# ---- Names of columns and fields.


def _fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """{what it means: value} of the fields that are understood."""
    names = _names_by_meaning(entry)
    return {meaning: entry[found[0]] for meaning, found in names.items()}


def _check_names(names: Iterable[str], where: str) -> None:
    """Refuse names of a sentence's fields that leave open what is meant.

    Raises:
        DataError: if two could be the sentence, or if one must be a time and is not understood.
    """
    names = list(names)
    _check_single('text', names, where)
    found = _names_by_meaning(names)
    if 'times' in found:
        return
    beginnings: tuple[str, ...] = ()
    if 'start' not in found:
        beginnings += _START_NAMES
    if 'end' not in found and 'duration' not in found:
        beginnings += _END_NAMES
    for name in names:
        if _simplified(name).startswith(beginnings):
            raise DataError(
                f'{where}: expected times in fields start and end (seconds, or 0:01:30), got '
                f'{name!r}, whose unit is unknown; rename it'
            )


def _check_single(meaning: str, names: Iterable[str], where: str) -> None:
    """Refuse several fields that could be meant: all but one would be lost."""
    possible = _names_by_meaning(names).get(meaning, [])
    # The name itself is clear.
    if len(possible) > 1 and _simplified(possible[0]) != meaning:
        raise DataError(
            f'{where}: expected one field {meaning}, got {" and ".join(possible)}; '
            f'call the one that is meant {meaning}'
        )


def _names_by_meaning(names: Iterable[Any]) -> dict[str, list[str]]:
    """{what it means: the names that mean it, likeliest first}."""
    name_of = {_simplified(name): name for name in names}
    found: dict[str, list[str]] = {}
    for meaning, possible_names in _NAMES_OF.items():
        present = [name_of[name] for name in possible_names if name in name_of]
        if present:
            found[meaning] = present
    return found


def _simplified(name: Any) -> str:
    """'Start (s)' and 'start-s' -> 'start_s'."""
    return re.sub(r'[^\w]+', '_', str(name).strip().lower()).strip('_')


# ---- Reading and checking.


def _checked_path(path: str | pathlib.Path, kind: str, suffixes: tuple[str, ...]) -> pathlib.Path:
    path = pathlib.Path(path)
    if not path.exists():
        raise DataError(f'the {kind} file {path} does not exist')
    if not path.is_file():
        raise DataError(f'the {kind} file {path}: expected a file, got a folder or a pipe')
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        hint = ''
        for remedy, kinds in _REMEDIES.items():
            if suffix in kinds:
                hint = f'; {remedy}'
        raise DataError(
            f'the {kind} file {path}: expected one of {", ".join(suffixes)}, '
            f'got {path.suffix or "no suffix"}{hint}'
        )
    return path


def _quote(value: Any) -> str:
    return str(value)[:_MAX_QUOTE]


# ---- Times.


def _times(entry: Mapping[str, Any], where: str) -> dict[str, float]:
    """'start' and 'end' of an entry; of one without them, those of the whole file."""
    start, end = entry.get('start'), entry.get('end')
    if entry.get('times') is not None:
        start, end = _pair(entry['times'], where)
    begin = _seconds(start, WHOLE[0], where)
    finish = _seconds(end, WHOLE[1], where)
    # A duration beside a start is that of the sentence; by itself it may be that of the file.
    if is_missing(end) and not is_missing(start):
        finish = begin + _seconds(entry.get('duration'), WHOLE[1], where)
    # Equal ones are allowed: an event that has a moment and no length.
    if finish < begin:
        raise DataError(f'{where}: it ends ({finish:g} s) before it starts ({begin:g} s)')
    return {'start': begin, 'end': finish}


def _seconds(value: Any, default: float, where: str) -> float:
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


def _is_time(text: str) -> bool:
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
