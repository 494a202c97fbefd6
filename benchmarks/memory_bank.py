"""What memory banks cost: steps of AVID beside those of a plain contrastive objective, on a CPU.

    # CPU seconds, interleaved
    python benchmarks/memory_bank.py
    # to see that it runs
    python benchmarks/memory_bank.py --rounds=1 --rows=5000
    # one of both parts; the other keeps its former results
    python benchmarks/memory_bank.py --parts=objective

Three comparisons. `objective`: embeddings [B 128] of both modalities in, gradients and new memories
out, for 1024 negatives and tables of several sizes, beside NCE within the batch. `host`: the same
with tables on the host, drawing, reading and storing included, beside those on the device; and the
bytes that either takes on the device. `step`: whole training steps of
configs/avid.py:demo,synthetic with either objective on the same towers. Each is the least of all
rounds, in CPU seconds. Writes benchmarks/results/memory_bank.json.
"""

from __future__ import annotations

import argparse
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
from configs import avid
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


def training_step(objective: ConfigDict | None, records: int) -> Callable[[], None]:
    """One turn of the demo's training step; None: AVID's own objective."""
    config = avid.get_config('demo,synthetic')
    config.data.synthetic_size = records
    config.mesh.replica = 1
    if objective is not None:
        config.objective = objective
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    with jax.set_mesh(built.mesh):
        state = built.init()
        batch = select_streams(next(data.train(0, config.batch_size)), built.objective.streams())
        batch['record'] = batch['index']
        batch = feature_extractor.place_on_mesh(batch, built.mesh)

    def run() -> None:
        nonlocal state
        with jax.set_mesh(built.mesh):
            state, metrics = built.step(state, batch)
            jax.block_until_ready((state, metrics))

    return run


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--rows', default='10000,100000,1000000')
    parser.add_argument('--clips', type=int, default=64)
    parser.add_argument('--parts', default='objective,host,step')
    arguments = parser.parse_args()
    sizes = [int(rows) for rows in arguments.rows.split(',')]

    former = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    result = {
        **former,
        'date': datetime.date.today().isoformat(),
        'commit': repository.commit('vatt_jax', 'configs', 'benchmarks/memory_bank.py'),
        'processor': repository.processor(),
        'jax': jax.__version__,
        'clips': arguments.clips,
        'negatives': NEGATIVES,
        'width': WIDTH,
        'rounds': arguments.rounds,
    }
    if 'objective' in arguments.parts.split(','):
        turns = {'NCE within the batch': batch_objective(arguments.clips)}
        for rows in sizes:
            turns[f'memory of {rows} records'], _ = memory_objective(arguments.clips, rows)
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
        pairs = (('video', 'audio', 'va', 1.0),)
        contrastive = ConfigDict({'name': 'contrastive', 'pairs': pairs, 'form': 'symmetric'})
        turns = {'NCE within the batch': training_step(contrastive, sizes[0])}
        for rows in (sizes[0], sizes[-1]):
            turns[f'memory of {rows} records'] = training_step(None, rows)
        result['step'] = least_seconds(turns, arguments.rounds)
        RESULTS.write_text(json.dumps(result, indent=1) + '\n')
    print(json.dumps(result, indent=1))


if __name__ == '__main__':
    main()
