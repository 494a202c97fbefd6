"""Adapting a frozen model: every method from few labels, on the playground.

    # beside runs/demo (make demo) and runs/clip (configs/clip.py:demo); two CPU cores
    python benchmarks/adaptation.py
    python benchmarks/adaptation.py --base=demo --methods=linear,vpt --labels=5,20 --seeds=0

The recipes are those of configs/adapt.py. Each cell is a run of its own, kept in --runs and not
repeated when it is there. Which segments are labelled is the seed's choice, the same for all
methods. Accuracy on the test split, four windows averaged. Trained parameters are those of the
run's checkpoint; seconds are of its training, with compiling. Writes
benchmarks/results/adaptation.json and prints a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import pathlib
import subprocess
import sys

from support import repository

RESULTS = repository.RESULTS / 'adaptation.json'

# Base -> its methods.
METHODS = {
    'demo': ('linear', 'vpt_shallow', 'vpt', 'lora', 'full'),
    'clip': ('linear', 'lora', 'visual_prompt', 'coop', 'pgn', 'video_prompting'),
}


def words(text: str) -> list[str]:
    """'vpt,lora' -> ['vpt', 'lora']."""
    return [word for word in text.split(',') if word]


def train(folder: pathlib.Path, base: str, method: str, labels: int, seed: int, steps: int) -> None:
    """Makes the run of one cell."""
    command = [
        sys.executable,
        'run.py',
        f'--config=configs/adapt.py:{base},{method},labels={labels}',
        f'--workdir={folder}',
        f'--config.seed={seed}',
        '--quiet',
    ]
    if steps:
        command += [
            f'--config.steps={steps}',
            f'--config.checkpoint.every={steps}',
            f'--config.optimizer.schedule.warmup={steps // 10}',
        ]
    subprocess.run(command, cwd=repository.ROOT, check=True)


def num_trained(folder: pathlib.Path) -> int:
    """Parameters that the optimizer of a run updates."""
    from vatt_jax.training import checkpoint

    shapes = checkpoint.saved_shapes(checkpoint.find(folder))
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith('params/'))


def cell(
    runs: pathlib.Path, base: str, method: str, labels: int, seed: int, steps: int
) -> dict[str, object]:
    """Reads one run; makes it if it is not there.

    Args:
        runs: folder of all runs.
        base: demo | clip.
        method: of configs/adapt.py.
        labels: labelled segments of each class.
        seed: seed of the run.
        steps: of the run; 0: those of the config.

    Returns:
        An entry of the result file: accuracy with its interval, and what it belongs to.
    """
    folder = runs / f'{base}_{method}_{labels}_seed{seed}'
    if not (folder / 'done.json').exists():
        train(folder, base, method, labels, seed, steps)
    done = json.loads((folder / 'done.json').read_text())
    last = max((folder / 'evals').glob('step_*/results.json'))
    (results,) = json.loads(last.read_text()).values()
    return {
        'base': base,
        'method': method,
        'labels': labels,
        'seed': seed,
        'steps': done['step'],
        'accuracy': results['scalars']['accuracy'],
        'interval': results['artifacts'].get('accuracy/interval'),
        'trained': num_trained(folder),
        'seconds': done['seconds'],
    }


def print_table(cells: list[dict], base: str, labels: list[int]) -> None:
    """A row for each method, a column for each number of labels; seeds side by side."""
    columns = ' | '.join(f'{count} labels' for count in labels)
    print(f'\n{base}: accuracy in %, one number a seed\n')
    print(f'| method | trained | {columns} | seconds |\n|---|---|{"---|" * len(labels)}---|')
    for method in METHODS[base]:
        own = [entry for entry in cells if (entry['base'], entry['method']) == (base, method)]
        if not own:
            continue
        shown = []
        for count in labels:
            found = [entry['accuracy'] for entry in own if entry['labels'] == count]
            shown.append(', '.join(f'{100 * accuracy:.1f}' for accuracy in found))
        seconds = sum(entry['seconds'] for entry in own) / len(own)
        print(f'| {method} | {own[0]["trained"]:,} | {" | ".join(shown)} | {seconds:.0f} |')


def main() -> None:
    """Makes the runs that are missing, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--base', default='demo,clip')
    parser.add_argument('--methods', default='', help='default: all of the base')
    parser.add_argument('--labels', default='1,5,20,100', help='of each class')
    parser.add_argument('--seeds', default='0,1')
    parser.add_argument('--runs', default='runs/adaptation')
    parser.add_argument('--steps', type=int, default=0, help='0: those of the config')
    args = parser.parse_args()
    runs = pathlib.Path(args.runs).resolve()
    labels = [int(count) for count in words(args.labels)]
    chosen = words(args.methods)
    cells = []
    for base in words(args.base):
        for method in METHODS[base]:
            if chosen and method not in chosen:
                continue
            for count in labels:
                for seed in words(args.seeds):
                    cells.append(cell(runs, base, method, count, int(seed), args.steps))
    results = {
        'commit': repository.commit('vatt_jax', 'configs'),
        'date': datetime.date.today().isoformat(),
        'hardware': f'{os.cpu_count()} CPU cores',
        'cells': cells,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')
    for base in words(args.base):
        print_table(cells, base, labels)
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
