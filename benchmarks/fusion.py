"""Which attention type tells who belongs to whom, and what do hidden words gain by the picture?

    # hours of two CPU cores, estimated: all rows have never been run
    python benchmarks/fusion.py
    # some of the rows
    python benchmarks/fusion.py --only=merged_2,specific_2 --seeds=0

Attention types × 1, 2 and 4 layers, with and without sound, each with every seed, on the playground
by configs/fusion.py with towers that are smaller still. `specific` is the control: matching must
stay at one half, and hidden words must gain nothing. A run is kept in --runs and not repeated when
it is finished; one that was stopped goes on. Writes benchmarks/results/fusion.json after each run,
in which rows and seeds that were not asked for stay as they are, and prints its table.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from support import repository, runs

from configs import fusion

RESULTS = repository.RESULTS / 'fusion.json'
STEPS = 300
# Of the towers and the fusion layers.
SIZE = {'layers': 2, 'width': 64, 'mlp': 128, 'heads': 2}
FIELDS = (
    f'--config.steps={STEPS}',
    '--config.batch_size=32',
    '--config.checkpoint.every=100',
    '--config.eval_every=0',
    '--config.report=False',
    '--config.model.inputs.video.frames=4',
    '--config.model.inputs.audio.samples=8000',
    *(
        f'--config.model.towers.{tower}.{field}={value}'
        for tower in ('video', 'audio', 'text')
        for field, value in SIZE.items()
    ),
    '--config.model.fusion.mlp=128',
    '--config.model.fusion.heads=2',
)
LAYERS = (1, 2, 4)
# Column of the table -> the score that it shows.
COLUMNS = {
    'matching, words': 'matching_text/accuracy',
    'matching, sound': 'matching_audio/accuracy',
    'word with the picture': 'masked_words/accuracy',
    'of another clip': 'masked_words/accuracy/other',
    'without': 'masked_words/accuracy/without',
}


def make_rows() -> dict[str, str]:
    """Row -> its options of configs/fusion.py."""
    rows = {}
    for sound in ('', '_audio'):
        for kind in fusion.KINDS:
            for layers in LAYERS:
                # One layer of a mixed schedule is merged.
                if kind == fusion.MIXED and layers == 1:
                    continue
                rows[f'{kind}_{layers}{sound}'] = f'{kind},{layers}{sound.replace("_", ",")}'
    return rows


ROWS = make_rows()


def entry(row: str, seed: int, folder: pathlib.Path) -> dict[str, Any]:
    """Reads a finished run."""
    found: dict[str, Any] = {'row': row, 'seed': seed}
    found['scores'] = runs.scores_of(runs.newest_results(folder), COLUMNS.values())
    found |= runs.origin_of(folder)
    cost = folder / 'cost.json'
    return found | (json.loads(cost.read_text()) if cost.exists() else {})


def write(found: list[dict[str, Any]]) -> None:
    """Writes the result file with these entries, in the order of the table."""
    order = list(ROWS)
    found.sort(key=lambda entry: (order.index(entry['row']), entry['seed']))
    runs.write(RESULTS, STEPS, found)


def main() -> None:
    """Makes the runs that are missing; writes after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default=','.join(ROWS))
    parser.add_argument('--seeds', default='0,1')
    parser.add_argument('--runs', default=f'runs/fusion_types_{STEPS}')
    args = parser.parse_args()
    rows = args.only.split(',')
    for row in rows:
        if row not in ROWS:
            parser.error(f'--only={row}: expected some of {", ".join(ROWS)}')
    kept = (repository.ROOT / args.runs).resolve()
    found = runs.earlier(RESULTS, STEPS)
    for seed in map(int, args.seeds.split(',')):
        for row in rows:
            folder = kept / f'{row}_seed{seed}'
            if not (folder / 'done.json').exists():
                config = f'configs/fusion.py:demo,{ROWS[row]},words'
                runs.train(folder, config, seed, FIELDS)
            found = [old for old in found if (old['row'], old['seed']) != (row, seed)]
            found.append(entry(row, seed, folder))
            write(found)
    runs.print_table(found, COLUMNS)
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
