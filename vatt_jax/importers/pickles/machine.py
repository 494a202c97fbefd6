"""The machine that executes the opcodes of a pickle, on stand-ins alone.

Not Python's unpickler, which hashes and compares whatever a file asks it to: tuples nested deep
enough end the process, and tuples that hold each other twice keep it busy for ever.
"""

from __future__ import annotations

import io
import mmap
import pathlib
import pickle
import pickletools
from collections.abc import Iterator
from typing import IO, Any, cast

import numpy as np

from vatt_jax.importers.messages import escaped, shown
from vatt_jax.importers.pickles.errors import Damaged, Refused, Unsupported, errors_of, one_line
from vatt_jax.importers.pickles.names import ADMITTED, TORCH
from vatt_jax.importers.pickles.stand_ins import (
    LONGEST_AXIS,
    Array,
    DType,
    Fixed,
    Mapping,
    Module,
    Name,
    Storage,
    Unhashed,
)

# Opcodes that put their own argument on the stack.
LITERALS = frozenset(
    """BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8""".split()
)
CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
# What protocols 2 to 5 need for arrays and containers. Left out, among others: EXT1… (names by
# number, from a registry of the process), INST, OBJ and NEWOBJ (make instances of classes; modules
# of TorchScript alone use NEWOBJ), PERSID (names of things outside the file; PyTorch's storages
# alone use BINPERSID).
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
# What the names of TorchScript's classes begin with.
TORCHSCRIPT = '__torch__.'
# Bounds far above what checkpoints need, so that no value costs more than its bytes in the file.
MOST_BITS = 2048  # of an integer
# Bytes of an argument that ends with its line.
MOST_LINE = 1 << 16
OPCODE_OF = {opcode.code: opcode for opcode in pickletools.opcodes}
LONGEST_KEY = 4096  # characters of a name in a mapping or a set
MOST_KEY_PARTS = 16  # of a tuple that is a key
# Hashes of tuples can be made to collide, and n keys of one hash take n² comparisons.
MOST_TUPLE_KEYS = 4096
# Calls that copy their arguments may copy so many times the bytes of the file in all.
MOST_COPIES = 4
FREE_COPIES = 1 << 20  # bytes, whatever the size of the file
ELEMENT_BYTES = 16  # that an element of a container counts for


def load_one(
    path: pathlib.Path,
    data: mmap.mmap | io.BytesIO,
    storages: dict[str, Storage] | None = None,
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
    with errors_of(path):
        return Machine(path, data, storages).run()


class Machine:
    """Executes one pickle: a stack, marks on it, and a memo of values to refer back to.

    Names of the file mean entries of ADMITTED and TORCH, nothing else.
    """

    def __init__(
        self,
        path: pathlib.Path,
        data: mmap.mmap | io.BytesIO,
        storages: dict[str, Storage] | None,
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
                f'{self.path} is not a whole pickle: after {last}, {one_line(error)}; fetch the '
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
        is_torch = name in ('BINPERSID', 'NEWOBJ') and self.storages is not None
        if name not in OPCODES and not is_torch:
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
        elif name == 'NEWOBJ':
            stack.append(self._module())
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
            self._target(dict, Mapping).update(zip(keys, items[1::2], strict=True))
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
            raise Unsupported(f'items put into {shown(self.stack[-1])}')
        return self.stack[-1]

    def _check_keys(self, keys: list[Any]) -> None:
        """Check what is about to be hashed: plain values, or a flat tuple of them."""
        for key in keys:
            if type(key) is tuple:
                self.tuple_keys += 1
                if len(key) > MOST_KEY_PARTS or not all(_is_plain_key(part) for part in key):
                    raise Unsupported(f'{shown(key)} as a key; names and numbers are read')
            elif not _is_plain_key(key):
                raise Unsupported(f'{shown(key)} as a key; names and numbers are read')
        if self.tuple_keys > MOST_TUPLE_KEYS:
            raise Unsupported(f'more than {MOST_TUPLE_KEYS} tuples as keys')

    def _name(self, argument: str | None) -> Name:
        """What a name stands for: of GLOBAL's argument, or of the two strings on the stack."""
        # Never Python's own look-up: it imports the module.
        if argument is None:
            module, name = self._pop_last(2)
        else:
            module, _, name = argument.partition(' ')
        if type(module) is not str or type(name) is not str:
            raise Unsupported(f'the name {shown(module)}.{shown(name)}')
        table = ADMITTED if self.storages is None else ADMITTED | TORCH
        if module == '__builtin__':  # protocol 2 has the names of Python 2
            module = 'builtins'
        make = table.get(f'{module}.{name}')
        # The classes of a TorchScript archive: their code lies in it, and is not looked at.
        if self.storages is not None and f'{module}.'.startswith(TORCHSCRIPT):
            make = Module
        if make is None:
            raise Refused(
                f'{self.path} refers to {escaped(module, 80)}.{escaped(name, 80)}, which is '
                'neither an array nor a plain container; it was not run, and nothing of the file '
                'was used'
            )
        return Name(f'{module}.{name}', make)

    def _call(self) -> Any:
        function, arguments = self._pop_last(2)
        if type(function) is not Name or type(arguments) is not tuple:
            raise Unsupported(f'a call of {shown(function)} with {shown(arguments)}')
        self._count_copies(arguments)
        made = function(*arguments)
        # The only functions that hash what they are given.
        if type(made) is Unhashed:
            self._check_keys(made.keys)
            made = made.make()
        return made

    def _module(self) -> Module:
        """A module of TorchScript, without its attributes."""
        kind, arguments = self._pop_last(2)
        if type(kind) is not Name or kind.make is not Module or arguments != ():
            raise Unsupported(f'an instance of {shown(kind)} with {shown(arguments)}')
        return Module()

    def _build(self) -> None:
        state = self.stack.pop()
        value = self.stack[-1]
        if not isinstance(value, (Fixed, Mapping, Module, DType, Array)):
            raise Unsupported(f'{shown(value)} with a state')
        self._count_copies(state)
        value.set_state(state)

    def _count_copies(self, value: Any, depth: int = 2) -> None:
        """Count what a call may copy: a few bytes could have a large value copied many times."""
        if type(value) in (str, bytes, bytearray):
            self.copied += len(value)
        elif type(value) in (list, tuple, dict, Mapping):
            self.copied += ELEMENT_BYTES * len(value)
        if self.copied > FREE_COPIES + MOST_COPIES * self.size:
            raise Unsupported('values that are copied many times over')
        # Arguments of a call within those of another one.
        if type(value) is tuple and depth:
            for item in value:
                self._count_copies(item, depth - 1)

    def _storage(self, reference: Any) -> Storage:
        """The PyTorch storage that a reference out of the pickle means."""
        assert self.storages is not None  # else BINPERSID is refused
        if not _is_storage_id(reference):
            raise Refused(f'{self.path}: expected a PyTorch storage, got {shown(reference)}')
        key, dtype, count = reference[2], reference[1].make, reference[4]
        # Tensors may be views of one storage; each of them refers to it.
        storage = self.storages.setdefault(key, Storage(dtype, count))
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
    if type(key) is Array:
        return isinstance(key.value, np.generic) and key.value.nbytes <= LONGEST_KEY
    return key is None or type(key) in (bool, float)


def _is_storage_id(pid: Any) -> bool:
    """Whether it is ('storage', type, key, device, number of elements[, None])."""
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != 'storage':
        return False
    kind, key, count = pid[1], pid[2], pid[4]
    if type(kind) is not Name or not isinstance(kind.make, np.dtype):
        return False
    if type(key) is not str or len(key) > LONGEST_KEY:
        return False
    if type(count) is not int or not 0 <= count < LONGEST_AXIS:
        return False
    # The sixth, of files before 1.6, describes a view of a storage; PyTorch has long written None.
    return len(pid) == 5 or pid[5] is None
