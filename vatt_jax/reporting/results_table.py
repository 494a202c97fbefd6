"""The table of results: every evaluated number beside its interval, its baselines and chance."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence

from vatt_jax.evals import Result
from vatt_jax.reporting.finished_run import FinishedRun

ABSENT = '–'
# A header, and rows of as many cells.
Table = tuple[list[str], list[list[str]]]


def rows(run: FinishedRun, beside: Sequence[FinishedRun] = ()) -> Table:
    """Header and rows of the results table.

    Shown is every scalar that has an interval or a chance level, or that its evaluator names in the
    artifact `shown`.

    Args:
        run: whose results they are.
        beside: further runs, one column each.
    """
    header = ['', 'pretrained', '95 % interval']
    header += [other.name for other in beside]
    header += ['random init', 'chance']
    body = []
    for evaluator, result in run.results.items():
        shown = [key for key in result.scalars if _is_shown(key, result)]
        for key in shown:
            form = form_of(key)
            others = [_cell(other.results, evaluator, key, form) for other in beside]
            body.append(
                [
                    label_of(evaluator, key, is_only_one=len(shown) == 1)
                    + _note(result.artifacts.get(f'{key}/chance'), key),
                    form(result.scalars[key]),
                    _interval(result, key, form),
                    *others,
                    _cell(run.baseline, evaluator, key, form),
                    _chance(result, key, form),
                ]
            )
    return header, body


def table(
    workdir: str | os.PathLike, others: Sequence[str | os.PathLike] = (), width: int = 0
) -> str:
    """The results table as text.

    Args:
        workdir: the run folder.
        others: further run folders, one column each.
        width: of the table, in characters; 0: what its columns need.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table as TextTable

    header, body = rows(FinishedRun(workdir), [FinishedRun(other) for other in others])
    drawn = TextTable(box=box.SIMPLE_HEAD)
    # no_wrap: a name over two lines would read as two rows.
    drawn.add_column(header[0], justify='left', no_wrap=True)
    for name in header[1:]:
        drawn.add_column(name, justify='right')
    for row in body:
        drawn.add_row(*row)
    # Into a string with a width of its own: the terminal's would wrap rows, and a file has none.
    text = io.StringIO()
    # Names of runs and evaluators are text, not rich's [styles] and :pictures:.
    console = Console(file=text, width=width or 110 + 16 * len(others), markup=False, emoji=False)
    console.print(drawn)
    return text.getvalue().rstrip()


def _is_shown(key: str, result: Result) -> bool:
    if key in result.artifacts.get('shown', ()):
        return True
    return f'{key}/interval' in result.artifacts or f'{key}/chance' in result.artifacts


def _cell(
    results: Mapping[str, Result], evaluator: str, key: str, form: Callable[[float], str]
) -> str:
    # Runs may have been evaluated by other evaluators.
    if evaluator not in results or key not in results[evaluator].scalars:
        return ABSENT
    return form(results[evaluator].scalars[key])


def _interval(result: Result, key: str, form: Callable[[float], str]) -> str:
    interval = result.artifacts.get(f'{key}/interval')
    return ABSENT if interval is None else f'{form(interval[0])} … {form(interval[1])}'


def _chance(result: Result, key: str, form: Callable[[float], str]) -> str:
    chance = result.artifacts.get(f'{key}/chance')
    return ABSENT if chance is None else form(chance)


def _note(chance: float | None, key: str) -> str:
    """What a reader must know of a number that cannot be anything else."""
    # R@10 of three clips.
    if 'R@' in key and chance is not None and chance >= 1:
        return ' (too few clips to be wrong)'
    return ''


def label_of(evaluator: str, key: str, is_only_one: bool) -> str:
    """'retrieval', 'text_to_video/R@10' -> 'retrieval text → video R@10'."""
    *pair, last = key.split('/')
    parts = [part.replace('_to_', ' → ') for part in pair]
    words = ' '.join([evaluator, *parts]).replace('_', ' ')
    # Saying "accuracy" in each row would only widen the table.
    if last == 'accuracy' and is_only_one:
        return words
    return f'{words} {last.replace("_", " ")}'


def form_of(key: str) -> Callable[[float], str]:
    """How a scalar of this name is written."""
    # Median and mean rank, in clips.
    if 'rank' in key:
        return _number
    # Natural logarithms.
    if 'entropy' in key:
        return _nats
    # Its largest value is 10; papers print it a hundredfold.
    if 'CIDEr' in key:
        return _hundredfold
    # Recalls, accuracies and NMI, from 0 to 1.
    return _percent


def _percent(x: float) -> str:
    return f'{100 * x:.1f} %'


def _hundredfold(x: float) -> str:
    return f'{100 * x:.1f}'


def _number(x: float) -> str:
    return f'{x:.1f}'


def _nats(x: float) -> str:
    return f'{x:.2f} nats'
