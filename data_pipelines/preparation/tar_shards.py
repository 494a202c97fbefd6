"""Tar archives of samples (WebDataset), read where they lie: nothing is unpacked.

A sample is the members of one name: `000000012.jpg`, `000000012.txt` and `000000012.json` are the
picture, the caption and the metadata of the sample `000000012`, one behind the other, as
img2dataset writes them. The name ends at the first dot behind the last slash.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from data_pipelines import media
from data_pipelines.errors import DataError
from data_pipelines.preparation.folder_listing import readable

_BLOCK = 512  # of tar, in bytes
# First bytes of archives that are compressed as a whole.
_COMPRESSED = (b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd')


class Member(NamedTuple):
    """A file in an archive: its name, the byte at which it begins, and its length."""

    name: str
    offset: int
    size: int


@dataclasses.dataclass
class Sample:
    """The members of one name.

    Attributes:
        name: the common part of their names.
        members: by suffix, in lower case and with its dot, in the order of the archive.
    """

    name: str
    members: dict[str, Member] = dataclasses.field(default_factory=dict)

    def picture(self) -> Member | None:
        """The first member with the suffix of a picture."""
        for suffix, member in self.members.items():
            if suffix.endswith(media.IMAGES):
                return member
        return None


def samples(path: str | os.PathLike, problems: dict[str, str]) -> Iterator[Sample]:
    """The samples of an archive, in its order.

    Args:
        path: of the archive.
        problems: gets what cannot be used: member, or '' for what follows the last one -> reason.

    Raises:
        DataError: it is no tar archive, or a compressed one.
    """
    current: Sample | None = None
    seen: set[str] = set()
    for member in _members(path, problems):
        folder, slash, file_name = member.name.rpartition('/')
        stem, dot, suffix = file_name.partition('.')
        name = f'{folder}{slash}{stem}'
        suffix = f'{dot}{suffix}'.lower()
        if current is not None and current.name == name and suffix not in current.members:
            current.members[suffix] = member
            continue
        if name in seen:
            problems[member.name] = 'again: the archive has a member of this name already'
            continue
        if current is not None:
            yield current
        seen.add(name)
        current = Sample(name, {suffix: member})
    if current is not None:
        yield current


def _members(path: str | os.PathLike, problems: dict[str, str]) -> Iterator[Member]:
    """The regular files of an archive."""
    size = os.path.getsize(path)
    try:
        # 'r:' is uncompressed: only such members can be read in any order.
        with tarfile.open(path, 'r:') as archive:
            try:
                for entry in archive:
                    name = readable(pathlib.PurePosixPath(entry.name).as_posix())
                    if entry.offset_data + entry.size > size:
                        problems[name] = 'truncated: the archive ends within it'
                        return
                    if entry.isreg():
                        yield Member(name, entry.offset_data, entry.size)
                    elif not entry.isdir():
                        problems[name] = 'a link or a device: expected a file'
            except tarfile.TarError as error:
                problems[''] = f'damaged: {error}; what follows in the archive is left out'
                return
            end = archive.offset
    except (tarfile.TarError, OSError) as error:
        raise DataError(f'{path}: expected a tar archive, got {_explain(path, error)}') from None
    # tarfile takes whatever is no header for the end.
    _check_end(path, end, problems)


def _check_end(path: str | os.PathLike, end: int, problems: dict[str, str]) -> None:
    """Note as a problem where an archive does not end as archives do: with a block of zeros."""
    with open(path, 'rb') as stream:
        stream.seek(end)
        block = stream.read(_BLOCK)
    if len(block) < _BLOCK:
        problems[''] = 'truncated: the mark of its end is missing; are all members there?'
    elif any(block):
        problems[''] = f'damaged: no header at byte {end}; what follows is left out'


def _explain(path: str | os.PathLike, error: Exception) -> str:
    try:
        with open(path, 'rb') as stream:
            begin = stream.read(_BLOCK)
    except OSError:
        return str(error)
    if begin.startswith(_COMPRESSED):
        return 'a compressed one; decompress it first, as its members lie anywhere'
    return f'another file ({error})'


def read_member(path: str | os.PathLike, member: Member) -> bytes:
    """The bytes of a member."""
    with open(path, 'rb') as stream:
        stream.seek(member.offset)
        return stream.read(member.size)
