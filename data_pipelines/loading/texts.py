"""What the data say in words of the examples of a pass, made when it is looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex, overload


class Texts(Sequence[dict[str, Any]]):
    """Entries of examples by their place in a pass, like a list of them.

    A list of a hundred million dicts would take some hundred GB, and who asks looks at a few. So an
    entry is made each time it is asked for, a slice is a view, and the length is known without any.
    """

    def __init__(self, places: range, entry: Callable[[int], dict[str, Any]]):
        """See the class.

        Args:
          places: of the examples in the pass.
          entry: place of an example -> its entry.
        """
        self._places = places
        self._entry = entry

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, i: SupportsIndex) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, i: slice) -> Texts: ...

    def __getitem__(self, i: SupportsIndex | slice) -> dict[str, Any] | Texts:
        if isinstance(i, slice):
            return Texts(self._places[i], self._entry)
        return self._entry(self._places[i])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        if len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other))

    def __repr__(self) -> str:
        return f'Texts of {len(self)} examples'
