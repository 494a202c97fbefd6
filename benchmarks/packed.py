"""One packed pass of a shared encoder for all modalities, against one pass for each.

    # CPU seconds forward and backward, interleaved; leave the machine alone meanwhile
    python benchmarks/packed.py
    # to see that it runs
    python benchmarks/packed.py --rounds=1 --block=1
    # nothing timed: what the compiled training step moves with fsdp=8
    python benchmarks/packed.py --collectives

Both ways have the same values and the same products of matrices. Tokens are those of the published
agnostic model with DropToken 0.5 for each clip (video 785, audio 601, five sentences of 17) and
those of configs/demo.py:agnostic, through 4 layers of width 256 with dropout 0.1, float32, with
gradients of parameters and tokens. A ratio is that of the minima of CPU seconds, and the median of
each turn's.

Collectives: a small agnostic model on eight simulated devices that share its parameters, layers
scanned and rematerialised as published. Writes benchmarks/results/packed.json.
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
from collections.abc import Callable, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta
from ml_collections import ConfigDict
from support import repository

import data_pipelines
from configs import default
from vatt_jax.models.transformer import Encoder, pack, unpack
from vatt_jax.modes import process
from vatt_jax.performance import hlo
from vatt_jax.rng import Packed, Rng
from vatt_jax.training import loop

process.keep_freed_memory()

RESULTS = repository.RESULTS / 'packed.json'

WIDTH = 256
# Clips, and rows and tokens of each clip's streams: video, audio, text.
SIZES = {
    'published tokens': (2, ((1, 785), (1, 601), (5, 17))),
    'demo': (32, ((1, 49), (1, 32), (3, 13))),
}


def compile_gradient(
    clips: int, layout: Sequence[tuple[int, int]], packed: bool
) -> tuple[Callable, tuple]:
    """The compiled value and gradient of a loss on the encoder's output, and its arguments.

    Args:
        clips: clips of the batch.
        layout: rows and tokens of a clip, for each modality.
        packed: one pass for all modalities, or one for each.

    Returns:
        The compiled function and the tuple of its arguments: parameters and the modalities' tokens.
    """
    encoder = Encoder(4, WIDTH, 4 * WIDTH, 4)
    *token_keys, params_key = jax.random.split(jax.random.key(0), len(layout) + 1)
    streams = [
        jax.random.normal(key, (clips * rows, length, WIDTH))
        for key, (rows, length) in zip(token_keys, layout)
    ]
    text_rows, text_length = layout[2]
    text_mask = jnp.ones((clips * text_rows, text_length), bool).at[:, 12:].set(False)
    masks = [None, None, text_mask]
    base = Rng.create(0, 0, jnp.arange(clips))
    rngs = []
    for i, (rows, _) in enumerate(layout):
        rng = base.at(str(i))
        rngs.append(rng.repeat(rows) if rows > 1 else rng)

    @jax.jit
    def init(key):
        return meta.unbox(encoder.init(key, streams[0], None, rngs[0], False))

    def packed_pass(params, streams):
        tokens = encoder.apply(
            params,
            pack(streams, clips),
            tuple(masks),
            Packed.pack(rngs, layout),
            True,
            False,
            layout,
        )
        return unpack(tokens, tuple((rows, 1) for rows, _ in layout))

    def separate_passes(params, streams):
        return [
            encoder.apply(params, tokens, mask, rng, True)
            for tokens, mask, rng in zip(streams, masks, rngs)
        ]

    def loss(params, streams):
        encoded = packed_pass(params, streams) if packed else separate_passes(params, streams)
        return sum(jnp.sin(tokens).sum() for tokens in encoded)

    arguments = (init(params_key), streams)
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return gradient.lower(*arguments).compile(), arguments


def compare_times(rounds: int, block: int) -> list[dict]:
    """Times both ways in turns.

    Args:
        rounds: turns of each way.
        block: calls in a turn.

    Returns:
        A row of the result file for each of SIZES.
    """
    rows = []
    for name, (clips, layout) in SIZES.items():
        variants = {
            'packed': compile_gradient(clips, layout, packed=True),
            'separate': compile_gradient(clips, layout, packed=False),
        }
        losses = {kind: gradient(*args)[0] for kind, (gradient, args) in variants.items()}
        np.testing.assert_allclose(losses['packed'], losses['separate'], rtol=1e-4)

        seconds: dict[str, list[float]] = {kind: [] for kind in variants}
        for _ in range(rounds):
            for kind, (gradient, args) in variants.items():
                began = time.process_time()
                for _ in range(block):
                    jax.block_until_ready(gradient(*args))
                seconds[kind].append((time.process_time() - began) / block)

        packed, separate = np.array(seconds['packed']), np.array(seconds['separate'])
        ratio = {
            'minima': float(packed.min() / separate.min()),
            'median': float(np.median(packed / separate)),
        }
        memory = {}
        for kind, (gradient, _) in variants.items():
            memory[kind] = gradient.memory_analysis().temp_size_in_bytes / 1e6
        rows.append(
            {
                'size': name,
                'cpu_seconds': {kind: min(values) for kind, values in seconds.items()},
                'packed_over_separate': ratio,
                'temporary_MB': memory,
            }
        )
        print(
            f'{name}: CPU s packed {packed.min():.3f} separate {separate.min():.3f}, '
            f'ratio {ratio["minima"]:.3f} (median {ratio["median"]:.3f}); '
            f'temporaries MB packed {memory["packed"]:.0f}  separate {memory["separate"]:.0f}',
            flush=True,
        )
    return rows


def sharded_config(packed: bool) -> ConfigDict:
    """A small agnostic model on eight devices that share its parameters."""
    config = default.get_config()
    config.batch_size = 16
    config.mesh.replica = 1
    config.mesh.fsdp = 8
    config.model.inputs.video.update({'frames': 4, 'size': 32})
    config.model.inputs.audio.samples = 2048
    config.model.towers = ConfigDict(
        {
            'video': {'name': 'vit'},
            'audio': {'name': 'wat'},
            'text': {'name': 't5', 'vocab': 100},
        }
    )
    config.model.encoder = {'layers': 4, 'width': 64, 'mlp': 256, 'heads': 4, 'head_width': 16}
    config.model.shared = True
    config.model.scan = True
    config.model.remat = 'full'
    config.model.packed = packed
    config.data.source = 'synthetic'
    config.data.synthetic_size = 16
    return config


def collectives() -> dict[str, list[dict]]:
    """{packed | separate: rows of hlo.summary} of a training step."""
    summaries = {}
    for kind in ('packed', 'separate'):
        config = sharded_config(kind == 'packed')
        built = loop.build(config, data_pipelines.open(config))
        with jax.set_mesh(built.mesh):
            compiled = built.step.lower(built.shape, built.batch).compile()
        rows = hlo.summary(hlo.read(compiled.as_text()).collectives)
        summaries[kind] = rows
        received = sum(row['received'] for row in rows)
        print(f'{kind} {received / 1e6:.2f} MB received by each device')
        for row in rows:
            print(
                f'  {row["kind"]} {row["group"]} devices, '
                f'{row["count"]:.0f} times, {row["bytes"] / 1e6:.2f} MB'
            )
    return summaries


def main() -> None:
    """Measures and writes; what the other of both measurements wrote stays."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--block', type=int, default=2)
    parser.add_argument('--collectives', action='store_true')
    flags = parser.parse_args()
    if flags.collectives:
        jax.config.update('jax_num_cpu_devices', 8)
        measured = {'collectives': collectives()}
    else:
        measured = {
            'rows': compare_times(flags.rounds, flags.block),
            'rounds': flags.rounds,
            'block': flags.block,
            'load_average': os.getloadavg(),
        }
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results.update(
        commit=repository.git('rev-parse', '--short', 'HEAD'),
        date=datetime.date.today().isoformat(),
        jax=jax.__version__,
        hardware=f'{os.cpu_count()} × {platform.processor() or platform.machine()}',
        **measured,
    )
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
