"""Memory and time of contrastive losses, value and gradient: blockwise (vatt_jax/losses/nce.py) against the best dense form we know.

    python benchmarks/loss_memory.py                      # CPU: memory from the compiler, time side by side; TPU: memory, compiled only
    python benchmarks/loss_memory.py --parts=tpu          # needs libtpu, no TPU: pip install "jax[tpu]==<your jax version>"
    python benchmarks/loss_memory.py --sizes=1024,2048 --repeats=5
    python benchmarks/loss_memory.py --parts=tpu --devices=8,32 --losses=symmetric

Embeddings are already on the unit sphere (512 wide; float32 on CPU, bfloat16 on TPU), so that only the loss is measured. Dense is the
fastest of two formulations: automatic derivative of two log-sum-exps and a row-wise dot product, and a hand-written derivative with one
weight matrix. Runs are interleaved and the minimum over repeats is taken, in CPU seconds (steady on a shared machine) and wall seconds.
Writes benchmarks/results/loss_memory.json; a part that does not run, and a compilation that is not chosen, keep their former results.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
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
# libtpu compiles for a named topology without its hardware; these keep it from looking for any and from talking.
for name, value in {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0',
    'TPU_STDERR_LOG_LEVEL': '3',
    'TPU_MIN_LOG_LEVEL': '3',
    'TF_CPP_MIN_LOG_LEVEL': '3',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}.items():
    os.environ.setdefault(name, value)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vatt_jax.losses import nce
from vatt_jax.losses.blockwise import MAX_STORED_SCORES
from vatt_jax.losses.similarity import How

WIDTH = 512
RESULTS = ROOT / 'benchmarks' / 'results' / 'loss_memory.json'
TIMED = ('symmetric', 'asymmetric', 'mil_nce')
CANDIDATES = {'symmetric': 1, 'asymmetric': 1, 'mil_nce': 5, 'siglip': 1, 'nt_xent': 1}


def combine(form, rows, columns, own):
    """The loss from log-sum-exps: rows [B], columns [B K], own scores [B K]."""
    columns, positive = jax.nn.logsumexp(columns, 1), jax.nn.logsumexp(own, 1)
    return jnp.mean(
        rows + columns - 2 * positive
        if form == 'symmetric'
        else jnp.logaddexp(rows, columns) - positive
    )


def product(a, b, contracted):
    return jax.lax.dot_general(
        a, b, (((contracted[0],), (contracted[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def dense_automatic(form, temperature):
    def loss(x, y):
        s = product(x, y.reshape(-1, WIDTH), (1, 1)) / temperature
        # Row by row: taking a diagonal of the matrix does not even compile at size on TPU.
        own = jnp.sum(x[:, None].astype(jnp.float32) * y, -1) / temperature
        return combine(form, jax.nn.logsumexp(s, 1), jax.nn.logsumexp(s, 0).reshape(own.shape), own)

    return loss


def dense_by_hand(form, temperature):
    @jax.custom_vjp
    def sums(x, y):
        return forward(x, y)[0]

    def forward(x, y):
        s = product(x, y, (1, 1)) / temperature
        rows, columns = jax.nn.logsumexp(s, 1), jax.nn.logsumexp(s, 0)
        return (rows, columns), (x, y, s, rows, columns)

    def backward(residuals, cotangents):
        x, y, s, rows, columns = residuals
        g, h = cotangents
        w = jnp.exp(s - rows[:, None]) * (g / temperature)[:, None] + jnp.exp(s - columns) * (
            h / temperature
        )
        w = w.astype(x.dtype)
        return product(w, y, (1, 0)).astype(x.dtype), product(w, x, (0, 0)).astype(y.dtype)

    sums.defvjp(forward, backward)

    def loss(x, y):
        rows, columns = sums(x, y.reshape(-1, WIDTH))
        own = jnp.sum(x[:, None].astype(jnp.float32) * y, -1) / temperature
        return combine(form, rows, columns.reshape(own.shape), own)

    return loss


def blockwise(form, how, normalise=False):
    options = {'temperature': 0.07, 'how': how}
    if form != 'mil_nce':
        options['normalise'] = normalise
    return lambda x, y: getattr(nce, form)(x, y, **options)


def with_gradient(loss):
    return jax.jit(jax.value_and_grad(loss, (0, 1)))


# ---- CPU: memory and time


def cpu(sizes, repeats, forms):
    out = []
    print(
        f'{"loss":11} {"B":>6} {"form":18} {"temp MB":>9} {"less":>7} {"CPU s":>8} {"ratio":>6} {"wall s":>8} {"ratio":>6}'
    )
    for form in forms:
        k = CANDIDATES[form]
        for b in sizes:
            if b * k > max(sizes) * 2:
                continue
            rng = np.random.default_rng(0)
            x = rng.normal(size=(b, WIDTH))
            y = rng.normal(size=(b, k, WIDTH)) + x[:, None]
            x, y = (
                jnp.asarray(a / np.linalg.norm(a, axis=-1, keepdims=True), jnp.float32)
                for a in (x, y)
            )
            losses = {
                'dense, automatic': dense_automatic(form, 0.07),
                'dense, by hand': dense_by_hand(form, 0.07),
                'blockwise': blockwise(form, How()),
            }
            if b * b * k <= MAX_STORED_SCORES:  # there `auto` keeps the scores
                losses['blockwise, 512'] = blockwise(form, How(block=512))
            compiled = {name: with_gradient(f).lower(x, y).compile() for name, f in losses.items()}
            memory = {name: f.memory_analysis().temp_size_in_bytes for name, f in compiled.items()}
            seconds = {name: [np.inf, np.inf] for name in losses}
            values = {}
            for _ in range(repeats):
                for name, f in compiled.items():
                    cpu_start, wall_start = time.process_time(), time.perf_counter()
                    values[name] = jax.block_until_ready(f(x, y))
                    spent = time.process_time() - cpu_start, time.perf_counter() - wall_start
                    seconds[name] = [min(a, s) for a, s in zip(seconds[name], spent)]
            dense = [n for n in losses if n.startswith('dense')]
            least = min(memory[n] for n in dense)
            best = [min(seconds[n][i] for n in dense) for i in (0, 1)]
            want, (gx, gy) = values['dense, automatic']
            for name in losses:
                value, grads = values[name]
                error = [float(abs(value - want) / abs(want))] + [
                    float(jnp.linalg.norm(a - w) / jnp.linalg.norm(w))
                    for a, w in zip(grads, (gx, gy))
                ]
                row = {
                    'loss': form,
                    'B': b,
                    'K': k,
                    'form': name,
                    'temp_bytes': memory[name],
                    'times_less_memory': least / memory[name],
                    'cpu_seconds': seconds[name][0],
                    'cpu_ratio': seconds[name][0] / best[0],
                    'wall_seconds': seconds[name][1],
                    'wall_ratio': seconds[name][1] / best[1],
                    'relative_difference': max(error),
                }
                out.append(row)
                print(
                    f'{form:11} {b:6} {name:18} {memory[name] / 1e6:9.2f} {row["times_less_memory"]:7.1f} {row["cpu_seconds"]:8.3f} '
                    f'{row["cpu_ratio"]:6.2f} {row["wall_seconds"]:8.3f} {row["wall_ratio"]:6.2f}',
                    flush=True,
                )
    return out


# ---- TPU: memory by compiling

K = 1024
# (loss, global B, devices, form); forms: dense | auto | gather | ring, and `normalised`: auto with normalisation from raw embeddings inside
COMPILED = [
    *(
        ('symmetric', b * K, 1, form)
        for b, form in (
            (8, 'dense'),
            (8, 'auto'),
            (32, 'dense'),
            (32, 'auto'),
            (128, 'dense'),
            (128, 'auto'),
            (128, 'normalised'),
            (1024, 'auto'),
        )
    ),
    *(
        ('asymmetric', b * K, 1, form)
        for b, form in (
            (8, 'dense'),
            (8, 'auto'),
            (128, 'dense'),
            (128, 'auto'),
            (128, 'normalised'),
            (1024, 'auto'),
        )
    ),
    *(
        ('mil_nce', b * K, 1, form)
        for b, form in ((8, 'dense'), (8, 'auto'), (32, 'dense'), (32, 'auto'), (128, 'auto'))
    ),
    *((loss, 128 * K, 1, 'auto') for loss in ('siglip', 'nt_xent')),
    *(
        ('symmetric', b * K, 8, form)
        for b, form in (
            (32, 'dense'),
            (32, 'gather'),
            (32, 'ring'),
            (128, 'dense'),
            (128, 'gather'),
            (128, 'ring'),
            (256, 'ring'),
            (1024, 'gather'),
            (1024, 'ring'),
        )
    ),
    *(('symmetric', b * K, 32, 'ring') for b in (32, 128, 256, 1024)),
    *(
        ('symmetric', b * K, 64, form)
        for b, form in (
            (128, 'dense'),
            (128, 'gather'),
            (128, 'ring'),
            (1024, 'gather'),
            (1024, 'ring'),
        )
    ),
    *((loss, 1024 * K, 64, 'ring') for loss in ('asymmetric', 'siglip', 'nt_xent', 'mil_nce')),
]
TOPOLOGY = {1: 'v5p:2x2x1', 8: 'v5p:2x2x2', 32: 'v5p:2x4x4', 64: 'v5p:4x4x4'}


def tpu(former, losses, counts, about):
    """Yields all rows after each compilation: what is chosen in place of former ones of the same name; each says which commit it is of."""
    from jax.experimental import topologies

    out = {(r['loss'], r['B'], r['devices'], r['form']): r for r in former}
    print(
        f'{"loss":11} {"B":>8} {"devices":>7} {"form":11} {"temp MB/device":>15} {"kB/row":>9} {"compile CPU s":>14}'
    )
    for loss, b, devices, form in COMPILED:
        if loss not in losses or devices not in counts:
            continue
        k = CANDIDATES[loss]
        topology = topologies.get_topology_desc(platform='tpu', topology_name=TOPOLOGY[devices])
        mesh = jax.make_mesh(
            (devices,),
            ('replica',),
            devices=topology.devices[:devices],
            axis_types=(AxisType.Auto,),
        )
        rows = NamedSharding(mesh, P('replica'))
        x = jax.ShapeDtypeStruct((b, WIDTH), jnp.bfloat16, sharding=rows)
        y = jax.ShapeDtypeStruct((b, k, WIDTH), jnp.bfloat16, sharding=rows)
        how = How(form if form in ('gather', 'ring') else 'auto', dtype='bfloat16')
        f = (
            dense_automatic(loss, 0.07)
            if form == 'dense'
            else blockwise(loss, how, normalise=form == 'normalised')
        )
        began, row = (
            time.process_time(),
            {
                'loss': loss,
                'B': b,
                'K': k,
                'devices': devices,
                'topology': TOPOLOGY[devices],
                'form': form,
                **about,
            },
        )
        try:
            with jax.set_mesh(mesh):
                compiled = with_gradient(f).trace(x, y).lower(lowering_platforms=('tpu',)).compile()
            memory = compiled.memory_analysis()
            row |= {
                'temp_bytes': memory.temp_size_in_bytes,
                'argument_bytes': memory.argument_size_in_bytes,
                'bytes_per_row': memory.temp_size_in_bytes / (b / devices),
            }
            text = f'{row["temp_bytes"] / 1e6:15.1f} {row["bytes_per_row"] / 1e3:9.2f}'
        except jax.errors.JaxRuntimeError as error:
            row['error'] = str(error).splitlines()[0][:200]
            text = f'  does not compile: {row["error"][:90]}'
        out[loss, b, devices, form] = row
        print(
            f'{loss:11} {b:8} {devices:7} {form:11} {text} {time.process_time() - began:14.1f}',
            flush=True,
        )
        yield [out[name] for name in COMPILED if name in out]


def write(results):
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--parts', default='cpu,tpu')
    parser.add_argument('--sizes', default='1024,2048,4096,8192', help='rows of the CPU part')
    parser.add_argument('--losses', default='symmetric,asymmetric,mil_nce,siglip,nt_xent')
    parser.add_argument('--devices', default='1,8,32,64', help='of the TPU part')
    parser.add_argument('--repeats', type=int, default=3)
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    run = lambda *command: subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    cpus = (
        [
            line.split(':')[1].strip()
            for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines()
            if line.startswith('model name')
        ]
        if pathlib.Path('/proc/cpuinfo').exists()
        else [platform.processor()]
    )
    source = ('vatt_jax/losses', 'benchmarks/loss_memory.py')
    about = {
        'commit': run('git', 'rev-parse', '--short', 'HEAD')
        + ('+' if run('git', 'status', '--porcelain', *source) else ''),
        'date': datetime.date.today().isoformat(),
        'jax': jax.__version__,
        'width': WIDTH,
    }
    parts = args.parts.split(',')
    if 'cpu' in parts:
        sizes = [int(s) for s in args.sizes.split(',')]
        about_cpu = {
            **about,
            'hardware': f'{os.cpu_count()} × {cpus[0]}',
            'load_average': os.getloadavg(),
            'repeats': args.repeats,
        }
        results['cpu'] = {
            **about_cpu,
            'rows': cpu(
                sizes, args.repeats, [loss for loss in args.losses.split(',') if loss in TIMED]
            ),
        }
        write(results)
    if 'tpu' in parts:
        if importlib.util.find_spec('libtpu') is None:
            print(
                f'TPU part left out: libtpu is not installed. No TPU is needed, only its compiler: pip install "jax[tpu]=={jax.__version__}" '
                '(an environment of its own will do: this script needs nothing else), then --parts=tpu'
            )
        else:
            for rows in tpu(
                results.get('tpu', {}).get('rows', []),
                args.losses.split(','),
                [int(n) for n in args.devices.split(',')],
                {'commit': about['commit'], 'libtpu': importlib.metadata.version('libtpu')},
            ):
                results['tpu'] = {**about, 'hardware': 'none: compiled for TPU v5p', 'rows': rows}
                write(results)
    print(f'written: {RESULTS.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
