"""What a training set costs a host: bytes a record, and the start of a mixture of many sources.

    # two minutes on two CPU cores, 1.5 GB
    python benchmarks/record_memory.py
    python benchmarks/record_memory.py --records=1000000

Each part stands beside the plain way to do the same: a list of all texts, one cumulative table of
weights, batches joined at the end, every source opened at the start. Bytes are those that Python
and NumPy allocate (tracemalloc), kept and at the peak. Writes
benchmarks/results/record_memory.json and prints the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import sys
import tempfile
import time
import tracemalloc
import wave
from collections.abc import Callable
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
from support import repository

import data_pipelines
from configs.default import get_config
from data_pipelines.loading import records_source
from data_pipelines.loading.order import Order, Source
from data_pipelines.loading.texts import Texts
from data_pipelines.loading.weighted_records import WeightedRecords
from vatt_jax.training import columns
from vatt_jax.training.refresh import RecordRows

RESULTS = repository.RESULTS / 'record_memory.json'

BATCH = 512
WIDTH = 16  # of the features that a refresh collects
HEADS = 4  # labels of a record
SOURCES = 300
TEXTS_AT_MOST = 200_000  # a list of more takes gigabytes


def measured(make: Callable[[], Any], num_records: int) -> dict[str, float]:
    """Bytes a record that `make` keeps and needs at its peak, and its seconds."""
    tracemalloc.start()
    began = time.perf_counter()
    kept_object = make()
    seconds = time.perf_counter() - began
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept_object
    return {
        'kept': round(kept / num_records, 2),
        'peak': round(peak / num_records, 2),
        'seconds': round(seconds, 3),
    }


def texts(num_records: int) -> dict[str, Any]:
    """Entries of a pass: a list of all, and made when they are looked at."""
    num_records = min(num_records, TEXTS_AT_MOST)

    def entry(i: int) -> dict[str, Any]:
        sentences = [f'sentence {j} of {i}, of some length' for j in range(5)]
        return {'id': f'clip/{i}.mp4', 'start': 0.0, 'end': 9.0, 'sentences': sentences}

    def all_entries() -> list[dict[str, Any]]:
        return [entry(i) for i in range(num_records)]

    return {
        'plain': measured(all_entries, num_records),
        'ours': measured(lambda: Texts(range(num_records), entry), num_records),
    }


def sampling_weights(num_records: int) -> dict[str, Any]:
    """Drawing by float32 weights: one table of sums, and sums of blocks."""
    weights = np.random.default_rng(0).random(num_records, np.float32)

    def table() -> np.ndarray:
        sums = np.cumsum(np.ones(num_records) * weights.astype(np.float64))
        return sums / sums[-1]

    def blocks() -> WeightedRecords:
        return WeightedRecords((weights,), num_records, 'benchmark')

    u = np.random.default_rng(1).random(BATCH)
    cumulative, drawn = table(), blocks()
    expected = np.searchsorted(cumulative, u, side='right')
    assert (drawn.draw(u) == expected).all()
    began = time.perf_counter()
    drawn.draw(u)
    seconds = time.perf_counter() - began
    return {
        'plain': measured(table, num_records),
        'ours': {**measured(blocks, num_records), 'ms_a_batch': round(1e3 * seconds, 2)},
    }


def features(num_records: int) -> dict[str, Any]:
    """Features of all records: batches joined at the end, and one array; float32 [M WIDTH]."""
    batch = np.ones((BATCH, WIDTH), np.float32)
    firsts = range(0, num_records - BATCH + 1, BATCH)

    def joined() -> np.ndarray:
        parts = [(np.arange(first, first + BATCH), batch.copy()) for first in firsts]
        by_place = np.argsort(np.concatenate([places for places, _ in parts]), kind='stable')
        return np.concatenate([rows for _, rows in parts])[by_place]

    def one_array() -> dict[str, np.ndarray]:
        found = RecordRows(num_records)
        for first in firsts:
            found.add(np.arange(first, first + BATCH), {'x': batch})
        return found.joined()

    return {'plain': measured(joined, num_records), 'ours': measured(one_array, num_records)}


def labels(num_records: int) -> dict[str, Any]:
    """Labels of HEADS heads: int32 in memory, and int16 in a mapped file."""

    def in_memory() -> np.ndarray:
        return np.zeros((num_records, HEADS), np.int32)

    given = np.random.default_rng(0).integers(0, 3000, (num_records, HEADS), np.int16)
    kept = columns.keep({'label': given})
    records = np.random.default_rng(1).integers(0, num_records, BATCH)
    began = time.perf_counter()
    columns.lookup(kept, records)
    seconds = time.perf_counter() - began
    ours = measured(lambda: columns.keep({'label': given}), num_records)
    return {
        'plain': measured(in_memory, num_records),
        'ours': {
            **ours,
            'in_file': float(given.nbytes / num_records),
            'is_mapped': isinstance(kept['label'], np.memmap),
            'ms_a_batch': round(1e3 * seconds, 3),
        },
    }


def order_of_sources() -> dict[str, float]:
    """Milliseconds to order a batch of 8 and of BATCH rows of a mixture of SOURCES."""
    sources = [Source(1000 + i, 1.0 + i % 3) for i in range(SOURCES)]
    order = Order(sources, 0, BATCH)
    result = {}
    for rows in (8, BATCH):
        began = time.perf_counter()
        for number in range(10):
            order.rows(np.arange(number * BATCH, number * BATCH + rows))
        result[f'ms_{rows}_rows'] = round(100 * (time.perf_counter() - began), 2)
    return result


def write_sounds(folder: pathlib.Path) -> None:
    """Three short wav files, the smallest dataset that can be prepared."""
    folder.mkdir(parents=True)
    samples = np.random.default_rng(0).integers(-9999, 9999, 8000, np.int16)
    for i in range(3):
        with wave.open(str(folder / f'{i}.wav'), 'wb') as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(samples.tobytes())


def start_of_mixture() -> dict[str, float]:
    """Seconds until a mixture of SOURCES prepared folders is open, lazily and all at once."""
    from data_pipelines.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        write_sounds(root / 'media')
        prepare(str(root / 'media'), '', str(root / 'set'), rate=8000, processes=1, quiet=True)
        config = get_config()
        config.model.inputs.audio.update(samples=800, rate=8000)
        del config.model.inputs['video']
        config.data.train = {}
        for i in range(SOURCES):
            (root / f'{i}').symlink_to(root / 'set')
            config.data.train[f's{i}'] = {'path': str(root / f'{i}')}
        seconds = {}
        for name, at_once in (('lazily', records_source.OPENED_AT_ONCE), ('at_once', SOURCES)):
            records_source.OPENED_AT_ONCE = at_once
            began = time.perf_counter()
            data_pipelines.open(config).close()
            seconds[name] = round(time.perf_counter() - began, 3)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--records', default='1000000,10000000', help='sizes, with commas')
    args = parser.parse_args()
    parts = {
        'texts': texts,
        'sampling weights': sampling_weights,
        'features': features,
        'labels': labels,
    }
    result: dict[str, Any] = {
        'commit': repository.commit('data_pipelines', 'vatt_jax'),
        'date': datetime.date.today().isoformat(),
        'processor': repository.processor(),
    }
    for size in args.records.split(','):
        for name, part in parts.items():
            found = part(int(size))
            result[f'{name}, {size}'] = found
            print(f'{size} records, {name}: plain {found["plain"]}, ours {found["ours"]}')
    result['order'] = order_of_sources()
    result['start'] = start_of_mixture()
    print(f'{SOURCES} sources: order {result["order"]}, start {result["start"]}')
    RESULTS.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
