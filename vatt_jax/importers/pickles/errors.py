"""Errors of reading a pickle: one sentence each, which begins with the name of the file."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

from vatt_jax.config import ConfigError
from vatt_jax.importers.messages import escaped


class Refused(ConfigError):
    """The file asks for something that is neither an array nor a plain container."""


class Damaged(ConfigError):
    """The file is no such file, or not all of it."""


class Unsupported(ValueError):
    """Raised by the stand-ins, which do not know the file's name; `errors_of` adds it."""


@contextlib.contextmanager
def errors_of(path: pathlib.Path) -> Iterator[None]:
    """Turn any failure into one sentence that begins with the file's name."""
    try:
        yield
    except ConfigError:
        raise
    except Unsupported as error:
        raise Refused(f'{path} holds {error}') from error
    # A stream that was made to harm can fail anywhere, and with any exception.
    except Exception as error:
        raise Damaged(
            f'{path} is damaged, or was made by hand: {type(error).__name__}: {one_line(error)}'
        ) from error


def one_line(error: Exception) -> str:
    return escaped(' '.join(str(error)[:1000].split()), 200)
