"""Which media file a name in a caption or annotation file means."""

from __future__ import annotations

import collections
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.preparation.store import Store, StoredLists, to_bytes, to_text

# The id in the address of a YouTube video.
_ADDRESS = re.compile(
    r'^(?:https?://)?(?:[\w.]*\.)?(?:youtube\.com/(?:watch\?(?:.*&)?v=|shorts/|embed/|v/)|youtu\.be/)'
    r'([\w-]{11})(?![\w-])',
    re.ASCII,
)

# What a name is of a file: its path, an end of the path or either without the suffix, the id of
# a video in it, an end of the path if case does not count.
_PATH, _ALIAS, _VIDEO_ID, _CASELESS = range(4)


class NameResolver:
    """Finds the media file that a name in a caption or annotation file means.

    A name is the path of the file below the folder, or any end of that path, or either without the
    suffix, or a path that leads to the folder and on to the file. Downloaders put the id of a video
    behind its title, `Title [ID].mp4` or `Title-ID.mp4`: the id is a name as well, and so is the
    address of the video. Each counts as long as only one file answers to it.

    Names are compared in composed form, because file systems of macOS write an accent as a
    character of its own.

    Attributes:
        store: where the names are kept.
    """

    def __init__(
        self, file_ids: Iterable[str], folder: str | pathlib.Path = '', store: Store | None = None
    ):
        """See the class.

        Args:
            file_ids: paths below the folder.
            folder: of the files, for names that lead to it; '' without.
            store: where the names are kept; None for one of their own.
        """
        self.store = store or Store()
        self._connection = self.store.connection
        # All ends of all paths are entered once, since a list may have a million names to look up.
        # A name that several files answer to has no file.
        self._table = self.store.new_table(
            '(name BLOB, kind INTEGER, file BLOB, PRIMARY KEY (name, kind)) WITHOUT ROWID'
        )
        self._ignores_case = False
        self._folder_parts: list[str] = []
        if folder:
            absolute = pathlib.Path(folder).absolute()
            self._folder_parts = [_composed(part) for part in absolute.parts]
        for file_id in file_ids:
            self._enter_all(file_id)

    def _enter_all(self, file_id: str) -> None:
        self._enter(file_id, _PATH, file_id)
        # 'a/b/c.mp4' answers to a/b/c.mp4, b/c.mp4, c.mp4, a/b/c, b/c and c.
        parts = _composed(file_id).split('/')
        for i in range(len(parts)):
            path_end = '/'.join(parts[i:])
            without_suffix = path_end.rpartition('.')[0]
            for alias in {path_end, without_suffix} - {file_id}:
                self._enter(alias, _ALIAS, file_id)
        video_id = _id_in_title(parts[-1].rpartition('.')[0])
        if video_id:
            self._enter(video_id, _VIDEO_ID, file_id)

    def _enter(self, name: str, kind: int, file_id: str) -> None:
        """Let a file answer to a name; no file does where another one does so already."""
        self._connection.execute(
            f'INSERT INTO {self._table} VALUES (?, ?, ?) ON CONFLICT (name, kind) '
            'DO UPDATE SET file = NULL WHERE file IS NOT excluded.file',
            (to_bytes(name), kind, to_bytes(file_id)),
        )

    def _files_called(self, name: str) -> dict[int, str | None]:
        """{kind of name: the file that answers to it, None if there are several}."""
        query = f'SELECT kind, file FROM {self._table} WHERE name = ?'
        found: dict[int, str | None] = {}
        for kind, file_id in self._connection.execute(query, (to_bytes(name),)):
            found[kind] = None if file_id is None else to_text(file_id)
        return found

    def __call__(self, name: str) -> str | None:
        """The file id; None if no file, or more than one, answers to the name."""
        # The forms in which Windows and shells write relative paths.
        name = name.strip().replace('\\', '/').removeprefix('./')
        found = self._files_called(name)
        # A full path means its file, even where it is also the end of another path.
        if _PATH in found:
            return found[_PATH]
        composed = _composed(name)
        if composed != name:
            found = self._files_called(composed)
        # The file that is called so, before one that has it as its id only.
        if _ALIAS in found:
            return found[_ALIAS]
        address = _ADDRESS.search(composed)
        if address:
            return self(address[1])
        return found.get(_VIDEO_ID) or self._below_folder(composed)

    def _below_folder(self, name: str) -> str | None:
        """The file that a path like videos/a.mp4 or /data/videos/a.mp4 means."""
        parts = name.split('/')
        if name.startswith('/'):
            parts[0] = '/'  # as pathlib has it
        for i in range(1, len(parts)):
            if self._folder_parts[-i:] == parts[:i]:
                rest = '/'.join(parts[i:])
                found = self._files_called(rest)
                # From the folder on, only the whole path is meant.
                file_id = found.get(_PATH) or found.get(_ALIAS)
                if file_id is not None and rest.count('/') == file_id.count('/'):
                    return file_id
        return None

    def ignoring_case(self, names: Iterable[str]) -> dict[str, str]:
        """{name: file id} of the names that mean a file if their case does not count.

        Only names with a suffix: the ids of two videos may differ in case alone.
        """
        if not self._ignores_case:
            for file_id in self._file_ids():
                parts = _composed(file_id).casefold().split('/')
                for i in range(len(parts)):
                    self._enter('/'.join(parts[i:]), _CASELESS, file_id)
            self._ignores_case = True
        found = {}
        for name in names:
            path = name.strip().replace('\\', '/').removeprefix('./')
            match = self._files_called(_composed(path).casefold()).get(_CASELESS)
            if match is not None:
                found[name] = match
        return found

    def _file_ids(self) -> Iterator[str]:
        # In parts: a query does not go on over rows that are added meanwhile.
        last = b''
        query = (
            f'SELECT name FROM {self._table} WHERE name > ? AND kind = {_PATH} '
            'ORDER BY name LIMIT 1000'
        )
        while rows := self._connection.execute(query, (last,)).fetchall():
            for (file_id,) in rows:
                yield to_text(file_id)
            last = rows[-1][0]


def _id_in_title(stem: str) -> str:
    """The id of the video in the name of a downloaded file, '' without."""
    # yt-dlp's names: Title [abcDEF_12-3]; of one stream alone, Title [abcDEF_12-3].f137.
    found = re.fullmatch(r'.*\[([^\[\]\s]+)\](?:\.f\d+)?', stem)
    # youtube-dl's: Title-abcDEF_12-3, where ids have eleven characters.
    found = found or re.fullmatch(r'.+-([\w-]{11})', stem, re.ASCII)
    return found[1] if found else ''


def _composed(name: str) -> str:
    return unicodedata.normalize('NFC', name)


# ---- Content by file.


class MatchedContent(Mapping[str, Any]):
    """The content of a caption or annotation file, by media file.

    Args:
        content: by the names in the file.
        resolver: whose store is used.
    """

    def __init__(self, content: Mapping[str, Any], resolver: NameResolver):
        self._content = content
        self._names_of_file = StoredLists(resolver.store)

    def add(self, file_id: str, name: str) -> None:
        """Let a file have what is under a name, behind what it has."""
        self._names_of_file.extend(file_id, [name])

    def __getitem__(self, file_id: str) -> Any:
        names = self._names_of_file[file_id]
        content = self._content[names[0]]
        for name in names[1:]:
            # A new list; += would change the caller's.
            content = content + self._content[name]
        return content

    def __contains__(self, file_id: object) -> bool:
        return file_id in self._names_of_file

    def __iter__(self) -> Iterator[str]:
        return iter(self._names_of_file)

    def __len__(self) -> int:
        return len(self._names_of_file)


def match_to_files(
    content: Mapping[str, Any], resolver: NameResolver
) -> tuple[MatchedContent, list[str]]:
    """Key the content of a caption or annotation file by media file.

    Sentences of two names that mean one file are joined. Names that differ from a file's in case
    alone mean it if nothing else does.

    Returns:
        File id -> content, and the names that no file answers to.

    Raises:
        DataError: if two names of annotations mean one file.
    """
    by_file = MatchedContent(content, resolver)
    unmatched = []
    for name in content:
        file_id = resolver(name)
        if file_id is None:
            unmatched.append(name)
        elif file_id in by_file and not isinstance(content[name], list):
            raise DataError(f'annotations: {name!r} and another name both mean the file {file_id}')
        else:
            by_file.add(file_id, name)
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
            by_file.add(file_id, name)
    return by_file, unknown_names
