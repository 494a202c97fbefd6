"""Which classes of the playground does each method find without labels?

    # over an hour of CPU time; runs/demo (make demo) is a baseline
    python benchmarks/self_labelling.py
    # some of them
    python benchmarks/self_labelling.py --only=selavi,xdc --seeds=0

Every option of configs/selavi.py:demo, beside k-means baselines. Each row is a run of its own, kept
in --runs and not repeated when it is there; results are written after each. All are scored on the
training videos, by classes that none of them saw.

Rows: selavi (alignment, Gaussian sizes, four heads in two groups), the same less one ingredient,
sela (video alone), xdc, swav; their k-means rows cluster unit features of video and sound together,
sela's of video. Baselines: k-means of the same towers before training and of a VATT that was
trained on other videos of this world (--from). Writes benchmarks/results/self_labelling.json and
prints the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from support import repository

from configs import selavi

RESULTS = repository.RESULTS / 'self_labelling.json'

# row -> (options of configs/selavi.py:demo, number of the given seeds that it is run with)
ROWS = {
    'selavi': ('', 2),
    'one_head': (',one_head', 2),
    'unaligned': (',unaligned', 2),
    'uniform': (',uniform', 2),
    'sela': (',sela', 1),
    'xdc': (',xdc', 1),
    'swav': (',swav', 1),
}
REPORTED = (
    'NMI',
    'AMI',
    'ARI',
    'accuracy',
    'mean_entropy',
    'mean_max_purity',
    'shots_1',
    'shots_10',
    'NMI_between_heads',
)


def run(folder: pathlib.Path, *arguments: str) -> None:
    """Runs run.py; the runs differ in little, so most of what one compiles serves the next."""
    cache = {'JAX_COMPILATION_CACHE_DIR': str(folder.parent / 'compiled')}
    command = [sys.executable, 'run.py', f'--workdir={folder}', *arguments, '--quiet']
    subprocess.run(command, cwd=repository.ROOT, check=True, env=os.environ | cache)


def result_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a run's evaluations, in the order of their steps."""
    return sorted((folder / 'evals').glob('step_*/results.json'))


def entries(name: str, seed: int, folder: pathlib.Path, results: pathlib.Path) -> list[dict]:
    """Reads one evaluation.

    Args:
        name: row of the table.
        seed: of the run.
        folder: of the run.
        results: file of the evaluation.

    Returns:
        An entry of the result file for each clustering: heads (the one of best NMI, the one of
        least loss), k-means of features.
    """
    evaluation = json.loads(results.read_text())
    done = json.loads((folder / 'done.json').read_text())
    probes = {}
    for evaluator, result in evaluation.items():
        if evaluator.startswith('probe_'):
            probes[evaluator] = result['scalars']['accuracy']

    found = []
    for evaluator, result in evaluation.items():
        if not evaluator.startswith(('clusters', 'kmeans')):
            continue
        for prefix, suffix in (('', ''), ('chosen/', ' (least loss)')):
            scores = {}
            for score in REPORTED:
                if prefix + score in result['scalars']:
                    scores[score] = result['scalars'][prefix + score]
            if not scores:
                continue
            found.append(
                {
                    'row': name,
                    'seed': seed,
                    'clusters': evaluator + suffix,
                    **scores,
                    'chance_NMI': result['artifacts'].get('NMI/chance'),
                    'steps': done['step'],
                    'seconds': done['seconds'],
                    **probes,
                }
            )
    return found


def self_labelled(name: str, seed: int, folder: pathlib.Path) -> list[dict]:
    """Entries of one of ROWS; makes the run if it is not there."""
    options, _ = ROWS[name]
    if not result_files(folder):
        # What random values give is the same for every row of a seed.
        evals = {}
        for evaluator, settings in selavi.get_config(f'demo{options}').evals.items():
            evals[evaluator] = {**settings, 'baseline': name == 'selavi'}
        run(
            folder,
            f'--config=configs/selavi.py:demo{options}',
            f'--config.seed={seed}',
            f'--config.evals={evals}',
        )
    found = entries(name, seed, folder, result_files(folder)[-1])
    if name == 'selavi':
        random = folder / 'evals' / 'random_init' / 'results.json'
        found += entries('random initialisation', seed, folder, random)
    return found


def contrastive(origin: pathlib.Path, folder: pathlib.Path) -> list[dict]:
    """Entries of k-means of what a VATT learnt on other videos.

    It is evaluated in a copy of its checkpoint, so that the run keeps its own evaluations.
    """
    if not result_files(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for part in ('checkpoints', 'config.json', 'done.json'):
            subprocess.run(['cp', '-r', str(origin / part), str(folder)], check=True)
        evals = {}
        streams = {
            'kmeans': ('video', 'audio'),
            'kmeans_video': ('video',),
            'kmeans_audio': ('audio',),
        }
        for evaluator, clustered in streams.items():
            evals[evaluator] = {
                'type': 'clustering',
                'of': 'features',
                'streams': clustered,
                'baseline': False,
            }
        for stream in ('video', 'audio'):
            evals[f'probe_{stream}'] = {
                'type': 'linear_probe',
                'stream': stream,
                'train_limit': 1 << 20,
                'test_limit': 1 << 20,
                'baseline': False,
            }
        run(
            folder,
            '--mode=eval',
            f'--config.evals={evals}',
            '--config.data.make={}',
            "--config.data.train={'scenes': {'path': 'runs/data/scenes/records'}}",
        )
    return entries('VATT demo', 0, folder, result_files(folder)[-1])


def write(found: list[dict]) -> None:
    """Writes the result file with these entries."""
    results = {
        'commit': repository.commit('vatt_jax', 'configs'),
        'date': datetime.date.today().isoformat(),
        'hardware': f'{os.cpu_count()} CPU cores',
        'entries': found,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')


def print_table(found: list[dict]) -> None:
    """A row for each entry."""
    print('| run, seed | clusters | NMI | AMI | ARI | accuracy | entropy | purity |')
    print('|---|---|---|---|---|---|---|---|')
    for entry in found:
        percentages = [f'{100 * entry[key]:.1f}' for key in ('NMI', 'AMI', 'ARI', 'accuracy')]
        columns = [
            f'{entry["row"]}, {entry["seed"]}',
            entry['clusters'],
            *percentages,
            f'{entry["mean_entropy"]:.2f}',
            f'{100 * entry["mean_max_purity"]:.1f}',
        ]
        print(f'| {" | ".join(columns)} |')


def main() -> None:
    """Makes the runs that are missing; writes after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default=','.join(ROWS))
    parser.add_argument('--seeds', default='0,1', help='rows of one seed take the first')
    parser.add_argument(
        '--from',
        dest='origin',
        default='runs/demo',
        help='a run of configs/demo.py; left out where it is not there',
    )
    parser.add_argument('--runs', default='runs/self_labelling')
    args = parser.parse_args()
    runs, origin = (
        (repository.ROOT / args.runs).resolve(),
        (repository.ROOT / args.origin).resolve(),
    )
    found = []
    if (origin / 'done.json').exists():
        found += contrastive(origin, runs / 'vatt')
    for i, seed in enumerate(args.seeds.split(',')):
        for name in args.only.split(','):
            _, seeds = ROWS[name]
            if i >= seeds:
                continue
            found += self_labelled(name, int(seed), runs / f'{name}_seed{seed}')
            write(found)
    print_table(found)
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
