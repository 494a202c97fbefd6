"""Text files as editors, spreadsheets and programs of any system write them.

Bytes become text, text becomes the rows of a table or JSON. What the rows mean is decided in
`annotation_files`.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

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
# Characters of a line that an error message quotes.
_MAX_QUOTE = 60


# ---- Bytes -> text.


def read_text(path: str | os.PathLike, encoding: str = '') -> str:
    """Read a text file whose lines end in any system's way; here they end in newlines.

    Args:
        path: the file.
        encoding: as of `decode`.

    Raises:
        DataError: if the file cannot be read, or is in another encoding.
    """
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error.strerror or error}') from None
    return decode(content, path, encoding)


def decode(content: bytes, path: str | os.PathLike, encoding: str = '') -> str:
    """Decode UTF-8, or UTF-16 and UTF-32 with a byte order mark, or what the user names.

    Legacy encodings are not guessed: most bytes are valid in all of them, and a wrong guess would
    put wrong letters into the vocabulary without a word.

    Args:
        content: of the file.
        path: for messages.
        encoding: of files that are none of the above, in Python's words (cp1252); '': refuse them.

    Raises:
        DataError: if the file is in another encoding; the message names line and remedy.
    """
    try:
        text = content.decode(_announced_encoding(content) or 'utf-8')
    except UnicodeDecodeError as error:
        if not encoding:
            raise _not_utf8(content, path, error) from None
        text = _decode_as(content, path, encoding)
    # Windows ends lines in \r\n and old Macs in \r. Not splitlines(), which would also break lines
    # at characters that a sentence may hold.
    return text.replace('\r\n', '\n').replace('\r', '\n')


def _announced_encoding(content: bytes) -> str:
    """The encoding that the first bytes show; '' if they show none."""
    for mark, name in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            return name
    # UTF-16 without a mark: every other byte of Latin letters is 0, which no UTF-8 text has.
    probe = content[:_PROBE_BYTES]
    zeros_at_even = probe[0::2].count(0)
    zeros_at_odd = probe[1::2].count(0)
    if zeros_at_odd > len(probe) / 4 and not zeros_at_even:
        return 'utf-16-le'
    if zeros_at_even > len(probe) / 4 and not zeros_at_odd:
        return 'utf-16-be'
    return ''


def _not_utf8(content: bytes, path: str | os.PathLike, error: UnicodeDecodeError) -> DataError:
    if b'\0' in content[:_PROBE_BYTES]:
        return DataError(
            f'{path}: expected text, got binary data (if it is text in an encoding such as '
            'utf-16-le, name that: --encoding)'
        )
    line_number = content.count(b'\n', 0, error.start) + 1
    begin = content.rfind(b'\n', 0, error.start) + 1
    line = content[begin:].split(b'\n')[0]
    # What it says in the encoding of Western Windows, for the user to judge.
    reading = line.decode('cp1252', 'replace').strip()[:_MAX_QUOTE]
    return DataError(
        f'{path}, line {line_number}: expected UTF-8, got other bytes, which read {reading!r} if '
        'they are Windows-1252; if that is right, pass --encoding=cp1252 (or name the encoding it '
        'is), or save the file as UTF-8 (spreadsheets: "CSV UTF-8")'
    )


def _decode_as(content: bytes, path: str | os.PathLike, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except LookupError:
        raise DataError(
            f'encoding: expected a name that Python knows (cp1252, utf-16, shift_jis), '
            f'got {encoding!r}'
        ) from None
    except UnicodeDecodeError as error:
        line_number = content.count(b'\n', 0, error.start) + 1
        raise DataError(
            f'{path}, line {line_number}: expected UTF-8 or {encoding}, got the byte '
            f'{content[error.start]:#04x}; name the encoding of the file (--encoding)'
        ) from None


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


def rows(text: str, path: str | os.PathLike, delimiter: str = ',') -> Iterator[Row]:
    """Yield the rows of a CSV file that are not blank.

    Args:
        text: of the file, its lines ending in newlines.
        path: for messages.
        delimiter: between fields.

    Raises:
        DataError: if quotes do not match; the message names the line.
    """
    lines = text.split('\n')
    # Generators of lines, not a file: a file would split them anew, by rules of its own.
    # skipinitialspace: a quote after ", " would otherwise be part of the text.
    # strict: otherwise a quote that is never closed takes the rest of the file for its sentence.
    reader = csv.reader(
        (line + '\n' for line in lines), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    first_line = 0
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f'{path}, line {first_line + 1}: expected a row of CSV, got '
                f'{lines[first_line][:_MAX_QUOTE]!r} ({error}); write a double quote inside a '
                'quoted text twice, and close every quote'
            ) from None
        if fields is None:
            return
        # A row may span lines, where a quoted field holds line breaks.
        source = '\n'.join(lines[first_line : reader.line_num])
        fields = [field.strip() for field in fields]
        if any(fields):
            yield Row(first_line + 1, fields, source)
        first_line = reader.line_num


def check_quotes(
    table: Sequence[Row], path: str | os.PathLike, delimiter: str, column: int
) -> None:
    """Refuse a row that holds another row of the table between its quotes.

    A quote that is not closed takes the following rows for its text, up to the next quote.

    Args:
        table: the rows.
        path: for messages.
        delimiter: between fields.
        column: of the names, by which a row is known as one.

    Raises:
        DataError: if a quoted field goes on over what looks like rows.
    """
    names = {row.fields[column] for row in table if len(row.fields) > column} - {''}
    for row in table:
        for i, line in enumerate(row.source.split('\n')[1:], 1):
            cells = [cell.strip().strip('"') for cell in line.split(delimiter)]
            if len(cells) > max(column, 1) and cells[column] in names:
                raise DataError(
                    f'{path}, line {row.line_number}: expected the quoted text to end before '
                    f'line {row.line_number + i}, which looks like another row '
                    f'({line[:_MAX_QUOTE]!r}); close the quote, and write a double quote inside a '
                    'quoted text twice'
                )


# ---- Text -> JSON.


def parse_json(text: str, path: str | os.PathLike) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: if it is malformed, or an object holds one name twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_names)
    except ValueError as error:
        raise DataError(f'{path} is not readable JSON: {error}') from None
    except RecursionError:
        raise DataError(f'{path} is not readable JSON: its lists are nested too deeply') from None


def parse_json_lines(text: str, path: str | os.PathLike) -> list[tuple[int, Any]]:
    """(line number, content) of each line of a JSON Lines file that is not blank.

    Raises:
        DataError: if a line is malformed.
    """
    documents = []
    for line_number, line in enumerate(text.split('\n'), 1):
        if line.strip():
            documents.append((line_number, parse_json(line, f'{path}, line {line_number}')))
    return documents


def is_json_lines(text: str) -> bool:
    """Whether a text that is no JSON document begins with a line that is one."""
    first_line, _, rest = text.strip().partition('\n')
    if not rest:
        return False
    try:
        return isinstance(json.loads(first_line), dict)
    except ValueError:
        return False


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        # Python keeps the last of two without a word.
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'the name {repeated!r} comes twice in one object; join its entries')
    return content
