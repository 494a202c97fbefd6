"""MMV's video towers, ours against a plain restatement of the official networks, on this CPU.

    python benchmarks/mmv_step.py                         # about five minutes on two idle cores,
                                                          # compilation included
    python benchmarks/mmv_step.py --nets=tsm50 --repeats=3

Forward and forward + backward, interleaved: 2 clips of 16×112×112 frames, float32, running
statistics of batch norm; S3D-G with the 7×7×7 stem, TSM-ResNet50. `forward` is the pooled vector,
`gradient` the value and gradient by all parameters of its mean. The restatement is one
`lax.conv_general_dilated` after another on arrays [B T H W C] (TSM: [B·T H W C]), batch norm as
(x − mean) · rsqrt(var + ε) · scale + offset, `lax.reduce_window`, the shift by padding and
concatenation. Both sides read the same parameters under the same jax, and their results are
compared. CPU and wall seconds: the least of the repeats. Compilation: once each, the other side
first in every other pair, from an empty cache. Writes benchmarks/results/mmv_step.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta
from support import repository

from vatt_jax.models.towers.resnet_v2 import DEPTHS
from vatt_jax.models.towers.s3d import S3D
from vatt_jax.models.towers.tsm_resnet import TSMResNet
from vatt_jax.modes import process

# As every run on the CPU does; both sides share the heap. Before they compute.
process.keep_freed_memory()

RESULTS = repository.RESULTS / 'mmv_step.json'
BATCH, FRAMES, SIZE, EPS = 2, 16, 112, 1e-5
OURS, RESTATEMENT = 'ours', 'restatement'


# ---- the restatement


def conv(x, kernel, strides: Sequence[int]):
    """A convolution over two or three axes with TensorFlow's padding."""
    axes = 'HW' if x.ndim == 4 else 'DHW'
    layout = f'N{axes}C'
    return jax.lax.conv_general_dilated(
        x, kernel, strides, 'SAME', dimension_numbers=(layout, f'{axes}IO', layout)
    )


def batch_norm(x, params, stats):
    """Batch norm by running statistics."""
    normalised = (x - stats['mean']) * jax.lax.rsqrt(stats['var'] + EPS)
    return normalised * params['scale'] + params['bias']


def max_pool(x, window: Sequence[int], strides: Sequence[int]):
    """The largest in each window, with TensorFlow's padding."""
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *strides, 1), 'SAME'
    )


def s3d_unit(params, stats, x, stride: int = 1):
    """S3D-G's unit: separable convolutions, each with batch norm, and a gate where it has one."""
    for name in ('conv_0', 'conv_1'):
        if name in params:
            x = conv(x, params[name]['conv']['kernel'], (stride,) * 3)
            x = jax.nn.relu(batch_norm(x, params[name]['norm'], stats[name]['norm']))
    if 'gate' in params:
        dense = params['gate']['dense']
        gate = jax.nn.sigmoid(x.mean((1, 2, 3)) @ dense['kernel'] + dense['bias'])
        x = x * gate[:, None, None, None]
    return x


def s3d_mixed(params, stats, x):
    """S3D-G's inception block: four branches side by side."""

    def unit(name: str, x):
        return s3d_unit(params[name], stats[name], x)

    branches = [
        unit('b0', x),
        unit('b1', unit('b1_in', x)),
        unit('b2', unit('b2_in', x)),
        unit('b3', max_pool(x, (3, 3, 3), (1, 1, 1))),
    ]
    return jnp.concatenate(branches, -1)


def s3d(params, stats, x):
    """S3D-G: [B T H W 3] -> [B D]."""
    x = s3d_unit(params['conv_1a'], stats['conv_1a'], x, stride=2)
    x = max_pool(x, (1, 3, 3), (1, 2, 2))
    x = s3d_unit(params['conv_2b'], stats['conv_2b'], x)
    x = s3d_unit(params['conv_2c'], stats['conv_2c'], x)
    x = max_pool(x, (1, 3, 3), (1, 2, 2))
    for block in ('3b', '3c', '4b', '4c', '4d', '4e', '4f', '5b', '5c'):
        if block == '4b':
            x = max_pool(x, (3, 3, 3), (2, 2, 2))
        if block == '5b':
            x = max_pool(x, (2, 2, 2), (2, 2, 2))
        x = s3d_mixed(params[f'mixed_{block}'], stats[f'mixed_{block}'], x)
    return x.mean((1, 2, 3))


def temporal_shift(x, frames: int):
    """An eighth of the channels from the next frame, an eighth from the previous: [B·T H W C]."""
    shape = x.shape
    x = x.reshape(-1, frames, *shape[1:])
    fold = x.shape[-1] // 8
    later = jnp.pad(x[:, 1:, ..., -fold:], ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))
    earlier = jnp.pad(x[:, :-1, ..., :fold], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
    shifted = jnp.concatenate([later, x[..., fold:-fold], earlier], -1)
    return shifted.reshape(shape)


def tsm50_block(params, stats, x, stride: int, frames: int):
    """TSM-ResNet50's block, norm and ReLU before each convolution: [B·T H W C]."""

    def activate(name: str, x):
        return jax.nn.relu(batch_norm(x, params[name], stats[name]))

    active = activate('norm_0', x)
    shortcut = x
    if 'shortcut' in params:
        shortcut = conv(active, params['shortcut']['kernel'], (stride,) * 2)
    y = conv(temporal_shift(active, frames), params['conv_0']['kernel'], (1, 1))
    y = conv(activate('norm_1', y), params['conv_1']['kernel'], (stride,) * 2)
    return shortcut + conv(activate('norm_2', y), params['conv_2']['kernel'], (1, 1))


def tsm50(params, stats, x):
    """TSM-ResNet50: [B T H W 3] -> [B D]."""
    params, stats = params['resnet'], stats['resnet']
    batch, frames = x.shape[:2]
    x = conv(x.reshape(batch * frames, *x.shape[2:]), params['stem']['kernel'], (2, 2))
    x = max_pool(x, (3, 3), (2, 2))
    for unit, count in enumerate(DEPTHS[50][0]):
        for i in range(count):
            stride = 2 if unit > 0 and i == 0 else 1
            name = f'unit_{unit}_block_{i}'
            x = tsm50_block(params[name], stats[name], x, stride, frames)
    x = jax.nn.relu(batch_norm(x, params['norm'], stats['norm']))
    return x.mean((1, 2)).reshape(batch, frames, -1).mean(1)


# ---- both sides


def build_s3d() -> S3D:
    """S3D-G with the 7×7×7 stem."""
    return S3D(space_to_depth=False)


# Net -> (ours, the restatement).
NETS = {'s3d': (build_s3d, s3d), 'tsm50': (TSMResNet, tsm50)}


def sides(name: str) -> tuple[dict[str, Callable], tuple]:
    """Both sides of a net, as functions of (params, stats, x), and these arguments."""
    build, restatement = NETS[name]
    net = build()
    frames = np.random.default_rng(0).uniform(size=(BATCH, FRAMES, SIZE, SIZE, 3))
    x = jnp.asarray(frames, jnp.float32)
    valid = jnp.ones((BATCH,), bool)

    @jax.jit
    def init():
        return net.init(jax.random.key(0), x[:1, :2, :32, :32], valid[:1], False)

    variables = meta.unbox(init())
    params, stats = variables['params'], variables['batch_stats']

    def ours(params, stats, x):
        variables = {'params': params, 'batch_stats': stats}
        return net.apply(variables, x, valid, False)[0]

    return {OURS: ours, RESTATEMENT: restatement}, (params, stats, x)


def mean_and_gradient(function: Callable) -> Callable:
    """The mean of a function's result, and its gradient by the first argument."""

    def mean(*args):
        return function(*args).mean()

    return jax.value_and_grad(mean)


def compile_both(functions: dict[str, Callable], order: Sequence[str], args: tuple):
    """({side: compiled}, {side: (wall, CPU) seconds of compiling}), in the order given."""
    compiled, seconds = {}, {}
    for side in order:
        wall, cpu = time.perf_counter(), time.process_time()
        compiled[side] = jax.jit(functions[side]).lower(*args).compile()
        seconds[side] = time.perf_counter() - wall, time.process_time() - cpu
    return compiled, seconds


def time_both(compiled: dict[str, Callable], args: tuple, repeats: int):
    """({side: CPU seconds}, {side: wall seconds}): the least of the repeats, taken in turns."""
    cpu_seconds = dict.fromkeys(compiled, np.inf)
    wall_seconds = dict.fromkeys(compiled, np.inf)
    for _ in range(repeats):
        for side, function in compiled.items():
            cpu, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(function(*args))
            cpu_seconds[side] = min(cpu_seconds[side], time.process_time() - cpu)
            wall_seconds[side] = min(wall_seconds[side], time.perf_counter() - wall)
    return cpu_seconds, wall_seconds


def largest_difference(compiled: dict[str, Callable], args: tuple) -> float:
    """Of both sides' results, relative to the restatement's norm."""
    ours, restated = (jax.tree.leaves(compiled[side](*args)) for side in (OURS, RESTATEMENT))
    differences = []
    for a, b in zip(ours, restated, strict=True):
        differences.append(float(jnp.linalg.norm(a - b) / (jnp.linalg.norm(b) + 1e-20)))
    return max(differences)


def measure(name: str, repeats: int) -> list[dict]:
    """The rows of a net: forward and gradient, each of both sides."""
    functions, args = sides(name)
    gradients = {side: mean_and_gradient(function) for side, function in functions.items()}
    cases = (
        ('forward', functions, (RESTATEMENT, OURS)),
        ('gradient', gradients, (OURS, RESTATEMENT)),
    )
    rows = []
    for what, of_sides, order in cases:
        compiled, compile_seconds = compile_both(of_sides, order, args)
        difference = largest_difference(compiled, args)
        cpu_seconds, wall_seconds = time_both(compiled, args, repeats)
        for side in functions:
            compile_wall, compile_cpu = compile_seconds[side]
            cpu, wall = cpu_seconds[side], wall_seconds[side]
            row = {
                'net': name,
                'what': what,
                'side': side,
                'cpu_seconds': cpu,
                'wall_seconds': wall,
                'compile_seconds': compile_wall,
                'compile_cpu_seconds': compile_cpu,
                'times_faster_cpu': cpu_seconds[RESTATEMENT] / cpu,
                'times_faster_wall': wall_seconds[RESTATEMENT] / wall,
                'largest_relative_difference': difference,
            }
            rows.append(row)
            print(
                f'{name:6} {what:9} {side:12} {cpu:7.3f} CPU s {wall:7.3f} s  '
                f'× {row["times_faster_cpu"]:.2f} CPU × {row["times_faster_wall"]:.2f} wall  '
                f'compiled in {compile_wall:5.1f} s  difference {difference:.1e}',
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--nets', default=','.join(NETS))
    parser.add_argument('--repeats', type=int, default=7)
    args = parser.parse_args()
    rows = []
    for name in args.nets.split(','):
        rows += measure(name, args.repeats)
    results = {
        'commit': repository.commit('vatt_jax/models', 'benchmarks/mmv_step.py'),
        'date': datetime.date.today().isoformat(),
        'jax': jax.__version__,
        'load_average': os.getloadavg(),
        'repeats': args.repeats,
        'hardware': f'{os.cpu_count()} × {repository.processor()}',
        'config': {'batch': BATCH, 'frames': FRAMES, 'size': SIZE, 'dtype': 'float32'},
        'rows': rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
