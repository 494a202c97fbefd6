"""Exact microbatches against plain accumulation: time of a step, and memory of a whole batch.

    # 6 rounds of 3 steps for each variant; leave the machine alone meanwhile
    python benchmarks/microbatch.py
    # to see that it runs
    python benchmarks/microbatch.py --rounds=1 --block=1

The model of benchmarks/vatt_step.py in small (towers of 4 layers, width 256, DropToken 0.5,
dropout 0.1, float32), 16 clips in 4 parts, with rematerialisation and without. Variants take turns;
a ratio is that of the minima of CPU seconds, and the median of each turn's ratio. Memory:
temporaries of the compiled step. Writes benchmarks/results/microbatch.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import numpy as np
from ml_collections import ConfigDict
from support import repository

import data_pipelines
from configs import default
from vatt_jax.inference import feature_extractor
from vatt_jax.modes import process
from vatt_jax.training import loop

process.keep_freed_memory()

RESULTS = repository.RESULTS / 'microbatch.json'

# variant -> (parts of the batch, accumulation)
VARIANTS = {'whole': (1, 'plain'), 'plain': (4, 'plain'), 'exact': (4, 'exact')}


def make_config(accumulate: int, accumulation: str, remat: str) -> ConfigDict:
    """The config of a variant.

    Args:
        accumulate: parts of the batch.
        accumulation: plain | exact.
        remat: rematerialisation, none | full.

    Returns:
        The config.
    """
    config = default.get_config()
    config.name = 'microbatch'
    config.steps = 1000
    config.batch_size = 16
    config.accumulate = accumulate
    config.accumulation = accumulation
    config.model.inputs.video.update({'frames': 16, 'size': 112})
    config.model.inputs.audio.update({'samples': 32768})
    size = {'layers': 4, 'width': 256, 'mlp': 1024, 'heads': 4, 'head_width': 64}
    config.model.towers = ConfigDict(
        {
            'video': {'name': 'vit', **size},
            'audio': {'name': 'wat', **size},
            'text': {'name': 't5', **size, 'vocab': 1000},
        }
    )
    config.model.remat = remat
    config.optimizer.schedule.warmup = 10
    config.data.source = 'synthetic'
    config.data.synthetic_size = 16
    config.mesh.replica = 1
    return config


class Step:
    """A compiled training step with its state and one batch."""

    def __init__(self, config: ConfigDict):
        data = data_pipelines.open(config)
        built = loop.build(config, data)
        host_batch = next(data.train(0, config.batch_size))
        with jax.set_mesh(built.mesh):
            self.batch = feature_extractor.place_on_mesh(host_batch, built.mesh)
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


def compare(remat: str, rounds: int, block: int) -> dict:
    """Times all variants in turns.

    Args:
        remat: rematerialisation, none | full.
        rounds: turns of each variant.
        block: steps in a turn.

    Returns:
        A row of the result file.
    """
    variants = {
        name: Step(make_config(accumulate, accumulation, remat))
        for name, (accumulate, accumulation) in VARIANTS.items()
    }
    for step in variants.values():
        step(1)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in variants.items():
            times[name].append(step(block))

    wall = {name: np.array(turns)[:, 0] for name, turns in times.items()}
    cpu = {name: np.array(turns)[:, 1] for name, turns in times.items()}
    ratio = {
        'minima': float(cpu['exact'].min() / cpu['plain'].min()),
        'median': float(np.median(cpu['exact'] / cpu['plain'])),
    }
    memory = {name: step.temporaries / 1e6 for name, step in variants.items()}
    shown_seconds = '  '.join(f'{name} {seconds.min():.3f}' for name, seconds in cpu.items())
    shown_memory = '  '.join(f'{name} {megabytes:.0f}' for name, megabytes in memory.items())
    print(
        f'remat {remat}: CPU s {shown_seconds}  '
        f'exact / plain {ratio["minima"]:.2f} (median {ratio["median"]:.2f})  '
        f'temporaries MB {shown_memory}',
        flush=True,
    )
    return {
        'remat': remat,
        'cpu_seconds': {name: float(seconds.min()) for name, seconds in cpu.items()},
        'wall_seconds': {name: float(seconds.min()) for name, seconds in wall.items()},
        'exact_over_plain': ratio,
        'temporary_MB': memory,
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--rounds', type=int, default=6)
    parser.add_argument('--block', type=int, default=3)
    flags = parser.parse_args()
    rows = [compare(remat, flags.rounds, flags.block) for remat in ('none', 'full')]
    results = {
        'commit': repository.git('rev-parse', '--short', 'HEAD'),
        'date': datetime.date.today().isoformat(),
        'jax': jax.__version__,
        'hardware': f'{os.cpu_count()} × {platform.processor() or platform.machine()}',
        'load_average': os.getloadavg(),
        'rounds': flags.rounds,
        'block': flags.block,
        'rows': rows,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
