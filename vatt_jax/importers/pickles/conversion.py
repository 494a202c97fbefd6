"""Arrays and plain values in place of the stand-ins of a loaded pickle."""

from __future__ import annotations

import pathlib
from typing import Any

from vatt_jax.importers.messages import shown
from vatt_jax.importers.pickles.errors import Damaged, Refused, errors_of
from vatt_jax.importers.pickles.stand_ins import Array, DType, Tensor

DEEPEST = 64  # containers within containers


def converted(path: pathlib.Path, value: Any) -> Any:
    """The value with arrays in the place of their stand-ins."""
    with errors_of(path):
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
        if type(value) in (Array, DType) and value.value is not None:
            return value.value
        if type(value) is Tensor:
            return value.array()
        raise Refused(f'{self.path}: expected values, got {shown(value)} itself')
