"""What objectives with memories, queues and several views cost beside a plain one, on a CPU.

    # CPU seconds, interleaved; half an hour of two busy cores
    python benchmarks/memory_bank.py
    # to see that it runs
    python benchmarks/memory_bank.py --rounds=1 --rows=5000 --only=mmv,avid
    # one of both parts; the other keeps its former results
    python benchmarks/memory_bank.py --parts=objective

Three comparisons. `objective`: embeddings [B 128] of both modalities in, gradients and new memories
out, for 1024 negatives and tables of several sizes, beside NCE within the batch. `host`: the same
with tables on the host, drawing, reading and storing included, beside those on the device; and the
bytes that either takes on the device. `step`: whole training steps of rows of
configs/comparison.py, which has the same towers for all, on synthetic clips; AVID with the least
and the greatest number of records. Times are the least of all rounds, in CPU seconds. Bytes of
`step` are those of the compiled step: what it takes beside its arguments, and what the objective
keeps as state. Writes benchmarks/results/memory_bank.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ['JAX_PLATFORMS'] = 'cpu'

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from support import repository

import data_pipelines
from configs import comparison
from vatt_jax import phases
from vatt_jax.inference import feature_extractor
from vatt_jax.losses import nce
from vatt_jax.losses.noise_contrastive import noise_contrastive
from vatt_jax.objectives.base import Objective, select_streams
from vatt_jax.objectives.memory import negatives, table
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng
from vatt_jax.training import columns, loop
from vatt_jax.training.host_tables import HostTables
from vatt_jax.training.metrics import Meter

RESULTS = repository.RESULTS / 'memory_bank.json'
WIDTH, NEGATIVES, TEMPERATURE = 128, 1024, 0.07


def memory_objective(clips: int, rows: int) -> tuple[Callable[[], None], int]:
    """(one turn of AVID's loss, its gradient and both writes, compiled; bytes on the device)."""
    records = jax.random.randint(jax.random.key(0), (clips,), 0, rows)
    rng = Rng.create(0, 0, jnp.arange(clips))
    valid = jnp.ones(clips, bool)

    def loss(embeddings, memories):
        own = records[:, None]
        drawn = negatives.draw(rng, rows, NEGATIVES, own)
        picked = jnp.concatenate([own, drawn], -1)
        total = 0.0
        for query, memory in zip(embeddings, reversed(memories), strict=True):
            scores = table.scores(memory, query, picked) / TEMPERATURE
            total += noise_contrastive(scores[:, :1], scores[:, 1:], log_z=1.0) / 2
        return total

    def turn(memories, embeddings):
        value, gradients = jax.value_and_grad(loss)(embeddings, memories)
        # As in training: written last, when it is known that the gradients are finite. Else the
        # tables would be copied for the backward pass, which reads them too.
        norm = sum(jnp.sum(gradient**2) for gradient in gradients)
        is_written = valid & jnp.isfinite(value + norm)
        written = [
            table.write(memory, records, embedding, is_written, 0.5)
            for memory, embedding in zip(memories, embeddings, strict=True)
        ]
        return written, gradients

    # The memory of the tables passed in becomes that of the new ones, as in training.
    embeddings = unit_embeddings(clips)
    memories = [nn.unbox(table.init(jax.random.key(i), rows, WIDTH)) for i in range(2)]
    compiled = jax.jit(turn, donate_argnums=0).lower(memories, embeddings).compile()

    def run() -> None:
        nonlocal memories
        memories, gradients = compiled(memories, embeddings)
        jax.block_until_ready((memories, gradients))

    return run, device_bytes(compiled)


def device_bytes(compiled: Any) -> int:
    """What a program takes: its arguments and temporaries."""
    analysis = compiled.memory_analysis()
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


class Drawn(Objective):
    """What tables of the host are told by: each clip's own record and random others."""

    def lookups(self, batch, rng, num_records):
        own = batch['record'][:, None]
        drawn = negatives.draw(rng, num_records, NEGATIVES, own)
        return jnp.concatenate([own, drawn], -1)


def host_objective(clips: int, rows: int) -> tuple[Callable[[], None], int]:
    """(one turn of the same with both tables on the host, bytes on the device)."""
    mesh = sharding.make_mesh({'replica': 1})
    random = np.random.default_rng(0)
    arrays = {}
    for name in ('video', 'audio'):
        arrays[name] = columns.room_for((rows, WIDTH), np.dtype(np.float32))
        arrays[name][:] = random.random(WIDTH, np.float32)
    tables = HostTables(arrays, Drawn(ConfigDict()), mesh, 0, Meter())
    valid = jnp.ones(clips, bool)

    def loss(embeddings, batch):
        total = 0.0
        memories = (batch['tables']['audio'], batch['tables']['video'])
        for query, memory in zip(embeddings, memories, strict=True):
            scores = table.joined_scores(memory, query, range(1 + NEGATIVES)) / TEMPERATURE
            total += noise_contrastive(scores[:, :1], scores[:, 1:], log_z=1.0) / 2
        return total

    @jax.jit
    def turn(embeddings, batch):
        value, gradients = jax.value_and_grad(loss)(embeddings, batch)
        norm = sum(jnp.sum(gradient**2) for gradient in gradients)
        is_written = valid & jnp.isfinite(value + norm)
        written = {}
        for name, embedding in zip(('video', 'audio'), embeddings, strict=True):
            old = batch['tables'][name][:, 0]
            written[name] = table.new_rows(old, batch['record'], embedding, is_written, 0.5)
        return gradients, {'records': batch['record'], 'rows': written}

    embeddings = unit_embeddings(clips)
    number = 0

    def next_batch() -> dict[str, Any]:
        records = random.integers(0, rows, clips).astype(np.int32)
        batch = {'record': records, 'position': number * clips + np.arange(clips)}
        return tables.place(batch, number)

    def run() -> None:
        nonlocal number
        with jax.set_mesh(mesh):
            gradients, written = turn(embeddings, next_batch())
            tables.hold(written)
            jax.block_until_ready(gradients)
        number += 1

    with jax.set_mesh(mesh):
        compiled = turn.lower(embeddings, next_batch()).compile()
    return run, device_bytes(compiled)


def batch_objective(clips: int) -> Callable[[], None]:
    """One turn of NCE within the batch and its gradient; compiled."""
    compiled = jax.jit(jax.value_and_grad(lambda pair: nce.symmetric(*pair)))
    embeddings = unit_embeddings(clips)
    return lambda: jax.block_until_ready(compiled(embeddings))


def unit_embeddings(clips: int) -> list[jax.Array]:
    """[B E] of two modalities."""
    keys = (jax.random.key(2), jax.random.key(3))
    raw = [jax.random.normal(key, (clips, WIDTH)) for key in keys]
    return [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in raw]


# Rows of configs/comparison.py; mmv is NCE within the batch, the plain one.
ROWS = ('mmv', 'avid', 'cma', 'infonce', 'coclr', 'gdt_h1', 'gdt_h6', 'avts')


@dataclasses.dataclass
class Step:
    """A compiled training step.

    Attributes:
      turn: takes one step.
      streams: of each clip that are encoded, mirrored ones included.
      temporary_bytes: taken beside arguments and results.
      state_bytes: of the objective: tables, queues, teachers, models of other runs.
    """

    turn: Callable[[], None]
    streams: int
    temporary_bytes: int
    state_bytes: int


def step_config(row: str, records: int) -> ConfigDict:
    """The config of a row on synthetic clips; of its last network, where it trains several."""
    config = comparison.get_config(row)
    config.evals = ConfigDict()
    config.data.source, config.data.synthetic_size = 'synthetic', records
    config.mesh.replica = 1
    if not config.phases:
        return config
    networks = [phase.config for phase in phases.resolve(config, pathlib.Path('.'))]
    if row == 'coclr':
        # CoCLR on video: its model in the sampler's place need not have been trained.
        config, sampler = networks[2], networks[1]
        config.objective.sampler_model = sampler.model
    else:
        config = networks[-1]
    config.evals = ConfigDict()
    return config


def training_step(row: str, records: int) -> Step:
    """The training step of a row."""
    config = step_config(row, records)
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    batch = select_streams(next(data.train(0, config.batch_size)), built.objective.streams())
    batch['record'] = batch['index']
    for name, column in built.batch.get('columns', {}).items():
        # Any records will do, here the next ones.
        others = batch['index'][:, None] + 1 + np.arange(column.shape[-1])
        batch.setdefault('columns', {})[name] = (others % records).astype(column.dtype)
    with jax.set_mesh(built.mesh):
        state = built.init()
        batch = feature_extractor.place_on_mesh(batch, built.mesh)
        compiled = built.step.lower(state, batch).compile()
    streams = built.objective.streams() or tuple(config.model.towers)
    kept = jax.tree.leaves(state.objective)

    def turn() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    return Step(
        turn,
        len(streams),
        compiled.memory_analysis().temp_size_in_bytes,
        sum(x.nbytes for x in kept),
    )


def measure_steps(rows: list[str], records: list[int], rounds: int) -> dict[str, dict[str, Any]]:
    """Row -> what its step costs."""
    cases = {row: (row, records[0]) for row in rows}
    if 'avid' in rows and len(records) > 1:
        cases[f'avid of {records[-1]} records'] = ('avid', records[-1])
    steps = {}
    for name, case in cases.items():
        print(f'compiling {name}', flush=True)
        steps[name] = training_step(*case)
    seconds = least_seconds({name: step.turn for name, step in steps.items()}, rounds)
    found = {}
    for name, step in steps.items():
        found[name] = {
            'seconds': seconds[name],
            'streams': step.streams,
            'temporary_mb': round(step.temporary_bytes / 2**20, 1),
            'state_mb': round(step.state_bytes / 2**20, 1),
        }
    return found


def least_seconds(turns: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Name -> least CPU seconds of a turn; the turns take turns."""
    least = {}
    for turn in turns.values():
        turn()  # compiles
    for _ in range(rounds):
        for name, turn in turns.items():
            began = time.process_time()
            turn()
            seconds = time.process_time() - began
            least[name] = min(seconds, least.get(name, seconds))
    return {name: round(seconds, 5) for name, seconds in least.items()}


def conditions(rounds: int) -> dict[str, Any]:
    """What the times of a part were measured with."""
    return {
        'date': datetime.date.today().isoformat(),
        'commit': repository.commit('vatt_jax', 'configs', 'benchmarks/memory_bank.py'),
        'processor': repository.processor(),
        'cores': os.cpu_count(),
        'load_average': [round(load, 1) for load in os.getloadavg()],
        'jax': jax.__version__,
        'rounds': rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--rows', default='10000,100000,1000000')
    parser.add_argument('--clips', type=int, default=64)
    parser.add_argument('--parts', default='objective,host,step')
    parser.add_argument('--only', default=','.join(ROWS), help='rows of the part `step`')
    arguments = parser.parse_args()
    sizes = [int(rows) for rows in arguments.rows.split(',')]

    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if 'objective' in arguments.parts.split(','):
        turns = {'NCE within the batch': batch_objective(arguments.clips)}
        for rows in sizes:
            turns[f'memory of {rows} records'], _ = memory_objective(arguments.clips, rows)
        result |= conditions(arguments.rounds)
        result |= {'clips': arguments.clips, 'negatives': NEGATIVES, 'width': WIDTH}
        result['objective'] = least_seconds(turns, arguments.rounds)
        # Steps take minutes to compile; what is known by now is kept.
        RESULTS.write_text(json.dumps(result, indent=1) + '\n')
    if 'host' in arguments.parts.split(','):
        turns, sizes_on_device = {}, {}
        for rows in sizes:
            for place, make in (('device', memory_objective), ('host', host_objective)):
                name = f'{rows} records on the {place}'
                turns[name], sizes_on_device[name] = make(arguments.clips, rows)
        result['host'] = least_seconds(turns, arguments.rounds)
        result['bytes on the device'] = sizes_on_device
        RESULTS.write_text(json.dumps(result, indent=1) + '\n')
    if 'step' in arguments.parts.split(','):
        # Taken now: the sources may change while this runs.
        result['step_conditions'] = conditions(arguments.rounds)
        result['step'] = measure_steps(arguments.only.split(','), sizes, arguments.rounds)
        RESULTS.write_text(json.dumps(result, indent=1) + '\n')
    print(json.dumps(result, indent=1))


if __name__ == '__main__':
    main()
