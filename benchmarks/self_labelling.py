"""Which classes of the playground does each method find without labels? Every option of configs/selavi.py:demo, beside k-means baselines.

    python benchmarks/self_labelling.py                                  # over an hour of CPU time; runs/demo (make demo) is a baseline
    python benchmarks/self_labelling.py --only=selavi,xdc --seeds=0      # some of them

Each row is a run of its own, kept in --runs and not repeated when it is there; results are written after each. All are judged on the training
videos, by classes that none of them saw. Rows: selavi (alignment, Gaussian sizes, four heads in two groups), the same less one ingredient, sela
(video alone), xdc, swav; their k-means rows cluster unit features of video and sound together, sela's of video. Baselines: k-means of the same
towers before training and of a VATT that was trained on other videos of this world (--from). Writes benchmarks/results/self_labelling.json and
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

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import selavi

RESULTS = ROOT / 'benchmarks' / 'results' / 'self_labelling.json'
# row -> (options of configs/selavi.py:demo, seeds it is run with of those asked for)
ROWS = {
    'selavi': ('', 2),
    'one_head': (',one_head', 2),
    'unaligned': (',unaligned', 2),
    'uniform': (',uniform', 2),
    'sela': (',sela', 1),
    'xdc': (',xdc', 1),
    'swav': (',swav', 1),
}
KEPT = (
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
    """The runs differ in little, so most of what one compiles serves the next."""
    cache = {'JAX_COMPILATION_CACHE_DIR': str(folder.parent / 'compiled')}
    subprocess.run(
        [sys.executable, 'run.py', f'--workdir={folder}', *arguments, '--quiet'],
        cwd=ROOT,
        check=True,
        env=os.environ | cache,
    )


def entries(name: str, seed: int, folder: pathlib.Path, results: pathlib.Path) -> list[dict]:
    """One entry for each clustering of an evaluation: heads (the one of best NMI, the one of least loss), k-means of features."""
    out, read = [], json.loads(results.read_text())
    done = json.loads((folder / 'done.json').read_text())
    probes = {k: v['scalars']['accuracy'] for k, v in read.items() if k.startswith('probe_')}
    for entry, r in read.items():
        if not entry.startswith(('clusters', 'kmeans')):
            continue
        for prefix in ('', 'chosen/'):
            scalars = {k: r['scalars'][prefix + k] for k in KEPT if prefix + k in r['scalars']}
            if scalars:
                out.append(
                    {
                        'row': name,
                        'seed': seed,
                        'clusters': entry + (' (least loss)' if prefix else ''),
                        **scalars,
                        'chance_NMI': r['artifacts'].get('NMI/chance'),
                        'steps': done['step'],
                        'seconds': done['seconds'],
                        **probes,
                    }
                )
    return out


def main() -> None:
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
    runs, origin, found = (ROOT / args.runs).resolve(), (ROOT / args.origin).resolve(), []
    if (origin / 'done.json').exists():
        found += contrastive(origin, runs / 'vatt')
    for i, seed in enumerate(args.seeds.split(',')):
        for name in args.only.split(','):
            options, count = ROWS[name]
            if i >= count:
                continue
            folder, spec = runs / f'{name}_seed{seed}', f'configs/selavi.py:demo{options}'
            if not list((folder / 'evals').glob('step_*/results.json')):
                # What random values give is the same for every row of a seed.
                evals = {
                    k: {**e, 'baseline': name == 'selavi'}
                    for k, e in selavi.get_config(f'demo{options}').evals.items()
                }
                run(folder, f'--config={spec}', f'--config.seed={seed}', f'--config.evals={evals}')
            found += entries(
                name, int(seed), folder, max((folder / 'evals').glob('step_*/results.json'))
            )
            if name == 'selavi':
                found += entries(
                    'random initialisation',
                    int(seed),
                    folder,
                    folder / 'evals' / 'random_init' / 'results.json',
                )
            write(found)
    print(
        '| run, seed | clusters | NMI | AMI | ARI | accuracy | entropy | purity |\n|---|---|---|---|---|---|---|---|'
    )
    for e in found:
        print(
            f'| {e["row"]}, {e["seed"]} | {e["clusters"]} | '
            + ' | '.join(f'{100 * e[k]:.1f}' for k in ('NMI', 'AMI', 'ARI', 'accuracy'))
            + f' | {e["mean_entropy"]:.2f} | {100 * e["mean_max_purity"]:.1f} |'
        )
    print(f'written: {RESULTS.relative_to(ROOT)}')


def contrastive(origin: pathlib.Path, folder: pathlib.Path) -> list[dict]:
    """k-means of what a VATT learnt on other videos, in a copy of its checkpoint, so that the run keeps its own evaluations."""
    if not list((folder / 'evals').glob('step_*/results.json')):
        folder.mkdir(parents=True, exist_ok=True)
        for part in ('checkpoints', 'config.json', 'done.json'):
            subprocess.run(['cp', '-r', str(origin / part), str(folder)], check=True)
        kmeans = {
            n: {'type': 'clustering', 'of': 'features', 'streams': s, 'baseline': False}
            for n, s in (
                ('kmeans', ('video', 'audio')),
                ('kmeans_video', ('video',)),
                ('kmeans_audio', ('audio',)),
            )
        }
        probes = {
            f'probe_{s}': {
                'type': 'linear_probe',
                'stream': s,
                'train_limit': 1 << 20,
                'test_limit': 1 << 20,
                'baseline': False,
            }
            for s in ('video', 'audio')
        }
        run(
            folder,
            '--mode=eval',
            f'--config.evals={kmeans | probes}',
            '--config.data.make={}',
            "--config.data.train={'scenes': {'path': 'runs/data/scenes/records'}}",
        )
    return entries('VATT demo', 0, folder, max((folder / 'evals').glob('step_*/results.json')))


def write(found: list[dict]) -> None:
    told = lambda *command: subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    about = {
        'commit': told('git', 'rev-parse', '--short', 'HEAD')
        + ('+' if told('git', 'status', '--porcelain', 'vatt_jax', 'configs') else ''),
        'date': datetime.date.today().isoformat(),
        'hardware': f'{os.cpu_count()} CPU cores',
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**about, 'entries': found}, indent=1) + '\n')


if __name__ == '__main__':
    main()
