"""Caption and annotation files -> what is known about each media file. Formats: docs/data.md."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.preparation import json_files, subtitles, tables, text_files
from data_pipelines.preparation.store import Store, StoredDict, StoredLists
from data_pipelines.preparation.values import (
    WHOLE,
    checked_text,
    is_missing,
    pair,
    quote,
    seconds_of,
    storable,
    times,
)

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

# Of speech recognition (Whisper): sentences with times, beside the whole text without.
_SEGMENTS = 'segments'
# Lists of MSR-VTT, COCO and their like, in which every entry names its video.
_LISTS_OF_ENTRIES = ('sentences', 'captions', 'annotations', 'data')


# ---- Captions.


def read_captions(
    path: str | pathlib.Path, encoding: str = '', store: Store | None = None
) -> StoredLists:
    """Read captions from a table, JSON, JSON Lines, or the subtitles of one video.

    Args:
        path: the file.
        encoding: of a file that is neither UTF-8 nor UTF-16, '' to refuse it.
        store: where they are kept; None for one of their own.

    Returns:
        Name in the file -> its sentences, dicts of 'text', 'start', 'end' (seconds). A name
        without any sentence has an empty list.

    Raises:
        DataError: if the file is missing or malformed; the message names line or entry.
    """
    path = _checked_path(path, 'captions', (*_TABLE_SUFFIXES, *_JSON_SUFFIXES, *subtitles.SUFFIXES))
    sentences = StoredLists(store or Store())
    if path.suffix.lower() in subtitles.SUFFIXES:
        text = text_files.read_text(path, encoding)
        sentences.extend(subtitles.split_name(path.name)[0], subtitles.parse(text, path))
        return sentences
    file = text_files.TextFile(path, encoding)
    if path.suffix.lower() in _JSON_SUFFIXES:
        entries = _json_entries(file)
    else:
        entries = _table_entries(file)
    for video, value, where in entries:
        # Also a video without a sentence is known.
        sentences.extend(video, _sentences_of(value, where))
    return sentences


def _table_entries(file: text_files.TextFile) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(video, fields, file and line) of each row of a table; one row is one sentence."""
    for where, fields in tables.read(file, ('video', 'text'), 'video,start,end,text'):
        yield fields['video'], fields, where


def _json_entries(file: text_files.TextFile) -> Iterator[tuple[str, Any, str]]:
    """(video, entry, file and place) of each entry of a file of JSON or JSON Lines."""
    for where, content, is_only in _json_documents(file):
        # Counted from 1 for people who look for the entry in the file.
        for number, (video, entry) in enumerate(_json_rows(content, where), 1):
            place = f'{where}: entry {number}' if is_only else where
            if video is None:
                raise DataError(
                    f'{place}: expected a video name and {{"start", "end", "text"}}, '
                    f'got {quote(entry)}'
                )
            yield storable(str(video)), entry, place


def _json_documents(file: text_files.TextFile) -> Iterator[tuple[str, Any, bool]]:
    """(file and line, content, whether it is the only one) of the documents in a file."""
    # Programs write JSON Lines under the suffix of JSON too, and lists under that of JSON Lines.
    is_lines = file.path.suffix.lower() != '.json' and not json_files.begins_as_list(file)
    if not is_lines and not json_files.is_json_lines(file):
        yield str(file.path), _load(file), True
        return
    lines = json_files.parse_json_lines(file)
    first_two = list(itertools.islice(lines, 2))
    for line_number, content in itertools.chain(first_two, lines):
        yield f'{file.path}, line {line_number}', content, len(first_two) == 1


def _load(file: text_files.TextFile) -> Any:
    """The content of a JSON file, the members of a large one read one by one."""
    try:
        return json_files.load(file)
    except ValueError as error:
        raise DataError(f'{file.path} is not readable JSON: {error}') from None
    except RecursionError:
        raise json_files.too_deep(file.path) from None


def _json_rows(content: Any, where: str) -> Iterator[tuple[Any, Any]]:
    """(video or None, entry) of each entry of one JSON document."""
    if _has_segments(content) and not _is_entry(content):
        # Of one video, which gave the file its name.
        yield pathlib.Path(where).stem, dict(content.items())
        return
    if isinstance(content, Mapping) and not _is_entry(content):
        for name in _LISTS_OF_ENTRIES:
            entries = content.get(name)
            if json_files.is_list(entries) and entries and all(map(_is_entry, entries)):
                content = entries
                break
    if json_files.is_list(content):
        for entry in content:
            fields = tables.fields(entry) if isinstance(entry, Mapping) else {}
            yield fields.get('video'), entry
    elif not isinstance(content, Mapping):
        raise DataError(
            f'{where}: expected {{video: [sentences]}} or a list of {{"video", "start", "end", '
            f'"text"}}, got {quote(content)}'
        )
    elif _is_entry(content):
        # One entry by itself, as lines of JSON Lines are.
        yield tables.fields(content)['video'], dict(content.items())
    elif _is_nameless(content):
        yield None, dict(content.items())
    else:
        for video, entries in content.items():
            # A list without sentences still makes the video known.
            is_filled_list = isinstance(entries, list) and entries
            for entry in entries if is_filled_list else [entries]:
                yield video, entry


def _is_entry(value: Any) -> bool:
    """Whether a JSON value is an entry that names its video itself."""
    if not isinstance(value, Mapping):
        return False
    names = tables.names_by_meaning(value)
    return 'text' in names and 'video' in names and isinstance(value[names['video'][0]], str | int)


def _is_nameless(content: Mapping[str, Any]) -> bool:
    """Whether an object is an entry that lacks its video, and no table of videos."""
    names = tables.names_by_meaning(content)
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
        tables.check_names(value, where)
        fields = tables.fields(value)
    elif isinstance(value, str | list) or is_missing(value):
        fields = {'text': value}
    if 'text' not in fields:
        raise DataError(
            f'{where}: expected a video name and {{"start", "end", "text"}}, got {quote(value)}'
        )
    text = fields['text']
    if isinstance(text, list):
        return _sentences_of_lists(fields, where)
    if is_missing(text):
        return []
    return [{'text': checked_text(text, where), **times(fields, where)}]


def _has_segments(value: Any) -> bool:
    """Whether an entry holds sentences with times in a list of its own."""
    segments = value.get(_SEGMENTS) if isinstance(value, Mapping) else None
    if not json_files.is_list(segments) or not segments:
        return False
    return all(isinstance(item, Mapping) and 'text' in tables.fields(item) for item in segments)


def _sentences_of_lists(fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The sentences of an entry that has a list of them, and a list of times or none."""
    texts = fields['text']
    starts, ends = fields.get('start'), fields.get('end')
    if fields.get('times') is not None:
        pairs = [pair(value, where) for value in _list_of(fields['times'], len(texts), where)]
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
        begin = seconds_of(start, WHOLE[0], where)
        if not is_missing(duration):
            end = begin + seconds_of(duration, WHOLE[1], where)
        # HowTo100M has sentences that end before they begin; those have a moment and no length.
        finish = max(begin, seconds_of(end, WHOLE[1], where))
        sentences.append({'text': checked_text(text, where), 'start': begin, 'end': finish})
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


# ---- Annotations.


def read_annotations(
    path: str | pathlib.Path, encoding: str = '', store: Store | None = None
) -> tuple[dict[str, list[str]], StoredDict]:
    """Read annotations from JSON, or from a table with the columns video,label.

    Args:
        path: the file.
        encoding: of a file that is neither UTF-8 nor UTF-16, '' to refuse it.
        store: where they are kept; None for one of their own.

    Returns:
        Label name -> class names, and name in the file -> {'segments', 'ground_truth'}. A segment
        is a dict of 'start', 'end' (seconds), 'caption', and 'labels': label name -> class number,
        or a list of them.

    Raises:
        DataError: if the file is missing or malformed; the message names the entry.
    """
    path = _checked_path(path, 'annotations', (*_TABLE_SUFFIXES, '.json'))
    store = store or Store()
    file = text_files.TextFile(path, encoding)
    if path.suffix.lower() != '.json':
        return _annotations_from_table(file, store)

    content = _load(file)
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
    annotations = StoredDict(store)
    for video, entry in content['videos'].items():
        annotations[str(video)] = _annotation(entry, classes, f'{path}: videos[{video!r}]')
    return classes, annotations


def _annotation(entry: Any, classes: Mapping[str, list[str]], where: str) -> dict[str, Any]:
    """'segments' and 'ground_truth' of one video."""
    if not isinstance(entry, Mapping):
        raise DataError(f'{where}: expected an object with "segments", got {quote(entry)}')
    segments = entry.get('segments')
    # An empty list is an answer (no segment), a missing one is not.
    if segments is None and (entry.get('labels') or entry.get('caption')):
        # Labels or a caption of the file as a whole.
        segments = [{'caption': entry.get('caption'), 'labels': entry.get('labels', {})}]
    return {
        'segments': [
            _segment(segment, classes, f'{where}.segments[{i}]')
            for i, segment in enumerate(segments or [])
        ],
        'ground_truth': entry.get('ground_truth', {}),
    }


def _segment(
    entry: Mapping[str, Any], classes: Mapping[str, list[str]], where: str
) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise DataError(
            f'{where}: expected {{"start", "end", "caption", "labels"}}, got {quote(entry)}'
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
        **times(entry, where),
        'caption': '' if is_missing(caption) else checked_text(caption, where),
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
    file: text_files.TextFile, store: Store
) -> tuple[dict[str, list[str]], StoredDict]:
    """One label `class`; multi-hot if any video has several rows with different labels."""
    labels_of = StoredLists(store)
    found: set[str] = set()
    for _, row in tables.read(file, ('video', 'label'), 'video,label'):
        # A row without a label still makes the video known, with an unknown class.
        labels = [row['label']] if row['label'] else []
        labels_of.extend(row['video'], labels)
        found.update(labels)

    # Alphabetical, so that class numbers do not depend on the order of the rows.
    class_names = sorted(found)
    number_of = {name: i for i, name in enumerate(class_names)}
    # One form for the whole label: a batch cannot hold numbers and vectors of it at once.
    is_multi_hot = any(len(set(labels)) > 1 for labels in labels_of.values())

    annotations = StoredDict(store)
    for video, labels in labels_of.items():
        # Each once, in the order of the rows.
        numbers = [number_of[label] for label in dict.fromkeys(labels)]
        value: int | list[int]
        if is_multi_hot:
            value = numbers
        elif numbers:
            value = numbers[0]
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
