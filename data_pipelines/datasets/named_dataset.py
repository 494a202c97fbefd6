"""What the named datasets share: the folder with their annotation files, and their base class.

`named.py` lists the datasets. A class of its own says what differs: which annotation files there
are, and what a row of them means.
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import pathlib
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from data_pipelines import media
from data_pipelines.errors import DataError
from data_pipelines.preparation import json_files, media_catalog, text_files
from data_pipelines.preparation.file_list import FileList
from data_pipelines.preparation.file_names import NameResolver
from data_pipelines.preparation.media_catalog import Clip
from data_pipelines.preparation.store import Store, StoredDict

Value = TypeVar('Value')

# Annotation files are looked for in the folder, and one and two folders below it.
_DEPTHS = ('', '*/', '*/*/')
# Allowed values that an error message lists.
_MAX_LISTED = 6
# Characters of a malformed entry that an error message quotes.
_MAX_QUOTE = 60


class AnnotationFolder:
    """The folder of a dataset: finds its annotation files and reads them.

    Every error is a DataError whose one sentence names the dataset, and the file and line.

    Attributes:
        dataset: name of the dataset.
        root: the folder.
        files: the media files that are there.
        resolver: which media file a name means.
        encoding: of annotation files that are neither UTF-8 nor UTF-16, '' to refuse them.
        media_root: the folder of the media files.
        skipped: what datasets find that cannot be used -> the reason.
        digests: annotation file -> hash of its contents, for each that was read; a file is named by
            the parts of its path below the folder, with zeros between them.
    """

    def __init__(
        self,
        dataset: str,
        root: pathlib.Path,
        files: FileList,
        resolver: NameResolver,
        encoding: str = '',
        media_root: pathlib.Path | None = None,
    ):
        self.dataset = dataset
        self.root = root
        self.media_root = media_root or root
        self.skipped: dict[str, str] = {}
        self.files = files
        self.resolver = resolver
        self.encoding = encoding
        # There may be one for each of a million videos.
        self.digests = StoredDict(resolver.store)

    # ---- Finding.

    def find_all(self, *patterns: str) -> list[pathlib.Path]:
        """Files that any of the patterns names, at the first depth where there are any."""
        # Shallow first: a copy further down, in an unpacked archive for example, does not count.
        for depth in _DEPTHS:
            found: set[pathlib.Path] = set()
            for pattern in patterns:
                found.update(
                    path
                    for path in self.root.glob(depth + pattern)
                    # '._x.txt' is what macOS leaves on foreign disks.
                    if path.is_file() and not path.name.startswith('.')
                )
            if found:
                return sorted(found)
        return []

    def find_optional(self, *patterns: str) -> pathlib.Path | None:
        """The one file that the patterns, tried in turn, name; None if there is none.

        Raises:
            DataError: if one pattern names several files.
        """
        # In the order of preference, so that a list under its official name wins over a mirror's.
        for pattern in patterns:
            found = self.find_all(pattern)
            # Which of two copies to take would be a guess.
            if len(found) > 1:
                raise DataError(
                    f'{self.dataset}: {found[0]} and {found[1]} both could be the file {pattern}; '
                    'leave one'
                )
            if found:
                return found[0]
        return None

    def find_one(self, *patterns: str) -> pathlib.Path:
        """As `find_optional`, but raises DataError if there is no such file."""
        path = self.find_optional(*patterns)
        if path is None:
            raise DataError(
                f'{self.dataset}: the annotation file {" or ".join(patterns)} is not in '
                f'{self.root} nor two folders below it; '
                f'--dataset={self.dataset} --help says which files to place there'
            )
        return path

    # ---- Reading.

    def open(self, path: pathlib.Path) -> text_files.TextFile:
        """Open an annotation file, whose hash is noted."""
        self.note_digest(path)
        try:
            return text_files.TextFile(path, self.encoding)
        except DataError as error:
            raise DataError(f'{self.dataset}: {error}') from None

    def note_digest(self, path: pathlib.Path) -> None:
        """Note the hash of an annotation file: a changed one makes another dataset."""
        # Sorted, these names are in the order of the paths: a slash comes behind other characters.
        name = '\0'.join(path.relative_to(self.root).parts)
        if name not in self.digests:
            self.digests[name] = self._digest(path)

    def _digest(self, path: pathlib.Path) -> str:
        try:
            with path.open('rb') as stream:
                return hashlib.file_digest(stream, 'sha256').hexdigest()
        except OSError as error:
            raise DataError(f'{self.dataset}: {path} cannot be read: {error}') from None

    def lines(self, path: pathlib.Path) -> Iterator[tuple[str, str]]:
        """Yield (file and line for messages, text) of each line that is not blank."""
        for number, line in enumerate(self.open(path).lines(), 1):
            if line.strip():
                yield f'{path}, line {number}', line.strip()

    def table(
        self,
        path: pathlib.Path,
        columns: Sequence[str],
        header: bool = True,
        delimiter: str = ',',
        comment: str = '',
    ) -> Iterator[tuple[str, dict[str, str]]]:
        """Read the rows of a CSV file.

        Args:
            path: the file.
            columns: those that must be there; without a header, the first of them in order.
            header: whether the first row has the names of the columns, in any case and order.
            delimiter: between fields.
            comment: rows that begin with it are left out; '' for none.

        Yields:
            (file and line for messages, {column: field}).

        Raises:
            DataError: if columns or fields are missing, or the file is malformed.
        """
        # skipinitialspace: AudioSet's lists have spaces after commas, and a quoted field would
        # begin with the space instead of the quote.
        # strict: otherwise a quote that is never closed takes the rest of the file for its field.
        reader = csv.reader(
            self.open(path).lines(),
            delimiter=delimiter,
            skipinitialspace=True,
            strict=True,
        )
        names = None if header else list(columns)
        expected = ', '.join(columns)
        last_line = 0
        try:
            for row in reader:
                # After the parser: a comment may contain commas, so it is a row of several fields.
                is_comment = bool(row and comment and row[0].startswith(comment))
                if not row or is_comment:
                    continue
                where = f'{path}, line {reader.line_num}'
                last_line = reader.line_num
                if names is None:
                    # The header, where one is expected.
                    names = [name.strip().lower() for name in row]
                    if not set(columns) <= set(names):
                        raise DataError(
                            f'{self.dataset}: {path}: expected the columns {expected}, '
                            f'got {", ".join(names)}'
                        )
                    continue
                # More fields are no error: lists have further columns that nobody needs here.
                if len(row) < len(columns):
                    quote = delimiter.join(row)[:_MAX_QUOTE]
                    raise DataError(
                        f'{self.dataset}: {where} has {len(row)} fields ({quote!r}); '
                        f'expected {delimiter.join(columns)}'
                    )
                fields = [field.strip() for field in row]
                # Behind the last name of the header is a field that was cut in two.
                if header and any(fields[len(names) :]):
                    quote = delimiter.join(row)[:_MAX_QUOTE]
                    raise DataError(
                        f'{self.dataset}: {where}: expected {len(names)} fields, got {len(row)} '
                        f'({quote!r}); put a text that holds {delimiter!r} into double quotes'
                    )
                # zip ends with the shorter of the two.
                yield where, dict(zip(names, fields))
        except csv.Error as error:
            # Of a quote that is not closed, the row that it is in has begun behind this line.
            raise DataError(
                f'{self.dataset}: {path} is not readable CSV: {error}, in the row behind line '
                f'{last_line}; close every double quote, and write one inside a text twice'
            ) from None
        if names is None:
            raise DataError(f'{self.dataset}: {path} is empty; expected the columns {expected}')

    def json(self, path: pathlib.Path, *keys: str) -> Any:
        """Contents of a JSON file as `json_files.load` gives them.

        Args:
            path: the file.
            keys: what its outermost object has to have.

        Raises:
            DataError: if the file is malformed, or is another one.
        """
        file = self.open(path)
        try:
            # As owners distribute them: whether names are unique is for them to know.
            content = json_files.load(file, unique_names=False)
        except ValueError as error:
            raise DataError(f'{self.dataset}: {path} is not readable JSON: {error}') from None
        except RecursionError:
            raise DataError(f'{self.dataset}: {json_files.too_deep(path)}') from None
        for key in keys:
            if not isinstance(content, Mapping) or key not in content:
                raise DataError(
                    f'{self.dataset}: {path} has no {key!r} at its top level; is it another file?'
                )
        return content

    # ---- Parsing.

    def parse_float(self, text: Any, where: str) -> float:
        """The number that is written there; DataError if there is none."""
        try:
            return float(text)
        except (TypeError, ValueError):
            raise self._not_a('number', text, where) from None

    def parse_int(self, text: Any, where: str) -> int:
        """The whole number that is written there; DataError if there is none."""
        try:
            return int(text)
        except (TypeError, ValueError):
            raise self._not_a('whole number', text, where) from None

    def _not_a(self, kind: str, text: Any, where: str) -> DataError:
        return DataError(f'{self.dataset}: {where}: {str(text)[:40]!r} is not a {kind}')

    def look_up(self, value: str, allowed: Mapping[str, Value], where: str, what: str) -> Value:
        """What a word stands for; DataError if it is not among `allowed`.

        Args:
            value: the word.
            allowed: word -> what it stands for.
            where: file and line.
            what: what the word is, for the message.
        """
        if value not in allowed:
            # A dataset may have a thousand classes.
            listed = ', '.join(list(allowed)[:_MAX_LISTED])
            more = ', …' if len(allowed) > _MAX_LISTED else ''
            raise DataError(
                f'{self.dataset}: {where}: {what} {value!r} is unknown; expected {listed}{more}'
            )
        return allowed[value]


class Dataset:
    """One named dataset.

    Attributes:
        name: on the command line.
        title: name and contents in one line.
        folds: number of official divisions into train and test; 0 if there are plain splits.
        suffixes: of its media files.
    """

    name: str = ''
    title: str = ''
    folds: int = 0
    suffixes: tuple[str, ...] = media.SUFFIXES

    def files(self, root: pathlib.Path, store: Store) -> FileList:
        """List the media files.

        Args:
            root: folder of the media files.
            store: where the list is kept.

        Raises:
            DataError: if there is none.
        """
        return media_catalog.scan(root, self.suffixes, store)

    def clips(self, folder: AnnotationFolder) -> tuple[Iterable[Clip], dict[str, list[str]]]:
        """Read the annotation files.

        Returns:
            All clips, whether their files are there or not, and label name -> class names. The
            clips of a large dataset come from a generator: together they are larger than memory.

        Raises:
            DataError: with one sentence that names file and line.
        """
        raise NotImplementedError

    def page(self) -> tuple[str, str, str]:
        """(title, what comes out, which files to place where), the latter two from the docstring.

        The last paragraph of the docstring lists the files.
        """
        # getdoc removes the indentation of the source.
        docstring = inspect.getdoc(type(self)) or ''
        text, _, files = docstring.rpartition('\n\n')
        return self.title, text, textwrap.dedent(files)


def segment(
    labels: Mapping[str, int | list[int]],
    start: float = 0.0,
    end: float = float('inf'),
    caption: str = '',
) -> dict[str, Any]:
    """A segment of a clip, by default all of it, as `media_catalog.Clip` has them."""
    return {'start': start, 'end': end, 'caption': caption, 'labels': dict(labels)}


def described(
    names: Sequence[str],
    split: str,
    captions: Sequence[str],
    labels: Mapping[str, int | list[int]] | None = None,
    ground_truth: Mapping[str, Any] | None = None,
) -> Clip:
    """A clip whose captions describe all of it, so that none has a time of its own.

    Args:
        names: as of `media_catalog.Clip`.
        split: likewise.
        captions: any number. The first is that of the segment; evaluation takes all.
        labels: of the segment.
        ground_truth: as of `media_catalog.Clip`.
    """
    whole = segment(labels or {}, caption=captions[0] if captions else '')
    sentences = [{'text': text, 'start': 0.0, 'end': float('inf')} for text in captions]
    return Clip(names, split, [whole], sentences, dict(ground_truth or {}))


def numbered(names: Sequence[str]) -> dict[str, int]:
    """Name -> its position."""
    return {name: i for i, name in enumerate(names)}


def youtube(video_id: str, start: float, end: float) -> dict[str, Any]:
    """Fields of `media_catalog.Clip` for a clip of a YouTube video.

    Args:
        video_id: of YouTube.
        start: in seconds.
        end: in seconds.

    Returns:
        'names': what the usual downloaders call the file of the clip, 'videos': what they call the
        file of the whole video, and 'part': where the clip is in it.
    """
    # The ways in which the times are written, for a clip from second 30 to 40:
    times = [
        (f'{int(start):06d}', f'{int(end):06d}'),  # 000030_000040
        (f'{int(start)}', f'{int(end)}'),  # 30_40
        (f'{start:.3f}', f'{end:.3f}'),  # 30.000_40.000
        (f'{start:.1f}', f'{end:.1f}'),  # 30.0_40.0
        (f'{round(start * 1000)}', f'{round(end * 1000)}'),  # 30000_40000
    ]
    names = []
    # Some put a letter before the id, as ids may begin with a dash and look like an option.
    for stem in (video_id, f'Y{video_id}'):
        for start_text, end_text in times:
            # With the end first, which is the more specific name.
            names += [f'{stem}_{start_text}_{end_text}', f'{stem}_{start_text}']
    # v_ID is the form of ActivityNet's files.
    videos = (video_id, f'Y{video_id}', f'v_{video_id}')
    # `media.read` compares the length of a file ID.mp4 with the part, and does not cut one that is
    # a clip already.
    return {'names': names, 'videos': videos, 'part': (start, end)}
