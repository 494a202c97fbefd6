"""Exact microbatches against plain accumulation: time of a step, side by side, and memory against the whole batch.

    python benchmarks/microbatch.py                       # 6 rounds of 3 steps for each variant; leave the machine alone meanwhile
    python benchmarks/microbatch.py --rounds=1 --block=1  # to see that it runs

The model of benchmarks/vatt_step.py in small (towers of 4 layers, width 256, DropToken 0.5, dropout 0.1, float32), 16 clips in 4 parts, with
rematerialisation and without. Variants take turns; a ratio is that of the minima of CPU seconds, and of the medians of each turn's ratio.
Memory: temporaries of the compiled step. Writes benchmarks/results/microbatch.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['JAX_PLATFORMS'] = 'cpu'

import run

run.keep_freed_memory()

import jax
import numpy as np
from ml_collections import ConfigDict

import data_pipelines
from configs import default
from vatt_jax.inference import feature_extractor
from vatt_jax.training import loop

RESULTS = ROOT / 'benchmarks' / 'results' / 'microbatch.json'


def config(accumulate: int, accumulation: str, remat: str):
    c = default.get_config()
    c.name, c.steps, c.batch_size, c.accumulate, c.accumulation = (
        'microbatch',
        1000,
        16,
        accumulate,
        accumulation,
    )
    c.model.inputs.video.update({'frames': 16, 'size': 112})
    c.model.inputs.audio.update({'samples': 32768})
    size = {'layers': 4, 'width': 256, 'mlp': 1024, 'heads': 4, 'head_width': 64}
    c.model.towers = ConfigDict(
        {
            'video': {'name': 'vit', **size},
            'audio': {'name': 'wat', **size},
            'text': {'name': 't5', **size, 'vocab': 1000},
        }
    )
    c.model.remat, c.optimizer.schedule.warmup = remat, 10
    c.data.source, c.data.synthetic_size, c.mesh.replica = 'synthetic', 16, 1
    return c


class Step:
    def __init__(self, c):
        data = data_pipelines.open(c)
        built = loop.build(c, data)
        with jax.set_mesh(built.mesh):
            self.batch = feature_extractor.place_on_mesh(
                next(data.train(0, c.batch_size)), built.mesh
            )
            self.state = built.init()
            self.compiled = built.step.lower(self.state, self.batch).compile()
        self.temporaries = self.compiled.memory_analysis().temp_size_in_bytes

    def __call__(self, steps: int) -> tuple[float, float]:
        """(wall, CPU) seconds of one of `steps` steps."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready(metrics['loss'])
        return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--rounds', type=int, default=6)
    parser.add_argument('--block', type=int, default=3)
    flags = parser.parse_args()
    rows = []
    for remat in ('none', 'full'):
        of = {'whole': (1, 'plain'), 'plain': (4, 'plain'), 'exact': (4, 'exact')}
        variants = {name: Step(config(*how, remat)) for name, how in of.items()}
        times: dict[str, list] = {name: [] for name in variants}
        for step in variants.values():
            step(1)
        for _ in range(flags.rounds):
            for name, step in variants.items():
                times[name].append(step(flags.block))
        cpu = {name: np.array(t)[:, 1] for name, t in times.items()}
        ratio = {
            'minima': float(cpu['exact'].min() / cpu['plain'].min()),
            'median': float(np.median(cpu['exact'] / cpu['plain'])),
        }
        memory = {name: step.temporaries / 1e6 for name, step in variants.items()}
        rows.append(
            {
                'remat': remat,
                'cpu_seconds': {k: float(v.min()) for k, v in cpu.items()},
                'wall_seconds': {k: float(np.array(t)[:, 0].min()) for k, t in times.items()},
                'exact_over_plain': ratio,
                'temporary_MB': memory,
            }
        )
        print(
            f'remat {remat}: CPU s '
            + '  '.join(f'{k} {v.min():.3f}' for k, v in cpu.items())
            + f'  exact / plain {ratio["minima"]:.2f} (median '
            f'{ratio["median"]:.2f})  temporaries MB '
            + '  '.join(f'{k} {v:.0f}' for k, v in memory.items()),
            flush=True,
        )
    git = lambda *c: subprocess.run(
        ['git', *c], cwd=ROOT, text=True, capture_output=True
    ).stdout.strip()
    RESULTS.write_text(
        json.dumps(
            {
                'commit': git('rev-parse', '--short', 'HEAD'),
                'date': datetime.date.today().isoformat(),
                'jax': jax.__version__,
                'hardware': f'{os.cpu_count()} × {platform.processor() or platform.machine()}',
                'load_average': os.getloadavg(),
                'rounds': flags.rounds,
                'block': flags.block,
                'rows': rows,
            },
            indent=1,
        )
        + '\n'
    )
    print(f'written: {RESULTS.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
