"""MMV's video towers, forward and forward + backward, ours against a plain restatement of the official networks, interleaved on this CPU.

    python benchmarks/mmv_step.py                         # about five minutes on two idle cores, compilation included
    python benchmarks/mmv_step.py --nets=tsm50 --repeats=3

2 clips of 16×112×112 frames, float32, running statistics of batch norm; S3D-G with the 7×7×7 stem, TSM-ResNet50. `forward` is the pooled vector,
`gradient` the value and gradient by all parameters of its mean. The restatement is one `lax.conv_general_dilated` after another on arrays [B T H W C]
(TSM: [B·T H W C]), batch norm as (x − mean) · rsqrt(var + ε) · scale + offset, `lax.reduce_window`, the shift by padding and concatenation. Both
sides read the same parameters under the same jax, and their results are compared. CPU and wall seconds: the least of the repeats. Compilation: once
each, the other side first in every other pair, from an empty cache. Writes benchmarks/results/mmv_step.json.
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

run.keep_freed_memory()  # as every run on the CPU does; both sides share the heap

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from vatt_jax.models.towers.resnet_v2 import DEPTHS
from vatt_jax.models.towers.s3d import S3D
from vatt_jax.models.towers.tsm_resnet import TSMResNet

RESULTS = ROOT / 'benchmarks' / 'results' / 'mmv_step.json'
B, FRAMES, SIZE, EPS = 2, 16, 112, 1e-5
NETS = {'s3d': lambda: S3D(space_to_depth=False), 'tsm50': TSMResNet}


# ---- the restatement


def conv(x, kernel, strides):
    axes = 'DHW'[-(x.ndim - 2) :]
    return jax.lax.conv_general_dilated(
        x, kernel, strides, 'SAME', dimension_numbers=(f'N{axes}C', f'{axes}IO', f'N{axes}C')
    )


def norm(x, params, stats):
    return (x - stats['mean']) * jax.lax.rsqrt(stats['var'] + EPS) * params['scale'] + params[
        'bias'
    ]


def pool(x, window, strides):
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *strides, 1), 'SAME'
    )


def s3d(params, stats, x):
    def unit(path, x, stride=1):
        p, s = params, stats
        for part in path.split('/'):
            p, s = p[part], s[part]
        for name in ('conv_0', 'conv_1'):
            if name in p:
                x = jax.nn.relu(
                    norm(
                        conv(x, p[name]['conv']['kernel'], (stride,) * 3),
                        p[name]['norm'],
                        s[name]['norm'],
                    )
                )
        if 'gate' in p:
            gate = jax.nn.sigmoid(
                x.mean((1, 2, 3)) @ p['gate']['dense']['kernel'] + p['gate']['dense']['bias']
            )
            x = x * gate[:, None, None, None]
        return x

    x = pool(unit('conv_1a', x, 2), (1, 3, 3), (1, 2, 2))
    x = pool(unit('conv_2c', unit('conv_2b', x)), (1, 3, 3), (1, 2, 2))
    for block in ('3b', '3c', '4b', '4c', '4d', '4e', '4f', '5b', '5c'):
        x = (
            pool(x, (3, 3, 3), (2, 2, 2))
            if block == '4b'
            else pool(x, (2, 2, 2), (2, 2, 2))
            if block == '5b'
            else x
        )
        u = lambda branch, x: unit(f'mixed_{block}/{branch}', x)  # noqa: B023
        x = jnp.concatenate(
            [
                u('b0', x),
                u('b1', u('b1_in', x)),
                u('b2', u('b2_in', x)),
                u('b3', pool(x, (3, 3, 3), (1, 1, 1))),
            ],
            -1,
        )
    return x.mean((1, 2, 3))


def tsm50(params, stats, x):
    params, stats = params['resnet'], stats['resnet']
    b, t = x.shape[:2]

    def shift(x):
        x = x.reshape(b, t, *x.shape[1:])
        fold = x.shape[-1] // 8
        later = jnp.pad(x[:, 1:, ..., -fold:], ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))
        earlier = jnp.pad(x[:, :-1, ..., :fold], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
        return jnp.concatenate([later, x[..., fold:-fold], earlier], -1).reshape(
            b * t, *x.shape[2:]
        )

    active = lambda name, which, x: jax.nn.relu(norm(x, params[name][which], stats[name][which]))
    x = pool(conv(x.reshape(b * t, *x.shape[2:]), params['stem']['kernel'], (2, 2)), (3, 3), (2, 2))
    for u, count in enumerate(DEPTHS[50][0]):
        for i in range(count):
            name, stride = f'unit_{u}_block_{i}', 2 if u and not i else 1
            block, p = params[name], active(name, 'norm_0', x)
            short = (
                conv(p, block['shortcut']['kernel'], (stride,) * 2) if 'shortcut' in block else x
            )
            y = conv(shift(p), block['conv_0']['kernel'], (1, 1))
            y = conv(active(name, 'norm_1', y), block['conv_1']['kernel'], (stride,) * 2)
            x = short + conv(active(name, 'norm_2', y), block['conv_2']['kernel'], (1, 1))
    x = jax.nn.relu(norm(x, params['norm'], stats['norm']))
    return x.mean((1, 2)).reshape(b, t, -1).mean(1)


# ---- both sides


def sides(name):
    net = NETS[name]()
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(B, FRAMES, SIZE, SIZE, 3)), jnp.float32)
    valid = jnp.ones((B,), bool)
    variables = meta.unbox(
        jax.jit(lambda: net.init(jax.random.key(0), x[:1, :2, :32, :32], valid[:1], False))()
    )
    params, stats = variables['params'], variables['batch_stats']
    ours = lambda params, stats, x: net.apply(
        {'params': params, 'batch_stats': stats}, x, valid, False
    )[0]
    return {'ours': ours, 'restatement': globals()[name]}, (params, stats, x)


def mean_and_gradient(f):
    return jax.value_and_grad(lambda *args: f(*args).mean())


def measure(name, repeats, rows):
    functions, args = sides(name)
    for what in ('forward', 'gradient'):
        make = (lambda f: f) if what == 'forward' else mean_and_gradient
        compiled, compiling = {}, {}
        for side in list(functions)[:: -1 if what == 'forward' else 1]:
            start = time.perf_counter(), time.process_time()
            compiled[side] = jax.jit(make(functions[side])).lower(*args).compile()
            compiling[side] = time.perf_counter() - start[0], time.process_time() - start[1]
        results = {side: jax.tree.leaves(f(*args)) for side, f in compiled.items()}
        errors = [
            float(jnp.linalg.norm(a - b) / (jnp.linalg.norm(b) + 1e-20))
            for a, b in zip(*results.values())
        ]
        seconds = {side: [np.inf, np.inf] for side in functions}
        for _ in range(repeats):
            for side, f in compiled.items():
                start = time.process_time(), time.perf_counter()
                jax.block_until_ready(f(*args))
                spent = time.process_time() - start[0], time.perf_counter() - start[1]
                seconds[side] = [min(a, b) for a, b in zip(seconds[side], spent)]
        for side in functions:
            (cpu, wall), (compile_wall, compile_cpu) = seconds[side], compiling[side]
            rows.append(
                {
                    'net': name,
                    'what': what,
                    'side': side,
                    'cpu_seconds': cpu,
                    'wall_seconds': wall,
                    'compile_seconds': compile_wall,
                    'compile_cpu_seconds': compile_cpu,
                    'times_faster_cpu': seconds['restatement'][0] / cpu,
                    'times_faster_wall': seconds['restatement'][1] / wall,
                    'largest_relative_difference': max(errors),
                }
            )
            print(
                f'{name:6} {what:9} {side:12} {cpu:7.3f} CPU s {wall:7.3f} s  × {rows[-1]["times_faster_cpu"]:.2f} CPU × '
                f'{rows[-1]["times_faster_wall"]:.2f} wall  compiled in {compile_wall:5.1f} s  difference {max(errors):.1e}',
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--nets', default=','.join(NETS))
    parser.add_argument('--repeats', type=int, default=7)
    args = parser.parse_args()
    git = lambda *command: subprocess.run(
        ['git', *command], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    info = pathlib.Path('/proc/cpuinfo')
    models = (
        [
            line.split(':')[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith('model name')
        ]
        if info.exists()
        else []
    )
    rows = []
    for name in args.nets.split(','):
        measure(name, args.repeats, rows)
    source = ('vatt_jax/models', 'benchmarks/mmv_step.py')
    about = {
        'commit': git('rev-parse', '--short', 'HEAD')
        + ('+' if git('status', '--porcelain', *source) else ''),
        'date': datetime.date.today().isoformat(),
        'jax': jax.__version__,
        'load_average': os.getloadavg(),
        'repeats': args.repeats,
        'hardware': f'{os.cpu_count()} × {models[0] if models else platform.processor()}',
        'config': {'batch': B, 'frames': FRAMES, 'size': SIZE, 'dtype': 'float32'},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**about, 'rows': rows}, indent=1) + '\n')
    print(f'written: {RESULTS.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
