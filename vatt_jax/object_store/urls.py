"""Paths on object stores. They stay strings: pathlib would make s3:/bucket of s3://bucket."""

from __future__ import annotations

import os
import re

from vatt_jax.config import ConfigError

# s3://bucket/folder; not C:\folder, and not file:///folder either, see `is_url`.
_URL = re.compile(r'([A-Za-z][A-Za-z0-9+.-]+)://')


def is_url(path: str | os.PathLike) -> bool:
    """Whether a path is on an object store, such as s3://bucket/folder or gs://bucket/folder."""
    return _URL.match(os.fspath(path)) is not None


def protocol(url: str) -> str:
    """'s3' of s3://bucket/folder."""
    match = _URL.match(url)
    if match is None:
        raise ValueError(f'expected a URL such as s3://bucket/folder, got {url!r}')
    return match[1].lower()


def join(url: str, *names: str) -> str:
    """The URL of what lies below a folder.

    Args:
        url: of the folder.
        *names: of a file or folder in it, one for each level.
    """
    return '/'.join([url.rstrip('/'), *names])


def last_name(url: str) -> str:
    """'data' of s3://bucket/data/."""
    return url.rstrip('/').rpartition('/')[2]


def check_local(path: str | os.PathLike, where: str) -> None:
    """Refuse a URL where files are written to a folder of this machine.

    Args:
        path: what was given.
        where: flag or field that it was given for.

    Raises:
        ConfigError: it is a URL; pathlib would make a folder called s3: of it.
    """
    if is_url(path):
        raise ConfigError(
            f'{where}={os.fspath(path)}: expected a folder of this machine; name one, and copy it '
            'to the store afterwards (docs/object_stores.md)'
        )
