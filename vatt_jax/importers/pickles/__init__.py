"""Pickle, dill and PyTorch files as plain values, without running anything that they ask for.

A pickle is a program: it may name any function and call it. Here every name it may use stands for
an object of this package, which only puts arrays and containers together; any other name, and any
opcode that could reach one in another way, ends the reading. Neither dill, Haiku, Flax nor PyTorch
need be installed to read what they wrote.

    machine.py        executes the opcodes, in the place of Python's unpickler
    names.py          every name that a file may use, and what stands for it
    stand_ins.py      what stands for it: arrays, types of numbers, mappings, tensors
    conversion.py     puts arrays in the places of their stand-ins
    torch_files.py    PyTorch's files: pickles and the numbers beside them
    errors.py         failures as one sentence
"""

from __future__ import annotations

import io
import mmap
import os
import pathlib
import pickle
from typing import Any

from vatt_jax.config import ConfigError
from vatt_jax.importers.pickles import torch_files
from vatt_jax.importers.pickles.conversion import converted
from vatt_jax.importers.pickles.errors import Damaged, Refused
from vatt_jax.importers.pickles.machine import load_one

__all__ = ['ConfigError', 'Damaged', 'Refused', 'read', 'read_bytes']

ZIP_MAGIC = b'PK\x03\x04'


def read(path: str | os.PathLike) -> Any:
    """Read a pickle, dill or PyTorch file without executing what it asks for.

    Args:
        path: the file: a pickle of protocol 2 to 5, or what torch.save wrote, before or since 1.6.

    Returns:
        What the file holds: dicts, lists, tuples, sets, numbers, strings, None, and (read-only)
        NumPy arrays and scalars. OrderedDict, Haiku's flat mappings and Flax's frozen ones come as
        dicts, jax arrays and PyTorch tensors as NumPy arrays.

    Raises:
        ConfigError: (Refused, Damaged) with the name of the file and of what was found in it.
    """
    path = pathlib.Path(path)
    try:
        with open(path, 'rb') as file:
            # An empty file cannot be mapped into memory.
            if not os.fstat(file.fileno()).st_size:
                raise Damaged(f'{path} is empty; expected a pickle, dill or PyTorch file')
            if file.read(4) == ZIP_MAGIC:
                return torch_files.read_zip(path)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read_stream(path, data)
    except OSError as error:
        raise ConfigError(f'{path} cannot be read ({error.strerror or error})') from error


def read_bytes(data: bytes, name: str) -> Any:
    """Read a pickle in memory, such as a record of a database.

    Args:
        data: one pickle of protocol 2 to 5.
        name: what errors call it.

    Returns:
        See `read`.

    Raises:
        ConfigError: see `read`.
    """
    path = pathlib.Path(name)
    _check_start(path, data[:8])
    stream = io.BytesIO(data)
    value = load_one(path, stream)
    _check_end(path, len(data) - stream.tell())
    return converted(path, value)


def _read_stream(path: pathlib.Path, data: mmap.mmap) -> Any:
    """Read a file that is one pickle, or PyTorch's row of them."""
    _check_start(path, data[:8])
    first = load_one(path, data)
    # `type(…) is int` because `==` on a stand-in or an array could mean anything.
    if type(first) is int and first == torch_files.MAGIC:
        return torch_files.read_legacy(path, data)
    _check_end(path, len(data) - data.tell())
    return converted(path, first)


def _check_start(path: pathlib.Path, head: bytes) -> None:
    # Protocols 0 and 1 have no header that would tell them from any other file.
    if head[:1] != pickle.PROTO:
        raise Damaged(
            f'{path} is not a pickle of protocol 2 or later (it begins with {head!r}); '
            'expected a pickle, dill or PyTorch file'
        )


def _check_end(path: pathlib.Path, left: int) -> None:
    if left:
        raise Damaged(
            f'{path}: {left} bytes follow the end of the pickle; it was not '
            'written whole, or holds more than one'
        )
