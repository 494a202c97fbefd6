"""Fine-tuning from few labels: pretrained against from scratch, on the playground.

    # from runs/demo (make demo); 5, 20, 100 labels a class; two CPU cores
    python benchmarks/few_labels.py
    python benchmarks/few_labels.py --labels=5,20 --seeds=0,1 --from=runs/demo

The recipe is the published one (configs/vatt_finetune.py:demo). Each cell is a run of its own, kept
in --runs and not repeated when it is there. Which segments are labelled is the seed's choice, the
same for both starts. Accuracy on the test split, four windows averaged. Writes
benchmarks/results/few_labels.json and prints the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys

from support import repository

RESULTS = repository.RESULTS / 'few_labels.json'

STARTS = ('pretrained', 'scratch')


def numbers(text: str) -> list[int]:
    """'5,20' -> [5, 20]."""
    return [int(number) for number in text.split(',')]


def train(
    folder: pathlib.Path, labels: int, start: str, seed: int, origin: str, steps: int
) -> None:
    """Makes the run of one cell."""
    config = f'configs/vatt_finetune.py:demo,{labels}'
    options = [f'--config.seed={seed}', '--quiet']
    if start == 'scratch':
        config += ',scratch'
    else:
        options.append(f'--config.init_from={origin}')
    if steps:
        options += [f'--config.steps={steps}', f'--config.checkpoint.every={steps}']
    command = [sys.executable, 'run.py', f'--config={config}', f'--workdir={folder}', *options]
    subprocess.run(command, cwd=repository.ROOT, check=True)


def cell(runs: pathlib.Path, labels: int, start: str, seed: int, origin: str, steps: int) -> dict:
    """Reads one run; makes it if it is not there.

    Args:
        runs: folder of all runs.
        labels: labelled segments of each class.
        start: pretrained | scratch.
        seed: seed of the run.
        origin: the pretraining run.
        steps: of the run; 0: those of the config.

    Returns:
        An entry of the result file: accuracy with its interval, and what it belongs to.
    """
    folder = runs / f'{labels}_{start}_seed{seed}'
    if not (folder / 'done.json').exists():
        train(folder, labels, start, seed, origin, steps)
    done = json.loads((folder / 'done.json').read_text())
    last = max((folder / 'evals').glob('step_*/results.json'))
    results = json.loads(last.read_text())['classification']
    return {
        'labels': labels,
        'start': start,
        'seed': seed,
        'steps': done['step'],
        'accuracy': results['scalars']['accuracy'],
        'interval': results['artifacts']['accuracy/interval'],
        'seconds': done['seconds'],
    }


def print_table(cells: list[dict], labels: list[int]) -> None:
    """A row for each number of labels, a column for each start."""
    print('| labels a class | pretrained | from scratch |\n|---|---|---|')
    for count in labels:
        columns = []
        for start in STARTS:
            shown = []
            for entry in cells:
                if entry['labels'] == count and entry['start'] == start:
                    low, high = entry['interval']
                    accuracy = f'{100 * entry["accuracy"]:.1f} %'
                    shown.append(f'{accuracy} ({100 * low:.1f} … {100 * high:.1f})')
            columns.append(', '.join(shown))
        print(f'| {count} | {" | ".join(columns)} |')


def main() -> None:
    """Makes the runs that are missing, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--labels', default='5,20,100', help='of each class')
    parser.add_argument('--seeds', default='0')
    parser.add_argument('--from', dest='origin', default='runs/demo', help='the pretraining run')
    parser.add_argument('--runs', default='runs/few_labels')
    parser.add_argument('--steps', type=int, default=0, help='0: those of the config')
    args = parser.parse_args()
    origin, runs = pathlib.Path(args.origin).resolve(), pathlib.Path(args.runs).resolve()
    labels = numbers(args.labels)
    cells = []
    for count in labels:
        for seed in numbers(args.seeds):
            for start in STARTS:
                cells.append(cell(runs, count, start, seed, str(origin), args.steps))
    done = origin / 'done.json'
    results = {
        'commit': repository.commit('vatt_jax', 'configs'),
        'date': datetime.date.today().isoformat(),
        'hardware': f'{os.cpu_count()} CPU cores',
        'pretraining_steps': json.loads(done.read_text())['step'] if done.exists() else None,
        'cells': cells,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')
    print_table(cells, labels)
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
