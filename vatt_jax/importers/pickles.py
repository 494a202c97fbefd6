"""Pickle, dill and PyTorch files as plain values, without running anything that they ask for.

A pickle is a program: it may name any function and call it. Here every name it may use stands for an object of this file, which only puts
arrays and containers together; any other name, and any opcode that could reach one in another way, ends the reading. Neither dill, Haiku, Flax
nor PyTorch need be installed to read what they wrote.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import os
import pathlib
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vatt_jax.config import ConfigError

# What protocols 2 to 5 need for arrays and containers. Left out, among others: EXT1… (names by number, from a registry of the process), INST, OBJ
# and NEWOBJ (make instances of classes), PERSID (names of things outside the file; PyTorch's storages alone use BINPERSID).
OPCODES = frozenset(
    """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_DICT EMPTY_LIST EMPTY_TUPLE
    EMPTY_SET TUPLE TUPLE1 TUPLE2 TUPLE3 FROZENSET APPEND APPENDS SETITEM SETITEMS ADDITEMS GLOBAL STACK_GLOBAL REDUCE BUILD
    MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET""".split()
)
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a PyTorch file from before 1.6
TORCH_STORAGES = {
    'Float': 'f4',
    'Double': 'f8',
    'Half': 'f2',
    'BFloat16': 'bfloat16',
    'Long': 'i8',
    'Int': 'i4',
    'Short': 'i2',
    'Char': 'i1',
    'Byte': 'u1',
    'Bool': 'b1',
    'ComplexFloat': 'c8',
    'ComplexDouble': 'c16',
}
DEEPEST = 64  # containers within containers


class Refused(ConfigError):
    """The file asks for something that is neither an array nor a plain container."""


class Damaged(ConfigError):
    """The file is no such file, or not all of it."""


class _Odd(ValueError):
    """Said by the stand-ins, which do not know the file's name, of what they were given."""


def read(path: str | os.PathLike) -> Any:
    """What the file holds: dicts, lists, tuples, sets, numbers, strings, None, and (read-only) NumPy arrays and scalars.

    OrderedDict, Haiku's flat mappings and Flax's frozen ones come as dicts, jax arrays and PyTorch tensors as NumPy arrays. Raises ConfigError
    (Refused, Damaged) with the name of the file and of what was found in it.
    """
    path = pathlib.Path(path)
    try:
        with open(path, 'rb') as file:
            if not os.fstat(file.fileno()).st_size:
                raise Damaged(f'{path} is empty; a pickle, dill or PyTorch file is wanted')
            if file.read(4) == b'PK\x03\x04':
                return _torch_zip(path)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _whole(path, data)
    except OSError as error:
        raise ConfigError(f'{path} cannot be read ({error.strerror or error})') from error


def _whole(path: pathlib.Path, data: mmap.mmap) -> Any:
    if data[:1] != pickle.PROTO:
        raise Damaged(
            f'{path} is not a pickle of protocol 2 or later (it begins with {data[:8]!r}); a pickle, dill or PyTorch file is wanted'
        )
    first = _one(path, data)
    if type(first) is int and first == TORCH_MAGIC:
        return _torch_legacy(path, data)
    if data.tell() != len(data):
        raise Damaged(
            f'{path}: {len(data) - data.tell()} bytes follow the end of the pickle; it was not written whole, or holds more than one'
        )
    return _finished(path, first)


def _one(path: pathlib.Path, data: Any, storages: dict[str, _Storage] | None = None) -> Any:
    """The pickle that begins where the file `data` stands, with stand-ins in it; leaves the file at its end."""
    begin = data.tell()
    _check(path, data, storages is not None)
    end = data.tell()
    data.seek(begin)
    with _told(path):
        value = _Unpickler(path, data, storages).load()
    data.seek(end)
    return value


@contextlib.contextmanager
def _told(path: pathlib.Path) -> Iterator[None]:
    """Any failure as one sentence that begins with the file's name."""
    try:
        yield
    except ConfigError:
        raise
    except _Odd as error:
        raise Refused(f'{path} holds {error}') from error
    except Exception as error:
        raise Damaged(
            f'{path} is damaged, or was made by hand: {type(error).__name__}: {" ".join(str(error).split())[:200]}'
        ) from error


def _check(path: pathlib.Path, data: Any, persistent: bool) -> None:
    """Reads one pickle's opcodes without obeying them: each is admitted, whole, and claims no more memory than the file has bytes for."""
    last = 'its beginning'
    try:
        for number, (opcode, arg, at) in enumerate(pickletools.genops(data)):
            name = opcode.name
            if name not in OPCODES and not (persistent and name == 'BINPERSID'):
                raise Refused(
                    f'{path}: opcode {name}{"" if arg is None else f" {arg!r:.80}"} at byte {at} is refused; NumPy arrays and plain '
                    'containers, pickled with protocol 2 to 5, are read'
                )
            if name == 'PROTO' and arg > pickle.HIGHEST_PROTOCOL:
                raise Damaged(
                    f'{path} is a pickle of protocol {arg}, or no pickle; 2 to {pickle.HIGHEST_PROTOCOL} are read'
                )
            if (
                name in ('BINPUT', 'LONG_BINPUT') and arg > number
            ):  # the unpickler makes room for all numbers up to this one
                raise Damaged(
                    f'{path} is damaged, or was made by hand: {name} {arg} at byte {at} counts more values than came before'
                )
            last = f'{name} at byte {at}'
    except ConfigError:
        raise
    except Exception as error:
        raise Damaged(
            f'{path} is not a whole pickle: after {last}, {" ".join(str(error).split())[:200]}; fetch the file again'
        ) from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, path, file, storages):
        super().__init__(file, encoding='latin1')
        self.path, self.storages = path, storages

    def find_class(self, module: str, name: str) -> Any:
        table = ADMITTED if self.storages is None else ADMITTED | TORCH
        module = (
            'builtins' if module == '__builtin__' else module
        )  # protocol 2 has the names of Python 2
        make = table.get(f'{module}.{name}')
        if make is None:
            raise Refused(
                f'{self.path} refers to {module}.{name}, which is neither an array nor a plain container; it was not run, and nothing '
                'of the file was used'
            )
        return _Name(f'{module}.{name}', make)

    def persistent_load(self, pid: Any) -> Any:
        if self.storages is None:
            raise Refused(f'{self.path} refers to {pid!r:.80}, a thing outside of the file')
        if not (
            type(pid) is tuple
            and len(pid) in (5, 6)
            and pid[0] == 'storage'
            and type(pid[1]) is _Name
            and isinstance(pid[1].make, np.dtype)
            and type(pid[2]) is str
            and type(pid[4]) is int
            and pid[4] >= 0
            and (len(pid) == 5 or pid[5] is None)
        ):
            raise Refused(f'{self.path} refers to {pid!r:.80}; a PyTorch storage is wanted')
        own = self.storages.setdefault(pid[2], _Storage(pid[1].make, pid[4]))
        if (own.dtype, own.count) != (pid[1].make, pid[4]):
            raise Damaged(f'{self.path}: storage {pid[2]!r} is of two types or sizes')
        return own


# ---- stand-ins: all that the unpickler ever sees, calls or changes
class _Fixed:
    """Opcode BUILD cannot change it."""

    __slots__ = ()

    def __setstate__(self, state):
        raise _Odd(f'a {type(self).__name__[1:].lower()} with a state')


class _Name(_Fixed):
    """What a name of the file stands for. It may be called if `make` is a function."""

    __slots__ = ('name', 'make')

    def __init__(self, name: str, make: Any):
        self.name, self.make = name, make

    def __call__(self, *args):
        if not callable(self.make):
            raise _Odd(f'{self.name} is called')
        return self.make(*args)

    def __repr__(self):
        return self.name


class _Mapping(dict):
    """A dict of some other class; attributes that its instances may carry are passed over."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class _DType:
    __slots__ = ('value',)

    def __init__(self, given, align=False, copy=True):
        self.value = (
            given.make
            if type(given) is _Name and isinstance(given.make, np.dtype)
            else _simple(given)
        )

    def __setstate__(self, state):
        version, order, *rest = state
        if order not in ('<', '>', '|', '=') or any(x is not None for x in rest[:3]):
            raise _Odd(f'a NumPy type with the state {state!r:.80}; arrays of numbers are read')
        if order in '<>':
            self.value = self.value.newbyteorder(order)


class _Array:
    __slots__ = ('value',)

    def __init__(self, value: Any = None):
        self.value = value

    def __setstate__(self, state):
        shape, dtype, fortran, raw = state if len(state) == 4 else state[1:]
        self.value = _array(raw, dtype, shape, 'F' if fortran else 'C')


class _Storage(_Fixed):
    """PyTorch's: `count` numbers, which follow elsewhere in the file."""

    __slots__ = ('dtype', 'count', 'data')

    def __init__(self, dtype: np.dtype, count: int):
        self.dtype, self.count, self.data = dtype, count, None

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * self.count


class _Tensor(_Fixed):
    __slots__ = ('storage', 'offset', 'shape', 'strides')

    def __init__(self, storage, offset, shape, strides, *others):
        numbers = (offset, *shape, *strides)
        if (
            type(storage) is not _Storage
            or len(shape) != len(strides)
            or any(type(n) is not int or n < 0 for n in numbers)
        ):
            raise _Odd(
                f'a tensor at {offset!r:.40} of shape {shape!r:.40} and strides {strides!r:.40}'
            )
        self.storage, self.offset, self.shape, self.strides = (
            storage,
            offset,
            tuple(shape),
            tuple(strides),
        )

    def array(self) -> np.ndarray:
        own = self.storage
        if 0 in self.shape:
            return np.zeros(self.shape, own.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides))
        if last >= own.count or math.prod(self.shape) > own.count:
            raise _Odd(
                f'a tensor of shape {list(self.shape)} at {self.offset} of a storage of {own.count} numbers'
            )
        strides = [s * own.dtype.itemsize for s in self.strides]
        return np.lib.stride_tricks.as_strided(
            np.frombuffer(own.data, own.dtype)[self.offset :], self.shape, strides, writeable=False
        )


def _simple(given: Any) -> np.dtype:
    if type(given) is not str or not re.fullmatch(
        r'b1|bool|[iu][1248]|f[248]|c8|c16|[SU]\d{1,6}', given
    ):
        raise _Odd(
            f'a NumPy array of type {given!r:.40}; arrays of plain numbers are read, not of Python objects or records'
        )
    return np.dtype(given)


def _array(raw: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    """A view of the bytes `raw`; their number must be that of the shape."""
    if (
        type(dtype) is not _DType
        or type(shape) is not tuple
        or any(type(n) is not int or n < 0 for n in shape)
    ):
        raise _Odd(f'an array of shape {shape!r:.80}')
    raw = raw.encode('latin1') if type(raw) is str else raw  # of Python 2
    if type(raw) not in (bytes, bytearray):
        raise _Odd(f'an array whose content is {type(raw).__name__}')
    if math.prod(shape) * dtype.value.itemsize != len(raw):
        raise _Odd(f'an array of shape {list(shape)} and type {dtype.value} with {len(raw)} bytes')
    out = np.frombuffer(raw, dtype.value) if raw else np.zeros(0, dtype.value)
    out.flags.writeable = False
    return out.reshape(shape, order=order)


def _empty_array(kind, shape, code):
    """numpy's _reconstruct: BUILD fills it."""
    if type(kind) is not _Name or kind.name != 'numpy.ndarray':
        raise _Odd(f'an array of class {kind!r:.80}')
    return _Array()


def _from_buffer(raw, dtype, shape, order, axes=None):
    """numpy's _frombuffer, protocol 5. order 'K': `shape` is that of the bytes as they lie, `axes` brings them into the array's order."""
    if order == 'K' and axes is not None:
        return _Array(_array(raw, dtype, shape, 'C').transpose(axes))
    return _Array(_array(raw, dtype, shape, order))


def _filled_array(empty, args, state, *others):
    """dill's and jax's: an array made and filled in one call; of `others` (attributes, weak type) nothing is wanted."""
    if type(empty) is not _Name or empty.make is not _empty_array:
        raise _Odd(f'an array made by {empty!r:.80}')
    out = empty(*args)
    out.__setstate__(state)
    return out


def _scalar(dtype, raw=b''):
    return _Array(_array(raw, dtype, (), 'C')[()])


def _mapping(*args):
    if len(args) > 1 or (args and not isinstance(args[0], (dict, list, tuple))):
        raise _Odd(f'a mapping of {args!r:.80}')
    return _Mapping(*args)


def _latin1(text, encoding):
    """Bytes, as protocol 2 has them."""
    if type(text) is not str or encoding != 'latin1':
        raise _Odd(f'text in the encoding {encoding!r:.40}')
    return text.encode('latin1')


def _dill_type(name):
    make = ADMITTED.get(f'builtins.{name}') if type(name) is str else None
    if make is None:
        raise _Odd(f'the type {name!r:.40}, which is no plain container')
    return _Name(f'builtins.{name}', make)


def _of(kind: type, *sources: type) -> Callable:
    def make(*args):
        if len(args) > 1 or (args and type(args[0]) not in sources):
            raise _Odd(f'{kind.__name__} of {args!r:.80}')
        return kind(*args)

    return make


def _bfloat16() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


ADMITTED: Mapping[str, Any] = {
    'numpy.ndarray': 'a class',
    'numpy.dtype': _DType,
    'ml_dtypes.bfloat16': _bfloat16(),
    **{
        f'numpy.{core}.multiarray.{name}': make
        for core in ('core', '_core')
        for name, make in (('_reconstruct', _empty_array), ('scalar', _scalar))
    },
    'numpy.core.numeric._frombuffer': _from_buffer,
    'numpy._core.numeric._frombuffer': _from_buffer,
    'dill._dill._load_type': _dill_type,
    'dill._dill._create_array': _filled_array,
    'dill.dill._create_array': _filled_array,
    'jax._src.array._reconstruct_array': _filled_array,
    'jax._src.device_array.reconstruct_device_array': _filled_array,
    'collections.OrderedDict': _mapping,
    'flax.core.frozen_dict.FrozenDict': _mapping,
    **{
        f'haiku._src.data_structures.{name}': _mapping
        for name in ('FlatMapping', 'FlatMap', 'frozendict')
    },
    'builtins.set': _of(set, list),
    'builtins.frozenset': _of(frozenset, list),
    'builtins.bytes': _of(bytes),
    'builtins.bytearray': _of(bytearray, bytes),
    '_codecs.encode': _latin1,
}
TORCH: Mapping[str, Any] = {
    'torch._utils._rebuild_tensor_v2': _Tensor,
    'torch._utils._rebuild_tensor': _Tensor,
    'torch._utils._rebuild_parameter': lambda tensor, *others: tensor,
    'torch.Size': _of(tuple, list, tuple),
    **{
        f'torch.{name}Storage': _bfloat16() if code == 'bfloat16' else np.dtype(code)
        for name, code in TORCH_STORAGES.items()
    },
}


def _finished(path: pathlib.Path, value: Any) -> Any:
    """The value with arrays in the place of their stand-ins; what occurs twice is made once."""
    made: dict[int, Any] = {}
    open_ = object()

    def one(x, depth):
        if x is None or type(x) in (bool, int, float, str, bytes, bytearray):
            return x
        if id(x) in made:
            if made[id(x)] is open_:
                raise Damaged(f'{path} holds a container that contains itself')
            return made[id(x)]
        if depth > DEEPEST:
            raise Damaged(f'{path} holds containers more than {DEEPEST} deep within each other')
        made[id(x)] = open_
        if isinstance(x, dict):
            out = {one(k, depth + 1): one(v, depth + 1) for k, v in x.items()}
        elif type(x) in (list, tuple, set, frozenset):
            out = type(x)(one(v, depth + 1) for v in x)
        elif type(x) in (_Array, _DType) and x.value is not None:
            out = x.value
        elif type(x) is _Tensor:
            out = x.array()
        else:
            raise Refused(f'{path} holds {x!r:.80} itself; values are wanted')
        made[id(x)] = out
        return out

    with _told(path):
        return one(value, 0)


# ---- PyTorch
def _torch_zip(path: pathlib.Path) -> Any:
    """Since 1.6: a zip of `data.pkl` and one file for each storage."""
    with _told(path), zipfile.ZipFile(path) as archive:
        entries = {i.filename: i for i in archive.infolist()}
        found = [n for n in entries if n == 'data.pkl' or n.endswith('/data.pkl')]
        if len(found) != 1:
            raise Damaged(
                f'{path} is a zip file without a data.pkl; a PyTorch file (torch.save) is wanted'
            )
        root = found[0].removesuffix('data.pkl')

        def content(name):
            entry = entries.get(root + name)
            if entry is None:
                raise Damaged(f'{path} lacks {root + name}')
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                raise Damaged(f'{path}: {root + name} is compressed; torch.save does not compress')
            return archive.read(entry)

        if f'{root}byteorder' in entries and content('byteorder') != b'little':
            raise Damaged(f'{path} was written on a big-endian machine; save it on another one')
        storages: dict[str, _Storage] = {}
        value = _one(path, io.BytesIO(content('data.pkl')), storages)
        for key, storage in storages.items():
            storage.data = content(f'data/{key}')
            if len(storage.data) != storage.bytes:
                raise Damaged(
                    f'{path}: {root}data/{key} has {len(storage.data)} bytes where {storage.bytes} are wanted'
                )
        return _finished(path, value)


def _torch_legacy(path: pathlib.Path, data: mmap.mmap) -> Any:
    """Before 1.6: magic number, version, machine, object, list of storages as pickles one after the other; then the numbers of each storage."""
    version, machine = _one(path, data), _one(path, data)
    if version != 1001 or not isinstance(machine, dict) or not machine.get('little_endian', True):
        raise Damaged(
            f'{path}: a PyTorch file of version {version!r:.20} and machine {machine!r:.80}; version 1001 of a little-endian one is read'
        )
    storages: dict[str, _Storage] = {}
    value = _one(path, data, storages)
    keys = _one(path, data)
    if (
        type(keys) is not list
        or any(type(k) is not str for k in keys)
        or set(keys) != set(storages)
        or len(set(keys)) != len(keys)
    ):
        raise Damaged(f'{path}: its list of storages is not that of its tensors')
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(data.read(8), 'little')
        if count != storage.count or storage.bytes > len(data) - data.tell():
            raise Damaged(
                f'{path} ends within storage {key!r} of {storage.count} numbers; fetch it again'
            )
        storage.data = data.read(storage.bytes)
    if data.tell() != len(data):
        raise Damaged(f'{path}: {len(data) - data.tell()} bytes follow the last storage')
    return _finished(path, value)
