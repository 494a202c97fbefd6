"""Fine-tuning from few labels: pretrained against from scratch, the published recipe on the playground (configs/vatt_finetune.py:demo).

    python benchmarks/few_labels.py                                    # from runs/demo (make demo); 5, 20, 100 labels a class; two CPU cores
    python benchmarks/few_labels.py --labels=5,20 --seeds=0,1 --from=runs/demo --runs=runs/few_labels

Each cell is a run of its own, kept in --runs and not repeated when it is there. Which segments are labelled is the seed's choice, the same for
both starts. Accuracy on the test split, four windows averaged. Writes benchmarks/results/few_labels.json and prints the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results' / 'few_labels.json'


def cell(runs: pathlib.Path, labels: int, start: str, seed: int, origin: str, steps: int) -> dict:
    """{'accuracy', 'interval', 'chance', 'seconds'} of one run, made if it is not there."""
    folder = runs / f'{labels}_{start}_seed{seed}'
    if not (folder / 'done.json').exists():
        config = f'configs/vatt_finetune.py:demo,{labels}' + (
            ',scratch' if start == 'scratch' else ''
        )
        command = [
            sys.executable,
            'run.py',
            f'--config={config}',
            f'--workdir={folder}',
            f'--config.seed={seed}',
            '--quiet',
        ]
        command += [] if start == 'scratch' else [f'--config.init_from={origin}']
        command += (
            [f'--config.steps={steps}', f'--config.checkpoint.every={steps}'] if steps else []
        )
        subprocess.run(command, cwd=ROOT, check=True)
    done = json.loads((folder / 'done.json').read_text())
    results = json.loads(max((folder / 'evals').glob('step_*/results.json')).read_text())[
        'classification'
    ]
    return {
        'labels': labels,
        'start': start,
        'seed': seed,
        'steps': done['step'],
        'accuracy': results['scalars']['accuracy'],
        'interval': results['artifacts']['accuracy/interval'],
        'seconds': done['seconds'],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--labels', default='5,20,100', help='of each class')
    parser.add_argument('--seeds', default='0')
    parser.add_argument('--from', dest='origin', default='runs/demo', help='the pretraining run')
    parser.add_argument('--runs', default='runs/few_labels')
    parser.add_argument('--steps', type=int, default=0, help='0: those of the config')
    args = parser.parse_args()
    origin, runs = (str(pathlib.Path(p).resolve()) for p in (args.origin, args.runs))
    numbers = lambda text: [int(x) for x in text.split(',')]
    cells = [
        cell(pathlib.Path(runs), n, start, seed, origin, args.steps)
        for n in numbers(args.labels)
        for seed in numbers(args.seeds)
        for start in ('pretrained', 'scratch')
    ]
    pretraining = (
        json.loads((pathlib.Path(origin) / 'done.json').read_text())['step']
        if (pathlib.Path(origin) / 'done.json').exists()
        else None
    )
    run = lambda *command: subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    about = {
        'commit': run('git', 'rev-parse', '--short', 'HEAD')
        + ('+' if run('git', 'status', '--porcelain', 'vatt_jax', 'configs') else ''),
        'date': datetime.date.today().isoformat(),
        'hardware': f'{os.cpu_count()} CPU cores',
        'pretraining_steps': pretraining,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**about, 'cells': cells}, indent=1) + '\n')
    print('| labels a class | pretrained | from scratch |\n|---|---|---|')
    for n in numbers(args.labels):
        shown = []
        for start in ('pretrained', 'scratch'):
            own = [c for c in cells if c['labels'] == n and c['start'] == start]
            shown.append(
                ', '.join(
                    f'{100 * c["accuracy"]:.1f} % ({100 * c["interval"][0]:.1f} … {100 * c["interval"][1]:.1f})'
                    for c in own
                )
            )
        print(f'| {n} | {" | ".join(shown)} |')
    print(f'written: {RESULTS.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
