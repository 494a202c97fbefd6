"""Detection from sound on the playground: the whole chain, and what each of its parts costs.

    python benchmarks/detection.py                                   # hours of two CPU cores
    python benchmarks/detection.py --seeds=0 --only=heat_maps,clusters_8
    python benchmarks/detection.py --quick     # minutes: every stage runs, numbers say nothing

For each seed: localisation and self-labelling, their scores, boxes of the training pictures, and
detectors of these. All are measured on the same test pictures with the same true boxes. Rows:

    localisation     boxes of heat maps against a centre box, a random box and the saliency of the
                     untrained network; one object a picture, the one that is heard
    heat_maps        the same maps as a detector: one box a picture
    heat_maps_2      up to two boxes a picture
    clusters_8       the detector of pseudo-boxes and 8 pseudo-classes, named in five ways;
                     clusters_4, _16, _32: of other localisation runs
    true_classes     the detector of the same boxes with the true class of what is heard
    true_boxes       of the true boxes of what is heard, with pseudo-classes
    supervised       of all true boxes and classes, silent objects too

Every stage is a command that this prints. What is finished in --runs is not repeated, and what was
stopped goes on. Names by hand (`manual`) are what somebody would write who looks through the
training pictures: the class that most pictures of a cluster show. Writes
benchmarks/results/detection.json after each row (--quick: into --runs), in which rows and seeds
that were not asked for stay as they are, and prints its table.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from support import repository

RESULTS = repository.RESULTS / 'detection.json'
# Clusters of the chain, and the others that are swept.
CLUSTERS = 8
SWEPT = (4, 16, 32)
ROWS = (
    'localisation',
    'heat_maps',
    'heat_maps_2',
    f'clusters_{CLUSTERS}',
    *(f'clusters_{count}' for count in SWEPT),
    'true_classes',
    'true_boxes',
    'supervised',
)
# Rows whose detector says clusters, which get names.
NAMED = ('true_boxes', *(row for row in ROWS if row.startswith('clusters_')))
# Row -> which labels of its training pictures are true (--true of --mode=pseudo_boxes).
TRUE = {'true_classes': 'classes', 'true_boxes': 'boxes', 'supervised': 'all'}
# Names are found on the validation pictures, but for those that are fitted as published ones are.
NAMINGS: dict[str, dict[str, Any]] = {
    'hungarian': {'naming': 'hungarian'},
    'argmax': {'naming': 'argmax'},
    'manual': {'naming': 'manual'},
    'shots_1': {'naming': 'few_shot', 'shots': 1, 'naming_split': 'validation'},
    'shots_10': {'naming': 'few_shot', 'shots': 10, 'naming_split': 'validation'},
}
# Column of the table -> the score that it shows.
COLUMNS = {
    'AP50, Hungarian': 'hungarian/AP50',
    'argmax': 'argmax/AP50',
    'manual': 'manual/AP50',
    '1 shot': 'shots_1/AP50',
    '10 shots': 'shots_10/AP50',
    'true classes': 'detection/AP50',
    'any class': 'boxes/AP50',
    'heard': 'boxes/found/sounding',
    'silent': 'boxes/found/silent',
    'all of several': 'boxes/found/several',
}
# Small enough for a minute or two a stage.
QUICK_WORLD = {
    'path': 'runs/data/boxes_quick',
    'train': 24,
    'validation': 16,
    'test': 16,
    'seconds': 2.0,
    'size': 64,
}
QUICK_LOCALISATION = {
    'steps': 4,
    'batch_size': 8,
    'objective.warmup': 2,
    'objective.refreshes': 2,
    'optimizer.schedule.warmup': 1,
    'checkpoint.every': 4,
    'log_every': 1,
    'model.inputs.video.size': 64,
    **{f'data.make.{field}': value for field, value in QUICK_WORLD.items()},
}
QUICK_DETECTOR = {
    'steps': 4,
    'batch_size': 8,
    'optimizer.schedule.warmup': 1,
    'checkpoint.every': 4,
    'log_every': 1,
    'model.inputs.video.size': 64,
}


class Chain:
    """The stages of one seed, each in a folder of its own.

    Args:
        folder: of all of them.
        seed: of the runs.
        is_quick: with a few steps on a few pictures.
    """

    def __init__(self, folder: pathlib.Path, seed: int, is_quick: bool) -> None:
        self.folder, self.seed, self.is_quick = folder, seed, is_quick

    # ---- stages

    def localisation(self, clusters: int = CLUSTERS) -> pathlib.Path:
        """The run that learns to localise and to label."""
        fields = {'seed': self.seed, 'objective.clusters': clusters}
        if self.is_quick:
            fields.update(QUICK_LOCALISATION)
        return self._trained(
            f'localisation_{clusters}', ['--config=configs/detection.py:demo', *flags_of(fields)]
        )

    def boxes(
        self, name: str, splits: str, clusters: int = CLUSTERS, true: str = '', most: int = 1
    ) -> pathlib.Path:
        """A folder of pictures with boxes, as COCO has them.

        Args:
            name: of the folder.
            splits: with commas.
            clusters: of the localisation run.
            true: what comes from the truth.
            most: boxes of a picture.
        """
        run = self.localisation(clusters)
        beta = scores_of(run)['boxes/heat/beta']
        out = self.folder / name
        if not (out / f'{splits.split(",")[-1]}.json').exists():
            command = [sys.executable, 'run.py', '--mode=pseudo_boxes', f'--workdir={run}']
            command += [f'--split={splits}', f'--beta={beta:g}', f'--boxes={most}', f'--out={out}']
            call(command + ([f'--true={true}'] if true else []))
        return out

    def truth(self) -> pathlib.Path:
        """Validation and test pictures with all true boxes."""
        return self.boxes('truth', 'validation,test', true='all')

    def detector(self, row: str) -> pathlib.Path:
        """The run of a row's detector."""
        clusters = int(row.split('_')[1]) if row.startswith('clusters_') else CLUSTERS
        pictures = self.boxes(f'pictures_{row}', 'train', clusters, TRUE.get(row, ''))
        fields = {'seed': self.seed, **(QUICK_DETECTOR if self.is_quick else {})}
        training = {'pictures': {'path': str(pictures)}}
        flags = [
            '--config=configs/detector.py:playground',
            f'--config.data.train={training!r}',
            f'--config.data.eval.path={self.truth()}',
            f'--config.init_from={self.localisation(clusters)}',
            *flags_of(fields),
        ]
        if row in NAMED:
            flags.append(f'--config.evals={self._evaluations(row, clusters)!r}')
        return self._trained(f'detector_{row}', flags)

    def _evaluations(self, row: str, clusters: int) -> dict[str, Any]:
        """Entries of config.evals: the five ways of naming."""
        entries = {}
        for name, fields in NAMINGS.items():
            entries[name] = {'type': 'detection', **fields}
        entries['manual']['names'] = self._names_by_hand(clusters)
        return entries

    def _names_by_hand(self, clusters: int) -> tuple[tuple[str, str], ...]:
        """((cluster, class), …): the class that most training pictures of each cluster show."""
        found = self.boxes(f'pictures_clusters_{clusters}', 'train', clusters)
        true = self.boxes(f'pictures_classes_{clusters}', 'train', clusters, 'classes')
        cluster_of, class_of = category_by_example(found), category_by_example(true)
        votes: dict[str, collections.Counter] = {}
        for example, name in class_of.items():
            if example in cluster_of:
                votes.setdefault(cluster_of[example], collections.Counter())[name] += 1
        return tuple((name, votes[name].most_common(1)[0][0]) for name in sorted(votes))

    def _trained(self, name: str, flags: Sequence[str]) -> pathlib.Path:
        """A finished run: trained or continued where it is not."""
        run = self.folder / name
        if not (run / 'done.json').exists():
            call([sys.executable, 'run.py', f'--workdir={run}', '--quiet', *flags])
        return run

    # ---- rows

    def scores(self, row: str) -> dict[str, float]:
        """What a row says."""
        if row == 'localisation':
            return self._localisation_scores()
        if row.startswith('heat_maps'):
            return self._heat_map_scores(row)
        scores = scores_of(self.detector(row))
        # Boxes are the same whatever the clusters are called.
        source = 'hungarian' if row in NAMED else 'detection'
        renamed = {'AP50/any_class': 'boxes/AP50'}
        for name in [name for name in scores if name.startswith(f'{source}/')]:
            score = name.removeprefix(f'{source}/')
            if score in renamed or score.startswith('found/'):
                scores[renamed.get(score, f'boxes/{score}')] = scores[name]
        return scores

    def _localisation_scores(self) -> dict[str, float]:
        run = self.localisation()
        scores = scores_of(run)
        random = json.loads((run / 'evals' / 'random_init' / 'results.json').read_text())
        untrained = random['boxes']['scalars']
        scores.update({f'untrained/{name}': value for name, value in untrained.items()})
        return scores

    def _heat_map_scores(self, row: str) -> dict[str, float]:
        most = 2 if row.endswith('_2') else 1
        found = self.boxes(f'test_{row}', 'test', most=most)
        command = [sys.executable, '-m', 'vatt_jax.detection.naming']
        command += [str(self.truth() / 'test.json'), str(found / 'test.json')]
        printed = call([*command, '--method=hungarian'], reads=True)
        names = {'ap50': 'hungarian/AP50', 'ap50 any class': 'boxes/AP50'}
        scores = {}
        for line in printed.splitlines():
            name, _, value = line.partition(': ')
            if name in names or name.startswith('found '):
                key = names.get(name, 'boxes/' + name.replace(' ', '/'))
                scores[key] = float(value) / 100
        return scores


def flags_of(fields: dict[str, Any]) -> list[str]:
    """Fields of a config as arguments."""
    return [f'--config.{name}={value}' for name, value in fields.items()]


def call(command: Sequence[str], reads: bool = False) -> str:
    """Prints and runs a command; returns what it printed where that is read."""
    print(shlex.join(['python', *command[1:]]), flush=True)
    output = subprocess.PIPE if reads else None
    # The runs differ in little, so most of what one compiles serves the next.
    cache = {'JAX_COMPILATION_CACHE_DIR': str(repository.ROOT / 'runs' / 'compiled_detection')}
    done = subprocess.run(
        command,
        cwd=repository.ROOT,
        check=True,
        stdout=output,
        text=True,
        env={**os.environ, **cache},
    )
    return done.stdout or ''


def scores_of(run: pathlib.Path) -> dict[str, float]:
    """Scores of a finished run: '<evaluator>/<name>'."""
    newest = max((run / 'evals').glob('step_*/results.json'))
    evaluation = json.loads(newest.read_text())
    scores = {}
    for evaluator, result in evaluation.items():
        for name, value in result['scalars'].items():
            scores[f'{evaluator}/{name}'] = value
    return scores


def category_by_example(folder: pathlib.Path) -> dict[int, str]:
    """Number of a training picture -> the category of its first box."""
    document = json.loads((folder / 'train.json').read_text())
    names = {category['id']: category['name'] for category in document['categories']}
    example_of = {image['id']: image['example'] for image in document['images']}
    found: dict[int, str] = {}
    for box in document['annotations']:
        found.setdefault(example_of[box['image_id']], names[box['category_id']])
    return found


# ---- results


def entry(row: str, seed: int, scores: dict[str, float]) -> dict[str, Any]:
    """What the result file says of a row."""
    return {
        'row': row,
        'seed': seed,
        'scores': {name: round(value, 4) for name, value in scores.items()},
        'commit': repository.commit(),
        'date': datetime.date.today().isoformat(),
    }


def write(path: pathlib.Path, entries: list[dict[str, Any]]) -> None:
    """Writes the result file with these entries, in the order of the table."""
    entries.sort(key=lambda entry: (ROWS.index(entry['row']), entry['seed']))
    results = {'hardware': f'{os.cpu_count()} CPU cores', 'entries': entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + '\n')


def print_tables(entries: list[dict[str, Any]]) -> None:
    """Means over seeds and how far these are apart, in percent."""
    print(f'\n| row | seeds | {" | ".join(COLUMNS)} |')
    print('|---' * (len(COLUMNS) + 2) + '|')
    for row in ROWS[1:]:
        of_row = [entry['scores'] for entry in entries if entry['row'] == row]
        if of_row:
            cells = [cell(of_row, score) for score in COLUMNS.values()]
            print(f'| {row} | {len(of_row)} | {" | ".join(cells)} |')
    of_row = [entry['scores'] for entry in entries if entry['row'] == 'localisation']
    print('\n| one box of what is heard | β | IoU 0.5 | cIoU 0.5 | AUC | pointing |')
    print('|---' * 6 + '|')
    for title, name in (
        ('heat map', 'boxes/heat'),
        ('untrained heat map', 'untrained/heat'),
        ('saliency', 'boxes/saliency'),
        ('untrained saliency', 'untrained/saliency'),
        ('centre box', 'boxes/centre_box'),
        ('random box', 'boxes/random_box'),
    ):
        scores = ('beta', 'IoU', 'cIoU', 'AUC', 'pointing')
        print(f'| {title} | {" | ".join(cell(of_row, f"{name}/{score}") for score in scores)} |')


def cell(of_row: list[dict[str, float]], score: str) -> str:
    """Percent: the mean ± half of the range."""
    values = [scores[score] for scores in of_row if score in scores]
    if not values:
        return '–'
    mean = 100 * statistics.mean(values)
    if len(values) == 1:
        return f'{mean:.1f}'
    return f'{mean:.1f} ± {50 * (max(values) - min(values)):.1f}'


def main() -> None:
    """Makes what is missing; writes after each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default=','.join(ROWS), help='rows, with commas')
    parser.add_argument('--seeds', default='0,1')
    parser.add_argument('--runs', default='runs/detection', help='folder of all stages')
    parser.add_argument('--quick', action='store_true')
    args = parser.parse_args()
    rows = args.only.split(',')
    unknown = sorted(set(rows) - set(ROWS))
    if unknown:
        parser.error(f'--only: no row {", ".join(unknown)}; there are {", ".join(ROWS)}')
    runs = (repository.ROOT / args.runs).resolve() / ('quick' if args.quick else '')
    path = runs / 'detection.json' if args.quick else RESULTS
    entries = json.loads(path.read_text())['entries'] if path.exists() else []
    for seed in map(int, args.seeds.split(',')):
        chain = Chain(runs / f'seed{seed}', seed, args.quick)
        for row in rows:
            new = entry(row, seed, chain.scores(row))
            entries = [old for old in entries if (old['row'], old['seed']) != (row, seed)]
            entries.append(new)
            write(path, entries)
    print_tables(entries)
    print(f'written: {path}')


if __name__ == '__main__':
    main()
