"""Caption and annotation files -> what is known about each media file. Formats: docs/data.md."""

from __future__ import annotations

import csv
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from data_pipelines.errors import DataError

# (start, end) in seconds of an entry without times: the whole file.
WHOLE = (0.0, float('inf'))

# Characters of a malformed entry that an error message quotes.
_MAX_QUOTE = 60

Content = TypeVar('Content')


# ---- Captions.


def read_captions(path: str | pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """Read captions from CSV with the columns video,start,end,text, or from JSON.

    Returns:
        Name in the file -> its sentences, dicts of 'text', 'start', 'end' (seconds).

    Raises:
        DataError: if the file is missing or malformed; the message names line or entry.
    """
    path = _checked_path(path, 'captions')
    if path.suffix.lower() == '.json':
        return _captions_from_json(path)

    # One row a sentence; a video may have any number of them.
    columns, rows = _read_csv(path)
    _require_columns(path, columns, required=('video', 'text'), all_columns='video,start,end,text')
    sentences: dict[str, list[dict[str, Any]]] = {}
    for line_number, row in rows:
        sentence = _sentence(row, f'{path}, line {line_number}')
        sentences.setdefault(row['video'], []).append(sentence)
    return sentences


def _captions_from_json(path: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """Either {video: [entries]}, or [entries] that name their video themselves."""
    content = _read_json(path)
    rows: list[tuple[Any, Any]] = []  # (video or None, entry)
    # Two layouts, brought into one list, so that entries are checked and numbered alike.
    if isinstance(content, Mapping):
        for video, entries in content.items():
            rows += [(video, entry) for entry in _as_list(entries, path, video)]
    else:
        for entry in _as_list(content, path, 'the top level'):
            video = entry.get('video') if isinstance(entry, Mapping) else None
            rows.append((video, entry))

    sentences: dict[str, list[dict[str, Any]]] = {}
    # Counted from 1 for people who look for the entry in the file.
    for number, (video, entry) in enumerate(rows, 1):
        if isinstance(entry, str):
            entry = {'text': entry}  # a sentence without times
        if video is None or not isinstance(entry, Mapping) or 'text' not in entry:
            raise DataError(
                f'{path}: entry {number}: expected a video name and {{"start", "end", "text"}}, '
                f'got {_quote(entry)}'
            )
        sentence = _sentence(entry, f'{path}: entry {number}')
        sentences.setdefault(str(video), []).append(sentence)
    return sentences


def _sentence(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {'text': str(entry['text']), **_times(entry, where)}


# ---- Annotations.


def read_annotations(
    path: str | pathlib.Path,
) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
    """Read annotations from JSON, or from CSV with the columns video,label.

    Returns:
        Label name -> class names, and name in the file -> {'segments', 'ground_truth'}. A segment
        is a dict of 'start', 'end' (seconds), 'caption', and 'labels': label name -> class number,
        or a list of them.

    Raises:
        DataError: if the file is missing or malformed; the message names the entry.
    """
    path = _checked_path(path, 'annotations')
    if path.suffix.lower() != '.json':
        return _annotations_from_csv(path)

    content = _read_json(path)
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
            segments = [{'caption': entry.get('caption', ''), 'labels': entry.get('labels', {})}]
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
    return {**_times(entry, where), 'caption': str(entry.get('caption') or ''), 'labels': labels}


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


def _annotations_from_csv(
    path: pathlib.Path,
) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
    """One label `class`; multi-hot if any video has several rows with different labels."""
    columns, rows = _read_csv(path)
    _require_columns(path, columns, required=('video', 'label'), all_columns='video,label')
    names_by_video: dict[str, list[str]] = {}
    for _, row in rows:
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
    suffix, as long as only one file answers to it.
    """

    def __init__(self, file_ids: Iterable[str]):
        self._paths: dict[str, str] = {}
        self._aliases: dict[str, str | None] = {}  # None: several files answer
        for file_id in file_ids:
            # All ends are entered once, so that each look-up is O(1): a list may have a million
            # names.
            self._paths[file_id] = file_id
            # 'a/b/c.mp4' answers to a/b/c.mp4, b/c.mp4, c.mp4, a/b/c, b/c and c.
            parts = file_id.split('/')
            for i in range(len(parts)):
                path_end = '/'.join(parts[i:])
                without_suffix = path_end.rpartition('.')[0]
                for alias in {path_end, without_suffix} - {file_id}:
                    is_ambiguous = alias in self._aliases
                    self._aliases[alias] = None if is_ambiguous else file_id

    def __call__(self, name: str) -> str | None:
        """The file id; None if no file, or more than one, answers to the name."""
        # The forms in which Windows and shells write relative paths.
        name = name.strip().replace('\\', '/').removeprefix('./')
        # A full path means its file, even where it is also the end of another path.
        return self._paths.get(name) or self._aliases.get(name)


def match_to_files(
    content: Mapping[str, Content], resolver: NameResolver
) -> tuple[dict[str, Content], list[str]]:
    """Key the content of a caption or annotation file by media file.

    Sentences of two names that mean one file are joined.

    Returns:
        File id -> content, and the names that no file answers to.

    Raises:
        DataError: if two names of annotations mean one file.
    """
    by_file: dict[str, Any] = {}
    unknown_names = []
    for name, value in content.items():
        file_id = resolver(name)
        if file_id is None:
            unknown_names.append(name)
        elif file_id not in by_file:
            by_file[file_id] = value
        elif isinstance(value, list):
            # A new list; += would change the caller's.
            by_file[file_id] = by_file[file_id] + value
        else:
            raise DataError(f'annotations: {name!r} and another name both mean the file {file_id}')
    return by_file, unknown_names


# ---- Reading and checking.


def _checked_path(path: str | pathlib.Path, kind: str) -> pathlib.Path:
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataError(f'the {kind} file {path} does not exist')
    if path.suffix.lower() not in ('.csv', '.json'):
        raise DataError(f'the {kind} file {path} must be .csv or .json')
    return path


def _read_json(path: pathlib.Path) -> Any:
    # utf-8-sig: spreadsheet programs put a byte order mark in front.
    try:
        return json.loads(path.read_text(encoding='utf-8-sig'))
    except (ValueError, OSError) as error:
        raise DataError(f'{path} is not readable JSON: {error}') from None


def _read_csv(path: pathlib.Path) -> tuple[set[str], list[tuple[int, dict[str, str]]]]:
    """Column names in lower case, and (line number, row) of the rows that name a video."""
    try:
        # newline='': the csv module handles line breaks itself, also those inside quotes.
        # skipinitialspace: a quote after ", " would otherwise be part of the text.
        with open(path, newline='', encoding='utf-8-sig') as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            columns = {_clean(column).lower() for column in reader.fieldnames or ()}
            # line_num counts lines, not rows: it is what an editor shows.
            rows = [(reader.line_num, _clean_row(row)) for row in reader]
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f'{path} is not readable CSV in UTF-8: {error}') from None
    return columns, [(line_number, row) for line_number, row in rows if row.get('video')]


def _clean_row(row: Mapping[str | None, Any]) -> dict[str, str]:
    # Fields beyond the last column come as a list under None; they are left out.
    return {
        _clean(column).lower(): _clean(value)
        for column, value in row.items()
        if isinstance(value, str | None)
    }


def _clean(text: str | None) -> str:
    """Without spaces around it; rows that are too short have None in their last columns."""
    return (text or '').strip()


def _require_columns(
    path: pathlib.Path, columns: set[str], required: tuple[str, ...], all_columns: str
) -> None:
    if not set(required) <= columns:
        found = ', '.join(sorted(columns)) or '(none)'
        raise DataError(f'{path}: expected the columns {all_columns}, got {found}')


def _as_list(value: Any, path: pathlib.Path, where: str) -> list[Any]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise DataError(
            f'{path}: {where}: expected a list of {{"start", "end", "text"}}, got {_quote(value)}'
        )
    return value


def _quote(value: Any) -> str:
    return str(value)[:_MAX_QUOTE]


def _times(entry: Mapping[str, Any], where: str) -> dict[str, float]:
    """'start' and 'end' of an entry; of one without them, those of the whole file."""
    start = _seconds(entry.get('start'), WHOLE[0], where)
    end = _seconds(entry.get('end'), WHOLE[1], where)
    # Equal ones are allowed: an event that has a moment and no length.
    if end < start:
        raise DataError(f'{where}: it ends ({end:g} s) before it starts ({start:g} s)')
    return {'start': start, 'end': end}


def _seconds(value: Any, default: float, where: str) -> float:
    # An empty cell of CSV, or null.
    if value in (None, ''):
        return default
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise DataError(f'{where}: {value!r} is not a time in seconds') from None
    if not seconds >= 0:  # also NaN
        raise DataError(f'{where}: {value!r} is not a time in seconds from the beginning')
    return seconds
