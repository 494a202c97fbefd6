"""The shared encoder of the modality-agnostic model in one packed pass for all modalities against one pass each: same values, same products.

    python benchmarks/packed.py                       # CPU seconds forward and backward, interleaved; leave the machine alone meanwhile
    python benchmarks/packed.py --rounds=1 --block=1  # to see that it runs
    python benchmarks/packed.py --collectives         # nothing timed: what the compiled training step moves with fsdp=8

Tokens of the published agnostic model with DropToken 0.5 for each clip (video 785, audio 601, five sentences of 17) and those of
configs/demo.py:agnostic, through 4 layers of width 256 with dropout 0.1, float32, gradients of parameters and tokens. A ratio is that of the
minima of CPU seconds, and the median of each turn's. Collectives: a small agnostic model on eight simulated devices that share its parameters,
layers scanned and rematerialised as published. Writes benchmarks/results/packed.json.
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
import jax.numpy as jnp
import numpy as np
from flax.linen import meta
from ml_collections import ConfigDict

import data_pipelines
from configs import default
from vatt_jax.models.transformer import Encoder, pack, unpack
from vatt_jax.performance import hlo
from vatt_jax.rng import Packed, Rng
from vatt_jax.training import loop

RESULTS = ROOT / 'benchmarks' / 'results' / 'packed.json'
WIDTH = 256
# clips, and rows and tokens of each clip's streams: video, audio, text
SIZES = {
    'published tokens': (2, ((1, 785), (1, 601), (5, 17))),
    'demo': (32, ((1, 49), (1, 32), (3, 13))),
}


def passes(clips: int, layout, packed: bool):
    """(compiled gradient, its arguments)."""
    encoder = Encoder(4, WIDTH, 4 * WIDTH, 4)
    keys = jax.random.split(jax.random.key(0), len(layout) + 1)
    xs = [jax.random.normal(k, (clips * rows, n, WIDTH)) for k, (rows, n) in zip(keys, layout)]
    masks = [None, None, jnp.ones((clips * layout[2][0], layout[2][1]), bool).at[:, 12:].set(False)]
    base = Rng.create(0, 0, jnp.arange(clips))
    rngs = [
        base.at(str(i)).repeat(rows) if rows > 1 else base.at(str(i))
        for i, (rows, _) in enumerate(layout)
    ]
    params = jax.jit(lambda k: meta.unbox(encoder.init(k, xs[0], None, rngs[0], False)))(keys[-1])

    def loss(params, xs):
        if packed:
            out = unpack(
                encoder.apply(
                    params,
                    pack(xs, clips),
                    tuple(masks),
                    Packed.pack(rngs, layout),
                    True,
                    False,
                    layout,
                ),
                tuple((rows, 1) for rows, _ in layout),
            )
        else:
            out = [encoder.apply(params, x, m, r, True) for x, m, r in zip(xs, masks, rngs)]
        return sum(jnp.sin(x).sum() for x in out)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, xs).compile(), (
        params,
        xs,
    )


def timed(rounds: int, block: int) -> list[dict]:
    rows = []
    for name, (clips, layout) in SIZES.items():
        made = {kind: passes(clips, layout, kind == 'packed') for kind in ('packed', 'separate')}
        values = {kind: f(*args) for kind, (f, args) in made.items()}
        np.testing.assert_allclose(values['packed'][0], values['separate'][0], rtol=1e-4)
        cpu: dict[str, list] = {kind: [] for kind in made}
        for _ in range(rounds):
            for kind, (f, args) in made.items():
                began = time.process_time()
                for _ in range(block):
                    jax.block_until_ready(f(*args))
                cpu[kind].append((time.process_time() - began) / block)
        a, b = (np.array(cpu[kind]) for kind in ('packed', 'separate'))
        memory = {
            kind: f.memory_analysis().temp_size_in_bytes / 1e6 for kind, (f, _) in made.items()
        }
        ratio = {'minima': float(a.min() / b.min()), 'median': float(np.median(a / b))}
        rows.append(
            {
                'size': name,
                'cpu_seconds': {k: min(v) for k, v in cpu.items()},
                'packed_over_separate': ratio,
                'temporary_MB': memory,
            }
        )
        print(
            f'{name}: CPU s packed {a.min():.3f} separate {b.min():.3f}, ratio {ratio["minima"]:.3f} (median {ratio["median"]:.3f}); '
            'temporaries MB ' + '  '.join(f'{k} {v:.0f}' for k, v in memory.items()),
            flush=True,
        )
    return rows


def collectives() -> dict:
    """{packed | separate: rows of hlo.summary} of a training step."""
    out = {}
    for packed in (True, False):
        c = default.get_config()
        c.batch_size, c.mesh.replica, c.mesh.fsdp = 16, 1, 8
        c.model.inputs.video.update({'frames': 4, 'size': 32})
        c.model.inputs.audio.samples = 2048
        c.model.towers = ConfigDict(
            {
                'video': {'name': 'vit'},
                'audio': {'name': 'wat'},
                'text': {'name': 't5', 'vocab': 100},
            }
        )
        c.model.encoder = {'layers': 4, 'width': 64, 'mlp': 256, 'heads': 4, 'head_width': 16}
        c.model.shared, c.model.scan, c.model.remat, c.model.packed = True, True, 'full', packed
        c.data.source, c.data.synthetic_size = 'synthetic', 16
        built = loop.build(c, data_pipelines.open(c))
        with jax.set_mesh(built.mesh):
            rows = hlo.summary(
                hlo.read(built.step.lower(built.shape, built.batch).compile().as_text()).collectives
            )
        out['packed' if packed else 'separate'] = rows
        print(
            'packed' if packed else 'separate',
            f'{sum(r["received"] for r in rows) / 1e6:.2f} MB received by each device',
        )
        for r in rows:
            print(
                f'  {r["kind"]} {r["group"]} devices, {r["count"]:.0f} times, {r["bytes"] / 1e6:.2f} MB'
            )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--block', type=int, default=2)
    parser.add_argument('--collectives', action='store_true')
    flags = parser.parse_args()
    if flags.collectives:
        jax.config.update('jax_num_cpu_devices', 8)
    found = (
        {'collectives': collectives()}
        if flags.collectives
        else {
            'rows': timed(flags.rounds, flags.block),
            'rounds': flags.rounds,
            'block': flags.block,
            'load_average': os.getloadavg(),
        }
    )
    git = lambda *c: subprocess.run(
        ['git', *c], cwd=ROOT, text=True, capture_output=True
    ).stdout.strip()
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(
        json.dumps(
            before
            | {
                'commit': git('rev-parse', '--short', 'HEAD'),
                'date': datetime.date.today().isoformat(),
                'jax': jax.__version__,
                'hardware': f'{os.cpu_count()} × {platform.processor() or platform.machine()}',
                **found,
            },
            indent=1,
        )
        + '\n'
    )
    print(f'written: {RESULTS.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
