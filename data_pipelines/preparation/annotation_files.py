"""Caption and annotation files -> what is known about each media file. Formats: docs/data.md."""

from __future__ import annotations

import csv
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from data_pipelines.errors import DataError

WHOLE = (0.0, float('inf'))


def read_captions(path: str | pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """CSV with columns video,start,end,text or JSON -> {name in the file: [{'text', 'start', 'end'}]}. Raises DataError."""
    path = _file(path, 'captions')
    out: dict[str, list[dict[str, Any]]] = {}
    if path.suffix.lower() == '.json':
        content = _json(path)
        if isinstance(content, Mapping):
            rows = [
                (video, entry)
                for video, entries in content.items()
                for entry in _listed(entries, path, video)
            ]
        else:
            rows = [
                (e.get('video') if isinstance(e, Mapping) else None, e)
                for e in _listed(content, path, 'the top level')
            ]
        for number, (video, entry) in enumerate(rows, 1):
            entry = {'text': entry} if isinstance(entry, str) else entry
            if video is None or not isinstance(entry, Mapping) or 'text' not in entry:
                raise DataError(
                    f'{path}: entry {number} is {str(entry)[:80]}; wanted a video name and {{"start", "end", "text"}}'
                )
            out.setdefault(str(video), []).append(_sentence(entry, f'{path}: entry {number}'))
        return out
    columns, rows = _csv(path)
    if not {'video', 'text'} <= columns:
        raise DataError(
            f'{path} has the columns {", ".join(sorted(columns)) or "(none)"}; wanted video,start,end,text'
        )
    for number, row in rows:
        out.setdefault(row['video'], []).append(_sentence(row, f'{path}, line {number}'))
    return out


def read_annotations(
    path: str | pathlib.Path,
) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
    """JSON, or CSV with columns video,label -> ({label name: class names}, {name in the file: {'segments', 'ground_truth'}}).

    Segments are {'start', 'end', 'caption', 'labels': {name: class number or list of them}}. Raises DataError.
    """
    path = _file(path, 'annotations')
    if path.suffix.lower() != '.json':
        return _label_csv(path)
    content = _json(path)
    if not isinstance(content, Mapping) or not isinstance(content.get('videos'), Mapping):
        raise DataError(
            f'{path} wants the form {{"labels": {{name: [classes]}}, "videos": {{path: {{"segments": [...]}}}}}}'
        )
    classes = {str(k): [str(c) for c in v] for k, v in (content.get('labels') or {}).items()}
    videos = {}
    for video, entry in content['videos'].items():
        if not isinstance(entry, Mapping):
            raise DataError(
                f'{path}: videos[{video!r}] is {str(entry)[:60]}; wanted an object with "segments"'
            )
        segments = entry.get('segments')
        if segments is None and (entry.get('labels') or entry.get('caption')):
            segments = [{'caption': entry.get('caption', ''), 'labels': entry.get('labels', {})}]
        videos[str(video)] = {
            'segments': [
                _segment(s, classes, f'{path}: videos[{video!r}].segments[{i}]')
                for i, s in enumerate(segments or [])
            ],
            'ground_truth': entry.get('ground_truth', {}),
        }
    return classes, videos


def _label_csv(path: pathlib.Path) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
    columns, rows = _csv(path)
    if not {'video', 'label'} <= columns:
        raise DataError(
            f'{path} has the columns {", ".join(sorted(columns)) or "(none)"}; wanted video,label'
        )
    given: dict[str, list[str]] = {}
    for _, row in rows:
        labels = given.setdefault(row['video'], [])
        if row['label'] and row['label'] not in labels:
            labels.append(row['label'])
    names = sorted({label for labels in given.values() for label in labels})
    number = {name: i for i, name in enumerate(names)}
    several = any(len(labels) > 1 for labels in given.values())
    value = lambda labels: (
        [number[x] for x in labels] if several else number[labels[0]] if labels else -1
    )
    return {'class': names}, {
        video: {
            'segments': [
                {
                    'start': WHOLE[0],
                    'end': WHOLE[1],
                    'caption': '',
                    'labels': {'class': value(labels)},
                }
            ],
            'ground_truth': {},
        }
        for video, labels in given.items()
    }


def several(
    classes: Mapping[str, list[str]], videos: Mapping[str, dict[str, Any]]
) -> dict[str, int | None]:
    """{label name: number of classes if some segment has a list of them (multi-hot), else None}."""
    lists = {
        name
        for v in videos.values()
        for s in v['segments']
        for name, x in s['labels'].items()
        if isinstance(x, list)
    }
    return {name: len(names) if name in lists else None for name, names in classes.items()}


class Names:
    """Which media file a name in a caption or annotation file means: its path below the folder, or any end of that path, or
    either without the suffix, as long as only one file answers to it."""

    def __init__(self, ids: Iterable[str]):
        self._exact, self._loose = {}, {}
        for i in ids:
            self._exact[i] = i
            parts = i.split('/')
            for n in range(len(parts)):
                end = '/'.join(parts[n:])
                for alias in {end, end.rpartition('.')[0]} - {i}:
                    self._loose[alias] = None if alias in self._loose else i

    def __call__(self, name: str) -> str | None:
        name = name.strip().replace('\\', '/').removeprefix('./')
        return self._exact.get(name) or self._loose.get(name)


def assign(content: Mapping[str, Any], names: Names) -> tuple[dict[str, Any], list[str]]:
    """({media file: content}, names that no file answers to). Entries of two names for one file are joined."""
    out: dict[str, Any] = {}
    unknown = []
    for name, value in content.items():
        media = names(name)
        if media is None:
            unknown.append(name)
        elif media in out and isinstance(value, list):
            out[media] = out[media] + value
        elif media in out:
            raise DataError(f'annotations: {name!r} and another name both mean the file {media}')
        else:
            out[media] = value
    return out, unknown


def _file(path: str | pathlib.Path, what: str) -> pathlib.Path:
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataError(f'the {what} file {path} does not exist')
    if path.suffix.lower() not in ('.csv', '.json'):
        raise DataError(f'the {what} file {path} must be .csv or .json')
    return path


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding='utf-8-sig'))
    except (ValueError, OSError) as e:
        raise DataError(f'{path} is not readable JSON: {e}') from None


def _csv(path: pathlib.Path) -> tuple[set[str], list[tuple[int, dict[str, str]]]]:
    try:
        with open(path, newline='', encoding='utf-8-sig') as f:
            reader = csv.DictReader(f, skipinitialspace=True)
            columns = {(c or '').strip().lower() for c in reader.fieldnames or ()}
            rows = [
                (
                    reader.line_num,
                    {
                        (k or '').strip().lower(): (v or '').strip()
                        for k, v in row.items()
                        if isinstance(v, str | None)
                    },
                )
                for row in reader
            ]
    except (csv.Error, UnicodeDecodeError, OSError) as e:
        raise DataError(f'{path} is not readable CSV in UTF-8: {e}') from None
    return columns, [(n, r) for n, r in rows if r.get('video')]


def _listed(value: Any, path: pathlib.Path, what: str) -> list[Any]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise DataError(
            f'{path}: {what} is {str(value)[:60]}; wanted a list of {{"start", "end", "text"}}'
        )
    return value


def _seconds(value: Any, default: float, where: str) -> float:
    if value in (None, ''):
        return default
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise DataError(f'{where}: {value!r} is not a time in seconds') from None
    if not seconds >= 0:
        raise DataError(f'{where}: {value!r} is not a time in seconds from the beginning')
    return seconds


def _times(entry: Mapping[str, Any], where: str) -> dict[str, float]:
    start, end = (
        _seconds(entry.get('start'), WHOLE[0], where),
        _seconds(entry.get('end'), WHOLE[1], where),
    )
    if end < start:
        raise DataError(f'{where}: it ends ({end:g} s) before it starts ({start:g} s)')
    return {'start': start, 'end': end}


def _sentence(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {'text': str(entry['text']), **_times(entry, where)}


def _segment(
    entry: Mapping[str, Any], classes: Mapping[str, list[str]], where: str
) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise DataError(
            f'{where} is {str(entry)[:60]}; wanted {{"start", "end", "caption", "labels"}}'
        )
    labels = {}
    for name, value in (entry.get('labels') or {}).items():
        if name not in classes:
            raise DataError(
                f'{where}: label {name!r} is not among "labels" ({", ".join(classes) or "none"})'
            )
        labels[name] = (
            [_class(v, classes[name], name, where) for v in value]
            if isinstance(value, list)
            else _class(value, classes[name], name, where)
        )
    return {**_times(entry, where), 'caption': str(entry.get('caption') or ''), 'labels': labels}


def _class(value: Any, names: list[str], label: str, where: str) -> int:
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and -1 <= value < len(names):
        return value
    raise DataError(
        f'{where}: {value!r} is not a class of {label!r} (a name or a number below {len(names)})'
    )
