"""What a pickle may name: every name, and the function or type that stands for it here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from vatt_jax.importers.messages import shown
from vatt_jax.importers.pickles.errors import Unsupported
from vatt_jax.importers.pickles.stand_ins import (
    Array,
    DType,
    Mapping,
    Name,
    Tensor,
    Unhashed,
    are_lengths,
    make_array,
)

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


def _empty_array(kind: Any, shape: Any, code: Any) -> Array:
    """numpy's _reconstruct: BUILD fills it."""
    if type(kind) is not Name or kind.name != 'numpy.ndarray':
        raise Unsupported(f'an array of class {shown(kind)}')
    return Array()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Array:
    """numpy's _frombuffer, protocol 5.

    order 'K': `shape` is that of the bytes as they lie, `axes` brings them into the array's order.
    """
    if order == 'K' and are_lengths(axes):
        return Array(make_array(raw, dtype, shape, 'C').transpose(axes))
    return Array(make_array(raw, dtype, shape, order))


def _filled_array(empty: Any, args: Any, state: Any, *others: Any) -> Array:
    """dill's and jax's: an array made and filled in one call.

    `others` (attributes, weak type) are ignored.
    """
    if type(empty) is not Name or empty.make is not _empty_array:
        raise Unsupported(f'an array made by {shown(empty)}')
    out = empty(*args)
    out.set_state(state)
    return out


def _scalar(dtype: Any, raw: Any = b'') -> Array:
    # [()] makes a NumPy scalar of an array without axes.
    return Array(make_array(raw, dtype, (), 'C')[()])


def _mapping(*args: Any) -> Any:
    if not args:
        return Mapping()
    (given,) = args
    # Keys of a mapping were checked when they were put into it.
    if type(given) in (dict, Mapping):
        return Mapping(given)
    if type(given) not in (list, tuple) or not all(_is_pair(item) for item in given):
        raise Unsupported(f'a mapping of {shown(args)}')
    return Unhashed([key for key, _ in given], functools.partial(Mapping, given))


def _is_pair(item: Any) -> bool:
    return type(item) in (list, tuple) and len(item) == 2


def _latin1(text: Any, encoding: Any) -> bytes:
    """Bytes, as protocol 2 has them."""
    # Other codecs (zlib, rot13, …) are programs of their own.
    if type(text) is not str or encoding != 'latin1':
        raise Unsupported(f'text in the encoding {shown(encoding)}')
    return text.encode('latin1')


def _dill_type(name: Any) -> Name:
    """dill's _load_type: a type by the name it has in Python's `types` or builtins."""
    make = ADMITTED.get(f'builtins.{name}') if type(name) is str else None
    if make is None:
        raise Unsupported(f'the type {shown(name)}, which is no plain container')
    return Name(f'builtins.{name}', make)


def _constructor(kind: type, *sources: type) -> Callable:
    """A function that makes `kind` of nothing, or of one value of the types `sources`."""

    def make(*args: Any) -> Any:
        if len(args) > 1 or (args and type(args[0]) not in sources):
            raise Unsupported(f'{kind.__name__} of {shown(args)}')
        if kind in (set, frozenset) and args:
            return Unhashed(args[0], functools.partial(kind, args[0]))
        return kind(*args)

    return make


def _parameter(tensor: Any, *others: Any) -> Any:
    """The first argument: PyTorch's _rebuild_parameter and restore_type_tag.

    requires_grad, hooks and the names of types are ignored.
    """
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
    'numpy.dtype': DType,
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
    'torch._utils._rebuild_tensor_v2': Tensor,
    'torch._utils._rebuild_tensor': Tensor,
    'torch._utils._rebuild_parameter': _parameter,
    'torch.Size': _constructor(tuple, list, tuple),
    # Lists and tagged values of TorchScript archives.
    'torch.jit._pickle.build_intlist': _constructor(list, list),
    'torch.jit._pickle.build_doublelist': _constructor(list, list),
    'torch.jit._pickle.build_boollist': _constructor(list, list),
    'torch.jit._pickle.build_tensorlist': _constructor(list, list),
    'torch.jit._pickle.restore_type_tag': _parameter,
    **{f'torch.{name}Storage': _torch_dtype(code) for name, code in TORCH_STORAGES.items()},
}
