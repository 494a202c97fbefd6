"""What does each objective learn from the same videos, with the same towers, in the same steps?

    # some hours of two CPU cores
    python benchmarks/objectives.py
    # some of the rows
    python benchmarks/objectives.py --only=gdt_h1,gdt_h6 --seeds=0

Every row of configs/comparison.py, with every seed. A run is kept in --runs and not repeated when
it is finished; one that was stopped goes on. Rows of two stages give a result for each network.
Writes benchmarks/results/objectives.json after each run, in which rows and seeds that were not
asked for stay as they are, and prints its table. CPU seconds are those of the whole run: reading,
compiling, training and evaluation.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from support import repository

from configs import comparison

RESULTS = repository.RESULTS / 'objectives.json'
# Column of the table -> the score that it shows.
COLUMNS = {
    'probe, video': 'probe_video/accuracy',
    'probe, audio': 'probe_audio/accuracy',
    'probe, flow': 'probe_flow/accuracy',
    'NN@1, video': 'neighbours_video/R@1',
    'NN@1, audio': 'neighbours_audio/R@1',
    'NN@1, flow': 'neighbours_flow/R@1',
    'audio → video, R@10': 'retrieval/audio_to_video/R@10',
    'synchrony': 'sync/accuracy',
}
RANDOM = {'vatt': 'random VATT', 'mmv': 'random towers'}


def train(folder: pathlib.Path, row: str, seed: int) -> None:
    """Makes or continues a run, and notes what it cost beside its results."""
    # The runs differ in little, so most of what one compiles serves the next.
    cache = {'JAX_COMPILATION_CACHE_DIR': str(folder.parent / 'compiled')}
    command = [
        sys.executable,
        'run.py',
        f'--config=configs/comparison.py:{row}',
        f'--config.seed={seed}',
        f'--workdir={folder}',
        '--quiet',
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=repository.ROOT, check=True, env=os.environ | cache)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    cost = folder / 'cost.json'
    # Of all starts together.
    seconds += json.loads(cost.read_text())['cpu_seconds'] if cost.exists() else 0
    cost.write_text(json.dumps({'cpu_seconds': round(seconds, 1)}))


def scores_of(results: pathlib.Path) -> dict[str, float]:
    """The scores of COLUMNS that an evaluation has."""
    evaluation = json.loads(results.read_text())
    scores = {}
    for score in COLUMNS.values():
        evaluator, _, name = score.partition('/')
        scalars = evaluation.get(evaluator, {}).get('scalars', {})
        if name in scalars:
            scores[score] = scalars[name]
    return scores


def entries(row: str, seed: int, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a finished run: an entry for it, for each of its phases, and for random values."""
    phases = sorted((folder / 'phases').glob('*'))
    found = []
    for run in phases or [folder]:
        name = f'{row}: {run.name[2:]}' if phases else row
        newest = max((run / 'evals').glob('step_*/results.json'))
        found.append({'row': name, 'seed': seed, 'scores': scores_of(newest)} | origin_of(run))
    cost = folder / 'cost.json'
    if cost.exists():
        found[-1].update(json.loads(cost.read_text()))
    random = folder / 'evals' / 'random_init' / 'results.json'
    if random.exists():
        scores = scores_of(random)
        found.append({'row': RANDOM[row], 'seed': seed, 'scores': scores} | origin_of(folder))
    return found


def origin_of(run: pathlib.Path) -> dict[str, str]:
    """Of which code and when a finished run is."""
    return {
        'commit': json.loads((run / 'provenance.json').read_text())['commit'],
        'date': datetime.date.fromtimestamp((run / 'done.json').stat().st_mtime).isoformat(),
    }


def earlier() -> list[dict[str, Any]]:
    """Entries of the result file, of runs as long as those of today."""
    if not RESULTS.exists():
        return []
    results = json.loads(RESULTS.read_text())
    return results['entries'] if results['steps'] == comparison.STEPS else []


def write(found: list[dict[str, Any]]) -> None:
    """Writes the result file with these entries, in the order of the table."""
    methods = [*RANDOM.values(), *comparison.METHODS]
    found.sort(key=lambda entry: (methods.index(entry['row'].partition(':')[0]), entry['seed']))
    results = {
        'hardware': f'{os.cpu_count()} CPU cores',
        'steps': comparison.STEPS,
        'entries': found,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')


def print_table(found: list[dict[str, Any]]) -> None:
    """A line for each row: means over seeds, and how far the seeds are apart."""
    print(f'| row | seeds | {" | ".join(COLUMNS)} | CPU s |')
    print('|---' * (len(COLUMNS) + 3) + '|')
    for row in dict.fromkeys(entry['row'] for entry in found):
        of_row = [entry for entry in found if entry['row'] == row]
        cells = []
        for score in COLUMNS.values():
            values = [entry['scores'][score] for entry in of_row if score in entry['scores']]
            cells.append(_cell(values))
        seconds = [entry['cpu_seconds'] for entry in of_row if 'cpu_seconds' in entry]
        cells.append(f'{statistics.mean(seconds):.0f}' if seconds else '')
        print(f'| {row} | {len(of_row)} | {" | ".join(cells)} |')


def _cell(values: list[float]) -> str:
    """Percent: the mean ± half of the range."""
    if not values:
        return '–'
    mean = 100 * statistics.mean(values)
    if len(values) == 1:
        return f'{mean:.1f}'
    return f'{mean:.1f} ± {50 * (max(values) - min(values)):.1f}'


def main() -> None:
    """Makes the runs that are missing; writes after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default=','.join(comparison.METHODS))
    parser.add_argument('--seeds', default='0,1')
    parser.add_argument('--runs', default='runs/comparison')
    args = parser.parse_args()
    runs = (repository.ROOT / args.runs).resolve()
    found = earlier()
    for seed in map(int, args.seeds.split(',')):
        for row in args.only.split(','):
            folder = runs / f'{row}_seed{seed}'
            if not (folder / 'done.json').exists():
                train(folder, row, seed)
            new = entries(row, seed, folder)
            replaced = {(entry['row'], seed) for entry in new}
            found = [entry for entry in found if (entry['row'], entry['seed']) not in replaced]
            found += new
            write(found)
    print_table(found)
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
