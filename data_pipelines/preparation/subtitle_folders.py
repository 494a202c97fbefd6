"""Folders of subtitle files: which file is of which video, and which of several is read."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.preparation import folder_listing, subtitles, text_files
from data_pipelines.preparation.file_list import FileList
from data_pipelines.preparation.file_names import NameResolver
from data_pipelines.preparation.store import Store, StoredDict, StoredLists

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

_AUTOMATIC_WORDS = ('auto', 'asr', 'generated', 'orig')


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

    sentences: Mapping[str, list[dict[str, Any]]]
    unknown_names: list[str]
    skipped: dict[str, str]
    remarks: list[str]
    digest: str


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
    path: str
    language: str
    is_automatic: bool


@dataclasses.dataclass
class _Choice:
    """What was chosen among the subtitle files.

    Attributes:
        sentences: media file id -> sentences.
        skipped: subtitle file -> reason why it cannot be used.
        paths: subtitle file that is read -> its path.
        languages: language -> number of media files whose sentences are in it.
        num_choices: number of media files with several tracks.
        example: the first subtitle file that is read, '' if there is none.
    """

    sentences: StoredDict
    skipped: dict[str, str]
    paths: StoredDict
    languages: collections.Counter[str]
    num_choices: int = 0
    example: str = ''


def find(
    folder: pathlib.Path, files: FileList, resolver: NameResolver, encoding: str = ''
) -> Found:
    """Read the subtitle files below a folder, one for each media file.

    A file is of the media file beside it that is called so, or of the one that answers to its name.
    Of several, the one without a language comes first, then the language that most videos have
    (of equal ones English), then what people wrote before what was recognised.

    Args:
        folder: searched through.
        files: the media files.
        resolver: which media file a name means; what is found is kept in its store.
        encoding: of files that are neither UTF-8 nor UTF-16, '' to skip them.
    """
    tracks_of = StoredLists(resolver.store)
    unknown_names = []
    num_others = 0
    other = ''
    paths = _walk(folder, resolver.store)
    for subtitle_id in paths.in_order():
        if not subtitle_id.lower().endswith(subtitles.SUFFIXES):
            num_others += 1
            other = other or subtitle_id
            continue
        media_ids, tags = _media_of(subtitle_id, files, resolver)
        if not media_ids:
            unknown_names.append(subtitle_id)
        track = _track(subtitle_id, paths[subtitle_id], tags)
        for media_id in media_ids:
            tracks_of.extend(media_id, [dataclasses.astuple(track)])

    choice = _read_best(tracks_of, resolver.store, encoding)
    return Found(
        sentences=choice.sentences,
        unknown_names=unknown_names,
        skipped=choice.skipped,
        remarks=_remarks(choice, num_others, other),
        digest=_digest(choice.paths),
    )


def _walk(folder: pathlib.Path, store: Store) -> StoredDict:
    """{path below the folder: path} of all files that may be subtitles, without hidden ones."""
    paths = StoredDict(store)
    for root, entries in folder_listing.walk(folder):
        for entry in entries:
            if entry.lower().endswith((*subtitles.SUFFIXES, *_OTHER_SUFFIXES)):
                path = pathlib.Path(root, entry)
                paths[folder_listing.readable(path.relative_to(folder).as_posix())] = str(path)
    return paths


def _media_of(
    subtitle_id: str, files: FileList, resolver: NameResolver
) -> tuple[list[str], list[str]]:
    """The media files that a subtitle file is of, and what else its name says."""
    parent, slash, name = subtitle_id.rpartition('/')
    # The longest first: a title may end in what looks like a language.
    stem, tags = subtitles.split_name(name)
    stems = []
    for i in range(len(tags), -1, -1):
        stems.append(('.'.join([stem, *tags[:i]]), tags[i:]))
    for candidate, rest in stems:
        # Sound that lies beside its pictures has the same sentences.
        beside = files.ids_called(f'{parent}{slash}{candidate}')
        if beside:
            return beside, rest
    for candidate, rest in stems:
        media_id = resolver(f'{parent}{slash}{candidate}') or resolver(candidate)
        if media_id:
            return [media_id], rest
    return [], []


def _track(subtitle_id: str, path: str, tags: Sequence[str]) -> _Track:
    words: list[str] = []
    for tag in tags:
        words += re.split('[-_]', tag.lower())
    languages = [tag for tag in tags if tag.lower() not in subtitles.TRACK_WORDS]
    language = re.split('[-_]', languages[0].lower())[0] if languages else ''
    is_automatic = any(word in _AUTOMATIC_WORDS for word in words)
    return _Track(subtitle_id, path, language, is_automatic)


def _read_best(tracks_of: StoredLists, store: Store, encoding: str) -> _Choice:
    """Read the best track of each media file."""
    counts: collections.Counter[str] = collections.Counter()
    for rows in tracks_of.values():
        counts.update({_Track(*row).language for row in rows})

    choice = _Choice(StoredDict(store), {}, StoredDict(store), collections.Counter())
    for media_id, rows in tracks_of.items():
        tracks = [_Track(*row) for row in rows]
        # One track in several formats, as speech recognition writes it, is no choice.
        names = {track.id.rpartition('.')[0] for track in tracks}
        choice.num_choices += len(names) > 1
        # Below the best are only those that are read if it cannot be.
        for track in sorted(tracks, key=lambda track: _rank(track, counts)):
            try:
                text = text_files.read_text(track.path, encoding)
                sentences = subtitles.parse(text, track.path)
            except DataError as error:
                # What precedes the colon is the kind of reason, under which it is counted.
                choice.skipped[track.id] = f'subtitles: {error}'
                continue
            if sentences:
                choice.sentences[media_id] = sentences
                choice.paths[track.id] = track.path
                choice.languages[track.language or 'no language'] += 1
                choice.example = choice.example or track.id
                break
    return choice


def _rank(track: _Track, counts: Mapping[str, int]) -> tuple[Any, ...]:
    """What tracks of one media file are sorted by, the best first.

    Args:
        track: one of them.
        counts: language -> number of media files that have it.
    """
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


def _digest(paths: StoredDict) -> str:
    """Hash of the subtitle files that are read; '' if there are none."""
    digest = hashlib.sha256()
    for track_id in paths.in_order():
        content = pathlib.Path(paths[track_id]).read_bytes()
        digest.update(f'{track_id} {hashlib.sha256(content).hexdigest()}\n'.encode())
    return digest.hexdigest() if paths else ''


def _remarks(choice: _Choice, num_others: int, other: str) -> list[str]:
    """What the user should know.

    Args:
        choice: what is read.
        num_others: number of files of kinds that are not read.
        other: one of them.
    """
    remarks = []
    if choice.languages:
        listed = ', '.join(f'{count} {name}' for name, count in choice.languages.most_common())
        remarks.append(
            f'sentences from the subtitle files of {choice.languages.total()} media files '
            f'({listed}); --captions=none leaves them out'
        )
    if choice.num_choices:
        read = f', for example {choice.example!r}' if choice.example else ''
        remarks.append(
            f'{choice.num_choices} media files have several subtitle files, of which one is '
            f'read{read}; for others, give --captions=FOLDER with only those'
        )
    if num_others:
        remarks.append(
            f'{num_others} subtitle files are of kinds that are not read (such as {other!r}); '
            'convert them to SRT: ffmpeg -i FILE FILE.srt, or yt-dlp --convert-subs=srt'
        )
    return remarks
