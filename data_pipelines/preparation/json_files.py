"""JSON and JSON Lines of any length.

Values are decoded by Python's own decoder, since caption files in use hold NaN, which the parsers
for streams refuse. Only the objects and lists around them are walked through here, so that the
members of a large one are read one by one.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, TextIO, TypeGuard, overload

from data_pipelines.errors import DataError
from data_pipelines.preparation.store import Store, StoredDict
from data_pipelines.preparation.text_files import TextFile

# Characters of a document that are decoded at once; the members of a larger one, one by one.
_AT_ONCE = 16 << 20
# Characters of a line that may be an object of JSON Lines under the suffix of JSON.
_LONGEST_LINE = 16 << 20
# Characters that are read from a file at once.
_CHUNK = 1 << 20
# Characters that decide about those before them: the rest of -Infinity, 1e+5 or \\ud83d\\ude00.
_LONGEST_TOKEN = 16

_SPACE = re.compile(r'[ \t\n\r]*')
_UNTERMINATED = 'Unterminated string starting at'
# In place of a value that goes on behind what was read.
_INCOMPLETE = object()


# ---- One text.


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
        raise too_deep(path) from None


def too_deep(path: str | os.PathLike) -> DataError:
    """The error of a file whose lists are nested deeper than Python's decoder can follow."""
    return DataError(f'{path} is not readable JSON: its lists are nested too deeply')


def parse_json_lines(file: TextFile) -> Iterator[tuple[int, Any]]:
    """Yield (line number, content) of each line of a JSON Lines file that is not blank.

    Raises:
        DataError: if a line is malformed.
    """
    for line_number, line in enumerate(file.lines(), 1):
        if line.strip():
            yield line_number, parse_json(line, f'{file.path}, line {line_number}')


def is_json_lines(file: TextFile) -> bool:
    """Whether a file begins with a line that is a JSON object, and has others behind it."""
    with file.open() as stream:
        lines = _filled_lines(stream)
        first_line = next(lines, '')
        is_only = next(lines, None) is None
    if is_only or not first_line.endswith('\n'):
        return False
    try:
        return isinstance(json.loads(first_line), dict)
    except ValueError:
        return False


def begins_as_list(file: TextFile) -> bool:
    """Whether a file begins with a line that only opens a list."""
    with file.open() as stream:
        return next(_filled_lines(stream), '').strip() == '['


def _filled_lines(stream: TextIO) -> Iterator[str]:
    """Lines that are not blank; of a document in one endless line, some parts of it."""
    while line := stream.readline(_LONGEST_LINE):
        if line.strip():
            yield line


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        # Python keeps the last of two without a word.
        names = [name for name, _ in pairs]
        raise _repeated(next(name for name in names if names.count(name) > 1))
    return content


def _repeated(name: str) -> ValueError:
    return ValueError(f'the name {name!r} comes twice in one object; join its entries')


# ---- A file.


def load(file: TextFile, unique_names: bool = True) -> Any:
    """The content of a JSON file.

    A file that is too large to be decoded at once is checked throughout, and comes as a
    `JsonObject` or a `JsonList`.

    Args:
        file: the file.
        unique_names: whether an object that holds one name twice is malformed; else the last
            counts.

    Raises:
        ValueError: in Python's words, if the file is malformed.
    """
    with file.open() as stream:
        text = stream.read(_AT_ONCE)
        is_whole = not stream.read(1)
    if is_whole:
        return json.loads(text, object_pairs_hook=_unique_names if unique_names else None)
    document = _Document(file, unique_names)
    with document.scanner() as scanner:
        scanner.skip()
        scanner.end()
    return document.content()


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value of `load` is a JSON list."""
    return isinstance(value, list | JsonList)


class _Document:
    """A container in a JSON file.

    Args:
        file: the file.
        unique_names: as of `load`.
        route: names of the objects' members that lead to the container.
    """

    def __init__(self, file: TextFile, unique_names: bool, route: tuple[str, ...] = ()):
        self._file = file
        self._unique_names = unique_names
        self._route = route

    def scanner(self) -> _Scanner:
        """A scanner at the beginning of the container."""
        scanner = _Scanner(self._file.open(), self._unique_names)
        for name in self._route:
            # There is one: the route was found in this file.
            for member in scanner.members():
                if member == name:
                    break
                scanner.skip()
        return scanner

    def content(self) -> Any:
        """The container as it is given to callers; a value that is none is decoded."""
        with self.scanner() as scanner:
            opening = scanner.peek()
            if opening == '{':
                return JsonObject(self)
            if opening == '[':
                return JsonList(self)
            return scanner.value()

    def member(self, name: str) -> Any:
        """The content of a member of this object."""
        return _Document(self._file, self._unique_names, (*self._route, name)).content()


class JsonObject(Mapping[str, Any]):
    """An object in a file, whose members are read from it whenever they are asked for."""

    def __init__(self, document: _Document):
        self._document = document

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return self._document.member(name)

    def __contains__(self, name: object) -> bool:
        return any(found == name for found in self)

    def __iter__(self) -> Iterator[str]:
        with self._document.scanner() as scanner:
            for name in scanner.members():
                yield name
                scanner.skip()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def items(self) -> ItemsView[str, Any]:
        """(name, value) of all members, in one pass."""
        return _Items(self)

    def pairs(self) -> Iterator[tuple[str, Any]]:
        """What `items` iterates over."""
        with self._document.scanner() as scanner:
            for name in scanner.members():
                yield name, scanner.value()


class _Items(ItemsView[str, Any]):
    """As of any Mapping, but without a look-up for each name."""

    def __init__(self, content: JsonObject):
        super().__init__(content)
        self._content = content

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return self._content.pairs()


class JsonList(Sequence[Any]):
    """A list in a file, whose members are read from it whenever they are asked for."""

    def __init__(self, document: _Document):
        self._document = document

    def __iter__(self) -> Iterator[Any]:
        with self._document.scanner() as scanner:
            for _ in scanner.members():
                yield scanner.value()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @overload
    def __getitem__(self, i: SupportsIndex) -> Any: ...

    @overload
    def __getitem__(self, i: slice) -> list[Any]: ...

    def __getitem__(self, i: SupportsIndex | slice) -> Any:
        if isinstance(i, slice):
            return list(itertools.islice(self, *i.indices(len(self))))
        number = int(i)
        if number < 0:
            number += len(self)
        for value in itertools.islice(self, max(number, 0), max(number, 0) + 1):
            return value
        raise IndexError(i)


# ---- Characters.


class _Scanner:
    """Walks through a JSON text; in memory are a chunk of it and the value that is asked for.

    A context manager that closes the text.
    """

    def __init__(self, stream: TextIO, unique_names: bool):
        self._stream = stream
        self._unique_names = unique_names
        hook: Callable[..., Any] | None = _unique_names if unique_names else None
        self._decoder = json.JSONDecoder(object_pairs_hook=hook)
        # A part of the text, and where in it the scanner stands.
        self._buffer = ''
        self._position = 0
        self._is_at_end = False
        # Of the text before the buffer: its line breaks, and its characters in all and since the
        # last line break.
        self._num_lines = 0
        self._num_characters = 0
        self._num_columns = 0

    def __enter__(self) -> _Scanner:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def peek(self) -> str:
        """The next character that is no white space; '' at the end of the text."""
        while True:
            space = _SPACE.match(self._buffer, self._position)
            assert space is not None  # the pattern fits everywhere
            self._position = space.end()
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._read():
                return ''

    def value(self) -> Any:
        """Decode the value that begins here, and go behind it."""
        value = self._decode()
        while value is _INCOMPLETE:
            self._read()
            value = self._decode()
        return value

    def skip(self) -> None:
        """Check the value that begins here, and go behind it."""
        opening = self.peek()
        while len(self._buffer) - self._position < _CHUNK and self._read():
            pass
        if self._decode() is not _INCOMPLETE:
            return
        if opening not in ('{', '['):
            self.value()
            return
        # A container longer than a chunk.
        seen = StoredDict(Store())
        for name in self.members():
            if self._unique_names and name in seen:
                raise _repeated(name)
            if opening == '{':
                seen[name] = None
            self.skip()

    def members(self) -> Iterator[str]:
        """Walk through the container that begins here.

        Yields:
            The name of each member, '' in a list. The scanner stands before its value then, and has
            to be taken behind it.
        """
        opening = self.peek()
        closing = '}' if opening == '{' else ']'
        self._position += 1
        if self.peek() == closing:
            self._position += 1
            return
        while True:
            yield self._name() if opening == '{' else ''
            separator = self.peek()
            if separator not in (',', closing) or not separator:
                raise self._error("Expecting ',' delimiter", self._position)
            self._position += 1
            if separator == closing:
                return

    def end(self) -> None:
        """Check that nothing follows."""
        if self.peek():
            raise self._error('Extra data', self._position)

    def _name(self) -> str:
        if self.peek() != '"':
            raise self._error('Expecting property name enclosed in double quotes', self._position)
        name = self.value()
        if self.peek() != ':':
            raise self._error("Expecting ':' delimiter", self._position)
        self._position += 1
        return name

    def _decode(self) -> Any:
        """As `value`, but _INCOMPLETE if the value may go on behind the buffer."""
        self.peek()
        try:
            value, end = self._decoder.raw_decode(self._buffer, self._position)
        except json.JSONDecodeError as error:
            is_cut = error.msg == _UNTERMINATED or (error.pos + _LONGEST_TOKEN >= len(self._buffer))
            if is_cut and not self._is_at_end:
                return _INCOMPLETE
            raise self._error(error.msg, error.pos) from None
        # The rest of a number may follow, as the e+5 of 1e+5.
        if end + _LONGEST_TOKEN >= len(self._buffer) and not self._is_at_end:
            return _INCOMPLETE
        self._position = end
        return value

    def _read(self) -> bool:
        """Read on, and forget what lies behind; False if the text is at its end."""
        passed = self._buffer[: self._position]
        self._num_lines += passed.count('\n')
        self._num_characters += len(passed)
        self._num_columns = self._columns_before(self._position)
        rest = self._buffer[self._position :]
        # As much again as there is, so that a long value is not begun too often.
        chunk = self._stream.read(max(_CHUNK, len(rest)))
        self._buffer = rest + chunk
        self._position = 0
        self._is_at_end = not chunk
        return bool(chunk)

    def _columns_before(self, position: int) -> int:
        """Characters between the last line break and a position of the buffer."""
        line_break = self._buffer.rfind('\n', 0, position)
        return self._num_columns + position if line_break < 0 else position - line_break - 1

    def _error(self, message: str, position: int) -> ValueError:
        """An error in the words of Python's decoder."""
        line = self._num_lines + self._buffer.count('\n', 0, position) + 1
        column = self._columns_before(position) + 1
        character = self._num_characters + position
        return ValueError(f'{message}: line {line} column {column} (char {character})')
