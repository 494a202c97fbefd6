"""Batches from an index that is not in the page cache, with and without advice to the system.

    python benchmarks/cold_index.py --videos=100000      # writes 1 GB for it first: minutes
    python benchmarks/cold_index.py --folder=FOLDER      # of benchmarks/data_scale.write_dataset

The pages of the index are given up before every measurement (posix_fadvise). `usual` maps columns
as the pipeline does; `random` tells the system, too, that their pages are read at random places
(madvise), so that it reads no others around them. Read are BATCHES batches of 512 training rows at
random places, or a pass of 20,480 rows, text alone. Written are seconds, the MB that came from the
disk and how often the process waited for it (major page faults), which other work on the machine
does not change. Writes benchmarks/results/cold_index.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import mmap
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import data_scale
import numpy as np
from support import repository

import data_pipelines
from data_pipelines.storage import columns

RESULTS = repository.RESULTS / 'cold_index.json'
BATCHES = 11
READ_AHEAD = pathlib.Path('/sys/block')


def advise_random() -> None:
    """Have columns mapped with the advice."""
    load = columns._load_column

    def load_with_advice(path: pathlib.Path) -> tuple[np.ndarray, bool]:
        values, is_mapped = load(path)
        if is_mapped:
            # `values` is a view of NumPy's memmap, which is one of the mapping.
            values.base.base.madvise(mmap.MADV_RANDOM)
        return values, is_mapped

    columns._load_column = load_with_advice


def forget_pages(folder: pathlib.Path) -> None:
    """Give up the cached pages of all files."""
    for path in folder.rglob('*'):
        if path.is_file():
            with path.open('rb') as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_mb() -> float:
    """What this process has read from disks."""
    for line in pathlib.Path('/proc/self/io').read_text().splitlines():
        if line.startswith('read_bytes'):
            return int(line.split()[1]) / 1e6
    raise SystemExit('this benchmark reads /proc/self/io, which is only on Linux')


def read(what: str, folder: pathlib.Path) -> None:
    """Read batches or a pass."""
    data = data_pipelines.open(data_scale.text_config(folder))
    if what == 'pass':
        data_scale.read_pass(folder, data.size('train'))
        return
    batches = data.train(0, data_scale.BATCH)
    for _ in range(BATCHES):
        next(batches)


def run_process(what: str, advice: str, folder: pathlib.Path) -> None:
    """Body of a process: prints the figures of one measurement."""
    if advice == 'random':
        advise_random()
    data_scale.warm_up()
    forget_pages(folder)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    began, mb = time.perf_counter(), read_mb()
    read(what, folder)
    seconds = time.perf_counter() - began
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - usage.ru_majflt
    figures = {'seconds': seconds, 'read_mb': read_mb() - mb, 'major_faults': faults}
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


def measure(folder: pathlib.Path) -> list[dict[str, Any]]:
    """All measurements, each in a process of its own, whose libraries are warm."""
    rows = []
    for what in ('batches', 'pass'):
        for advice in ('usual', 'random'):
            command = [sys.executable, __file__, f'--folder={folder}', '--one', what, advice]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            rows.append({'read': what, 'advice': advice, **figures})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--videos', type=int, default=100_000)
    parser.add_argument('--folder', type=pathlib.Path, help='of a dataset that is there')
    parser.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        run_process(*flags.one, flags.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.folder or pathlib.Path(temporary)
        if not flags.folder:
            data_scale.write_dataset(folder, flags.videos)
            os.sync()
        index_mb = data_scale.size_mb(folder / 'index-train')
        rows = measure(folder)
    read_ahead = {}
    for path in sorted(READ_AHEAD.glob('[!l]*/queue/read_ahead_kb')):
        read_ahead[path.parts[3]] = int(path.read_text())
    results = {
        'commit': repository.commit('data_pipelines', 'benchmarks/cold_index.py'),
        'date': datetime.date.today().isoformat(),
        'hardware': f'{os.cpu_count()} × {repository.processor()}',
        'load_average': os.getloadavg(),
        'config': {'index_mb': round(index_mb, 1), 'read_ahead_kb': read_ahead},
        'rows': rows,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
