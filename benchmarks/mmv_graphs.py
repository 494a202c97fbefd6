"""MMV's ablation on the playground: graphs and modalities, by configs/mmv.py:demo_GRAPH_MODALITIES (Alayrac et al., 2020, tables 1 and 2).

    python benchmarks/mmv_graphs.py                                   # six runs of about three minutes each on two idle CPU cores
    python benchmarks/mmv_graphs.py --cells=fac_vat --seeds=0,1 --runs=runs/mmv_graphs

Two modalities alone have one space, so that graphs become the same network but for names: all three for video and sound, `shared` and `disjoint` for
video and words. These are run once. Each cell is a run of its own, kept in --runs and not repeated when it is there. Writes
benchmarks/results/mmv_graphs.json and prints the table.
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
RESULTS = ROOT / 'benchmarks' / 'results' / 'mmv_graphs.json'
CELLS = ('fac_vat', 'shared_vat', 'disjoint_vat', 'fac_va', 'fac_vt', 'shared_vt')
ROWS = {
    'text → video, R@10': 'retrieval/text_to_video/R@10',
    'video → text, R@10': 'retrieval/video_to_text/R@10',
    'audio → video, R@10': 'retrieval/audio_to_video/R@10',
    'video → audio, R@10': 'retrieval/video_to_audio/R@10',
    'text → audio, R@10 (never trained)': 'retrieval/text_to_audio/R@10',
    'linear probe, audio': 'probe_audio/accuracy',
    'linear probe, video': 'probe_video/accuracy',
    'own sound or one second later': 'sync/accuracy',
}


def cell(runs: pathlib.Path, name: str, seed: int, extra: list[str]) -> dict:
    """{'cell', 'seed', 'steps', 'seconds', 'eval/…'} of one run, made if it is not there."""
    folder = runs / f'{name}_seed{seed}'
    if not (folder / 'done.json').exists():
        subprocess.run(
            [
                sys.executable,
                'run.py',
                f'--config=configs/mmv.py:demo_{name}',
                f'--workdir={folder}',
                f'--config.seed={seed}',
                '--quiet',
                *extra,
            ],
            cwd=ROOT,
            check=True,
        )
    done = json.loads((folder / 'done.json').read_text())
    last = [
        json.loads(line)
        for line in (folder / 'metrics.jsonl').read_text().splitlines()
        if '"eval/' in line
    ][-1]
    random = [path for path in (folder / 'evals').glob('*random*/results.json')]
    baseline = json.loads(random[0].read_text()) if random else {}
    scores = {k.removeprefix('eval/'): v for k, v in last.items() if k.startswith('eval/')}
    start = {f'{e}/{k}': v for e, r in baseline.items() for k, v in r.get('scalars', {}).items()}
    return {
        'cell': name,
        'seed': seed,
        'steps': done['step'],
        'seconds': done['seconds'],
        'scores': scores,
        'random': start,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cells', default=','.join(CELLS))
    parser.add_argument('--seeds', default='0')
    parser.add_argument('--runs', default='runs/mmv_graphs')
    args, extra = parser.parse_known_args()
    git = lambda *command: subprocess.run(
        ['git', *command], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    about = {
        'commit': git('rev-parse', '--short', 'HEAD')
        + ('+' if git('status', '--porcelain', 'vatt_jax', 'configs') else ''),
        'date': datetime.date.today().isoformat(),
        'hardware': f'{os.cpu_count()} CPU cores',
    }
    runs = pathlib.Path(args.runs).resolve()
    cells = []
    for seed in args.seeds.split(','):
        for name in args.cells.split(','):
            cells.append(cell(runs, name, int(seed), extra))
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps({**about, 'cells': cells}, indent=1) + '\n')
    print(
        '| | '
        + ' | '.join(f'{c["cell"]}' + (f', seed {c["seed"]}' if c['seed'] else '') for c in cells)
        + ' |'
    )
    print('|---' * (len(cells) + 1) + '|')
    for row, key in ROWS.items():
        print(
            f'| {row} | '
            + ' | '.join(
                f'{100 * c["scores"][key]:.1f} %' if key in c['scores'] else '–' for c in cells
            )
            + ' |'
        )
    print(f'written: {RESULTS.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
