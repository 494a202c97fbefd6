"""Stand-ins: all that the machine of pickles ever calls or changes.

They put arrays together from what a file holds. Opcode BUILD calls `set_state`. Types are compared
exactly (`type(x) is …`) so that no subclass passes. Arguments come from the file and may be
anything: hence `Any`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from vatt_jax.importers.messages import shown
from vatt_jax.importers.pickles.errors import Unsupported

MOST_AXES = 32  # of an array, each shorter than LONGEST_AXIS
LONGEST_AXIS = 1 << 48


class Fixed:
    """A stand-in that opcode BUILD cannot change."""

    __slots__ = ()

    def set_state(self, state: Any) -> None:
        raise Unsupported(f'a {type(self).__name__.lower()} with a state')


class Name(Fixed):
    """What a name of the file stands for. It may be called if `make` is a function."""

    __slots__ = ('name', 'make')

    def __init__(self, name: str, make: Any) -> None:
        self.name = name
        self.make = make

    def __call__(self, *args: Any) -> Any:
        if not callable(self.make):
            raise Unsupported(f'{self.name} is called')
        return self.make(*args)

    def described(self) -> str:
        """The name, for errors."""
        return self.name


class Mapping(dict):
    """A dict of some other class; attributes that its instances may carry are passed over."""

    __slots__ = ()

    def set_state(self, state: Any) -> None:
        pass


class Module(dict):
    """A module of a TorchScript archive: its attributes by name, tensors and modules among them."""

    __slots__ = ()

    def set_state(self, state: Any) -> None:
        # Keys of a dict were checked when they were put into it.
        if type(state) is not dict or self:
            raise Unsupported(f'a module with the state {shown(state)}')
        self.update(state)


class DType:
    """A NumPy type. BUILD sets its byte order."""

    __slots__ = ('value',)

    def __init__(self, given: Any, align: Any = False, copy: Any = True) -> None:
        # ml_dtypes' types are named by the file, NumPy's are strings.
        if type(given) is Name and isinstance(given.make, np.dtype):
            self.value = given.make
        else:
            self.value = _plain_dtype(given)

    def set_state(self, state: Any) -> None:
        # (version, byte order, subarray, field names, fields, …): the three are None for numbers.
        _, order, *rest = state
        if order not in ('<', '>', '|', '=') or any(part is not None for part in rest[:3]):
            raise Unsupported(
                f'a NumPy type with the state {shown(state)}; arrays of numbers are read'
            )
        if order in '<>':
            self.value = self.value.newbyteorder(order)


class Array:
    """An array or a scalar. BUILD fills it where it was made empty."""

    __slots__ = ('value',)

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def set_state(self, state: Any) -> None:
        # NumPy's state is ([version,] shape, dtype, is Fortran order, bytes).
        shape, dtype, fortran, raw = state if len(state) == 4 else state[1:]
        order = 'F' if fortran else 'C'
        self.value = make_array(raw, dtype, shape, order)


class Storage(Fixed):
    """A storage of PyTorch: `count` numbers, which follow elsewhere in the file."""

    __slots__ = ('dtype', 'count', 'data')

    def __init__(self, dtype: np.dtype, count: int) -> None:
        self.dtype = dtype
        self.count = count
        self.data = b''  # filled when the pickle that refers to it has been loaded

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * self.count


class Tensor(Fixed):
    """A view of a storage. Offset and strides count elements, not bytes."""

    __slots__ = ('storage', 'offset', 'shape', 'strides')

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *others: Any) -> None:
        # `others`: requires_grad, hooks, metadata.
        if (
            type(storage) is not Storage
            or not are_lengths((offset,))
            or not are_lengths(shape)
            or not are_lengths(strides)
            or len(shape) != len(strides)
        ):
            raise Unsupported(
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
            raise Unsupported(
                f'a tensor of shape {list(self.shape)} at {self.offset} of a storage of '
                f'{storage.count} numbers'
            )
        elements = np.frombuffer(storage.data, storage.dtype)[self.offset :]
        byte_strides = [stride * storage.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(elements, self.shape, byte_strides, writeable=False)


def are_lengths(numbers: Any) -> bool:
    """Whether this can be a shape: products of such numbers are computed at no cost."""
    if type(numbers) is not tuple or len(numbers) > MOST_AXES:
        return False
    return all(type(n) is int and 0 <= n < LONGEST_AXIS for n in numbers)


def _plain_dtype(given: Any) -> np.dtype:
    """A NumPy type of plain numbers or text, by its name."""
    # Not np.dtype(given) at once: it also takes records and 'O', pointers to Python objects.
    plain = r'b1|bool|[iu][1248]|f[248]|c8|c16|[SU]\d{1,6}'
    if type(given) is not str or not re.fullmatch(plain, given):
        raise Unsupported(
            f'a NumPy array of type {shown(given)}; arrays of plain numbers are read, not of '
            'Python objects or records'
        )
    return np.dtype(given)


def make_array(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """A view of the bytes `raw`; their number must be that of the shape."""
    if type(dtype) is not DType or not are_lengths(shape):
        raise Unsupported(f'an array of shape {shown(shape)}')
    if order not in ('C', 'F'):
        raise Unsupported(f'an array in the order {shown(order)}')
    if type(raw) is str:  # of Python 2
        raw = raw.encode('latin1')
    if type(raw) not in (bytes, bytearray):
        raise Unsupported(f'an array whose content is {type(raw).__name__}')
    if math.prod(shape) * dtype.value.itemsize != len(raw):
        raise Unsupported(
            f'an array of shape {list(shape)} and type {dtype.value} with {len(raw)} bytes'
        )
    # frombuffer refuses an empty buffer.
    out = np.frombuffer(raw, dtype.value) if raw else np.zeros(0, dtype.value)
    # A view of a bytearray is writable; one of bytes is not.
    out.flags.writeable = False
    return out.reshape(shape, order=order)


class Unhashed:
    """A mapping or a set, to be made once its keys are checked."""

    __slots__ = ('keys', 'make')

    def __init__(self, keys: list[Any], make: Callable[[], Any]) -> None:
        self.keys = keys
        self.make = make
