"""What users are told while their inputs are encoded: warnings and a progress bar."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import rich.console
import rich.progress


def warn(message: str) -> None:
    """Warns with the line of the user's own code."""
    frame: Any = sys._getframe()
    level = 1
    while frame.f_back and frame.f_globals.get('__name__', '').startswith('vatt_jax'):
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)


class Notices:
    """Warnings of which each kind is given once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, key: str, message: str) -> None:
        """Warns, unless there was a warning of this key before."""
        if key not in self._told:
            self._told.add(key)
            warn(message)

    def clear(self) -> None:
        """Forgets what was told."""
        self._told.clear()


def summary(errors: Sequence[str], count: int) -> str:
    """The warning of items that were left out: how many of `count`, and the first reasons."""
    more = '' if len(errors) <= 3 else ', …'
    return f'{len(errors)} of {count} items were left out: {"; ".join(errors[:3])}{more}'


@contextlib.contextmanager
def progress_bar(count: int, has_windows: bool, is_shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar of `count` items; yields what is called with the number of the item under way."""
    console = rich.console.Console(stderr=True)
    is_terminal = console.is_terminal or console.is_jupyter
    if not (is_shown and is_terminal and (count > 1 or has_windows)):
        yield lambda number: None
        return
    progress = rich.progress.Progress(
        rich.progress.TextColumn('{task.completed:.0f}/{task.total:.0f} files'),
        rich.progress.BarColumn(),
        rich.progress.TextColumn('{task.fields[windows]} windows'),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with progress:
        task = progress.add_task('', total=count, windows=0)
        num_windows = 0

        def advance(number: int) -> None:
            nonlocal num_windows
            num_windows += 1
            progress.update(task, completed=number, windows=num_windows)

        yield advance
