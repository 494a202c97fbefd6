"""What a refresh takes of a host's memory, over the number of hosts that share its records.

    python benchmarks/refresh_memory.py                  # some minutes on two CPU cores, 2 GB
    python benchmarks/refresh_memory.py --records=1000000

Processes of this machine stand in for hosts. Each has the features of its own records, two views of
WIDTH numbers that are made up, and labels them by self-labelling with all the others. The memory is
that which the refresh adds to what Python and the libraries take (the largest, sampled, without
pages of files), features included; devices are simulated, so that it holds their rows too. A small
refresh comes before, so that what is compiled is no part of it.

The labels have to be the same whatever the number of processes: `same_labels` is the share of
records that have the label which a single process gives them. Writes
benchmarks/results/refresh_memory.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import numpy as np
from flax.core import meta
from ml_collections import ConfigDict
from support import repository

from vatt_jax import objectives
from vatt_jax.objectives import TrainingRecords
from vatt_jax.parallel import distributed, hosts, sharding
from vatt_jax.training import columns

RESULTS = repository.RESULTS / 'refresh_memory.json'

VIEWS = ('video', 'audio')
WIDTH = 128
CLUSTERS = 32
NUM_DEVICES = 4  # of all processes together
BLOCK = 10_000  # records whose features are drawn together
SMALL = 4 * BLOCK  # records of the refresh that comes before


class MemoryWatch:
    """Samples the memory of this process in a thread, without pages of files.

    Attributes:
        largest_mb: the most since the watch began.
    """

    def __init__(self) -> None:
        self.largest_mb = memory_mb()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.largest_mb = max(self.largest_mb, memory_mb())
            time.sleep(0.02)


def memory_mb() -> float:
    """Resident memory of this process without pages of files."""
    for line in pathlib.Path('/proc/self/status').read_text().splitlines():
        if line.startswith('RssAnon'):
            return int(line.split()[1]) / 1024
    raise SystemExit('this benchmark reads /proc/self/status, which is only on Linux')


def features_of(part: slice) -> dict[str, np.ndarray]:
    """What a pass over these records, whole blocks of them, returns."""
    num_records = part.stop - part.start
    found: dict[str, np.ndarray] = {'index': np.arange(num_records)}
    for view in VIEWS:
        found[view] = np.empty((num_records, WIDTH), np.float32)
        found[f'{view}/valid'] = np.ones(num_records, bool)
    centres = np.random.default_rng(0).standard_normal((CLUSTERS, WIDTH), np.float32)
    for begin in range(0, num_records, BLOCK):
        draw = np.random.default_rng(part.start + begin)
        group = draw.integers(0, CLUSTERS, BLOCK)
        for view in VIEWS:
            noise = draw.standard_normal((BLOCK, WIDTH), np.float32)
            found[view][begin : begin + BLOCK] = centres[group] + noise
    return found


def relabel(num_records: int) -> np.ndarray:
    """A first refresh; returns the column of all records."""
    fields = {'name': 'self_labelling', 'views': VIEWS, 'clusters': CLUSTERS}
    objective = objectives.build(ConfigDict(fields))
    pooled = types.SimpleNamespace(pooled=jax.ShapeDtypeStruct((2, WIDTH), 'float32'))
    output = types.SimpleNamespace(encoded=dict.fromkeys(VIEWS, pooled))
    spec = objectives.Spec(None, output, None, num_records, {})
    params, state = objective.init(jax.random.key(0), spec)
    params, state = jax.tree.map(np.array, meta.unbox((params, state)))
    part = hosts.own_stretch(num_records)
    encoded = features_of(part)
    records = TrainingRecords(
        part.stop - part.start, {}, lambda function, augment=True, draw=0: encoded
    )
    with jax.set_mesh(sharding.make_mesh({'replica': -1})):
        found = objective.refresh(None, params, state, 0, records)
        return columns.join(found.columns)['label']


def run_process(num_records: int, folder: pathlib.Path) -> None:
    """One of several processes: prints its figures, and process 0 writes the labels."""
    distributed.initialize(timeout=120)
    relabel(SMALL)
    before = memory_mb()
    watch = MemoryWatch()
    began = time.perf_counter()
    labels = relabel(num_records)
    seconds = time.perf_counter() - began
    if distributed.is_main():
        np.save(folder / f'{jax.process_count()}.npy', labels)
    figures = {'memory_mb': round(watch.largest_mb - before, 1), 'seconds': round(seconds, 1)}
    print(json.dumps(figures), flush=True)
    distributed.leave()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def measure(num_records: int, processes: int, folder: str) -> dict[str, Any]:
    """The largest figures of so many processes."""
    coordinator = f'127.0.0.1:{free_port()}'
    started = []
    for process in range(processes):
        environment = {
            **os.environ,
            'JAX_NUM_CPU_DEVICES': str(NUM_DEVICES // processes),
            'VATT_COORDINATOR': coordinator,
            'VATT_PROCESSES': str(processes),
            'VATT_PROCESS': str(process),
        }
        command = [sys.executable, __file__, f'--records={num_records}', f'--process_of={folder}']
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    figures = []
    for process in started:
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f'a process ended with code {process.returncode}')
        figures.append(json.loads(output.splitlines()[-1]))
    labels = np.load(pathlib.Path(folder) / f'{processes}.npy')
    expected = np.load(pathlib.Path(folder) / '1.npy')
    return {
        'processes': processes,
        'memory_mb': max(figure['memory_mb'] for figure in figures),
        'seconds': max(figure['seconds'] for figure in figures),
        'same_labels': float(np.mean(labels == expected)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--records', type=int, default=400_000, help=f'a multiple of {NUM_DEVICES * BLOCK}'
    )
    parser.add_argument('--process_of', default='', help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.process_of:
        run_process(flags.records, pathlib.Path(flags.process_of))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2, 4):
            rows.append(measure(flags.records, processes, folder))
            print(rows[-1], flush=True)
    result = {
        'commit': repository.commit('vatt_jax', 'benchmarks/refresh_memory.py'),
        'date': datetime.date.today().isoformat(),
        'hardware': f'{os.cpu_count()} × {repository.processor()}',
        'load_average': os.getloadavg(),
        'config': {
            'records': flags.records,
            'views': len(VIEWS),
            'width': WIDTH,
            'clusters': CLUSTERS,
            'features_mb': round(flags.records * len(VIEWS) * WIDTH * 4 / 2**20, 1),
        },
        'rows': rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + '\n')
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
