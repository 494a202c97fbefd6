"""The media files of a folder, and what else in it a user may have meant to be one."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import stat
from collections.abc import Iterator, Sequence

from data_pipelines import media
from data_pipelines.errors import DataError
from data_pipelines.preparation import decoded_files
from data_pipelines.preparation.file_list import FileList
from data_pipelines.preparation.store import Store

# Only for the hint in an error message.
_ARCHIVES = ('.zip', '.tar', '.gz', '.tgz', '.rar', '.7z')
# Downloads that browsers and downloaders have not finished.
_UNFINISHED = ('.part', '.partial', '.crdownload', '.download', '.opdownload', '.aria2', '.!ut')
# What lies beside media for good reason, and needs no word.
_COMPANIONS = (
    *('.csv', '.tsv', '.txt', '.json', '.jsonl', '.ndjson', '.srt', '.vtt', '.sbv', '.ass', '.ssa'),
    *('.ttml', '.xml', '.nfo', '.md', '.py', '.sh', '.log', '.ini', '.db', '.npy', '.npz'),
)
# Folders in which systems keep deleted files and thumbnails.
_OF_SYSTEMS = ('$RECYCLE.BIN', '#recycle', '@eaDir', '__MACOSX', 'lost+found')
# Kinds of files that a message names.
_MAX_KINDS = 4


@dataclasses.dataclass
class Listing:
    """What a folder holds.

    Attributes:
        files: media files, sorted; they lie on disk.
        skipped: what is called like a media file and cannot be one -> the reason.
        others: suffix ('' without) -> number of files that are no media by their names.
        archives: names of archives.
    """

    files: FileList
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    others: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    archives: list[str] = dataclasses.field(default_factory=list)

    def remarks(self) -> list[str]:
        """What the user should know of files that are left out, a sentence each."""
        if not self.others:
            return []
        return [f'left out, as no media by their names: {self._kinds()}']

    def _kinds(self) -> str:
        kinds = []
        for suffix, count in self.others.most_common(_MAX_KINDS):
            kinds.append(f'{count} {suffix or "without a suffix"}')
        more = ', …' if len(self.others) > _MAX_KINDS else ''
        return ', '.join(kinds) + more


def list_media(
    folder: str | pathlib.Path,
    suffixes: Sequence[str] = media.SUFFIXES,
    store: Store | None = None,
) -> Listing:
    """List all media files below a folder, without hidden ones.

    Args:
        folder: searched through.
        suffixes: of media files, in lower case.
        store: where the list is kept; None for one of its own.

    Raises:
        DataError: if there is none; archives that were not unpacked are pointed out.
    """
    _check_folder(folder)
    listing = Listing(FileList(store or Store()))
    for root, entries in walk(folder, listing.skipped):
        # Sorted, because file systems list in any order, and the order of records should not
        # depend on it.
        for entry in sorted(entries):
            path = pathlib.Path(root, entry)
            file_id = readable(path.relative_to(folder).as_posix())
            _enter(listing, path, file_id, suffixes)
    if not listing.files:
        hint = f'; unpack {listing.archives[0]} first' if listing.archives else ''
        found = f'; found {listing._kinds()}' if listing.others else ''
        raise DataError(
            f'no media file below {folder} (looked for {", ".join(suffixes)}){found}{hint}'
        )
    return listing


def _enter(listing: Listing, path: pathlib.Path, file_id: str, suffixes: Sequence[str]) -> None:
    """Enter one file where it belongs."""
    name = path.name.lower()
    if name.endswith(_UNFINISHED):
        listing.skipped[file_id] = 'unfinished: a download that was broken off, or still goes on'
    elif name.endswith(tuple(suffixes)):
        try:
            status = path.stat()
        except OSError as error:  # a link that leads nowhere, or in a circle
            reason = error.strerror or str(error)
            listing.skipped[file_id] = f'missing: the link leads nowhere ({reason})'
            return
        if stat.S_ISREG(status.st_mode):  # reading a pipe would never end
            file = decoded_files.File(file_id, str(path), status.st_size, status.st_mtime_ns)
            listing.files.append(file)
    elif name.endswith(_ARCHIVES):
        listing.archives.append(path.name)
        listing.others[path.suffix.lower()] += 1
    elif not name.endswith(_COMPANIONS):
        listing.others[path.suffix.lower()] += 1


def _check_folder(folder: str | pathlib.Path) -> None:
    """Raise DataError for what is no folder."""
    path = pathlib.Path(folder)
    if path.is_dir():
        return
    if path.exists():
        raise DataError(f'{folder}: expected a folder of media files, got a file; name its folder')
    hint = ''
    # pathlib makes one slash of two.
    if ':/' in str(folder):
        hint = '; addresses are not read, download the files first'
    elif any(mark in str(folder) for mark in '*?'):
        hint = '; patterns are not searched, name a folder'
    raise DataError(f'the folder {folder} does not exist{hint}')


def walk(
    folder: str | pathlib.Path, skipped: dict[str, str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, names of its files) of all folders below one, without hidden ones.

    Links are followed, since large collections are often linked together from several disks, but
    not in circles.

    Args:
        folder: searched through.
        skipped: gets the folders that cannot be read, with the reason.
    """

    def note(error: OSError) -> None:
        if skipped is not None and error.filename is not None:
            name = pathlib.Path(os.fsdecode(error.filename)).relative_to(folder).as_posix()
            skipped[readable(name)] = f'not readable: {error.strerror}'

    for root, subfolders, entries in os.walk(folder, onerror=note, followlinks=True):
        # Assigned in place: this is how os.walk is told where to go.
        subfolders[:] = sorted(name for name in subfolders if _is_entered(root, name))
        # '._x.mp4' is what macOS leaves on foreign disks.
        yield root, [entry for entry in entries if not entry.startswith('.')]


def _is_entered(root: str, name: str) -> bool:
    if name.startswith('.') or name in _OF_SYSTEMS:
        return False
    path = os.path.join(root, name)
    if not os.path.islink(path):
        return True
    # A link to a folder that holds it leads in a circle.
    target = os.path.join(os.path.realpath(path), '')
    return not os.path.join(os.path.realpath(root), '').startswith(target)


def readable(path: str) -> str:
    """A path as text that can be stored: bytes that are no UTF-8 become `\\\\xe9` and so on.

    It is the same in every locale, although Python's own text of a path is not.
    """
    return os.fsencode(path).decode('utf-8', 'backslashreplace')
