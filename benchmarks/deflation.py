"""Image networks out of a video network: naive and fitted deflation on frames of the playground.

    python run.py --config=configs/mmv.py:demo_fac_vat --workdir=runs/mmv_fac_vat
    # minutes on two CPU cores
    python benchmarks/deflation.py --run=runs/mmv_fac_vat
    python benchmarks/deflation.py --run=runs/mmv_fac_vat --fit=300 --pictures=256,128

Both stand beside the video network on tiled pictures. For each: mean absolute difference (L1) and
cosine to the tiled video network's pooled vectors on pictures of the test split, accuracy of a
logistic regression from the pictures' own features (train to test), and seconds for all pictures.
Writes benchmarks/results/deflation.json: one entry for each pretrained model by name, the others
are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import sys
import time

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
from support import repository

import run
import vatt_jax
from vatt_jax.adaptation import deflation

RESULTS = repository.RESULTS / 'deflation.json'


def read_pictures(model, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The middle frame of the first segments that have a class.

    Args:
        model: whose data they are.
        split: train | test.
        count: segments read.

    Returns:
        uint8 [N, H, W, 3] and the classes, int [N].
    """
    config = deflation.still_config(model.config)
    images, labels = [], []
    for batch in run.open_data(config).one_pass(split, 32, limit=count):
        use = batch['valid'] & batch['video']['valid'] & (batch['labels']['class'] >= 0)
        images.append(np.asarray(batch['video']['data'])[use, 0])
        labels.append(np.asarray(batch['labels']['class'])[use])
    return np.concatenate(images), np.concatenate(labels)


def deflate(pretrained: str, out: pathlib.Path, kinds: dict[str, list[str]]) -> dict[str, float]:
    """Makes the deflated models that are missing.

    Args:
        pretrained: folder of the run of the video network.
        out: folder of the deflated models.
        kinds: flags of --mode=deflate for each.

    Returns:
        Seconds of each that was made, {'KIND made': seconds}.
    """
    seconds = {}
    for kind, flags in kinds.items():
        if (out / kind).exists():
            continue
        begin = time.monotonic()
        with contextlib.redirect_stdout(sys.stderr):
            run.main(['--mode=deflate', f'--workdir={pretrained}', f'--out={out / kind}', *flags])
        seconds[f'{kind} made'] = round(time.monotonic() - begin, 1)
    return seconds


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def features_of(model, train_images, test_images) -> tuple[np.ndarray, np.ndarray, float]:
    """Pooled vectors of both sets of pictures, and the seconds that they take."""
    model.embed(image=test_images[:32])  # compiled before it is timed
    begin = time.monotonic()
    train, test = (
        model.embed(image=images)['image']['pooled'] for images in (train_images, test_images)
    )
    return train, test, time.monotonic() - begin


def print_table(rows: dict[str, dict]) -> None:
    """A row for each model."""
    print('| | L1 | cosine | accuracy | seconds |\n|---|---|---|---|---|')
    for name, row in rows.items():
        print(
            f'| {name} | {row["l1"]:.4f} | {row["cosine"]:.4f} '
            f'| {100 * row["accuracy"]:.1f} % | {row["seconds"]:.1f} |'
        )


def main() -> None:
    """Makes the deflated models that are missing, measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--run', default='runs/mmv_fac_vat', help='a run whose video tower is s3d or tsm_resnet'
    )
    parser.add_argument(
        '--out',
        default='',
        help='where the deflated models go, or are already; default: RUN_deflated',
    )
    parser.add_argument('--fit', type=int, default=500, help='steps of the fit')
    parser.add_argument('--rate', type=float, default=1e-3)
    parser.add_argument('--pictures', default='1024,512', help='to learn from and to test')
    args = parser.parse_args()
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    out = pathlib.Path(args.out or f'{args.run.rstrip("/")}_deflated')
    kinds = {'naive': ['--naive'], 'fitted': [f'--fit={args.fit}', f'--rate={args.rate}']}
    seconds = deflate(args.run, out, kinds)
    video = vatt_jax.load(args.run)
    models = {'tiled video': video, **{kind: vatt_jax.load(out / kind) for kind in kinds}}
    train_count, test_count = (int(count) for count in args.pictures.split(','))
    train_images, train_labels = read_pictures(video, 'train', train_count)
    test_images, test_labels = read_pictures(video, 'test', test_count)

    rows = {}
    reference = None
    for name, model in models.items():
        train, test, took = features_of(model, train_images, test_images)
        if reference is None:
            reference = test
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
        classifier.fit(train, train_labels)
        rows[name] = {
            'l1': float(np.abs(test - reference).mean()),
            'cosine': float((unit(test) * unit(reference)).sum(-1).mean()),
            'accuracy': float((classifier.predict(test) == test_labels).mean()),
            'seconds': round(took, 2),
        }

    done = pathlib.Path(args.run) / 'done.json'
    fit = {
        'steps': args.fit,
        'rate': args.rate,
        'batch': video.config.batch_size,
        **seconds,
        'loss': models['fitted'].info['deflated']['loss'],
    }
    about = {
        'commit': repository.commit('vatt_jax', 'configs'),
        'date': datetime.date.today().isoformat(),
        'hardware': f'{os.cpu_count()} CPU cores',
        'load': os.getloadavg(),
        'model': video.config.name,
        'pretraining_steps': json.loads(done.read_text())['step'] if done.exists() else None,
        'fit': fit,
        'pictures': [len(train_images), len(test_images)],
        'mean_magnitude': float(np.abs(reference).mean()),
        'chance': float(np.bincount(test_labels).max() / len(test_labels)),
    }
    entries = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    entries = [entry for entry in entries if entry['model'] != about['model']]
    entries.append({**about, 'models': rows})
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(entries, indent=1) + '\n')
    print_table(rows)
    print(
        f'{len(train_images)} and {len(test_images)} pictures, '
        f'chance {100 * about["chance"]:.1f} %; written: {RESULTS.relative_to(repository.ROOT)}'
    )


if __name__ == '__main__':
    main()
