"""Memory and time of the contrast of maps and sounds, value and gradient: blockwise against dense.

    python benchmarks/positions_memory.py                       # some minutes of a CPU core
    python benchmarks/positions_memory.py --sizes=256 --repeats=1

Both are vatt_jax/losses/max_over_positions.py: `dense` holds batch x batch x positions products,
`blockwise` a block of them at a time. Temporary memory is what the compiler reserves; time is the
least CPU time of one call, steady on a shared machine. From --timed clips on, the dense form is
compiled only. Writes benchmarks/results/positions_memory.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import jax.numpy as jnp
from support import repository

from vatt_jax.losses import max_over_positions

RESULTS = repository.RESULTS / 'positions_memory.json'
FORMS = {
    'dense': max_over_positions.dense,
    'blockwise': max_over_positions.max_over_positions,
}


def measure(form: str, clips: int, args: argparse.Namespace) -> dict[str, Any]:
    """MiB of temporaries and, where it is run, CPU seconds of a call.

    Args:
        form: entry of FORMS.
        clips: of the batch.
        args: of the command line.
    """
    keys = jax.random.split(jax.random.key(0))
    pictures = jax.random.normal(keys[0], (clips, args.positions, args.width))
    sounds = jax.random.normal(keys[1], (clips, args.width))
    both = jax.value_and_grad(FORMS[form], argnums=(0, 1))
    compiled = jax.jit(both).lower(pictures, sounds).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    found: dict[str, Any] = {'form': form, 'clips': clips, 'MiB': round(memory / 2**20)}
    if form == 'dense' and clips >= args.timed:
        return found
    jax.block_until_ready(compiled(pictures, sounds))
    times = []
    for _ in range(args.repeats):
        before = time.process_time()
        value, _ = jax.block_until_ready(compiled(pictures, sounds))
        times.append(time.process_time() - before)
    found['value'] = round(float(jnp.asarray(value)), 5)
    found['cpu_seconds'] = round(min(times), 2)
    return found


def main() -> None:
    """Measures, writes and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sizes', default='256,512,1024', help='clips of a batch, with commas')
    parser.add_argument('--positions', default=196, type=int)
    parser.add_argument('--width', default=64, type=int)
    parser.add_argument('--repeats', default=2, type=int)
    parser.add_argument('--timed', default=1024, type=int, metavar='CLIPS')
    args = parser.parse_args()
    rows = []
    for clips in map(int, args.sizes.split(',')):
        for form in FORMS:
            rows.append(measure(form, clips, args))
            print(rows[-1], flush=True)
    results = {
        'positions': args.positions,
        'width': args.width,
        'processor': repository.processor(),
        'commit': repository.commit('vatt_jax'),
        'date': datetime.date.today().isoformat(),
        'rows': rows,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
