"""Records of ViLBERT's and UNITER's databases: the bytes of one picture, whatever holds them.

Nothing in a record is executed: pickles are read by `importers.pickles`, npz members and msgpack
arrays of objects are refused.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
from jaxtyping import Float

from data_pipelines.errors import DataError
from data_pipelines.regions import tsv
from data_pipelines.regions.pictures import Picture
from vatt_jax.config import ConfigError
from vatt_jax.importers import pickles

ZIP_MAGIC = b'PK\x03\x04'


def parse_vilbert(data: bytes, where: str) -> Picture:
    """A value of ViLBERT's lmdb: the pickled columns of bottom-up attention.

    Raises:
        DataError: it is no such pickle; it asks for something to be executed.
    """
    try:
        values = pickles.read_bytes(data, where)
    except ConfigError as error:
        raise DataError(str(error)) from error
    if not isinstance(values, Mapping):
        raise DataError(f'{where}: expected a pickled dict, got {type(values).__name__}')
    return tsv.parse(values, where)


def parse_uniter(data: bytes, where: str, name: str) -> Picture:
    """A value of UNITER's lmdb, or a file of its npz folders.

    Fields: features [N F], norm_bb [N 4 or more] (x0 y0 x1 y1 as shares, then what follows from
    them), conf [N] and soft_labels [N P] where they were kept. Float16 becomes float32.

    Args:
        data: msgpack with NumPy's arrays in it, or npz (the databases called `compressed`).
        where: names the record in errors.
        name: of the picture.

    Raises:
        DataError: a field is missing or damaged.
    """
    fields = _npz_fields(data, where) if data[:4] == ZIP_MAGIC else _msgpack_fields(data, where)
    boxes = _numbers(fields, 'norm_bb', where)
    if boxes.ndim != 2 or boxes.shape[1] < 4:
        raise DataError(f'{where}: norm_bb: expected [N 4 or more], got shape {boxes.shape}')
    return Picture(
        name,
        _numbers(fields, 'features', where),
        boxes[:, :4],
        _numbers(fields, 'soft_labels', where) if 'soft_labels' in fields else None,
        _numbers(fields, 'conf', where) if 'conf' in fields else None,
    )


def _numbers(fields: Mapping[str, Any], name: str, where: str) -> Float[np.ndarray, '*shape']:
    """A field as float32."""
    if name not in fields:
        raise DataError(f'{where}: there is no {name!r}; there are {sorted(map(str, fields))}')
    value = fields[name]
    if not isinstance(value, np.ndarray) or value.dtype.kind not in 'fiu':
        raise DataError(f'{where}: {name}: expected an array of numbers')
    return value.astype(np.float32)


def _npz_fields(data: bytes, where: str) -> dict[str, Any]:
    """The members of an npz file that are read here."""
    wanted = ('features', 'norm_bb', 'soft_labels', 'conf')
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name in wanted}
    # RuntimeError: an encrypted member, or one of an unknown compression.
    except (
        OSError,
        ValueError,
        EOFError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise DataError(f'{where}: expected an npz file of numbers ({error})') from None


def _msgpack_fields(data: bytes, where: str) -> dict[str, Any]:
    """A msgpack dict with arrays in it."""
    try:
        fields = msgpack.unpackb(data, raw=False, object_hook=_array)
    # LookupError: an array without data; SyntaxError: NumPy's, of a type it cannot parse.
    except (
        ValueError,
        TypeError,
        LookupError,
        SyntaxError,
        msgpack.exceptions.UnpackException,
    ) as error:
        raise DataError(
            f'{where}: expected msgpack with arrays as msgpack_numpy writes them '
            f'({type(error).__name__}: {error})'
        ) from None
    if not isinstance(fields, dict):
        raise DataError(f'{where}: expected a dict, got {type(fields).__name__}')
    return fields


def _array(entry: dict[Any, Any]) -> Any:
    """What msgpack_numpy wrote for an array: its type, shape and bytes. Other dicts stay."""
    found = {key.decode() if isinstance(key, bytes) else key: entry[key] for key in entry}
    if 'nd' not in found:
        return entry
    kind = np.dtype(found.get('type', 'O')) if isinstance(found.get('type'), str) else None
    # Objects would be a pickle.
    if kind is None or kind.kind not in 'fiub':
        raise ValueError(f'an array of type {found.get("type")!r}; expected numbers')
    numbers = np.frombuffer(found['data'], kind)
    if not found['nd']:
        return numbers[0]
    if math.prod(found['shape']) != numbers.size:
        raise ValueError(f'shape {found["shape"]} of {numbers.size} numbers')
    return numbers.reshape(found['shape'])
