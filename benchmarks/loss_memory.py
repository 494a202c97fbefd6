"""Memory and time of contrastive losses, value and gradient: blockwise against the best dense form.

    python benchmarks/loss_memory.py                      # CPU: memory from the compiler, time side
                                                          # by side; TPU: memory, compiled only
    python benchmarks/loss_memory.py --parts=tpu          # needs libtpu, no TPU:
                                        # pip install "jax[tpu]==<your jax version>"
    python benchmarks/loss_memory.py --sizes=1024,2048 --repeats=5
    python benchmarks/loss_memory.py --parts=tpu --devices=8,32 --losses=symmetric

Blockwise is vatt_jax/losses/nce.py. Embeddings are already on the unit sphere (512 wide; float32 on
CPU, bfloat16 on TPU), so that only the loss is measured. Dense is the faster of two formulations:
automatic derivative of two log-sum-exps and a row-wise dot product, and a hand-written derivative
with one weight matrix. Runs are interleaved and the minimum over repeats is taken, in CPU seconds
(steady on a shared machine) and wall seconds. Writes benchmarks/results/loss_memory.json; a part
that does not run, and a compilation that is not chosen, keep their former results.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# libtpu compiles for a named topology without its hardware; these keep it from looking for any and
# from talking.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
os.environ.setdefault('TPU_WORKER_ID', '0')
os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '3')
os.environ.setdefault('TPU_MIN_LOG_LEVEL', '3')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import repository

from vatt_jax.losses import nce
from vatt_jax.losses.blockwise import MAX_STORED_SCORES
from vatt_jax.losses.similarity import How

RESULTS = repository.RESULTS / 'loss_memory.json'
WIDTH, TEMPERATURE = 512, 0.07
# Those of the CPU part.
TIMED = ('symmetric', 'asymmetric', 'mil_nce')
# Candidates of a clip.
CANDIDATES = {'symmetric': 1, 'asymmetric': 1, 'mil_nce': 5, 'siglip': 1, 'nt_xent': 1}
DENSE = ('dense, automatic', 'dense, by hand')

Loss = Callable[[jax.Array, jax.Array], jax.Array]


# ---- losses of x [B E] and its candidates y [B K E]


def combine(loss: str, rows, columns, own):
    """The loss from log-sum-exps: rows [B], columns [B K], own scores [B K]."""
    columns, positive = jax.nn.logsumexp(columns, 1), jax.nn.logsumexp(own, 1)
    if loss == 'symmetric':
        return jnp.mean(rows + columns - 2 * positive)
    return jnp.mean(jnp.logaddexp(rows, columns) - positive)


def product(a, b, contracted: tuple[int, int]):
    """A matrix product over an axis of each, summed in float32."""
    axes = ((contracted[0],), (contracted[1],))
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)


def own_scores(x, y):
    """Scores of each clip's own candidates: [B K].

    Row by row: taking a diagonal of the matrix does not even compile at size on TPU.
    """
    return jnp.sum(x[:, None].astype(jnp.float32) * y, -1) / TEMPERATURE


def dense_automatic(name: str) -> Loss:
    """All scores at once, and JAX's derivative."""

    def loss(x, y):
        scores = product(x, y.reshape(-1, WIDTH), (1, 1)) / TEMPERATURE
        own = own_scores(x, y)
        rows, columns = jax.nn.logsumexp(scores, 1), jax.nn.logsumexp(scores, 0)
        return combine(name, rows, columns.reshape(own.shape), own)

    return loss


@jax.custom_vjp
def log_sum_exps(x, y):
    """Of rows and of columns of the scores of x [B E] and y [B·K E]."""
    return _log_sum_exps_forward(x, y)[0]


def _log_sum_exps_forward(x, y):
    scores = product(x, y, (1, 1)) / TEMPERATURE
    rows, columns = jax.nn.logsumexp(scores, 1), jax.nn.logsumexp(scores, 0)
    return (rows, columns), (x, y, scores, rows, columns)


def _log_sum_exps_backward(residuals, cotangents):
    x, y, scores, rows, columns = residuals
    of_rows, of_columns = cotangents
    row_weights = jnp.exp(scores - rows[:, None]) * (of_rows / TEMPERATURE)[:, None]
    column_weights = jnp.exp(scores - columns) * (of_columns / TEMPERATURE)
    weights = (row_weights + column_weights).astype(x.dtype)
    x_gradient = product(weights, y, (1, 0)).astype(x.dtype)
    y_gradient = product(weights, x, (0, 0)).astype(y.dtype)
    return x_gradient, y_gradient


log_sum_exps.defvjp(_log_sum_exps_forward, _log_sum_exps_backward)


def dense_by_hand(name: str) -> Loss:
    """All scores at once, and a derivative with one matrix of weights."""

    def loss(x, y):
        rows, columns = log_sum_exps(x, y.reshape(-1, WIDTH))
        own = own_scores(x, y)
        return combine(name, rows, columns.reshape(own.shape), own)

    return loss


def blockwise(name: str, how: How, normalise: bool = False) -> Loss:
    """vatt_jax's loss."""
    function = getattr(nce, name)
    options = {'temperature': TEMPERATURE, 'how': how}
    if name != 'mil_nce':
        options['normalise'] = normalise

    def loss(x, y):
        return function(x, y, **options)

    return loss


def with_gradient(loss: Loss):
    """Value and gradient by both inputs, jitted."""
    return jax.jit(jax.value_and_grad(loss, (0, 1)))


# ---- CPU: memory and time


def make_embeddings(batch: int, candidates: int) -> tuple[jax.Array, jax.Array]:
    """Clips [B E] and candidates [B K E] near them, on the unit sphere."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, WIDTH))
    y = rng.normal(size=(batch, candidates, WIDTH)) + x[:, None]
    return to_unit_sphere(x), to_unit_sphere(y)


def to_unit_sphere(x: np.ndarray) -> jax.Array:
    """Float32, of norm 1 over the last axis."""
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


def forms_on_cpu(loss: str, batch: int) -> dict[str, Loss]:
    """What is compared of a loss."""
    forms = {
        'dense, automatic': dense_automatic(loss),
        'dense, by hand': dense_by_hand(loss),
        'blockwise': blockwise(loss, How()),
    }
    # Up to there `auto` keeps the scores.
    if batch * batch * CANDIDATES[loss] <= MAX_STORED_SCORES:
        forms['blockwise, 512'] = blockwise(loss, How(block=512))
    return forms


def time_all(compiled: dict[str, Callable], x: jax.Array, y: jax.Array, repeats: int):
    """(CPU seconds, wall seconds, results) by name: the least of the repeats, taken in turns."""
    cpu_seconds = dict.fromkeys(compiled, np.inf)
    wall_seconds = dict.fromkeys(compiled, np.inf)
    results = {}
    for _ in range(repeats):
        for name, function in compiled.items():
            cpu, wall = time.process_time(), time.perf_counter()
            results[name] = jax.block_until_ready(function(x, y))
            cpu_spent, wall_spent = time.process_time() - cpu, time.perf_counter() - wall
            cpu_seconds[name] = min(cpu_seconds[name], cpu_spent)
            wall_seconds[name] = min(wall_seconds[name], wall_spent)
    return cpu_seconds, wall_seconds, results


def largest_difference(result, expected) -> float:
    """Of the loss or a gradient, relative to what is expected."""
    loss, gradients = result
    expected_loss, expected_gradients = expected
    differences = [float(abs(loss - expected_loss) / abs(expected_loss))]
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        distance = jnp.linalg.norm(gradient - expected_gradient)
        differences.append(float(distance / jnp.linalg.norm(expected_gradient)))
    return max(differences)


def measure_on_cpu(loss: str, batch: int, repeats: int) -> list[dict]:
    """A row for each form of a loss."""
    candidates = CANDIDATES[loss]
    x, y = make_embeddings(batch, candidates)
    compiled, memory = {}, {}
    for name, function in forms_on_cpu(loss, batch).items():
        compiled[name] = with_gradient(function).lower(x, y).compile()
        memory[name] = compiled[name].memory_analysis().temp_size_in_bytes
    cpu_seconds, wall_seconds, results = time_all(compiled, x, y, repeats)

    least_memory = min(memory[name] for name in DENSE)
    best_cpu = min(cpu_seconds[name] for name in DENSE)
    best_wall = min(wall_seconds[name] for name in DENSE)
    rows = []
    for name in compiled:
        row = {
            'loss': loss,
            'B': batch,
            'K': candidates,
            'form': name,
            'temp_bytes': memory[name],
            'times_less_memory': least_memory / memory[name],
            'cpu_seconds': cpu_seconds[name],
            'cpu_ratio': cpu_seconds[name] / best_cpu,
            'wall_seconds': wall_seconds[name],
            'wall_ratio': wall_seconds[name] / best_wall,
            'relative_difference': largest_difference(results[name], results['dense, automatic']),
        }
        rows.append(row)
        print(
            f'{loss:11} {batch:6} {name:18} {memory[name] / 1e6:9.2f} '
            f'{row["times_less_memory"]:7.1f} {row["cpu_seconds"]:8.3f} {row["cpu_ratio"]:6.2f} '
            f'{row["wall_seconds"]:8.3f} {row["wall_ratio"]:6.2f}',
            flush=True,
        )
    return rows


def cpu_part(sizes: Sequence[int], repeats: int, losses: Sequence[str]) -> list[dict]:
    """All rows of the CPU; sizes with too many candidates are left out."""
    print(
        f'{"loss":11} {"B":>6} {"form":18} {"temp MB":>9} {"less":>7} {"CPU s":>8} {"ratio":>6} '
        f'{"wall s":>8} {"ratio":>6}'
    )
    rows = []
    for loss in losses:
        for batch in sizes:
            if batch * CANDIDATES[loss] <= max(sizes) * 2:
                rows += measure_on_cpu(loss, batch, repeats)
    return rows


# ---- TPU: memory by compiling

# (loss, devices, global batch in thousands of 1024, forms). Forms: dense | auto | gather | ring,
# and `normalised`: auto with normalisation from raw embeddings inside.
COMPILED = (
    ('symmetric', 1, 8, ('dense', 'auto')),
    ('symmetric', 1, 32, ('dense', 'auto')),
    ('symmetric', 1, 128, ('dense', 'auto', 'normalised')),
    ('symmetric', 1, 1024, ('auto',)),
    ('asymmetric', 1, 8, ('dense', 'auto')),
    ('asymmetric', 1, 128, ('dense', 'auto', 'normalised')),
    ('asymmetric', 1, 1024, ('auto',)),
    ('mil_nce', 1, 8, ('dense', 'auto')),
    ('mil_nce', 1, 32, ('dense', 'auto')),
    ('mil_nce', 1, 128, ('auto',)),
    ('siglip', 1, 128, ('auto',)),
    ('nt_xent', 1, 128, ('auto',)),
    ('symmetric', 8, 32, ('dense', 'gather', 'ring')),
    ('symmetric', 8, 128, ('dense', 'gather', 'ring')),
    ('symmetric', 8, 256, ('ring',)),
    ('symmetric', 8, 1024, ('gather', 'ring')),
    ('symmetric', 32, 32, ('ring',)),
    ('symmetric', 32, 128, ('ring',)),
    ('symmetric', 32, 256, ('ring',)),
    ('symmetric', 32, 1024, ('ring',)),
    ('symmetric', 64, 128, ('dense', 'gather', 'ring')),
    ('symmetric', 64, 1024, ('gather', 'ring')),
    ('asymmetric', 64, 1024, ('ring',)),
    ('siglip', 64, 1024, ('ring',)),
    ('nt_xent', 64, 1024, ('ring',)),
    ('mil_nce', 64, 1024, ('ring',)),
)
# Devices -> topology.
TOPOLOGY = {1: 'v5p:2x2x1', 8: 'v5p:2x2x2', 32: 'v5p:2x4x4', 64: 'v5p:4x4x4'}
# Fields of a row that name a compilation.
NAME = ('loss', 'B', 'devices', 'form')


def compilations() -> list[tuple[str, int, int, str]]:
    """(loss, global batch, devices, form) of each."""
    names = []
    for loss, devices, thousands, forms in COMPILED:
        for form in forms:
            names.append((loss, thousands * 1024, devices, form))
    return names


def tpu_part(
    former: Sequence[dict], losses: Sequence[str], device_counts: Sequence[int], about: dict
) -> Iterator[list[dict]]:
    """Compiles what is chosen.

    Args:
        former: rows of earlier runs.
        losses: the chosen ones.
        device_counts: the chosen ones.
        about: fields of every new row, as the commit that it is of.

    Yields:
        All rows after each compilation: new ones in place of former ones of the same name.
    """
    rows = {}
    for row in former:
        rows[tuple(row[field] for field in NAME)] = row
    print(
        f'{"loss":11} {"B":>8} {"devices":>7} {"form":11} {"temp MB/device":>15} {"kB/row":>9} '
        f'{"compile CPU s":>14}'
    )
    for name in compilations():
        loss, batch, devices, form = name
        if loss not in losses or devices not in device_counts:
            continue
        row = {
            'loss': loss,
            'B': batch,
            'K': CANDIDATES[loss],
            'devices': devices,
            'topology': TOPOLOGY[devices],
            'form': form,
            **about,
        }
        began = time.process_time()
        try:
            memory = compiled_memory(loss, batch, devices, form)
            row['temp_bytes'] = memory.temp_size_in_bytes
            row['argument_bytes'] = memory.argument_size_in_bytes
            row['bytes_per_row'] = memory.temp_size_in_bytes / (batch / devices)
            text = f'{row["temp_bytes"] / 1e6:15.1f} {row["bytes_per_row"] / 1e3:9.2f}'
        except jax.errors.JaxRuntimeError as error:
            row['error'] = str(error).splitlines()[0][:200]
            text = f'  does not compile: {row["error"][:90]}'
        rows[name] = row
        took = time.process_time() - began
        print(f'{loss:11} {batch:8} {devices:7} {form:11} {text} {took:14.1f}', flush=True)
        yield [rows[name] for name in compilations() if name in rows]


def compiled_memory(loss: str, batch: int, devices: int, form: str):
    """What the compiler says of a device's memory, value and gradient.

    Raises:
        JaxRuntimeError: it does not compile.
    """
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform='tpu', topology_name=TOPOLOGY[devices])
    mesh = jax.make_mesh(
        (devices,),
        ('replica',),
        devices=topology.devices[:devices],
        axis_types=(AxisType.Auto,),
    )
    by_row = NamedSharding(mesh, P('replica'))
    candidates = CANDIDATES[loss]
    x = jax.ShapeDtypeStruct((batch, WIDTH), jnp.bfloat16, sharding=by_row)
    y = jax.ShapeDtypeStruct((batch, candidates, WIDTH), jnp.bfloat16, sharding=by_row)
    if form == 'dense':
        function = dense_automatic(loss)
    else:
        exchange = form if form in ('gather', 'ring') else 'auto'
        how = How(exchange, dtype='bfloat16')
        function = blockwise(loss, how, normalise=form == 'normalised')
    with jax.set_mesh(mesh):
        lowered = with_gradient(function).trace(x, y).lower(lowering_platforms=('tpu',))
        return lowered.compile().memory_analysis()


# ---- both parts


def write(results: dict) -> None:
    """Writes the results of both parts."""
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--parts', default='cpu,tpu')
    parser.add_argument('--sizes', default='1024,2048,4096,8192', help='rows of the CPU part')
    parser.add_argument('--losses', default='symmetric,asymmetric,mil_nce,siglip,nt_xent')
    parser.add_argument('--devices', default='1,8,32,64', help='of the TPU part')
    parser.add_argument('--repeats', type=int, default=3)
    args = parser.parse_args()
    parts, losses = args.parts.split(','), args.losses.split(',')
    sizes = [int(size) for size in args.sizes.split(',')]
    device_counts = [int(count) for count in args.devices.split(',')]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    about = {
        'commit': repository.commit('vatt_jax/losses', 'benchmarks/loss_memory.py'),
        'date': datetime.date.today().isoformat(),
        'jax': jax.__version__,
        'width': WIDTH,
    }
    if 'cpu' in parts:
        timed_losses = [loss for loss in losses if loss in TIMED]
        results['cpu'] = {
            **about,
            'hardware': f'{os.cpu_count()} × {repository.processor()}',
            'load_average': os.getloadavg(),
            'repeats': args.repeats,
            'rows': cpu_part(sizes, args.repeats, timed_losses),
        }
        write(results)
    if 'tpu' in parts and importlib.util.find_spec('libtpu') is None:
        print(
            'TPU part left out: libtpu is not installed. No TPU is needed, only its compiler: '
            f'pip install "jax[tpu]=={jax.__version__}" (an environment of its own will do: this '
            'script needs nothing else), then --parts=tpu'
        )
    elif 'tpu' in parts:
        former = results.get('tpu', {}).get('rows', [])
        libtpu = importlib.metadata.version('libtpu')
        origin = {'commit': about['commit'], 'libtpu': libtpu}
        for rows in tpu_part(former, losses, device_counts, origin):
            results['tpu'] = {**about, 'hardware': 'none: compiled for TPU v5p', 'rows': rows}
            write(results)
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
