"""Packages that only parts of this package need: what to install where one is missing."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import NoReturn

from data_pipelines.errors import DataError

# Name of a module -> the extra of pyproject.toml that brings it.
_EXTRAS = {
    'av': 'video',
    'soxr': 'video',
    'PIL': 'video',
    'tensorflow': 'data',
    'tensorflow_datasets': 'data',
    'array_record': 'data',
    'tokenizers': 'text',
    'sentencepiece': 'text',
}


def require(*modules: str) -> None:
    """Raise DataError for the first of these modules that is not installed.

    Nothing is imported: it is asked before hours of work that need the modules at their end.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise DataError(_advice(module))


@contextlib.contextmanager
def explain_missing() -> Iterator[None]:
    """Turn the error of a package of an extra that is not installed into a DataError."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = _module_of(error)
        if module not in _EXTRAS:
            raise
        raise DataError(_advice(module)) from error


def exit_if_missing(error: ModuleNotFoundError) -> NoReturn:
    """End a command with one sentence about a missing package; raises any other error again."""
    module = _module_of(error)
    if module not in _EXTRAS:
        raise error
    print(f'error: {_advice(module)}', file=sys.stderr)
    sys.exit(2)  # as argparse exits after a wrong flag


def _module_of(error: ModuleNotFoundError) -> str:
    return (error.name or '').partition('.')[0]


def _advice(module: str) -> str:
    return (
        f'the package {module} is not installed in {sys.prefix}; in the folder of the repository, '
        f"pip install '.[{_EXTRAS[module]}]' brings it, and '.[data,video,text]' all that data "
        'need'
    )
