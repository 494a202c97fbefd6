"""What `prepare` shows on the terminal: messages, a progress bar and the closing tables."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vatt_jax.terminal import printable, use_plain_characters

_COUNTS = ('records', 'segments', 'sentences', 'hours', 'without_audio', 'without_video')

# Columns of a terminal that does not say how many it has, and that the table of splits needs.
_USUAL_WIDTH = 80
_TABLE_WIDTH = 60


class Console:
    """Prints to the terminal through rich, or prints nothing if `quiet`.

    rich is imported by the methods that need it, because worker processes import this module
    along with the command and never print.
    """

    def __init__(self, quiet: bool):
        from rich.console import Console as RichConsole

        use_plain_characters()
        # File names are text: neither [brackets] nor :words: in them mean styles and pictures.
        # Without highlighting, which colours every number and path.
        self.console = RichConsole(quiet=quiet, highlight=False, markup=False, emoji=False)
        if self.console.width < 1:
            # COLUMNS=0, as editors and containers have it: nothing at all would be printed.
            self.console.width = _USUAL_WIDTH

    def __call__(self, text: str) -> None:
        """Print one line."""
        # Not wrapped at the width of the terminal, so that commands can be copied whole.
        self.console.print(printable(text), soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, total: int, done: int) -> Iterator[Callable[[], None]]:
        """Show a progress bar while the context is open.

        Args:
            total: number of files.
            done: number of files that were finished by an earlier run.

        Yields:
            A function to call after each file.
        """
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        # Files, not bytes or seconds: the length of a file is unknown before it is decoded.
        with Progress(
            TextColumn('decoding'),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn('left'),
            TimeRemainingColumn(),
            # The same console, so that --quiet silences the bar and messages scroll above it.
            console=self.console,
        ) as progress_bar:
            # Files of an earlier run count as done from the start.
            task = progress_bar.add_task('', total=total, completed=done)

            def advance() -> None:
                progress_bar.advance(task)

            yield advance

    def summary(
        self, target: pathlib.Path | str, summary: Mapping[str, Any], unknown_names: list[str]
    ) -> None:
        """Print the tables of splits and of skipped files.

        Args:
            target: folder or URL of the prepared dataset.
            summary: as returned by `prepare`.
            unknown_names: names in captions or annotations that no media file answers to.
        """
        self._print_splits(target, summary['splits'])
        if summary['skipped']:
            self._print_skipped(summary['skipped'])
        if unknown_names:
            self(
                f'{len(unknown_names)} names in captions or annotations have no file here, or '
                f'several, for example {unknown_names[0]!r}.'
            )
        self(f'done in {summary["seconds"]} s.')

    def _print_splits(
        self, target: pathlib.Path | str, splits: Mapping[str, Mapping[str, Any]]
    ) -> None:
        from rich.table import Table

        table = Table(title=printable(str(target)), title_justify='left')
        table.add_column('')
        # One column a split: narrow, whatever is counted.
        for split in splits:
            table.add_column(split, justify='right', overflow='fold')
        for count in _COUNTS:
            values = [str(counts[count]) for counts in splits.values()]
            table.add_row(count.replace('_', ' '), *values)
        # On a narrow terminal the lines of the table wrap, but no number is cut off.
        width = self.console.width
        self.console.width = max(width, _TABLE_WIDTH)
        self.console.print(table)
        self.console.width = width

    def _print_skipped(self, skipped: Mapping[str, str]) -> None:
        # 'corrupt: …' and 'corrupt: …' are one kind of reason: what follows the colon differs
        # from file to file.
        files_by_reason: dict[str, list[str]] = {}
        for file_id, reason in skipped.items():
            kind = reason.split(':')[0]
            files_by_reason.setdefault(kind, []).append(file_id)

        self(f'skipped: {len(skipped)} (all of them in skipped.json)')
        # The most frequent reason first.
        for kind in sorted(files_by_reason, key=lambda kind: -len(files_by_reason[kind])):
            file_ids = files_by_reason[kind]
            example = file_ids[0]
            self(f'  {kind}: {len(file_ids)}, for example {example} ({skipped[example]})')
