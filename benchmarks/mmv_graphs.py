"""MMV's ablation on the playground: graphs and modalities (Alayrac et al., 2020, tables 1 and 2).

    # six runs of about three minutes each on two idle CPU cores
    python benchmarks/mmv_graphs.py
    python benchmarks/mmv_graphs.py --cells=fac_vat --seeds=0,1 --runs=runs/mmv_graphs

By configs/mmv.py:demo_GRAPH_MODALITIES. Two modalities alone have one space, so that graphs become
the same network but for names: all three for video and sound, `shared` and `disjoint` for video and
words. These are run once. Each cell is a run of its own, kept in --runs and not repeated when it is
there; flags that are not known here go on to its run. Writes benchmarks/results/mmv_graphs.json and
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

from support import repository

RESULTS = repository.RESULTS / 'mmv_graphs.json'

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


def last_scores(folder: pathlib.Path) -> dict[str, float]:
    """The scores of a run's last evaluation."""
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    evaluations = [line for line in lines if '"eval/' in line]
    return {
        name.removeprefix('eval/'): value
        for name, value in json.loads(evaluations[-1]).items()
        if name.startswith('eval/')
    }


def random_scores(folder: pathlib.Path) -> dict[str, float]:
    """The scores of a run's random initialisation, if it was evaluated."""
    files = list((folder / 'evals').glob('*random*/results.json'))
    if not files:
        return {}
    scores = {}
    for evaluator, result in json.loads(files[0].read_text()).items():
        for name, value in result.get('scalars', {}).items():
            scores[f'{evaluator}/{name}'] = value
    return scores


def cell(runs: pathlib.Path, name: str, seed: int, extra: list[str]) -> dict:
    """Reads one run; makes it if it is not there.

    Args:
        runs: folder of all runs.
        name: graph and modalities, as in CELLS.
        seed: seed of the run.
        extra: further flags of the run.

    Returns:
        An entry of the result file: scores of the run and of its random initialisation.
    """
    folder = runs / f'{name}_seed{seed}'
    if not (folder / 'done.json').exists():
        command = [
            sys.executable,
            'run.py',
            f'--config=configs/mmv.py:demo_{name}',
            f'--workdir={folder}',
            f'--config.seed={seed}',
            '--quiet',
            *extra,
        ]
        subprocess.run(command, cwd=repository.ROOT, check=True)
    done = json.loads((folder / 'done.json').read_text())
    return {
        'cell': name,
        'seed': seed,
        'steps': done['step'],
        'seconds': done['seconds'],
        'scores': last_scores(folder),
        'random': random_scores(folder),
    }


def print_table(cells: list[dict]) -> None:
    """A column for each run."""
    header = []
    for entry in cells:
        header.append(entry['cell'] + (f', seed {entry["seed"]}' if entry['seed'] else ''))
    print(f'| | {" | ".join(header)} |')
    print('|---' * (len(cells) + 1) + '|')
    for row, key in ROWS.items():
        columns = []
        for entry in cells:
            score = entry['scores'].get(key)
            columns.append('–' if score is None else f'{100 * score:.1f} %')
        print(f'| {row} | {" | ".join(columns)} |')


def main() -> None:
    """Makes the runs that are missing; writes after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cells', default=','.join(CELLS))
    parser.add_argument('--seeds', default='0')
    parser.add_argument('--runs', default='runs/mmv_graphs')
    args, extra = parser.parse_known_args()
    about = {
        'commit': repository.commit('vatt_jax', 'configs'),
        'date': datetime.date.today().isoformat(),
        'hardware': f'{os.cpu_count()} CPU cores',
    }
    runs = pathlib.Path(args.runs).resolve()
    cells: list[dict] = []
    for seed in args.seeds.split(','):
        for name in args.cells.split(','):
            cells.append(cell(runs, name, int(seed), extra))
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps({**about, 'cells': cells}, indent=1) + '\n')
    print_table(cells)
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
