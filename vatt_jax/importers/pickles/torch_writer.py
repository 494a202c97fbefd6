"""A state dict as torch.save writes it, without PyTorch: opcodes of a pickle, and bytes."""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

# NumPy's type -> the class of its storage.
STORAGES = {'float32': 'FloatStorage', 'float16': 'HalfStorage', 'int64': 'LongStorage'}
EMPTY_ORDERED_DICT = b'ccollections\nOrderedDict\n' + pickle.EMPTY_TUPLE + pickle.REDUCE


def write(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Write {name: array} as a file that torch.load reads as an OrderedDict of tensors.

    Raises:
        KeyError: an array is of a type that STORAGES lacks.
        OSError: the file cannot be written.
    """
    # Entries are stored, not compressed: PyTorch reads no others.
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
        archive.writestr('archive/data.pkl', _pickle(arrays))
        archive.writestr('archive/byteorder', 'little')
        for number, array in enumerate(arrays.values()):
            little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder('<'))
            archive.writestr(f'archive/data/{number}', little_endian.tobytes())
        archive.writestr('archive/version', '3\n')


def _pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    out = io.BytesIO()
    out.write(pickle.PROTO + b'\x02' + EMPTY_ORDERED_DICT + pickle.MARK)
    for number, (name, array) in enumerate(arrays.items()):
        out.write(_text(name) + _tensor(str(number), array))
    out.write(pickle.SETITEMS + pickle.STOP)
    return out.getvalue()


def _tensor(key: str, array: np.ndarray) -> bytes:
    """A call of _rebuild_tensor_v2 with the storage of that key."""
    storage = f'ctorch\n{STORAGES[array.dtype.name]}\n'.encode()
    reference = _text('storage') + storage + _text(key) + _text('cpu') + _number(array.size)
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    arguments = (
        _tuple(reference) + pickle.BINPERSID,
        _number(0),  # where in the storage it begins
        _tuple(b''.join(_number(length) for length in array.shape)),
        _tuple(b''.join(_number(stride) for stride in strides)),
        pickle.NEWFALSE,  # no gradient
        EMPTY_ORDERED_DICT,  # no hooks
    )
    rebuild = b'ctorch._utils\n_rebuild_tensor_v2\n'
    return rebuild + _tuple(b''.join(arguments)) + pickle.REDUCE


def _tuple(items: bytes) -> bytes:
    return pickle.MARK + items + pickle.TUPLE


def _text(text: str) -> bytes:
    encoded = text.encode('utf-8')
    return pickle.BINUNICODE + struct.pack('<I', len(encoded)) + encoded


def _number(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + struct.pack('<i', value)
    return pickle.LONG1 + b'\x08' + struct.pack('<q', value)
