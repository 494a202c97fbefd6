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
import json
import os
import pathlib
import statistics
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from support import repository, runs

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


def entries(row: str, seed: int, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a finished run: an entry for it, for each of its phases, and for random values."""
    phases = sorted((folder / 'phases').glob('*'))
    found = []
    for run in phases or [folder]:
        name = f'{row}: {run.name[2:]}' if phases else row
        newest = runs.newest_results(run)
        found.append(
            {'row': name, 'seed': seed, 'scores': runs.scores_of(newest, COLUMNS.values())}
            | runs.origin_of(run)
        )
    cost = folder / 'cost.json'
    if cost.exists():
        found[-1].update(json.loads(cost.read_text()))
    random = folder / 'evals' / 'random_init' / 'results.json'
    if random.exists():
        scores = runs.scores_of(random, COLUMNS.values())
        found.append({'row': RANDOM[row], 'seed': seed, 'scores': scores} | runs.origin_of(folder))
    return found


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
            cells.append(runs.cell(values))
        seconds = [entry['cpu_seconds'] for entry in of_row if 'cpu_seconds' in entry]
        cells.append(f'{statistics.mean(seconds):.0f}' if seconds else '')
        print(f'| {row} | {len(of_row)} | {" | ".join(cells)} |')


def main() -> None:
    """Makes the runs that are missing; writes after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default=','.join(comparison.METHODS))
    parser.add_argument('--seeds', default='0,1')
    parser.add_argument('--runs', default='runs/comparison')
    args = parser.parse_args()
    kept = (repository.ROOT / args.runs).resolve()
    found = earlier()
    for seed in map(int, args.seeds.split(',')):
        for row in args.only.split(','):
            folder = kept / f'{row}_seed{seed}'
            if not (folder / 'done.json').exists():
                runs.train(folder, f'configs/comparison.py:{row}', seed)
            new = entries(row, seed, folder)
            replaced = {(entry['row'], seed) for entry in new}
            found = [entry for entry in found if (entry['row'], entry['seed']) not in replaced]
            found += new
            write(found)
    print_table(found)
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
