"""Class names and templates from the files in use: lines of text, lists and objects of JSON."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vatt_jax.config import ConfigError

# 'n01440764 tench, Tinca tinca': a WordNet id, and what it is called.
_WITH_ID = re.compile(r'(n\d{8})[,:]?\s+(\S.*)')
# A line of Python's source, such as 'a photo of a {}.',
_QUOTED_LINE = re.compile(r'^([\'"]).*\1,?$')
# Keys of an object that an error message lists.
_MAX_LISTED = 6


@dataclasses.dataclass(frozen=True)
class ClassNames:
    """Names of classes, in order.

    Attributes:
        names: of P classes.
        ids: what else the classes are called, such as WordNet ids [P]; () where a file has none.
    """

    names: tuple[str, ...]
    ids: tuple[str, ...] = ()


def read_names(source: str, where: str) -> ClassNames:
    """Read a file of class names.

    Args:
        source: path of the file, with `:KEY` behind it for one list of an object of lists. It is

            - text, a name a line, each with a WordNet id before it or none,
            - a JSON list of names,
            - a JSON object: number or id -> name, number -> [id, name] (Keras), name -> number
              (torchvision's class_to_idx), or data set -> list of names (CLIP_benchmark).
        where: of the config field, for messages.

    Raises:
        ConfigError: it is none of these, or cannot be read.
    """
    content = _read(source, where)
    if isinstance(content, Mapping):
        names, ids = _names_of_object(content, source, where)
    else:
        names, ids = _names_of_lines(content)
    for name in (*names, *ids):
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f'{where}={source!r}: expected class names, got {name!r}')
    # Of files made for programs. Other characters stay: T-shirt and iPod are written so.
    names = [' '.join(name.replace('_', ' ').split()) for name in names]
    return ClassNames(tuple(names), tuple(ids))


def read_templates(source: str, where: str) -> list[str]:
    """Read a file of templates.

    Args:
        source: path of text, a template a line, or of a JSON list of them; with `:KEY` behind it,
            of a JSON object of lists.
        where: of the config field, for messages.

    Raises:
        ConfigError: it is none of these, or cannot be read.
    """
    content = _read(source, where)
    if isinstance(content, Mapping):
        raise ConfigError(
            f'{where}={source!r}: expected one template a line, or a JSON list of them, got a JSON '
            'object of other things than lists'
        )
    return list(content)


def _read(source: str, where: str) -> list[Any] | dict[str, Any]:
    """The lines or the JSON of a file; of an object of lists, the list that is meant."""
    path, key = _split_key(source)
    try:
        # utf-8-sig: editors of Windows put a mark before the first character.
        text = pathlib.Path(path).expanduser().read_text(encoding='utf-8-sig')
    except OSError as error:
        raise ConfigError(f'{where}={source!r}: cannot be read: {error.strerror}') from None
    except UnicodeDecodeError:
        raise ConfigError(f'{where}={source!r}: expected UTF-8; save it so') from None
    content = _parse(text, source, where)
    if isinstance(content, dict) and content:
        if all(isinstance(value, list) and not _is_pair(value) for value in content.values()):
            content = _list_of_key(content, key, source, where)
            key = ''
    if key:
        raise ConfigError(f'{where}={source!r}: the file is no JSON object of lists; drop :{key}')
    if not content:
        raise ConfigError(f'{where}={source!r}: the file is empty')
    return content


def _split_key(source: str) -> tuple[str, str]:
    """('file.json', 'key') of 'file.json:key'; no key where the whole is a file."""
    path, colon, key = source.rpartition(':')
    if colon and path.endswith('.json') and not pathlib.Path(source).expanduser().exists():
        return path, key
    return source, ''


def _parse(text: str, source: str, where: str) -> list[Any] | dict[str, Any]:
    """Lines that are not blank, or JSON where the text begins like it."""
    if text.lstrip()[:1] not in ('[', '{') or _is_template(text):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        for number, line in enumerate(lines, 1):
            if _QUOTED_LINE.match(line):
                raise ConfigError(
                    f'{where}={source!r}, entry {number}: expected a line without quotes, got '
                    f"{line!r}; a list of Python's is read as JSON, with brackets around it"
                )
        return lines
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f'{where}={source!r}: not readable as JSON: {error}') from None
    except RecursionError:
        raise ConfigError(f'{where}={source!r}: its lists are nested too deeply') from None


def _is_template(text: str) -> bool:
    """Whether a text begins with the name's place, as the template '{} on a table' does."""
    return text.lstrip().startswith(('{}', '{c}'))


def _list_of_key(content: dict[str, Any], key: str, source: str, where: str) -> list[Any]:
    if not key and len(content) == 1:
        return next(iter(content.values()))
    if key not in content:
        keys = ', '.join(list(content)[:_MAX_LISTED])
        more = ', …' if len(content) > _MAX_LISTED else ''
        got = f'got {key!r}' if key else 'got none'
        raise ConfigError(
            f'{where}={source!r}: expected FILE:KEY with one of the keys {keys}{more}, {got}'
        )
    return content[key]


def _is_pair(value: Any) -> bool:
    """Whether a value is Keras' [WordNet id, name]."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    return bool(re.fullmatch(r'n\d{8}', str(value[0])))


def _names_of_lines(lines: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """(names, ids) of lines; no ids unless every line has one."""
    found = [_WITH_ID.fullmatch(line) for line in lines if isinstance(line, str)]
    matches = [match for match in found if match]
    if len(matches) < len(lines):
        return lines, ()
    return [match[2] for match in matches], [match[1] for match in matches]


def _names_of_object(
    content: Mapping[str, Any], source: str, where: str
) -> tuple[Sequence[Any], Sequence[Any]]:
    """(names, ids) of an object."""
    values = list(content.values())
    by_number = _in_order(content, source, where)
    if by_number is not None and all(_is_pair(value) for value in by_number):
        return [pair[1] for pair in by_number], [pair[0] for pair in by_number]
    if by_number is not None:
        return by_number, ()
    if all(isinstance(value, int) for value in values):
        # The other way round: what is called so -> its number.
        if sorted(values) != list(range(len(values))):
            raise ConfigError(
                f'{where}={source!r}: expected the numbers 0 to {len(values) - 1}, each once, got '
                f'{sorted(values)[:_MAX_LISTED]} …'
            )
        names = sorted(content, key=lambda name: content[name])
        return names, names
    return values, list(content)


def _in_order(content: Mapping[str, Any], source: str, where: str) -> list[Any] | None:
    """The values by their keys, which are numbers; None where these are none.

    Raises:
        ConfigError: the numbers are not 0 to P - 1.
    """
    if not all(key.isdecimal() and key.isascii() for key in content):
        return None
    by_number = {int(key): value for key, value in content.items()}
    if set(by_number) != set(range(len(content))):
        raise ConfigError(
            f'{where}={source!r}: expected the keys 0 to {len(content) - 1}, got '
            f'{sorted(by_number)[:_MAX_LISTED]} …'
        )
    return [by_number[number] for number in range(len(content))]


def match_classes(classes: Sequence[str], given: ClassNames, where: str) -> list[str]:
    """The name of each class of the data.

    A class is found by its id, which is its name or the first word of it ('n01440764 tench'); so
    the data may have a part of the classes, in any order. Classes called by numbers (ImageNet-V2)
    are positions. Otherwise there are as many names as classes, in one order.

    Args:
        classes: names of the P classes of the data.
        given: of P classes or more.
        where: of the config field, for messages.

    Raises:
        ConfigError: a class has no name.
    """
    if given.ids:
        return _by_id(classes, given, where)
    if _are_positions(classes, len(given.names)):
        return [given.names[int(name)] for name in classes]
    if len(given.names) != len(classes):
        raise ConfigError(
            f'{where}: expected {len(classes)} names, one for each class of the data, got '
            f'{len(given.names)}; for a part of the classes, ids say which (ids_file)'
        )
    return list(given.names)


def _are_positions(classes: Sequence[str], count: int) -> bool:
    """Whether classes are called by their positions among `count` names."""
    if not all(name.isdecimal() and name.isascii() for name in classes):
        return False
    return max(int(name) for name in classes) < count


def _by_id(classes: Sequence[str], given: ClassNames, where: str) -> list[str]:
    if len(given.ids) != len(given.names):
        raise ConfigError(
            f'{where}: expected as many ids as names, got {len(given.ids)} and {len(given.names)}'
        )
    name_of = dict(zip(given.ids, given.names))
    if not _has_any(classes, name_of) and _are_positions(classes, len(given.names)):
        return [given.names[int(name)] for name in classes]
    found = []
    for name in classes:
        first_word = name.split(' ')[0]
        if name not in name_of and first_word not in name_of:
            raise ConfigError(
                f'{where}: expected a name for every class of the data, got none for {name!r} '
                f'(ids are {", ".join(given.ids[:_MAX_LISTED])}, …)'
            )
        found.append(name_of.get(name, name_of.get(first_word, '')))
    return found


def _has_any(classes: Sequence[str], name_of: Mapping[str, str]) -> bool:
    return any(name in name_of or name.split(' ')[0] in name_of for name in classes)
