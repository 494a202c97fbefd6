"""Arrays of a Hugging Face folder: model.safetensors, or several files and an index.

    model.safetensors.index.json    {'weight_map': {name of an array: name of its file}}

Shapes are known without reading arrays, and arrays are read one by one.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from vatt_jax import extras
from vatt_jax.config import ConfigError
from vatt_jax.importers.messages import escaped, listed, shown

MODEL, INDEX = 'model.safetensors', 'model.safetensors.index.json'

Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str], np.ndarray]


def open_folder(folder: pathlib.Path) -> tuple[Shapes, Read]:
    """The arrays of a folder.

    Returns:
        {name: shape}, and a function that reads the array of one name.

    Raises:
        ConfigError: there is no such file, or one is missing or damaged, or an index names what is
            not there.
    """
    if (folder / MODEL).is_file():
        return _open([folder / MODEL])
    if (folder / INDEX).is_file():
        expected = _read_index(folder / INDEX)
        shapes, read = _open([folder / name for name in sorted(set(expected.values()))])
        missing = sorted(set(expected) - set(shapes))
        if missing:
            raise ConfigError(
                f'{folder / INDEX}: its files lack arrays that it names: {listed(missing)}; fetch '
                'the folder again'
            )
        return shapes, read
    raise ConfigError(f'{folder}: expected a folder with {MODEL} or {INDEX}, got neither')


def _read_index(path: pathlib.Path) -> dict[str, str]:
    """{name of an array: name of its file}."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f'{path} cannot be read ({type(error).__name__})') from error
    files = content.get('weight_map') if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise ConfigError(f'{path}: expected a group weight_map with names, got {shown(files)}')
    for name in files.values():
        # A name with a folder in it could lie anywhere on the disk.
        if not isinstance(name, str) or pathlib.PurePath(name).name != name:
            raise ConfigError(
                f'{path}: weight_map: expected names of files in the folder, got {shown(name)}'
            )
    return files


def _open(paths: list[pathlib.Path]) -> tuple[Shapes, Read]:
    """The arrays of several files."""
    shapes: Shapes = {}
    # name of an array -> the file that holds it
    holders: dict[str, tuple[pathlib.Path, Any]] = {}
    for path in paths:
        file, of_file = _open_one(path)
        shapes.update(of_file)
        holders.update(dict.fromkeys(of_file, (path, file)))

    def read(name: str) -> np.ndarray:
        path, file = holders[name]
        try:
            return np.asarray(file.get_tensor(name))
        # Types that NumPy does not know by name are errors of several kinds.
        except Exception as error:
            raise _unreadable(path, error, name) from error

    return shapes, read


def _open_one(path: pathlib.Path) -> tuple[Any, Shapes]:
    """A file, and the shapes of its arrays."""
    library = safetensors()
    try:
        file = library.safe_open(path, framework='numpy')
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, library.SafetensorError) as error:
        raise _unreadable(path, error) from error
    return file, shapes


def _unreadable(path: pathlib.Path, error: Exception, name: str = '') -> ConfigError:
    where = f'{path}: {escaped(name)}' if name else str(path)
    return ConfigError(
        f'{where} cannot be read ({type(error).__name__}: {escaped(str(error), 200)}); fetch it '
        'again'
    )


def safetensors() -> Any:
    """The library, imported here: everything else works without it."""
    with extras.needed('exchange', 'reading and writing safetensors'):
        import safetensors
        import safetensors.numpy
    return safetensors
