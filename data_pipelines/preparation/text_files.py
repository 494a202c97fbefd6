"""Text files as editors, spreadsheets and programs of any system write them.

Bytes become text, and text becomes the rows of a table. What the rows mean is decided in
`annotation_files`. Files may be larger than memory.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, TextIO

from data_pipelines.errors import DataError

# Byte order marks and what they announce. UTF-32's begins with UTF-16's, so it comes first.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, 'utf-32'),
    (codecs.BOM_UTF32_BE, 'utf-32'),
    (codecs.BOM_UTF8, 'utf-8-sig'),
    (codecs.BOM_UTF16_LE, 'utf-16'),
    (codecs.BOM_UTF16_BE, 'utf-16'),
)
# Bytes that decide whether a file without a mark is UTF-16.
_PROBE_BYTES = 4096
# Of a file, read at once.
_CHUNK_BYTES = 1 << 20
# Characters of a line that an error message quotes.
_MAX_QUOTE = 60


# ---- Bytes -> text.


class TextFile:
    """A text file of any length, read as often as it is asked for.

    It is UTF-8, UTF-16 or UTF-32 with a byte order mark, or what the user names. Legacy encodings
    are not guessed: most bytes are valid in all of them, and a wrong guess would put wrong letters
    into the vocabulary without a word.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: str | os.PathLike, encoding: str = ''):
        """Find out in which encoding all of the file can be read.

        Args:
            path: of the file.
            encoding: of a file that is none of these, in Python's words (cp1252); '' to refuse it.

        Raises:
            DataError: if the file cannot be read, or is in another encoding; the message names line
                and remedy.
        """
        self.path = pathlib.Path(path)
        try:
            with open(path, 'rb') as stream:
                self._encoding = _find_encoding(stream, path, encoding)
        except OSError as error:
            raise DataError(f'{path} cannot be read: {error.strerror or error}') from None

    def open(self) -> TextIO:
        """The text from its beginning; lines end in newlines, whatever ends them in the file."""
        # Windows ends lines in \r\n and old Macs in \r. No other character ends one: a sentence may
        # hold it.
        return open(self.path, encoding=self._encoding, newline=None)

    def lines(self) -> Iterator[str]:
        """The lines of the text, each with its newline."""
        with self.open() as stream:
            yield from stream


def read_text(path: str | os.PathLike, encoding: str = '') -> str:
    """Read a text file whose lines end in any system's way; here they end in newlines.

    Args:
        path: the file.
        encoding: as of `TextFile`.

    Raises:
        DataError: if the file cannot be read, or is in another encoding.
    """
    with TextFile(path, encoding).open() as stream:
        return stream.read()


def _find_encoding(stream: BinaryIO, path: str | os.PathLike, encoding: str) -> str:
    """The encoding that all of a file is in; for arguments and errors see `TextFile`."""
    probe = stream.read(_PROBE_BYTES)
    announced = _announced_encoding(probe) or 'utf-8'
    offset = _first_undecodable(stream, announced)
    if offset is None:
        return announced
    if not encoding:
        raise _not_utf8(stream, path, offset, b'\0' in probe)
    try:
        # Refuses what decodes bytes, but not to text.
        io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        offset = _first_undecodable(stream, encoding)
    except LookupError:
        raise DataError(
            f'encoding: expected a name that Python knows (cp1252, utf-16, shift_jis), '
            f'got {encoding!r}'
        ) from None
    if offset is None:
        return encoding
    line_number, _ = _line_at(stream, offset)
    stream.seek(offset)
    raise DataError(
        f'{path}, line {line_number}: expected UTF-8 or {encoding}, got the byte '
        f'{stream.read(1)[0]:#04x}; name the encoding of the file (--encoding)'
    )


def _announced_encoding(probe: bytes) -> str:
    """The encoding that the first bytes show; '' if they show none."""
    for mark, name in _BYTE_ORDER_MARKS:
        if probe.startswith(mark):
            return name
    # UTF-16 without a mark: every other byte of Latin letters is 0, which no UTF-8 text has.
    zeros_at_even = probe[0::2].count(0)
    zeros_at_odd = probe[1::2].count(0)
    if zeros_at_odd > len(probe) / 4 and not zeros_at_even:
        return 'utf-16-le'
    if zeros_at_even > len(probe) / 4 and not zeros_at_odd:
        return 'utf-16-be'
    return ''


def _first_undecodable(stream: BinaryIO, encoding: str) -> int | None:
    """Offset of the first byte of a file that is not of an encoding; None if all are."""
    decoder = codecs.getincrementaldecoder(encoding)()
    stream.seek(0)
    begin = 0
    while True:
        chunk = stream.read(_CHUNK_BYTES)
        # Bytes of a character that the last chunk has cut in two.
        num_pending = len(decoder.getstate()[0])
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            return begin - num_pending + error.start
        if not chunk:
            return None
        begin += len(chunk)


def _line_at(stream: BinaryIO, offset: int) -> tuple[int, bytes]:
    """Number of the line at an offset, from 1, and its beginning."""
    stream.seek(0)
    line_number = 1
    line_begin = 0
    for begin in range(0, offset, _CHUNK_BYTES):
        chunk = stream.read(min(_CHUNK_BYTES, offset - begin))
        if b'\n' in chunk:
            line_number += chunk.count(b'\n')
            line_begin = begin + chunk.rfind(b'\n') + 1
    stream.seek(line_begin)
    return line_number, stream.read(_PROBE_BYTES).split(b'\n')[0]


def _not_utf8(stream: BinaryIO, path: str | os.PathLike, offset: int, is_binary: bool) -> DataError:
    if is_binary:
        return DataError(
            f'{path}: expected text, got binary data (if it is text in an encoding such as '
            'utf-16-le, name that: --encoding)'
        )
    line_number, line = _line_at(stream, offset)
    # What it says in the encoding of Western Windows, for the user to judge.
    reading = line.decode('cp1252', 'replace').strip()[:_MAX_QUOTE]
    return DataError(
        f'{path}, line {line_number}: expected UTF-8, got other bytes, which read {reading!r} if '
        'they are Windows-1252; if that is right, pass --encoding=cp1252 (or name the encoding it '
        'is), or save the file as UTF-8 (spreadsheets: "CSV UTF-8")'
    )


# ---- Text -> rows of a table.


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        line_number: of its first line, counted from 1 as editors do.
        fields: without spaces around them.
        source: the text of the row as it stands in the file.
    """

    line_number: int
    fields: list[str]
    source: str


def rows(lines: Iterable[str], path: str | os.PathLike, delimiter: str = ',') -> Iterator[Row]:
    """Yield the rows of a CSV file that are not blank.

    Args:
        lines: of the file, with or without the newlines at their ends.
        path: for messages.
        delimiter: between fields.

    Raises:
        DataError: if quotes do not match; the message names the line.
    """
    # Lines of the row that is being read: a quoted field may hold line breaks.
    taken: list[str] = []

    def taking() -> Iterator[str]:
        for line in lines:
            taken.append(line.removesuffix('\n'))
            yield taken[-1] + '\n'

    # skipinitialspace: a quote after ", " would otherwise be part of the text.
    # strict: otherwise a quote that is never closed takes the rest of the file for its sentence.
    reader = csv.reader(taking(), delimiter=delimiter, skipinitialspace=True, strict=True)
    line_number = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f'{path}, line {line_number}: expected a row of CSV, got '
                f'{taken[0][:_MAX_QUOTE]!r} ({error}); write a double quote inside a '
                'quoted text twice, and close every quote'
            ) from None
        if fields is None:
            return
        fields = [field.strip() for field in fields]
        if any(fields):
            yield Row(line_number, fields, '\n'.join(taken))
        line_number += len(taken)
        taken.clear()


class QuoteCheck:
    """Finds a row that holds another row of the table between its quotes.

    A quote that is not closed takes the following rows for its text, up to the next quote. Rows are
    read twice: first each goes to `add_row`, then each to `check`.
    """

    def __init__(self, path: str | os.PathLike, delimiter: str, column: int):
        """See the class.

        Args:
            path: for messages.
            delimiter: between fields.
            column: of the names, by which a row is known as one.
        """
        self._path = path
        self._delimiter = delimiter
        self._column = column
        # What stands in the column of the names, if a line inside a quoted text is taken for a row.
        self._suspects: set[str] = set()
        # Those of them that are names.
        self._names: set[str] = set()

    @property
    def is_needed(self) -> bool:
        """Whether any row has quoted lines that could be rows."""
        return bool(self._suspects)

    def add_row(self, row: Row) -> None:
        """Note what lines inside the quotes of a row would be called, were they rows."""
        for _, _, name in self._inner_lines(row):
            self._suspects.add(name)

    def add_name(self, row: Row) -> None:
        """Note the name of a row; behind all calls of `add_row`."""
        if len(row.fields) > self._column and row.fields[self._column] in self._suspects:
            self._names.add(row.fields[self._column])

    def check(self, row: Row) -> None:
        """Raise DataError if quotes in a row go on over what looks like rows."""
        for number, line, name in self._inner_lines(row):
            if name in self._names:
                raise DataError(
                    f'{self._path}, line {row.line_number}: expected the quoted text to end '
                    f'before line {row.line_number + number}, which looks like another row '
                    f'({line[:_MAX_QUOTE]!r}); close the quote, and write a double quote inside a '
                    'quoted text twice'
                )

    def _inner_lines(self, row: Row) -> Iterator[tuple[int, str, str]]:
        """(number in the row, line, name) of lines but the first, where they could be rows."""
        if '\n' not in row.source:
            return
        for number, line in enumerate(row.source.split('\n')[1:], 1):
            cells = [cell.strip().strip('"') for cell in line.split(self._delimiter)]
            if len(cells) > max(self._column, 1) and cells[self._column]:
                yield number, line, cells[self._column]
