"""Our reader over threads and over worker processes: clips a second, and CPU milliseconds a clip.

    python benchmarks/reader_scaling.py data/NAME/records       # any prepared dataset

The config is VATT's. Threads are those of one process (config.data.threads), workers processes of
one decoding thread each (config.data.workers), both from 1 up to the cores that this process may
use. Every variant is open all the time and takes turns with the others: its queues are emptied,
then some batches are timed, each of which must be made first. Between turns all wait until no
process works any more. CPU time is that of this process and of its workers; clips a second are of
the clock, and mean something on an idle machine only.

benchmarks/input_pipeline.py runs this on the clips that it makes, and stores the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')

import data_pipelines
from configs import vatt
from vatt_jax.planning.reading import usable_cores

BATCH = 4
PREFETCH = 1
# Batches that a process may hold: in its graph, its queues and on the way.
HELD_BY_PROCESS = 6


@dataclasses.dataclass
class Variant:
    """A way to read, open.

    Attributes:
        threads: of each process that decodes.
        workers: processes beside this one; 0: this one decodes.
        batches: the iterator.
        turns: (clips a second of the clock, CPU ms a clip) of each turn.
    """

    threads: int
    workers: int
    batches: Iterator
    turns: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def row(self) -> dict[str, float]:
        """Medians over the turns, and all of them."""
        rates = [rate for rate, _ in self.turns]
        cpu_ms = [ms for _, ms in self.turns]
        median_ms = statistics.median(cpu_ms)
        return {
            'threads': self.threads,
            'workers': self.workers,
            'clips_per_second': round(statistics.median(rates), 1),
            'cpu_ms': round(median_ms, 2),
            'clips_per_core_second': round(1e3 / median_ms, 1),
            'turns_clips_per_second': rates,
            'turns_cpu_ms': cpu_ms,
        }


def numbers_of_cores() -> list[int]:
    """1, 2, 4 and so on up to the cores that this process may use, and that number."""
    cores = usable_cores()
    numbers = []
    number = 1
    while number < cores:
        numbers.append(number)
        number *= 2
    return [*numbers, cores]


def open_variants(path: str) -> list[Variant]:
    """All ways to read a prepared dataset."""
    sizes = [(threads, 0) for threads in numbers_of_cores()]
    sizes += [(1, workers) for workers in numbers_of_cores()]
    variants = []
    for threads, workers in sizes:
        config = vatt.get_config('bbs')
        config.data.train = {'clips': {'path': path}}
        config.data.threads, config.data.workers = threads, workers
        config.data.prefetch = PREFETCH
        batches = data_pipelines.open(config).train(0, BATCH)
        variants.append(Variant(threads, workers, batches))
    return variants


def cpu_seconds() -> float:
    """User and system time of this process and of its workers, all threads."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        # The name, in brackets, may hold spaces; user and system ticks are fields 14 and 15.
        fields = pathlib.Path(f'/proc/{child.pid}/stat').read_text().rsplit(')')[-1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
    return total


def settle() -> None:
    """Waits until no process works any more."""
    last, quiet = cpu_seconds(), 0
    while quiet < 3:
        # Ticks of children are 10 ms: long enough that one who works is seen.
        time.sleep(0.1)
        now = cpu_seconds()
        # The threads of grain and TensorFlow look after their queues now and then.
        quiet = quiet + 1 if now - last < 0.025 else 0
        last = now


def take_turn(variant: Variant, batches: int) -> None:
    """Times some batches of one variant."""
    held = HELD_BY_PROCESS * max(1, variant.workers)
    for _ in range(held):
        next(variant.batches)
    cpu, clock = cpu_seconds(), time.monotonic()
    for _ in range(batches):
        next(variant.batches)
    clips = batches * BATCH
    rate = clips / (time.monotonic() - clock)
    cpu_ms = 1e3 * (cpu_seconds() - cpu) / clips
    variant.turns.append((round(rate, 1), round(cpu_ms, 2)))
    settle()


def measure(path: str, turns: int, batches: int) -> list[dict[str, float]]:
    """Measure all variants on a prepared dataset.

    Args:
        path: of the dataset.
        turns: of each variant.
        batches: timed in each turn.

    Returns:
        A row for each variant.
    """
    variants = open_variants(path)
    for variant in variants:  # traces, and starts the processes
        next(variant.batches)
    settle()
    for turn in range(turns):
        in_order = variants if turn % 2 == 0 else reversed(variants)
        for variant in in_order:
            take_turn(variant, batches)
    for variant in variants:
        variant.batches.close()
    return [variant.row() for variant in variants]


def show(name: str, rows: list[dict[str, float]]) -> None:
    """Prints the rows of one dataset."""
    print(f'{name:8s} {"threads":>8s} {"workers":>8s} {"clips/s":>8s} {"CPU ms":>8s} {"/core":>8s}')
    for row in rows:
        print(
            f'{"":8s} {row["threads"]:8d} {row["workers"]:8d} {row["clips_per_second"]:8.1f} '
            f'{row["cpu_ms"]:8.2f} {row["clips_per_core_second"]:8.1f}'
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('path', help='a folder made by data_pipelines.prepare')
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--batches', type=int, default=10, help='timed in one turn')
    flags = parser.parse_args()
    show('', measure(flags.path, flags.turns, flags.batches))
    print(f'{usable_cores()} cores, load {os.getloadavg()[0]:.1f}')


if __name__ == '__main__':
    main()
