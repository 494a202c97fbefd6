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
import pathlib
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


def write(found: list[dict[str, Any]]) -> None:
    """Writes the result file with these entries, in the order of the table."""
    methods = [*RANDOM.values(), *comparison.METHODS]
    found.sort(key=lambda entry: (methods.index(entry['row'].partition(':')[0]), entry['seed']))
    runs.write(RESULTS, comparison.STEPS, found)


def main() -> None:
    """Makes the runs that are missing; writes after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default=','.join(comparison.METHODS))
    parser.add_argument('--seeds', default='0,1')
    parser.add_argument('--runs', default='runs/comparison')
    args = parser.parse_args()
    kept = (repository.ROOT / args.runs).resolve()
    found = runs.earlier(RESULTS, comparison.STEPS)
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
    runs.print_table(found, COLUMNS)
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
