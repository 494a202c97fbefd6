"""Image networks out of a video network: naive and fitted deflation beside the video network on tiled pictures, on frames of the playground.

    python run.py --config=configs/mmv.py:demo_fac_vat --workdir=runs/mmv_fac_vat
    python benchmarks/deflation.py --run=runs/mmv_fac_vat                         # minutes on two CPU cores
    python benchmarks/deflation.py --run=runs/mmv_fac_vat --fit=300 --pictures=256,128

For each: mean absolute difference (L1) and cosine to the tiled video network's pooled vectors on pictures of the test split, accuracy of a logistic
regression from the pictures' own features (train to test), and seconds for all pictures. Writes benchmarks/results/deflation.json: one entry for
each pretrained model by name, the others are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import subprocess
import sys
import time

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / 'benchmarks' / 'results' / 'deflation.json'

import numpy as np

import run
import vatt_jax
from vatt_jax.adaptation import deflation


def pictures(model, split: str, count: int):
    """(uint8 [N H W 3], labels [N]): the middle frame of the first segments that have a class."""
    config = deflation.still_config(model.config)
    images, labels = [], []
    for batch in run.open_data(config).one_pass(split, 32, limit=count):
        use = batch['valid'] & batch['video']['valid'] & (batch['labels']['class'] >= 0)
        images.append(np.asarray(batch['video']['data'])[use, 0])
        labels.append(np.asarray(batch['labels']['class'])[use])
    return np.concatenate(images), np.concatenate(labels)


def main():
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
    out = pathlib.Path(args.out or f'{args.run.rstrip("/")}_deflated')
    kinds = {'naive': ['--naive'], 'fitted': [f'--fit={args.fit}', f'--rate={args.rate}']}
    seconds = {}
    for kind, flags in kinds.items():
        begin = time.monotonic()
        if not (out / kind).exists():
            with contextlib.redirect_stdout(sys.stderr):
                run.main(['--mode=deflate', f'--workdir={args.run}', f'--out={out / kind}', *flags])
            seconds[f'{kind} made'] = round(time.monotonic() - begin, 1)
    video = vatt_jax.load(args.run)
    models = {'tiled video': video, **{kind: vatt_jax.load(out / kind) for kind in kinds}}
    counts = [int(n) for n in args.pictures.split(',')]
    (x, y), (x_test, y_test) = (
        pictures(video, split, n) for split, n in zip(('train', 'test'), counts)
    )
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, reference = {}, None
    for name, model in models.items():
        model.embed(image=x_test[:32])  # compiled before it is timed
        begin = time.monotonic()
        f, f_test = (model.embed(image=images)['image']['pooled'] for images in (x, x_test))
        took = time.monotonic() - begin
        reference = f_test if reference is None else reference
        unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(f, y)
        rows[name] = {
            'l1': float(np.abs(f_test - reference).mean()),
            'cosine': float((unit(f_test) * unit(reference)).sum(-1).mean()),
            'accuracy': float((probe.predict(f_test) == y_test).mean()),
            'seconds': round(took, 2),
        }
    git = lambda *command: subprocess.run(
        ('git', *command), capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    done = pathlib.Path(args.run) / 'done.json'
    about = {
        'commit': git('rev-parse', '--short', 'HEAD')
        + ('+' if git('status', '--porcelain', 'vatt_jax', 'configs') else ''),
        'date': datetime.date.today().isoformat(),
        'hardware': f'{os.cpu_count()} CPU cores',
        'load': os.getloadavg(),
        'model': video.config.name,
        'pretraining_steps': json.loads(done.read_text())['step'] if done.exists() else None,
        'fit': {
            'steps': args.fit,
            'rate': args.rate,
            'batch': video.config.batch_size,
            **seconds,
            'loss': models['fitted'].info['deflated']['loss'],
        },
        'pictures': [len(x), len(x_test)],
        'mean_magnitude': float(np.abs(reference).mean()),
        'chance': float(np.bincount(y_test).max() / len(y_test)),
    }
    kept = (
        [entry for entry in json.loads(RESULTS.read_text()) if entry['model'] != about['model']]
        if RESULTS.exists()
        else []
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([*kept, {**about, 'models': rows}], indent=1) + '\n')
    print('| | L1 | cosine | accuracy | seconds |\n|---|---|---|---|---|')
    for name, r in rows.items():
        print(
            f'| {name} | {r["l1"]:.4f} | {r["cosine"]:.4f} | {100 * r["accuracy"]:.1f} % | {r["seconds"]:.1f} |'
        )
    print(
        f'{len(x)} and {len(x_test)} pictures, chance {100 * about["chance"]:.1f} %; written: {RESULTS.relative_to(ROOT)}'
    )


if __name__ == '__main__':
    main()
