"""Runs of run.py that make the rows of a table, kept and continued, and what is read of them."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from support import repository


def train(folder: pathlib.Path, config: str, seed: int, fields: Sequence[str] = ()) -> None:
    """Makes or continues a run, and notes what it cost beside its results.

    Args:
      folder: of the run.
      config: what --config says.
      seed: of the run.
      fields: further flags.
    """
    # The runs differ in little, so most of what one compiles serves the next.
    cache = {'JAX_COMPILATION_CACHE_DIR': str(folder.parent / 'compiled')}
    command = [
        sys.executable,
        'run.py',
        f'--config={config}',
        f'--config.seed={seed}',
        f'--workdir={folder}',
        '--quiet',
        *fields,
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        subprocess.run(command, cwd=repository.ROOT, check=True, env=os.environ | cache)
    finally:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        cost = folder / 'cost.json'
        # Of all starts together.
        seconds += json.loads(cost.read_text())['cpu_seconds'] if cost.exists() else 0
        if folder.is_dir():
            cost.write_text(json.dumps({'cpu_seconds': round(seconds, 1)}))


def scores_of(results: pathlib.Path, names: Iterable[str]) -> dict[str, float]:
    """Those of the scores `evaluator/name` that an evaluation has."""
    evaluation = json.loads(results.read_text())
    scores = {}
    for score in names:
        evaluator, _, name = score.partition('/')
        scalars = evaluation.get(evaluator, {}).get('scalars', {})
        if name in scalars:
            scores[score] = scalars[name]
    return scores


def newest_results(run: pathlib.Path) -> pathlib.Path:
    """The results of a run's last evaluation."""
    return max((run / 'evals').glob('step_*/results.json'))


def origin_of(run: pathlib.Path) -> dict[str, str]:
    """Of which code and when a finished run is."""
    return {
        'commit': json.loads((run / 'provenance.json').read_text())['commit'],
        'date': datetime.date.fromtimestamp((run / 'done.json').stat().st_mtime).isoformat(),
    }


def cell(values: Sequence[float]) -> str:
    """Percent: the mean ± half of the range."""
    if not values:
        return '–'
    mean = 100 * statistics.mean(values)
    if len(values) == 1:
        return f'{mean:.1f}'
    return f'{mean:.1f} ± {50 * (max(values) - min(values)):.1f}'


def earlier(results: pathlib.Path, steps: int) -> list[dict[str, Any]]:
    """Entries of a result file, of runs as long as those of today."""
    if not results.exists():
        return []
    found = json.loads(results.read_text())
    return found['entries'] if found['steps'] == steps else []


def write(results: pathlib.Path, steps: int, entries: list[dict[str, Any]]) -> None:
    """Writes a result file with these entries, in their order."""
    found = {'hardware': f'{os.cpu_count()} CPU cores', 'steps': steps, 'entries': entries}
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(found, indent=1) + '\n')


def print_table(entries: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """A line for each row: means over seeds, and how far the seeds are apart.

    Args:
        entries: with `row` and `scores`, some with `cpu_seconds`.
        columns: title of a column -> its score.
    """
    print(f'| row | seeds | {" | ".join(columns)} | CPU s |')
    print('|---' * (len(columns) + 3) + '|')
    for row in dict.fromkeys(entry['row'] for entry in entries):
        of_row = [entry for entry in entries if entry['row'] == row]
        cells = []
        for score in columns.values():
            values = [entry['scores'][score] for entry in of_row if score in entry['scores']]
            cells.append(cell(values))
        seconds = [entry['cpu_seconds'] for entry in of_row if 'cpu_seconds' in entry]
        cells.append(f'{statistics.mean(seconds):.0f}' if seconds else '')
        print(f'| {row} | {len(of_row)} | {" | ".join(cells)} |')
