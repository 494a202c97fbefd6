"""Tables of captions and labels, and what their columns, like the fields of JSON, may be called."""

from __future__ import annotations

import functools
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from data_pipelines import media
from data_pipelines.errors import DataError
from data_pipelines.preparation import text_files
from data_pipelines.preparation.values import is_time, quote

# Separators of tables, in the order in which they are tried.
_DELIMITERS = (',', ';', '\t', '|')
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
_KNOWN_NAMES = frozenset(itertools.chain.from_iterable(_NAMES_OF.values()))
# Beginnings of names that must mean times: left out in silence, a sentence would be in the wrong
# place.
_START_NAMES = ('start', 'begin', 'onset')
_END_NAMES = ('end', 'stop', 'offset')

# What spreadsheets write where they took a text, such as -abc or =abc, for a formula.
_SPREADSHEET_ERRORS = ('#NAME?', '#REF!', '#VALUE!', '#NULL!', '#NUM!', '#DIV/0!')
# Characters of the names of columns that an error message quotes.
_MAX_HEADER = 200


# ---- Tables.


class _Table:
    """The rows of a table, read from its file as often as they are asked for.

    Attributes:
        path: of the file.
        delimiter: between fields: the one with which the header has the columns.
    """

    def __init__(self, file: text_files.TextFile, required: tuple[str, ...]):
        self._file = file
        self.path = file.path
        # Lines above the header that are left out.
        self._num_skipped = 0
        lines = (line.removesuffix('\n') for line in file.lines())
        number, header = next(((i, line) for i, line in enumerate(lines, 1) if line), (0, ''))
        # Excel's own way of saying it, in a line of its own; some programs put it into quotes.
        separator = re.fullmatch(r'"?sep=(.)"?\s*', header, re.I)
        if separator:
            self._num_skipped = number
            self.delimiter = separator[1]
        else:
            self.delimiter = _delimiter(header, required)

    def rows(self) -> Iterator[text_files.Row]:
        """All rows that are not blank, the header first."""
        lines = enumerate(self._file.lines(), 1)
        # Empty lines in place of others, so that lines keep their numbers.
        kept = ('' if number <= self._num_skipped else line for number, line in lines)
        return text_files.rows(kept, self.path, self.delimiter)

    def body(self) -> Iterator[text_files.Row]:
        """All rows behind the header."""
        return itertools.islice(self.rows(), 1, None)

    def check_quotes(self, column: int) -> None:
        """Refuse a row that holds another row of the table between its quotes.

        Args:
            column: of the names.

        Raises:
            DataError: also if the rows are malformed in another way.
        """
        check = text_files.QuoteCheck(self.path, self.delimiter, column)
        for row in self.body():
            check.add_row(row)
        if not check.is_needed:
            return
        for row in self.body():
            check.add_name(row)
        for row in self.body():
            check.check(row)


def read(
    file: text_files.TextFile, required: tuple[str, ...], form: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a table whose first row has the names of its columns.

    Args:
        file: the file.
        required: what must be there, of the keys of _NAMES_OF.
        form: the usual header, for messages.

    Yields:
        (file and line, {what it means: cell}) of each row that is not blank.

    Raises:
        DataError: if the table is malformed, or a cell would be lost.
    """
    table = _Table(file, required)
    header = next(table.rows(), None)
    if header is None:
        raise DataError(f'{table.path}: expected the columns {form}, got an empty file')
    names = list(header.fields)
    while names and not names[-1]:
        # Spreadsheets fill all rows up to the longest.
        names.pop()
    column_of = _columns(names, table.path, required, form)
    table.check_quotes(column_of['video'])
    for row in table.body():
        where = f'{table.path}, line {row.line_number}'
        cells = _cells(row, len(names), column_of, table.delimiter, where)
        _check_cells(cells, where)
        found = _fields_of_cells(cells, column_of, table.delimiter)
        if not found['video']:
            raise DataError(
                f'{where}: expected the name of a video in column {names[column_of["video"]]!r}, '
                f'got {quote(row.source)!r}; name it in every row'
            )
        yield where, found


def _check_cells(cells: Sequence[str], where: str) -> None:
    """Refuse what a spreadsheet has written in place of a text."""
    for cell in cells:
        if cell in _SPREADSHEET_ERRORS:
            raise DataError(
                f'{where}: expected a text, got {cell!r}, which a spreadsheet writes for a '
                'formula that it cannot compute; format the column as text and enter it anew'
            )


def _fields_of_cells(
    cells: Sequence[str], column_of: Mapping[str, int], delimiter: str
) -> dict[str, Any]:
    """{what it means: cell} of a row."""
    found: dict[str, Any] = {}
    for meaning, column in column_of.items():
        # Rows that are too short lack their last cells.
        found[meaning] = cells[column] if column < len(cells) else ''
    # Where a comma separates fields it cannot be a decimal mark as well.
    if delimiter != ',':
        for meaning in ('start', 'end', 'duration'):
            found[meaning] = found.get(meaning, '').replace(',', '.')
    return found


def _delimiter(header: str, required: tuple[str, ...]) -> str:
    """The separator with which a header has the columns."""
    for delimiter in _DELIMITERS:
        names = [name.strip().strip('"') for name in header.split(delimiter)]
        if set(required) <= set(names_by_meaning(names)):
            return delimiter
    # None fits: the most frequent one shows best what is wrong.
    return max(_DELIMITERS, key=header.count)


def _columns(
    names: Sequence[str], path: pathlib.Path, required: tuple[str, ...], form: str
) -> dict[str, int]:
    """What it means -> position of the column."""
    by_name = {name: column for column, name in enumerate(names)}
    column_of = fields(by_name)
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
        check_names(names, str(path))
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
        starts_with_number = is_time(row.fields[text_column])
        if _is_name_and_times(cells, column_of) and not starts_with_number:
            # Spreadsheets fill up short rows with separators.
            cells[text_column] = cells[text_column].rstrip(f'{delimiter} ')
            return cells
    raise DataError(
        f'{where}: expected {num_columns} fields, got {len(row.fields)} '
        f'({quote(row.source)!r}); put a text that holds {delimiter!r} into double quotes, '
        'and write numbers with a decimal point'
    )


def _is_name_and_times(cells: Sequence[str], column_of: Mapping[str, int]) -> bool:
    """Whether the cells before a sentence are what their columns say."""
    for column, cell in enumerate(cells[:-1]):
        # Of another column, only a number cannot be a part of the text behind it.
        if column not in column_of.values() and cell and not is_time(cell):
            return False
    if 'start' in column_of and 'end' in column_of:
        times = [cells[column_of['start']], cells[column_of['end']]]
        return all(time == '' or is_time(time) for time in times)
    # Without times, only a name that ends as media files do cannot be the first half of one.
    return cells[column_of['video']].lower().endswith(media.SUFFIXES)


# ---- Names of columns and fields.


def fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """{what it means: value} of the fields that are understood."""
    names = names_by_meaning(entry)
    return {meaning: entry[found[0]] for meaning, found in names.items()}


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse names of a sentence's fields that leave open what is meant.

    Raises:
        DataError: if two could be the sentence, or if one must be a time and is not understood.
    """
    names = list(names)
    _check_single('text', names, where)
    found = names_by_meaning(names)
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
    possible = names_by_meaning(names).get(meaning, [])
    # The name itself is clear.
    if len(possible) > 1 and _simplified(possible[0]) != meaning:
        raise DataError(
            f'{where}: expected one field {meaning}, got {" and ".join(possible)}; '
            f'call the one that is meant {meaning}'
        )


def names_by_meaning(names: Iterable[Any]) -> dict[str, list[str]]:
    """{what it means: the names that mean it, likeliest first}."""
    name_of = {}
    # A file may have a million names that mean nothing.
    for name in names:
        simplified = _simplified(name)
        if simplified in _KNOWN_NAMES:
            name_of[simplified] = name
    found: dict[str, list[str]] = {}
    for meaning, possible_names in _NAMES_OF.items():
        present = [name_of[name] for name in possible_names if name in name_of]
        if present:
            found[meaning] = present
    return found


# The same few names come with every entry of a file.
@functools.lru_cache(maxsize=1024)
def _simplified(name: Any) -> str:
    """'Start (s)' and 'start-s' -> 'start_s'."""
    return re.sub(r'[^\w]+', '_', str(name).strip().lower()).strip('_')
