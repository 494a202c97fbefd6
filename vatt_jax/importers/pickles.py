"""Pickle, dill and PyTorch files as plain values, without running anything that they ask for.

A pickle is a program: it may name any function and call it. Here every name it may use stands for
an object of this file, which only puts arrays and containers together; any other name, and any
opcode that could reach one in another way, ends the reading. Neither dill, Haiku, Flax nor PyTorch
need be installed to read what they wrote.

The opcodes are executed here (`_Machine`), not by Python's unpickler, which hashes and compares
whatever a file asks it to: tuples nested deep enough end the process, and tuples that hold each
other twice keep it busy for ever. `_Converter` then replaces the stand-ins by arrays.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import mmap
import os
import pathlib
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

import numpy as np

from vatt_jax.config import ConfigError
from vatt_jax.importers.messages import escaped, shown

# Opcodes that put their own argument on the stack.
LITERALS = frozenset(
    """BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8""".split()
)
CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
# What protocols 2 to 5 need for arrays and containers. Left out, among others: EXT1… (names by
# number, from a registry of the process), INST, OBJ and NEWOBJ (make instances of classes), PERSID
# (names of things outside the file; PyTorch's storages alone use BINPERSID).
OPCODES = (
    LITERALS
    | frozenset(CONSTANTS)
    | frozenset(
        """PROTO FRAME STOP MARK POP POP_MARK
        EMPTY_DICT EMPTY_LIST EMPTY_TUPLE EMPTY_SET TUPLE TUPLE1 TUPLE2 TUPLE3 FROZENSET
        APPEND APPENDS SETITEM SETITEMS ADDITEMS
        GLOBAL STACK_GLOBAL REDUCE BUILD
        MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET""".split()
    )
)
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a PyTorch file from before 1.6
TORCH_VERSION = 1001  # second pickle of such a file
ZIP_MAGIC = b'PK\x03\x04'
# torch.<key>Storage -> the NumPy type of its numbers.
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
# Bounds far above what checkpoints need, so that no value costs more than its bytes in the file.
MOST_BITS = 2048  # of an integer
# Bytes of an argument that ends with its line.
MOST_LINE = 1 << 16
OPCODE_OF = {opcode.code: opcode for opcode in pickletools.opcodes}
MOST_AXES = 32  # of an array, each shorter than LONGEST_AXIS
LONGEST_AXIS = 1 << 48
LONGEST_KEY = 4096  # characters of a name in a mapping or a set
MOST_KEY_PARTS = 16  # of a tuple that is a key
# Hashes of tuples can be made to collide, and n keys of one hash take n² comparisons.
MOST_TUPLE_KEYS = 4096
# Calls that copy their arguments may copy so many times the bytes of the file in all.
MOST_COPIES = 4
FREE_COPIES = 1 << 20  # bytes, whatever the size of the file
ELEMENT_BYTES = 16  # that an element of a container counts for


class Refused(ConfigError):
    """The file asks for something that is neither an array nor a plain container."""


class Damaged(ConfigError):
    """The file is no such file, or not all of it."""


class _Unsupported(ValueError):
    """Raised by the stand-ins, which do not know the file's name; `_errors_of` adds it."""


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
                return _read_torch_zip(path)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read_stream(path, data)
    except OSError as error:
        raise ConfigError(f'{path} cannot be read ({error.strerror or error})') from error


def _read_stream(path: pathlib.Path, data: mmap.mmap) -> Any:
    """Read a file that is one pickle, or PyTorch's row of them."""
    # Protocols 0 and 1 have no header that would tell them from any other file.
    if data[:1] != pickle.PROTO:
        raise Damaged(
            f'{path} is not a pickle of protocol 2 or later (it begins with {data[:8]!r}); '
            'expected a pickle, dill or PyTorch file'
        )
    first = _load_one(path, data)
    # `type(…) is int` because `==` on a stand-in or an array could mean anything.
    if type(first) is int and first == TORCH_MAGIC:
        return _read_torch_legacy(path, data)
    if data.tell() != len(data):
        raise Damaged(
            f'{path}: {len(data) - data.tell()} bytes follow the end of the pickle; it was not '
            'written whole, or holds more than one'
        )
    return _converted(path, first)


def _load_one(
    path: pathlib.Path,
    data: mmap.mmap | io.BytesIO,
    storages: dict[str, _Storage] | None = None,
) -> Any:
    """Load the pickle that begins at the current position of a file.

    Args:
        path: name of the file, for errors.
        data: its content; left at the end of the pickle.
        storages: filled with the PyTorch storages that the pickle refers to; None where it may not
            refer to any.

    Returns:
        The value, with stand-ins in it.
    """
    with _errors_of(path):
        return _Machine(path, data, storages).run()


@contextlib.contextmanager
def _errors_of(path: pathlib.Path) -> Iterator[None]:
    """Turn any failure into one sentence that begins with the file's name."""
    try:
        yield
    except ConfigError:
        raise
    except _Unsupported as error:
        raise Refused(f'{path} holds {error}') from error
    # A stream that was made to harm can fail anywhere, and with any exception.
    except Exception as error:
        raise Damaged(
            f'{path} is damaged, or was made by hand: {type(error).__name__}: {_one_line(error)}'
        ) from error


def _one_line(error: Exception) -> str:
    return escaped(' '.join(str(error)[:1000].split()), 200)


# ---- the opcodes, executed on stand-ins
class _Machine:
    """Executes one pickle: a stack, marks on it, and a memo of values to refer back to.

    Names of the file mean entries of ADMITTED and TORCH, nothing else.
    """

    def __init__(
        self,
        path: pathlib.Path,
        data: mmap.mmap | io.BytesIO,
        storages: dict[str, _Storage] | None,
    ) -> None:
        self.path = path
        self.data = data
        self.storages = storages
        self.size = _bytes_of(data)
        # A mark begins a new stack, so that no opcode can take a value from before it.
        self.stack: list[Any] = []
        self.earlier: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.tuple_keys = 0
        self.copied = 0

    def run(self) -> Any:
        """Execute up to STOP, and leave the file right behind it."""
        # Typeshed knows no maps of files.
        operations = pickletools.genops(cast(IO[bytes], self.data))
        last = 'its beginning'
        number = 0  # of opcodes so far
        while True:
            name, argument, offset = self._next(operations, last)
            self._check(name, argument, offset, number)
            if name == 'STOP':
                return self.stack.pop()
            self._execute(name, argument)
            last = f'{name} at byte {offset}'
            number += 1

    def _next(self, operations: Iterator[Any], last: str) -> tuple[str, Any, int | None]:
        """The next opcode, its argument and its place; genops reads both whole."""
        self._check_line()
        try:
            opcode, argument, offset = next(operations)
        except Exception as error:
            raise Damaged(
                f'{self.path} is not a whole pickle: after {last}, {_one_line(error)}; fetch the '
                'file again'
            ) from error
        return opcode.name, argument, offset

    def _check_line(self) -> None:
        """Refuse an argument that is one endless line, before several copies of it are made."""
        offset = self.data.tell()
        code = self.data.read(1).decode('latin-1')
        opcode = OPCODE_OF.get(code)
        if opcode and opcode.arg and opcode.arg.n == pickletools.UP_TO_NEWLINE:
            head = self.data.read(MOST_LINE)
            if len(head) == MOST_LINE and b'\n' not in head:
                raise Refused(
                    f'{self.path}: opcode {opcode.name} at byte {offset} is followed by a line of '
                    f'{MOST_LINE} bytes or more, which no writer of weights makes'
                )
        self.data.seek(offset)

    def _check(self, name: str, argument: Any, offset: int | None, number: int) -> None:
        """Check one opcode before it is executed; `number` counts those before it."""
        is_storage = name == 'BINPERSID' and self.storages is not None
        if name not in OPCODES and not is_storage:
            argument_shown = '' if argument is None else f' {shown(argument)}'
            raise Refused(
                f'{self.path}: opcode {name}{argument_shown} at byte {offset} is refused; NumPy '
                'arrays and plain containers, pickled with protocol 2 to 5, are read'
            )
        if name == 'PROTO' and argument > pickle.HIGHEST_PROTOCOL:
            raise Damaged(
                f'{self.path} is a pickle of protocol {argument}, or no pickle; 2 to '
                f'{pickle.HIGHEST_PROTOCOL} are read'
            )
        if name == 'FRAME' and argument > self.size - self.data.tell():
            raise Damaged(
                f'{self.path} is not a whole pickle: the frame at byte {offset} has {argument} '
                'bytes, more than follow; fetch the file again'
            )
        # An honest writer numbers consecutively.
        if name in ('BINPUT', 'LONG_BINPUT') and argument > number:
            raise Damaged(
                f'{self.path} is damaged, or was made by hand: {name} {argument} at byte {offset} '
                'counts more values than came before'
            )
        if type(argument) is int and argument.bit_length() > MOST_BITS:
            raise Refused(
                f'{self.path} holds an integer of {argument.bit_length()} bits at byte {offset}; '
                f'at most {MOST_BITS} are read'
            )

    def _execute(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name == 'MARK':
            self.earlier.append(stack)
            self.stack = []
        elif name == 'POP':
            if stack:
                stack.pop()
            else:
                self._from_mark()
        elif name == 'POP_MARK':
            self._from_mark()
        elif name in ('MEMOIZE', 'BINPUT', 'LONG_BINPUT'):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(self.memo[argument])
        elif name in ('GLOBAL', 'STACK_GLOBAL'):
            stack.append(self._name(argument))
        elif name == 'REDUCE':
            stack.append(self._call())
        elif name == 'BUILD':
            self._build()
        elif name == 'BINPERSID':
            stack.append(self._storage(stack.pop()))
        elif name not in ('PROTO', 'FRAME'):
            self._contain(name)

    def _contain(self, name: str) -> None:
        """Make a container, or put values into one."""
        if name == 'EMPTY_DICT':
            self.stack.append({})
        elif name == 'EMPTY_LIST':
            self.stack.append([])
        elif name == 'EMPTY_TUPLE':
            self.stack.append(())
        elif name == 'EMPTY_SET':
            self.stack.append(set())
        elif name == 'TUPLE':
            items = self._from_mark()
            self.stack.append(tuple(items))
        elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
            self.stack.append(tuple(self._pop_last(int(name[-1]))))
        elif name == 'FROZENSET':
            items = self._from_mark()
            self._check_keys(items)
            self.stack.append(frozenset(items))
        elif name in ('APPEND', 'APPENDS'):
            items = self._pop_last(1) if name == 'APPEND' else self._from_mark()
            self._target(list).extend(items)
        elif name in ('SETITEM', 'SETITEMS'):
            items = self._pop_last(2) if name == 'SETITEM' else self._from_mark()
            keys = items[::2]
            self._check_keys(keys)
            self._target(dict, _Mapping).update(zip(keys, items[1::2], strict=True))
        else:  # ADDITEMS
            items = self._from_mark()
            self._check_keys(items)
            self._target(set).update(items)

    def _from_mark(self) -> list[Any]:
        """Take the values since the last mark, and the mark."""
        items = self.stack
        self.stack = self.earlier.pop()
        return items

    def _pop_last(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count:
            raise IndexError('the stack is empty')
        del self.stack[-count:]
        return items

    def _target(self, *kinds: type) -> Any:
        """The container on top of the stack, which items are put into."""
        if type(self.stack[-1]) not in kinds:
            raise _Unsupported(f'items put into {shown(self.stack[-1])}')
        return self.stack[-1]

    def _check_keys(self, keys: list[Any]) -> None:
        """Check what is about to be hashed: plain values, or a flat tuple of them."""
        for key in keys:
            if type(key) is tuple:
                self.tuple_keys += 1
                if len(key) > MOST_KEY_PARTS or not all(_is_plain_key(part) for part in key):
                    raise _Unsupported(f'{shown(key)} as a key; names and numbers are read')
            elif not _is_plain_key(key):
                raise _Unsupported(f'{shown(key)} as a key; names and numbers are read')
        if self.tuple_keys > MOST_TUPLE_KEYS:
            raise _Unsupported(f'more than {MOST_TUPLE_KEYS} tuples as keys')

    def _name(self, argument: str | None) -> _Name:
        """What a name stands for: of GLOBAL's argument, or of the two strings on the stack."""
        # Never Python's own look-up: it imports the module.
        if argument is None:
            module, name = self._pop_last(2)
        else:
            module, _, name = argument.partition(' ')
        if type(module) is not str or type(name) is not str:
            raise _Unsupported(f'the name {shown(module)}.{shown(name)}')
        table = ADMITTED if self.storages is None else ADMITTED | TORCH
        if module == '__builtin__':  # protocol 2 has the names of Python 2
            module = 'builtins'
        make = table.get(f'{module}.{name}')
        if make is None:
            raise Refused(
                f'{self.path} refers to {escaped(module, 80)}.{escaped(name, 80)}, which is '
                'neither an array nor a plain container; it was not run, and nothing of the file '
                'was used'
            )
        return _Name(f'{module}.{name}', make)

    def _call(self) -> Any:
        function, arguments = self._pop_last(2)
        if type(function) is not _Name or type(arguments) is not tuple:
            raise _Unsupported(f'a call of {shown(function)} with {shown(arguments)}')
        self._count_copies(arguments)
        made = function(*arguments)
        # The only functions that hash what they are given.
        if type(made) is _Unhashed:
            self._check_keys(made.keys)
            made = made.make()
        return made

    def _build(self) -> None:
        state = self.stack.pop()
        value = self.stack[-1]
        if not isinstance(value, (_Fixed, _Mapping, _DType, _Array)):
            raise _Unsupported(f'{shown(value)} with a state')
        self._count_copies(state)
        value.set_state(state)

    def _count_copies(self, value: Any, depth: int = 2) -> None:
        """Count what a call may copy: a few bytes could have a large value copied many times."""
        if type(value) in (str, bytes, bytearray):
            self.copied += len(value)
        elif type(value) in (list, tuple, dict, _Mapping):
            self.copied += ELEMENT_BYTES * len(value)
        if self.copied > FREE_COPIES + MOST_COPIES * self.size:
            raise _Unsupported('values that are copied many times over')
        # Arguments of a call within those of another one.
        if type(value) is tuple and depth:
            for item in value:
                self._count_copies(item, depth - 1)

    def _storage(self, reference: Any) -> _Storage:
        """The PyTorch storage that a reference out of the pickle means."""
        assert self.storages is not None  # else BINPERSID is refused
        if not _is_storage_id(reference):
            raise Refused(f'{self.path}: expected a PyTorch storage, got {shown(reference)}')
        key, dtype, count = reference[2], reference[1].make, reference[4]
        # Tensors may be views of one storage; each of them refers to it.
        storage = self.storages.setdefault(key, _Storage(dtype, count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise Damaged(f'{self.path}: storage {shown(key)} is of two types or sizes')
        return storage


def _bytes_of(data: mmap.mmap | io.BytesIO) -> int:
    return len(data) if isinstance(data, mmap.mmap) else data.getbuffer().nbytes


def _is_plain_key(key: Any) -> bool:
    """Whether a value may be hashed: text or bytes of bounded length, or a number of 64 bits."""
    if type(key) in (str, bytes):
        return len(key) <= LONGEST_KEY
    if type(key) is int:
        # Longer ones can be chosen so that all have one hash.
        return key.bit_length() <= 64
    if type(key) is _Array:
        return isinstance(key.value, np.generic) and key.value.nbytes <= LONGEST_KEY
    return key is None or type(key) in (bool, float)


def _is_storage_id(pid: Any) -> bool:
    """Whether it is ('storage', type, key, device, number of elements[, None])."""
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != 'storage':
        return False
    kind, key, count = pid[1], pid[2], pid[4]
    if type(kind) is not _Name or not isinstance(kind.make, np.dtype):
        return False
    if type(key) is not str or len(key) > LONGEST_KEY:
        return False
    if type(count) is not int or not 0 <= count < LONGEST_AXIS:
        return False
    # The sixth, of files before 1.6, describes a view of a storage; PyTorch has long written None.
    return len(pid) == 5 or pid[5] is None


# Stand-ins: all that the machine ever calls or changes. Opcode BUILD calls `set_state`. Types are
# compared exactly (`type(x) is …`) so that no subclass passes. Arguments come from the file and may
# be anything: hence `Any`.
class _Fixed:
    """A stand-in that opcode BUILD cannot change."""

    __slots__ = ()

    def set_state(self, state: Any) -> None:
        raise _Unsupported(f'a {type(self).__name__[1:].lower()} with a state')


class _Name(_Fixed):
    """What a name of the file stands for. It may be called if `make` is a function."""

    __slots__ = ('name', 'make')

    def __init__(self, name: str, make: Any) -> None:
        self.name = name
        self.make = make

    def __call__(self, *args: Any) -> Any:
        if not callable(self.make):
            raise _Unsupported(f'{self.name} is called')
        return self.make(*args)

    def described(self) -> str:
        """The name, for errors."""
        return self.name


class _Mapping(dict):
    """A dict of some other class; attributes that its instances may carry are passed over."""

    __slots__ = ()

    def set_state(self, state: Any) -> None:
        pass


class _DType:
    """A NumPy type. BUILD sets its byte order."""

    __slots__ = ('value',)

    def __init__(self, given: Any, align: Any = False, copy: Any = True) -> None:
        # ml_dtypes' types are named by the file, NumPy's are strings.
        if type(given) is _Name and isinstance(given.make, np.dtype):
            self.value = given.make
        else:
            self.value = _plain_dtype(given)

    def set_state(self, state: Any) -> None:
        # (version, byte order, subarray, field names, fields, …): the three are None for numbers.
        _, order, *rest = state
        if order not in ('<', '>', '|', '=') or any(part is not None for part in rest[:3]):
            raise _Unsupported(
                f'a NumPy type with the state {shown(state)}; arrays of numbers are read'
            )
        if order in '<>':
            self.value = self.value.newbyteorder(order)


class _Array:
    """An array or a scalar. BUILD fills it where it was made empty."""

    __slots__ = ('value',)

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def set_state(self, state: Any) -> None:
        # NumPy's state is ([version,] shape, dtype, is Fortran order, bytes).
        shape, dtype, fortran, raw = state if len(state) == 4 else state[1:]
        order = 'F' if fortran else 'C'
        self.value = _array(raw, dtype, shape, order)


class _Storage(_Fixed):
    """A storage of PyTorch: `count` numbers, which follow elsewhere in the file."""

    __slots__ = ('dtype', 'count', 'data')

    def __init__(self, dtype: np.dtype, count: int) -> None:
        self.dtype = dtype
        self.count = count
        self.data = b''  # filled when the pickle that refers to it has been loaded

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * self.count


class _Tensor(_Fixed):
    """A view of a storage. Offset and strides count elements, not bytes."""

    __slots__ = ('storage', 'offset', 'shape', 'strides')

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *others: Any) -> None:
        # `others`: requires_grad, hooks, metadata.
        if (
            type(storage) is not _Storage
            or not _are_lengths((offset,))
            or not _are_lengths(shape)
            or not _are_lengths(strides)
            or len(shape) != len(strides)
        ):
            raise _Unsupported(
                f'a tensor at {shown(offset)} of shape {shown(shape)} and strides {shown(strides)}'
            )
        self.storage = storage
        self.offset = offset
        self.shape = tuple(shape)
        self.strides = tuple(strides)

    def array(self) -> np.ndarray:
        storage = self.storage
        if 0 in self.shape:
            return np.zeros(self.shape, storage.dtype)
        # as_strided checks no bounds: the last element must lie within the storage. Nor may strides
        # of 0 make more elements than it holds: a copy could then need any amount of memory.
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides))
        if last >= storage.count or math.prod(self.shape) > storage.count:
            raise _Unsupported(
                f'a tensor of shape {list(self.shape)} at {self.offset} of a storage of '
                f'{storage.count} numbers'
            )
        elements = np.frombuffer(storage.data, storage.dtype)[self.offset :]
        byte_strides = [stride * storage.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(elements, self.shape, byte_strides, writeable=False)


def _are_lengths(numbers: Any) -> bool:
    """Whether this can be a shape: products of such numbers are computed at no cost."""
    if type(numbers) is not tuple or len(numbers) > MOST_AXES:
        return False
    return all(type(n) is int and 0 <= n < LONGEST_AXIS for n in numbers)


def _plain_dtype(given: Any) -> np.dtype:
    """A NumPy type of plain numbers or text, by its name."""
    # Not np.dtype(given) at once: it also takes records and 'O', pointers to Python objects.
    plain = r'b1|bool|[iu][1248]|f[248]|c8|c16|[SU]\d{1,6}'
    if type(given) is not str or not re.fullmatch(plain, given):
        raise _Unsupported(
            f'a NumPy array of type {shown(given)}; arrays of plain numbers are read, not of '
            'Python objects or records'
        )
    return np.dtype(given)


def _array(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """A view of the bytes `raw`; their number must be that of the shape."""
    if type(dtype) is not _DType or not _are_lengths(shape):
        raise _Unsupported(f'an array of shape {shown(shape)}')
    if order not in ('C', 'F'):
        raise _Unsupported(f'an array in the order {shown(order)}')
    if type(raw) is str:  # of Python 2
        raw = raw.encode('latin1')
    if type(raw) not in (bytes, bytearray):
        raise _Unsupported(f'an array whose content is {type(raw).__name__}')
    if math.prod(shape) * dtype.value.itemsize != len(raw):
        raise _Unsupported(
            f'an array of shape {list(shape)} and type {dtype.value} with {len(raw)} bytes'
        )
    # frombuffer refuses an empty buffer.
    out = np.frombuffer(raw, dtype.value) if raw else np.zeros(0, dtype.value)
    # A view of a bytearray is writable; one of bytes is not.
    out.flags.writeable = False
    return out.reshape(shape, order=order)


# ---- the functions that names stand for
def _empty_array(kind: Any, shape: Any, code: Any) -> _Array:
    """numpy's _reconstruct: BUILD fills it."""
    if type(kind) is not _Name or kind.name != 'numpy.ndarray':
        raise _Unsupported(f'an array of class {shown(kind)}')
    return _Array()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    """numpy's _frombuffer, protocol 5.

    order 'K': `shape` is that of the bytes as they lie, `axes` brings them into the array's order.
    """
    if order == 'K' and _are_lengths(axes):
        return _Array(_array(raw, dtype, shape, 'C').transpose(axes))
    return _Array(_array(raw, dtype, shape, order))


def _filled_array(empty: Any, args: Any, state: Any, *others: Any) -> _Array:
    """dill's and jax's: an array made and filled in one call.

    `others` (attributes, weak type) are ignored.
    """
    if type(empty) is not _Name or empty.make is not _empty_array:
        raise _Unsupported(f'an array made by {shown(empty)}')
    out = empty(*args)
    out.set_state(state)
    return out


def _scalar(dtype: Any, raw: Any = b'') -> _Array:
    # [()] makes a NumPy scalar of an array without axes.
    return _Array(_array(raw, dtype, (), 'C')[()])


class _Unhashed:
    """A mapping or a set, to be made once its keys are checked."""

    __slots__ = ('keys', 'make')

    def __init__(self, keys: list[Any], make: Callable[[], Any]) -> None:
        self.keys = keys
        self.make = make


def _mapping(*args: Any) -> Any:
    if not args:
        return _Mapping()
    (given,) = args
    # Keys of a mapping were checked when they were put into it.
    if type(given) in (dict, _Mapping):
        return _Mapping(given)
    if type(given) not in (list, tuple) or not all(_is_pair(item) for item in given):
        raise _Unsupported(f'a mapping of {shown(args)}')
    return _Unhashed([key for key, _ in given], functools.partial(_Mapping, given))


def _is_pair(item: Any) -> bool:
    return type(item) in (list, tuple) and len(item) == 2


def _latin1(text: Any, encoding: Any) -> bytes:
    """Bytes, as protocol 2 has them."""
    # Other codecs (zlib, rot13, …) are programs of their own.
    if type(text) is not str or encoding != 'latin1':
        raise _Unsupported(f'text in the encoding {shown(encoding)}')
    return text.encode('latin1')


def _dill_type(name: Any) -> _Name:
    """dill's _load_type: a type by the name it has in Python's `types` or builtins."""
    make = ADMITTED.get(f'builtins.{name}') if type(name) is str else None
    if make is None:
        raise _Unsupported(f'the type {shown(name)}, which is no plain container')
    return _Name(f'builtins.{name}', make)


def _constructor(kind: type, *sources: type) -> Callable:
    """A function that makes `kind` of nothing, or of one value of the types `sources`."""

    def make(*args: Any) -> Any:
        if len(args) > 1 or (args and type(args[0]) not in sources):
            raise _Unsupported(f'{kind.__name__} of {shown(args)}')
        if kind in (set, frozenset) and args:
            return _Unhashed(args[0], functools.partial(kind, args[0]))
        return kind(*args)

    return make


def _parameter(tensor: Any, *others: Any) -> Any:
    """PyTorch's _rebuild_parameter: the tensor; requires_grad and hooks are ignored."""
    return tensor


def _bfloat16() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def _torch_dtype(code: str) -> np.dtype:
    # NumPy knows no bfloat16 by name.
    return _bfloat16() if code == 'bfloat16' else np.dtype(code)


# Every name that a file may use -> what it stands for. What is not callable can only be passed on
# as an argument: as the class of an array, or as a type of numbers.
ADMITTED: dict[str, Any] = {
    'numpy.ndarray': 'a class',
    'numpy.dtype': _DType,
    'ml_dtypes.bfloat16': _bfloat16(),
    # numpy.core became numpy._core in NumPy 2.
    'numpy.core.multiarray._reconstruct': _empty_array,
    'numpy._core.multiarray._reconstruct': _empty_array,
    'numpy.core.multiarray.scalar': _scalar,
    'numpy._core.multiarray.scalar': _scalar,
    'numpy.core.numeric._frombuffer': _from_buffer,
    'numpy._core.numeric._frombuffer': _from_buffer,
    # dill.dill and jax._src.device_array: where older versions had them.
    'dill._dill._load_type': _dill_type,
    'dill._dill._create_array': _filled_array,
    'dill.dill._create_array': _filled_array,
    'jax._src.array._reconstruct_array': _filled_array,
    'jax._src.device_array.reconstruct_device_array': _filled_array,
    'collections.OrderedDict': _mapping,
    'flax.core.frozen_dict.FrozenDict': _mapping,
    # What Haiku's versions called their parameter trees.
    'haiku._src.data_structures.FlatMapping': _mapping,
    'haiku._src.data_structures.FlatMap': _mapping,
    'haiku._src.data_structures.frozendict': _mapping,
    'builtins.set': _constructor(set, list),
    'builtins.frozenset': _constructor(frozenset, list),
    'builtins.bytes': _constructor(bytes),
    'builtins.bytearray': _constructor(bytearray, bytes),
    '_codecs.encode': _latin1,
}
# Besides those, in PyTorch files alone.
TORCH: dict[str, Any] = {
    'torch._utils._rebuild_tensor_v2': _Tensor,
    'torch._utils._rebuild_tensor': _Tensor,
    'torch._utils._rebuild_parameter': _parameter,
    'torch.Size': _constructor(tuple, list, tuple),
    **{f'torch.{name}Storage': _torch_dtype(code) for name, code in TORCH_STORAGES.items()},
}


# ---- third pass: arrays in place of the stand-ins
def _converted(path: pathlib.Path, value: Any) -> Any:
    """The value with arrays in the place of their stand-ins."""
    with _errors_of(path):
        return _Converter(path).convert(value, 0)


class _Converter:
    """Makes plain values of loaded ones; what occurs twice is made once.

    Otherwise a list that holds another twice, and that one a third twice, and so on, would grow to
    2^depth elements.
    """

    UNFINISHED = object()

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        # id of the loaded value -> what was made of it. The ids stay valid because the loaded
        # value is alive as a whole until all of it is converted.
        self.made: dict[int, Any] = {}

    def convert(self, value: Any, depth: int) -> Any:
        if value is None or type(value) in (bool, int, float, str, bytes, bytearray):
            return value
        if id(value) in self.made:
            # Met again while still being made: a cycle.
            if self.made[id(value)] is self.UNFINISHED:
                raise Damaged(f'{self.path} holds a container that contains itself')
            return self.made[id(value)]
        if depth > DEEPEST:
            raise Damaged(
                f'{self.path} holds containers more than {DEEPEST} deep within each other'
            )
        self.made[id(value)] = self.UNFINISHED
        out = self._make(value, depth)
        self.made[id(value)] = out
        return out

    def _make(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            out = {}
            for key, item in value.items():
                new_key = self.convert(key, depth + 1)
                out[new_key] = self.convert(item, depth + 1)
            return out
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(self.convert(item, depth + 1) for item in value)
        # None: an array that was made empty and that BUILD never filled.
        if type(value) in (_Array, _DType) and value.value is not None:
            return value.value
        if type(value) is _Tensor:
            return value.array()
        raise Refused(f'{self.path}: expected values, got {shown(value)} itself')


# ---- PyTorch
def _read_torch_zip(path: pathlib.Path) -> Any:
    """Read a PyTorch file since 1.6: a zip of `data.pkl` and one file for each storage."""
    with _errors_of(path), zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        # All names of an archive begin with one folder, whose name varies.
        found = [name for name in entries if name == 'data.pkl' or name.endswith('/data.pkl')]
        if len(found) != 1:
            raise Damaged(
                f'{path}: expected a PyTorch file (torch.save), got a zip file without a data.pkl'
            )
        root = found[0].removesuffix('data.pkl')
        remaining = path.stat().st_size

        def content(name: str) -> bytes:
            nonlocal remaining
            entry = entries.get(root + name)
            if entry is None:
                raise Damaged(f'{path} lacks {escaped(root + name)}')
            # What is stored as it is cannot expand to more memory than the file has bytes, unless
            # several entries claim the same ones.
            remaining -= entry.file_size
            if entry.compress_type != zipfile.ZIP_STORED or remaining < 0:
                raise Damaged(
                    f'{path}: {escaped(root + name)} is compressed, or shares its bytes with '
                    'another entry; torch.save writes neither'
                )
            return archive.read(entry)

        # Older versions do not write it.
        if f'{root}byteorder' in entries and content('byteorder') != b'little':
            raise Damaged(f'{path} was written on a big-endian machine; save it on another one')
        storages: dict[str, _Storage] = {}
        value = _load_one(path, io.BytesIO(content('data.pkl')), storages)
        for key, storage in storages.items():
            storage.data = content(f'data/{key}')
            if len(storage.data) != storage.bytes:
                raise Damaged(
                    f'{path}: {escaped(f"{root}data/{key}")}: expected {storage.bytes} bytes, got '
                    f'{len(storage.data)}'
                )
        return _converted(path, value)


def _read_torch_legacy(path: pathlib.Path, data: mmap.mmap) -> Any:
    """Read a PyTorch file from before 1.6, after its magic number.

    Magic number, version, machine, object, list of storages as pickles one after the other; then
    the numbers of each storage.
    """
    version = _load_one(path, data)
    machine = _load_one(path, data)
    if (
        version != TORCH_VERSION
        or not isinstance(machine, dict)
        or not machine.get('little_endian', True)
    ):
        raise Damaged(
            f'{path}: expected a PyTorch file of version {TORCH_VERSION} of a little-endian '
            f'machine, got version {shown(version)} and machine {shown(machine)}'
        )
    storages: dict[str, _Storage] = {}
    value = _load_one(path, data, storages)
    keys = _load_one(path, data)
    if (
        type(keys) is not list
        or any(type(key) is not str for key in keys)
        or set(keys) != set(storages)
        or len(set(keys)) != len(keys)
    ):
        raise Damaged(f'{path}: its list of storages is not that of its tensors')
    for key in keys:
        storage = storages[key]
        # Each storage: the number of its elements in 8 bytes, then the elements.
        count = int.from_bytes(data.read(8), 'little')
        if count != storage.count or storage.bytes > len(data) - data.tell():
            raise Damaged(
                f'{path} ends within storage {shown(key)} of {storage.count} numbers; fetch it '
                'again'
            )
        storage.data = data.read(storage.bytes)
    if data.tell() != len(data):
        raise Damaged(f'{path}: {len(data) - data.tell()} bytes follow the last storage')
    return _converted(path, value)
