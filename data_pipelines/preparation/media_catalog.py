"""Media files and what annotation files say of them -> what `prepare` decodes and writes.

There is one form for anyone's videos and for named datasets.
"""

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
from data_pipelines.preparation import (
    annotation_files,
    decoded_files,
    folder_listing,
    subtitle_folders,
    subtitles,
)
from data_pipelines.preparation.file_list import FileList
from data_pipelines.preparation.file_names import NameResolver, match_to_files
from data_pipelines.preparation.store import Store, StoredDict
from data_pipelines.storage.records import SPLITS

# In place of a captions file: no sentences, though subtitle files lie beside the videos.
NO_CAPTIONS = 'none'

# A split, or one for each fold; '' where none is given.
SplitOrFolds = str | Sequence[str]


@dataclasses.dataclass
class Clip:
    """What an annotation file says of one clip.

    Times are in seconds from the beginning of the clip. Names mean files as in docs/data.md.

    Attributes:
        names: what a file that holds just this clip may be called, likeliest first.
        split: one of SPLITS, '' for a random one, or one for each fold ('' there: not in the fold).
        segments: dicts of 'start', 'end', 'caption', 'labels'.
        sentences: dicts of 'text', 'start', 'end'.
        ground_truth: anything else that is known, JSON-able.
        videos: what the file may be called that the clip would have to be cut out of.
        part: (start, end) of the clip in that file, in seconds.
    """

    # Tried in this order, each through the resolver.
    names: Sequence[str]
    split: SplitOrFolds
    segments: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sentences: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    ground_truth: dict[str, Any] = dataclasses.field(default_factory=dict)
    videos: Sequence[str] = ()
    part: tuple[float, float] = media.WHOLE


@dataclasses.dataclass
class MediaCatalog:
    """What `prepare` works on.

    What there is of every file lies on disk, in a `Store`: it is looked up when it is needed.

    Attributes:
        files: media files, or the parts of them that become records.
        sentences: file id -> sentences.
        annotations: file id -> {'segments', 'ground_truth'}.
        classes: label name -> class names.
        multi_hot: label name -> number of classes if segments have several, None if they have one.
        missing: names in annotation files that no media file answers to.
        identity: what decides the result besides the files.
        splits: file id -> official split, or one for each fold; empty without official splits.
        folds: number of folds, 0 without.
        unused: number of media files that no annotation names.
        skipped: file id -> reason why something of it is left out.
        remarks: what the user should know before it begins, a sentence each.
    """

    files: Sequence[decoded_files.File]
    sentences: Mapping[str, list[dict[str, Any]]]
    annotations: Mapping[str, dict[str, Any]]
    classes: dict[str, list[str]]
    multi_hot: dict[str, int | None]
    missing: list[str]
    identity: dict[str, Any]
    splits: Mapping[str, SplitOrFolds] = dataclasses.field(default_factory=dict)
    folds: int = 0
    unused: int = 0
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    remarks: list[str] = dataclasses.field(default_factory=list)


def from_folder(
    videos: str,
    captions: str = '',
    annotations: str = '',
    encoding: str = '',
    store: Store | None = None,
) -> MediaCatalog:
    """Catalog anyone's folder of media files.

    Args:
        videos: the folder.
        captions: captions file of docs/data.md, or a folder of subtitle files; '' for the subtitle
            files beside the videos, if there are any; 'none' for no sentences at all.
        annotations: annotations file of docs/data.md, '' for none.
        encoding: of text files that are neither UTF-8 nor UTF-16, '' to refuse them.
        store: where the catalog is kept; None for one of its own.

    Raises:
        DataError: if a file is missing or malformed, or names no file of the folder.
    """
    # The folder comes first: files are records even if no annotation names them.
    folder = pathlib.Path(videos)
    store = store or Store()
    listing = folder_listing.list_media(folder, store=store)
    files = listing.files
    resolver = NameResolver(files.ids(), folder, store)

    spoken = _read_sentences(captions, folder, files, resolver, encoding)
    unknown_names = list(spoken.unknown_names)

    classes: dict[str, list[str]] = {}
    annotations_by_name: Mapping[str, dict[str, Any]] = {}
    annotations_by_id: Mapping[str, dict[str, Any]] = {}
    if annotations:
        classes, annotations_by_name = annotation_files.read_annotations(
            annotations, encoding, store
        )
        annotations_by_id, unknown_annotations = match_to_files(annotations_by_name, resolver)
        if annotations_by_name and not annotations_by_id:
            raise _no_name_matches(annotations, folder, unknown_annotations, files)
        unknown_names += unknown_annotations

    return MediaCatalog(
        files=files,
        sentences=spoken.sentences,
        annotations=annotations_by_id,
        classes=classes,
        # Of all entries, also those without a file: the form of a label does not depend on which
        # files happen to be there.
        multi_hot=annotation_files.multi_hot_sizes(classes, annotations_by_name),
        missing=unknown_names,
        # By contents: copying the file or touching it does not make another dataset.
        identity=_identity(spoken.digest, annotations, encoding),
        skipped=listing.skipped | spoken.skipped,
        remarks=listing.remarks() + spoken.remarks,
    )


def _identity(captions_digest: str, annotations: str, encoding: str) -> dict[str, Any]:
    identity = {'captions': captions_digest, 'annotations': digest(annotations)}
    # Not where it is not given, so that datasets of older versions count as prepared.
    return {**identity, 'encoding': encoding} if encoding else identity


def _read_sentences(
    captions: str,
    folder: pathlib.Path,
    files: FileList,
    resolver: NameResolver,
    encoding: str,
) -> subtitle_folders.Found:
    """The sentences of the media files, from a captions file or from subtitle files."""
    if captions == NO_CAPTIONS:
        return subtitle_folders.Found({}, [], {}, [], '')
    if not captions or os.path.isdir(captions):
        found = subtitle_folders.find(pathlib.Path(captions or folder), files, resolver, encoding)
        if captions and not found.sentences:
            reason = next(iter(found.skipped.values()), '')
            raise DataError(
                f'captions: expected a file, or a folder with subtitle files of the videos '
                f'({", ".join(subtitles.SUFFIXES)}), got {captions}, which has none'
                f'{": " + reason if reason else ""}'
            )
        return found

    captions_by_name = annotation_files.read_captions(captions, encoding, resolver.store)
    if not captions_by_name:
        raise DataError(f'the captions file {captions} is empty')
    # Some names without a file are normal (videos disappear from the web); none that matches
    # means that the names are written in another way.
    sentences, unknown_names = match_to_files(captions_by_name, resolver)
    if not sentences:
        raise _no_name_matches(captions, folder, unknown_names, files)
    return subtitle_folders.Found(sentences, unknown_names, {}, [], digest(captions))


def _no_name_matches(
    path: str, folder: pathlib.Path, unknown_names: list[str], files: FileList
) -> DataError:
    return DataError(
        f'no entry of {path} names a file below {folder} (it says {unknown_names[0]!r}, '
        f'a file is {files[0].id!r})'
    )


def match_clips(
    clips: Iterable[Clip],
    files: FileList,
    resolver: NameResolver,
    classes: dict[str, list[str]],
    folds: int,
) -> tuple[MediaCatalog, int]:
    """Catalog the clips of a named dataset whose files are there.

    A file (or part of one) that several clips name is one record, with the segments of all of them.
    If these clips disagree about the split, the record is in the later of train, validation, test,
    so that nothing is trained on that is evaluated on.

    Args:
        clips: of the annotation files.
        files: all media files.
        resolver: which file a name means.
        classes: label name -> class names.
        folds: number of folds, 0 without.

    Returns:
        The catalog, in the store of the resolver, and the number of clips.
    """
    matches = _Matches(resolver.store)
    num_clips = 0
    for clip in clips:
        num_clips += 1
        found = _find_file(clip, files, resolver)
        if found is None:
            # One name for each clip, the likeliest.
            matches.missing.append([*clip.names, *clip.videos][0])
        else:
            matches.add(*found, clip)
    catalog = MediaCatalog(
        files=matches.files,
        sentences=matches.sentences,
        annotations=matches.annotations,
        classes=classes,
        # Only now that all segments are there.
        multi_hot=annotation_files.multi_hot_sizes(classes, matches.annotations),
        missing=matches.missing,
        identity={},
        splits=matches.splits,
        folds=folds,
        unused=len(files) - len(matches.used_files),
        skipped=matches.skipped,
    )
    return catalog, num_clips


def _find_file(
    clip: Clip, files: FileList, resolver: NameResolver
) -> tuple[str, decoded_files.File] | None:
    """The media file that has a clip: its id, and the file or the part of it that is the clip."""
    # A file with just this clip comes before one that it would have to be cut out of.
    file_id = _first_match(clip.names, resolver)
    if file_id is not None:
        return file_id, files.by_id(file_id)
    file_id = _first_match(clip.videos, resolver)
    if file_id is None:
        return None
    file = files.by_id(file_id)
    start, end = clip.part
    # With an infinite end, the clip is all of the file.
    if math.isfinite(end):
        # The id ends in the part, which makes it unique among the clips of the file.
        file = dataclasses.replace(file, id=f'{file_id}@{start:g}-{end:g}', part=clip.part)
    return file_id, file


def _first_match(names: Iterable[str], resolver: NameResolver) -> str | None:
    for name in names:
        file_id = resolver(name)
        if file_id:
            return file_id
    return None


class _Matches:
    """The clips of a named dataset by media file; for its attributes see `MediaCatalog`.

    Attributes:
        used_files: ids of the files that clips are in.
    """

    def __init__(self, store: Store):
        self.files = FileList(store)
        self.sentences = StoredDict(store)
        self.annotations = StoredDict(store)
        self.splits = StoredDict(store)
        self.used_files = StoredDict(store)
        self.missing: list[str] = []
        self.skipped: dict[str, str] = {}

    def add(self, source_id: str, file: decoded_files.File, clip: Clip) -> None:
        """Add a clip.

        Args:
            source_id: of the media file that it is in.
            file: the file, or the part of it that is the clip.
            clip: what is known of it.
        """
        # The whole file, also if only a part of it becomes a record.
        self.used_files[source_id] = True
        # As JSON has it, where folds are a list.
        split = clip.split if isinstance(clip.split, str) else list(clip.split)
        earlier_split = self.splits.get(file.id)
        # Parts have ids of their own: several clips of one long video are several records. The
        # same file again is another event in it, as in AVE.
        if earlier_split is None:
            self.files.append(file)
            self.splits[file.id] = split
            self.sentences[file.id] = clip.sentences
            self.annotations[file.id] = {
                'segments': clip.segments,
                'ground_truth': clip.ground_truth,
            }
        elif split == earlier_split:
            self.sentences[file.id] += clip.sentences
            annotation = self.annotations[file.id]
            annotation['segments'] += clip.segments
            self.annotations[file.id] = annotation
        else:
            self._settle_split(file.id, earlier_split, split)

    def _settle_split(self, file_id: str, earlier_split: SplitOrFolds, split: SplitOrFolds) -> None:
        """Move a record to the later of its split and another, and say so among the skipped."""

        def rank(candidate: SplitOrFolds) -> int:
            # Later in SPLITS is further from training. Folds, and '' (random), rank below all.
            return SPLITS.index(candidate) if candidate in SPLITS else -1

        # Of two with one rank, the first that was given.
        both = [earlier_split, split]
        later = max(both, key=rank)
        shown = [value if isinstance(value, str) else tuple(value) for value in both]
        self.skipped[f'{file_id} (again)'] = (
            f'two splits: {shown[0]} and {shown[1]}; it is in {shown[both.index(later)]}'
        )
        self.splits[file_id] = later


def scan(
    folder: pathlib.Path, suffixes: Sequence[str] = media.SUFFIXES, store: Store | None = None
) -> FileList:
    """All media files below a folder, sorted, without hidden ones.

    Args:
        folder: to search through.
        suffixes: of media files.
        store: where the list is kept; None for one of its own.

    Raises:
        DataError: if there is none; archives that were not unpacked are pointed out.
    """
    return folder_listing.list_media(folder, suffixes, store).files


def digest(path: str | os.PathLike) -> str:
    """Hash of a file's contents; '' for ''."""
    if not path:
        return ''
    with open(path, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()
