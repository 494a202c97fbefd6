"""Files, and what annotation files say of them -> what `prepare` decodes and writes. One form for anyone's videos and for named datasets."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_pipelines import media
from data_pipelines.errors import DataError
from data_pipelines.preparation import annotation_files, decoded_files
from data_pipelines.storage.records import SPLITS

_ARCHIVES = ('.zip', '.tar', '.gz', '.tgz', '.rar', '.7z')


@dataclasses.dataclass
class Clip:
    """What an annotation file says of one clip. Times of segments and sentences in seconds from the clip's beginning.

    names: what a file that holds just this clip may be called, likeliest first; videos: what the file it would have to be cut out of
    may be called, at `part`. Names mean files as in docs/data.md. split: of SPLITS, '' for a random one, or one for each fold ('' there:
    in none). segments: {'start', 'end', 'caption', 'labels'}; sentences: {'text', 'start', 'end'}.
    """

    names: Sequence[str]
    split: str | Sequence[str]
    segments: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sentences: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    ground_truth: dict[str, Any] = dataclasses.field(default_factory=dict)
    videos: Sequence[str] = ()
    part: tuple[float, float] = media.WHOLE


@dataclasses.dataclass
class Inputs:
    """What `prepare` works on. Everything by file id but: classes {label: names}, missing: names without a file, identity: what decides
    besides the files, unused: media files that no annotation names. splits: empty, or as of Clip. folds: 0, or their number."""

    files: list[decoded_files.File]
    sentences: dict[str, list[dict[str, Any]]]
    marks: dict[str, dict[str, Any]]
    classes: dict[str, list[str]]
    multi: dict[str, int | None]
    missing: list[str]
    identity: dict[str, Any]
    splits: dict[str, Any] = dataclasses.field(default_factory=dict)
    folds: int = 0
    unused: int = 0
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)


def mine(videos: str, captions: str = '', annotations: str = '') -> Inputs:
    """Anyone's folder of media files; the other two are files of docs/data.md, or ''. Raises DataError."""
    folder = pathlib.Path(videos)
    files = scan(folder)
    names = annotation_files.Names(f.id for f in files)
    sentences, unknown = annotation_files.assign(
        annotation_files.read_captions(captions) if captions else {}, names
    )
    if captions and not sentences:
        raise DataError(
            f'no entry of {captions} names a file below {folder} (it says {unknown[0]!r}, a file is {files[0].id!r})'
            if unknown
            else f'the captions file {captions} is empty'
        )
    classes, videos_notes = (
        annotation_files.read_annotations(annotations) if annotations else ({}, {})
    )
    marks, unknown_marks = annotation_files.assign(videos_notes, names)
    if annotations and videos_notes and not marks:
        raise DataError(
            f'no entry of {annotations} names a file below {folder} (it says {unknown_marks[0]!r}, a file is '
            f'{files[0].id!r})'
        )
    return Inputs(
        files,
        sentences,
        marks,
        classes,
        annotation_files.several(classes, videos_notes),
        [*unknown, *unknown_marks],
        {'captions': digest(captions), 'annotations': digest(annotations)},
    )


def resolve(
    clips: Iterable[Clip],
    files: list[decoded_files.File],
    names: annotation_files.Names,
    classes: dict[str, list[str]],
    folds: int,
) -> Inputs:
    """Clips of a named dataset whose files are there. A file (part) that several clips name is one record: their segments come together. If they
    disagree about the split, it is for the later of train, validation, test."""
    by_id = {f.id: f for f in files}
    out = Inputs([], {}, {}, classes, {}, [], {}, folds=folds)
    used, found = set(), {}
    for clip in clips:
        id = next(filter(None, map(names, clip.names)), None)
        file = by_id.get(id)
        if file is None:
            id = next(filter(None, map(names, clip.videos)), None)
            if id is None:
                out.missing.append([*clip.names, *clip.videos][0])
                continue
            file = by_id[id]
            if math.isfinite(clip.part[1]):
                file = dataclasses.replace(
                    file, id=f'{id}@{clip.part[0]:g}-{clip.part[1]:g}', part=clip.part
                )
        used.add(id)
        if file.id not in found:
            found[file.id] = clip
            out.files.append(file)
            out.splits[file.id] = clip.split
            out.sentences[file.id] = list(clip.sentences)
            out.marks[file.id] = {
                'segments': list(clip.segments),
                'ground_truth': clip.ground_truth,
            }
        elif clip.split == out.splits[file.id]:
            out.sentences[file.id] += clip.sentences
            out.marks[file.id]['segments'] += clip.segments
        else:
            later = max(
                [out.splits[file.id], clip.split],
                key=lambda s: SPLITS.index(s) if s in SPLITS else -1,
            )
            out.skipped[f'{file.id} (again)'] = (
                f'two splits: {out.splits[file.id]} and {clip.split}; it is in {later}'
            )
            out.splits[file.id] = later
    out.multi = annotation_files.several(classes, out.marks)
    out.unused = len(files) - len(used)
    return out


def scan(
    folder: pathlib.Path, suffixes: Sequence[str] = media.SUFFIXES
) -> list[decoded_files.File]:
    """All media files below a folder, sorted. Raises DataError if there is none."""
    if not folder.is_dir():
        raise DataError(f'the folder {folder} does not exist')
    files, archives = [], []
    for root, folders, found in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith('.'))
        for entry in sorted(found):
            if entry.lower().endswith(suffixes) and not entry.startswith('.'):
                path = pathlib.Path(root, entry)
                try:
                    stat = path.stat()
                except OSError:  # a dangling link
                    continue
                files.append(
                    decoded_files.File(
                        path.relative_to(folder).as_posix(),
                        str(path),
                        stat.st_size,
                        stat.st_mtime_ns,
                    )
                )
            elif entry.lower().endswith(_ARCHIVES):
                archives.append(entry)
    if not files:
        hint = f'; unpack {archives[0]} first' if archives else ''
        raise DataError(f'no media file below {folder} (looked for {", ".join(suffixes)}){hint}')
    return files


def digest(path: str | os.PathLike) -> str:
    """Of a file's contents; '' for ''."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() if path else ''


def counts(splits: Iterable[str]) -> Mapping[str, int]:
    """{split: how many}, of SPLITS, without those that have none."""
    given = list(splits)
    return {s: given.count(s) for s in SPLITS if s in given}
